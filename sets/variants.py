"""
Other test sets for a classifier that was trained on ImageNet, or on any folder of classes: which images, which classes.

    python evaluate.py --task linear --weights runs/s --data IMAGENET --tests imagenet-r,imagenet-a,sketch,real.json
    python evaluate.py --task linear --weights runs/s --data IMAGENET --tests imagenet-c,objectnet-1.0

    CLASS/*.jpg                       folders named as those of train; of these classes one is chosen: R, A, Sketch
    0 ... 999/*.jpg                   numbers in the order of train's folders: V2
    real.json                         for each image of val by its number the classes it shows, numbered so: ReaL
    CORRUPTION/SEVERITY/CLASS/*.jpg   C; mCE
    images/FOLDER/*.png, mappings/    ObjectNet: the folders that ImageNet has classes for, of these one is chosen

paper: DINOv3 Tab. 4, App. D.7; val has picked the classifier, these sets pick nothing.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.metrics import ALEXNET, corruption_error
from engine.sources import open_source
from sets.classes import Chosen

OBJECTNET = ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json", "pytorch_to_imagenet_2012_id.json",
             "imagenet_to_label_2012_v2")
BORDER = 2                     # pixels of ObjectNet's images to cut away: a red frame of 1, and one more to be safe


@dataclass
class Variant:
    source: object             # images; label(i) is a row of `answers`
    answers: list              # sets of right classes of train; an empty one leaves its images out
    columns: list              # classes that can be chosen
    cropped: bool = False      # its images are stored as crops: no margin is left to cut away
    of_val: bool = False       # source has val's images, in its order


def open_variants(path, train, val):
    """PATH of --tests -> {name: Variant}.    train, val  sources of the folders of classes"""
    root, classes = Path(path), train.classes
    if root.suffix == ".json":
        return dict(real=open_real(root, val, len(classes)))
    if not root.is_dir():
        raise ValueError(f"--tests: {path} is no folder and no real.json; see sets/variants.py")
    if (root / "mappings").is_dir():
        return dict(objectnet=open_objectnet(root, len(classes)))
    names = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    corruptions = [name for name in names if name in ALEXNET]
    if corruptions:
        return {f"{name}/{k}": replace(by_folder(root / name / str(k), classes), cropped=True)
                for name in corruptions for k in range(1, 6)}
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


def open_real(path, val, n_classes):
    """The images of val, labelled with the number that ends their name, from 0."""
    if not all(re.search(r"\d+\.\w+$", name) for name in getattr(val, "paths", [""])):
        raise ValueError(f"--tests: {path} goes by the numbers in val's names, ILSVRC2012_val_00000001; val has others")
    answers = [set(map(int, classes)) for classes in json.loads(path.read_text())]
    numbers = [int(re.search(r"(\d+)\.\w+$", name)[1]) - 1 for name in val.paths]
    if max(numbers) >= len(answers):
        raise ValueError(f"--tests: real.json has {len(answers)} images, but val has a number {max(numbers) + 1}")
    return Variant(Chosen(val, range(len(val)), numbers), answers, list(range(n_classes)), True)


def open_objectnet(root, n_classes):
    """
    The images of the folders that overlap with ImageNet; a folder's answers are its ImageNet classes. mappings/ has

        folder_to_objectnet_label.json    {folder: label}
        objectnet_to_imagenet_1k.json     {label: "class; class"}, of the labels that overlap
        pytorch_to_imagenet_2012_id.json  {number in the order of the sorted wnids, as train's folders have it: id}
        imagenet_to_label_2012_v2         a class in each line, in the order of these ids
    """
    files = [root / "mappings" / name for name in OBJECTNET]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"--tests: {root}/mappings has no {missing[0]}; wanted {', '.join(OBJECTNET)}")
    *tables, names = (file.read_text() for file in files)
    (label_of, overlap, ids), names = map(json.loads, tables), [name.strip() for name in names.splitlines()]
    first = min(ids.values())  # the first line's, whether they count from 0 or from 1
    if len(names) != n_classes or sorted(ids.values()) != list(range(first, first + n_classes)):
        raise ValueError(f"--tests: {root}/mappings is of {len(ids)} ids and {len(names)} names, but train has "
                         f"{n_classes} classes; train on all of ImageNet")
    number = {names[i - first]: int(k) for k, i in ids.items()}
    wanted = {label: classes.split("; ") for label, classes in overlap.items()}
    source = open_source(root / "images")
    odd = [name for each in wanted.values() for name in each if names.count(name) != 1]
    odd += [folder for folder in source.classes if folder not in label_of]
    if odd:
        raise ValueError(f"--tests: {root}/mappings should know {odd[0]!r} once; take the files of the set's own zip")
    answers = [{number[name] for name in wanted.get(label_of[folder], [])} for folder in source.classes]
    labels = [source.label(i) for i in range(len(source))]
    rows = [i for i, label in enumerate(labels) if answers[label]]
    columns = sorted({number[name] for each in wanted.values() for name in each})
    return Variant(Chosen(source, rows, [labels[i] for i in rows], BORDER), answers, columns)


def top1(guess, rows, variant):
    """Percent of the images with an answer whose guess is one:  classes of train n, rows of `answers` n -> float"""
    right = [g in variant.answers[row] for g, row in zip(guess.tolist(), torch.as_tensor(rows).tolist(), strict=True)
             if variant.answers[row]]
    if not right:
        raise ValueError("--tests: no image has an answer; see the layouts of sets/variants.py")
    return 100 * sum(right) / len(right)


def summary(scores):
    """{name: top-1} -> what is reported: corruptions as one mCE, all others by themselves"""
    errors = {}
    for name, score in scores.items():
        if "/" in name:
            errors.setdefault(name.split("/")[0], []).append(100 - score)
    found = {f"top1_{name}": score for name, score in scores.items() if "/" not in name}
    return found | (dict(mce=corruption_error(errors), n_corruptions=len(errors)) if errors else {})
