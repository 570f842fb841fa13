"""
Other test sets for a classifier that was trained on ImageNet, or on any folder of classes: which images, which classes.

    python evaluate.py --task linear --weights runs/s --data IMAGENET --tests imagenet-r,imagenet-a,sketch,real.json
    python evaluate.py --task linear --weights runs/s --data IMAGENET --tests imagenet-c

    CLASS/*.jpg                       folders named as those of train; of these classes one is chosen: R, A, Sketch
    0 ... 999/*.jpg                   numbers in the order of train's folders: V2
    real.json                         for each image of val by its number the classes it shows, numbered so: ReaL
    CORRUPTION/SEVERITY/CLASS/*.jpg   C; mCE

paper: DINOv3 Tab. 4, App. D.7; val has picked the classifier, these sets pick nothing.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from data import open_source
from metrics import ALEXNET, corruption_error


@dataclass
class Variant:
    source: object             # images; label(i) is a row of `answers`
    answers: list              # sets of right classes of train; an empty one leaves its images out
    columns: list              # classes that can be chosen


def open_variants(path, train, val):
    """PATH of --tests -> {name: Variant}.    train, val  sources of the folders of classes"""
    root, classes = Path(path), train.classes
    if root.suffix == ".json":
        return dict(real=open_real(root, val, len(classes)))
    if not root.is_dir():
        raise ValueError(f"--tests: {path} is no folder and no real.json; name folders in the layouts of variants.py")
    names = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    corruptions = [name for name in names if name in ALEXNET]
    if corruptions:
        return {f"{name}/{k}": by_folder(root / name / str(k), classes) for name in corruptions for k in range(1, 6)}
    return {root.name: by_folder(root, classes)}


def by_folder(root, classes):
    source = open_source(root)
    if all(name.isdecimal() for name in source.classes) and not set(source.classes) <= set(classes):
        numbers = [int(name) for name in source.classes]
    else:
        odd = [name for name in source.classes if name not in classes]
        if odd:
            raise ValueError(f"--tests: {root} has a folder {odd[0]} that train has not; name them as its classes")
        numbers = [classes.index(name) for name in source.classes]
    if max(numbers, default=0) >= len(classes):
        raise ValueError(f"--tests: {root} has a folder {max(numbers)}, but train has {len(classes)} classes, from 0")
    return Variant(source, [{number} for number in numbers], sorted(numbers))


class Numbered:
    """The images of val, labelled with the number that ends their name, from 0."""

    def __init__(self, val, n):
        self.val, self.numbers = val, [int(re.search(r"(\d+)\.\w+$", path)[1]) - 1 for path in val.paths]
        if max(self.numbers) >= n:
            raise ValueError(f"--tests: real.json has {n} images, but val has a number {max(self.numbers) + 1}")

    def __len__(self):
        return len(self.val)

    def load(self, i):
        return self.val.load(i)

    def label(self, i):
        return self.numbers[i]


def open_real(path, val, n_classes):
    if not all(re.search(r"\d+\.\w+$", name) for name in getattr(val, "paths", [""])):
        raise ValueError(f"--tests: {path} goes by the numbers in val's names, ILSVRC2012_val_00000001; val has others")
    answers = [set(map(int, classes)) for classes in json.loads(path.read_text())]
    return Variant(Numbered(val, len(answers)), answers, list(range(n_classes)))


def top1(logits, rows, variant):
    """Percent of the images that have an answer whose largest logit, of the columns, is one:  n classes, n -> float"""
    guess = torch.tensor(variant.columns)[logits[:, variant.columns].argmax(1).cpu()].tolist()
    right = [g in variant.answers[row] for g, row in zip(guess, rows.tolist(), strict=True) if variant.answers[row]]
    if not right:
        raise ValueError("--tests: no image has an answer; see the layouts of variants.py")
    return 100 * sum(right) / len(right)


def summary(scores):
    """{name: top-1} -> what is reported: corruptions as one mCE, all others by themselves"""
    errors = {}
    for name, score in scores.items():
        if "/" in name:
            errors.setdefault(name.split("/")[0], []).append(100 - score)
    found = {f"top1_{name}": score for name, score in scores.items() if "/" not in name}
    return found | (dict(mce=corruption_error(errors), n_corruptions=len(errors)) if errors else {})
