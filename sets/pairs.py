"""
Images with their truth, the form that all sets of dense tasks take: len, image(i) -> C H W uint8, truth(i) -> array.

    Pairs     files: lists and folders of images and truths
    Scenes    the generated `shapes`

and what finds files: evenly, folders, paired, images_below.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import shapes
from data import EXTENSIONS, read_image

GENERATED = 400, 100    # shapes: scenes to train on, scenes to measure on


class Pairs:
    """Files: (image, truth) paths, and what reads a truth."""

    def __init__(self, paths, read, crop=None):
        self.paths, self.read, self.crop = paths, read, crop

    def __len__(self):
        return len(self.paths)

    def image(self, i):
        return self.cut(read_image(self.paths[i][0]))

    def truth(self, i):
        return self.cut(self.read(self.paths[i][1]))

    def cut(self, array):
        return self.crop(array) if self.crop else array


class Scenes:
    """Generated scenes of one seed, by their numbers, and which part of each is the truth."""

    def __init__(self, numbers, seed, side, read):
        self.numbers, self.seed, self.side, self.read = numbers, seed, side, read

    def __len__(self):
        return len(self.numbers)

    def image(self, i):
        return torch.from_numpy(scene(self.numbers[i], self.side, self.seed).image).permute(2, 0, 1)

    def truth(self, i):
        return self.read(scene(self.numbers[i], self.side, self.seed))


@lru_cache(maxsize=64)
def scene(i, side, seed):
    return shapes.scene(i, side, seed)


def generated(c, read):
    """Scenes to train on and scenes to measure on, as large as the network sees them."""
    counts = (c.limit, c.limit) if c.limit else GENERATED
    return [Scenes(range(n), seed, c.resolution, read) for n, seed in zip(counts, (1000, 1001), strict=True)]


def evenly(items, limit):
    """All of a list, or `limit` of them, evenly spaced, so that what is sorted by class stays balanced."""
    n = len(items)
    return list(items) if not limit or limit >= n else [items[i * n // limit] for i in range(limit)]


def folders(c, *names):
    """The first of the sub-folders that is there; otherwise says which were looked for."""
    found = [Path(c.data, name) for name in names if Path(c.data, name).is_dir()]
    if not found:
        raise ValueError(f"--data: {c.data} has no folder {' or '.join(names)}; {c.task} wants one")
    return found[0]


def paired(c, images, truths, key):
    """(image, truth) paths whose keys agree, sorted; raises ValueError if none do."""
    truths = {key(path): path for path in truths}
    paths = [(path, truths[key(path)]) for path in sorted(images) if key(path) in truths]
    if not paths:
        raise ValueError(f"--data: {c.data} has no image with a truth of the same name; {c.task} wants pairs of files")
    return evenly(paths, c.limit)


def images_below(folder):
    return [path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS]


def others(n, c):
    """Whose truth each of n images is trained with: its own, or under --control another's."""
    return np.random.default_rng(c.seed).permutation(n) if c.control else np.arange(n)
