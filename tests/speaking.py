"""A network that knows three words, so that what a task makes of words can be told exactly: colours and their names."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from model import Features

WORDS = dict(red=(1.0, -1.0, -1.0), green=(-1.0, 1.0, -1.0), blue=(-1.0, -1.0, 1.0))
RGB = dict(red=(230, 20, 20), green=(20, 230, 20), blue=(20, 20, 230))


class Colours(nn.Module):
    """In the place of DinoTxt: a patch is its mean colour, a text the sum of the colours that it names"""
    config = SimpleNamespace(patch_size=8, width=3, depth=1, mean=(0.5,) * 3, std=(0.5,) * 3, n_registers=0)

    def __init__(self, *words):
        super().__init__()
        self.still = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        x = F.avg_pool2d(images, 8)                                                            # B 3 h w
        patches = x.flatten(2).transpose(1, 2)
        return Features(patches.mean(1), patches[:, :0], patches, tuple(x.shape[2:]))

    def encode_words(self, texts):
        return torch.stack([torch.tensor(sum((np.array(WORDS[word]) for word in WORDS if word in text), np.zeros(3))
                                         .tolist() * 2) for text in texts])

    def encode_patches(self, images):
        return self(images).patches


class Twice(Colours):
    """In the place of openvocab's network: behind the head as Colours, before it what is wrong, the channels turned"""
    @property
    def words(self):
        return self

    def forward(self, images):
        f = super().forward(images)
        return Features(f.cls, f.registers, torch.cat([f.patches, f.patches.roll(1, 2)], 2), f.grid)


def photo(path, *colours, size=(32, 48)):
    """Stripes of colours from left to right"""
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes = [np.full((size[0], size[1] // len(colours), 3), RGB[colour], np.uint8) for colour in colours]
    Image.fromarray(np.concatenate(stripes, 1)).save(path)
