"""
Sets of images with a class for every pixel.

    ADE20k, CamVid and their like    images/{training,validation}/NAME.jpg, annotations/.../NAME.png
    Cityscapes                       leftImg8bit/, gtFine/*_labelTrainIds.png
    VOC                              JPEGImages/, SegmentationClass[Aug]/, ImageSets/Segmentation/
"""

from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import numpy as np
from PIL import Image

import shapes
from engine.metrics import IGNORE
from sets.pairs import Pairs, evenly, folders, generated, images_below, paired


@dataclass(frozen=True)
class Labels:
    n_classes: int = 0         # 0 = as many as the largest label says
    first: int = 0             # label of class 0; what lies below it is ignored
    void: int = IGNORE         # label that is ignored


SETS = dict(segmentation=Labels(), ade20k=Labels(150, first=1), cityscapes=Labels(19), voc=Labels(21),
            camvid=Labels(11, void=11))


def read_labels(path, labels):
    """A file of class numbers, palette or grey -> H W uint8, ignored ones 255"""
    with Image.open(path) as file:
        if file.mode not in ("P", "L", "I", "I;16", "1"):
            raise ValueError(f"{path} has mode {file.mode}; wanted class numbers: a grey, or a palette's index")
        truth = np.asarray(file).astype(np.int64)
    out = (truth == labels.void) | (truth == IGNORE) | (truth < labels.first)
    top = int(truth[~out].max(initial=0))
    if labels.n_classes and top >= labels.first + labels.n_classes:
        raise ValueError(f"{path} has label {top}; wanted {labels.n_classes} classes from {labels.first} on")
    return np.where(out, IGNORE, truth - labels.first).astype(np.uint8)


def open_segmentation(c):
    """train, val, number of classes"""
    labels = SETS[c.task]
    labels = labels if labels.void != IGNORE else replace(labels, void=c.ignore)
    if c.data == "shapes":
        return *generated(c, attrgetter("semantic")), len(shapes.CLASSES) + 1
    layout = dict(cityscapes=cityscapes_pairs, voc=voc_pairs).get(c.task, label_pairs)
    read = partial(read_labels, labels=labels)
    train, val = (Pairs(layout(c, *split), read) for split in (("training", "train"), ("validation", "val")))
    truths = (part.truth(i) for part in (train, val) for i in range(len(part)))
    return train, val, labels.n_classes or 1 + max(int(truth[truth != IGNORE].max(initial=0)) for truth in truths)


def label_pairs(c, *split):
    """images/training/NAME.jpg, annotations/training/NAME.png; train and val are understood too"""
    images, labels = (folders(c, *[f"{kind}/{name}" for name in split]) for kind in ("images", "annotations"))
    return paired(c, images_below(images), images_below(labels), lambda path: path.stem)


def cityscapes_pairs(c, _, split):
    images = folders(c, f"leftImg8bit/{split}").rglob("*_leftImg8bit.png")
    labels = folders(c, f"gtFine/{split}").rglob("*_gtFine_labelTrainIds.png")
    return paired(c, images, labels, lambda path: path.name.replace("_gtFine_labelTrainIds", "_leftImg8bit"))


def voc_pairs(c, _, split):
    labels, lists = folders(c, "SegmentationClassAug", "SegmentationClass"), folders(c, "ImageSets/Segmentation")
    more = lists / f"{split}aug.txt"  # the 10,582 images that people train on
    names = (more if more.is_file() and labels.name.endswith("Aug") else lists / f"{split}.txt").read_text().split()
    return evenly([(folders(c, "JPEGImages") / f"{name}.jpg", labels / f"{name}.png") for name in names], c.limit)
