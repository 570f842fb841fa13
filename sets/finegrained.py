"""
Fine-grained sets as they are downloaded, with their official splits:  --data NAME:PATH  of knn, linear and logreg.

    python evaluate.py --task logreg --weights runs/s --data food101:DOWNLOADS     DOWNLOADS has the folder food-101

    food101, cifar10, cifar100, aircraft, dtd, pets, flowers102, cars     below PATH as torchvision unpacks them
    cub         CUB_200_2011/ with images/ and its lists
    sun397      SUN397/ with the folders a to z; Training_01.txt and Testing_01.txt beside them
    caltech101  caltech101/101_ObjectCategories/; 30 images of each class to train on, drawn, as it has no split

With tasks/voc07.py, the twelve of Fine-S; a set of another name wants train/CLASS and val/CLASS.

paper: DINOv3 App. D.7, Tab. 22; by convention mean_per_class of aircraft, pets, caltech101, flowers102, else top1.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset

from engine.sources import open_source
from sets.pairs import there

TORCHVISION = dict(  # the class; the arguments of what to train on, and of what to score
    food101=("Food101", [dict(split="train")], [dict(split="test")]),
    cifar10=("CIFAR10", [dict(train=True)], [dict(train=False)]),
    cifar100=("CIFAR100", [dict(train=True)], [dict(train=False)]),
    aircraft=("FGVCAircraft", [dict(split="trainval")], [dict(split="test")]),
    dtd=("DTD", [dict(split="train"), dict(split="val")], [dict(split="test")]),
    pets=("OxfordIIITPet", [dict(split="trainval")], [dict(split="test")]),
    flowers102=("Flowers102", [dict(split="train"), dict(split="val")], [dict(split="test")]),
    cars=("StanfordCars", [dict(split="train")], [dict(split="test")]))


class Known:
    """Parts of a set, one after the other: each has items (image, label), as torchvision's have them, and classes."""

    def __init__(self, parts):
        self.items, self.classes = ConcatDataset(parts), list(parts[0].classes)
        self.labels = [int(label) for part in parts for label in labels_of(part)]

    def __len__(self):
        return len(self.items)

    def load(self, i):
        try:
            image = np.array(self.items[i][0].convert("RGB"))
        except Exception as error:  # Pillow's decoders fail in many ways on foreign bytes; all mean: unreadable
            raise OSError(f"image {i} of {len(self)}: {error}") from error
        return torch.from_numpy(image).permute(2, 0, 1)

    def label(self, i):
        return self.labels[i]


def labels_of(part):
    """Without opening an image: torchvision's sets have them under one of three names."""
    if hasattr(part, "_samples"):
        return [label for _, label in part._samples]
    return part.targets if hasattr(part, "targets") else part._labels


class Named:
    """Pairs (path, name of its class), in the manner of torchvision's sets."""

    def __init__(self, pairs):
        self.pairs, self.classes = pairs, sorted({name for _, name in pairs})
        self.targets = [self.classes.index(name) for _, name in pairs]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return Image.open(self.pairs[i][0]), self.targets[i]


def cub(root):
    images, train = (dict(line.split() for line in (root / f"CUB_200_2011/{name}.txt").read_text().splitlines())
                     for name in ("images", "train_test_split"))
    return [[(root / f"CUB_200_2011/images/{path}", path.split("/")[0]) for i, path in images.items()
             if train[i] == part] for part in "10"]


def sun397(root):
    return [[(root / f"SUN397{path}", path.rpartition("/")[0]) for path in (root / "SUN397" / name).read_text().split()]
            for name in ("Training_01.txt", "Testing_01.txt")]


def caltech101(root):
    source = open_source(root / "caltech101/101_ObjectCategories")
    train, test = {name: [] for name in source.classes}, []
    for path in np.random.default_rng(0).permutation(source.paths).tolist():
        name = path.split("/")[0]
        (train[name] if len(train[name]) < 30 else test).append((source.root / path, name))
    return sum(train.values(), []), test


OWN = dict(cub=cub, sun397=sun397, caltech101=caltech101)
NAMES = *TORCHVISION, *OWN


def open_known(name, root):
    """The sources of NAME:PATH, to train on and to score;  raises ValueError if the set is not there, or not whole."""
    root = Path(root).expanduser()
    try:
        if name in OWN:
            parts = [list(pairs) for pairs in OWN[name](root)]
            there([path for pairs in parts for path, _ in pairs], f"{name}'s list")
            return [Known([Named(pairs)]) for pairs in parts]
        from torchvision import datasets
        kind, *parts = TORCHVISION[name]
        return [Known([getattr(datasets, kind)(root, **words) for words in part]) for part in parts]
    except (OSError, RuntimeError, ImportError, ValueError, KeyError) as error:
        said = str(error).partition(" You can use download")[0].rstrip(".")  # which we do not offer
        raise ValueError(f"--data {name}:{root}: {said}; sets/finegrained.py says what should lie there") from error
