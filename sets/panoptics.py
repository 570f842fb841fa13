"""
Sets of images with one segment for every pixel: truths are H W int64, class x 1000 + number; see engine/metrics.py.

    COCO      {train,val}2017/, annotations/panoptic_{train,val}2017.json, {,annotations/}panoptic_{train,val}2017/*.png
    shapes    each object, and the background

Classes are the categories in the order of their ids, whose gaps are closed. A crowd has the number 999.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import shapes
from engine.metrics import CROWD, IGNORE, PER
from sets.pairs import Pairs, alike, evenly, folders, generated, there, verified


@dataclass(frozen=True)
class Panoptic:
    names: tuple           # of the classes
    stuff: frozenset       # classes of which an image has one segment at most


def open_panoptic(c):
    """train, val, Panoptic; raises ValueError if a truth is not what it should be"""
    if c.data == "shapes":
        return *generated(c, scene_segments), Panoptic(("background", *shapes.CLASSES), frozenset({0}))
    (train, form), (val, other) = (coco_pairs(c, split) for split in ("train", "val"))
    if form != other:
        raise ValueError(f"--data: train and val of {c.data} list other categories; wanted one list for both")
    for part in train, val:
        if not any(verified(c, part, any_known)):
            raise ValueError(f"--data: no segment of {part.paths[0][1]} and the others is known; wanted some")
    return train, val, form


def scene_segments(scene):
    return scene.semantic.astype(np.int64) * PER + scene.instances


def any_known(truth, size, path):
    alike(truth, size, path)
    return bool((truth // PER != IGNORE).any())


def coco_pairs(c, split):
    """-> Pairs, Panoptic"""
    listed = Path(c.data, f"annotations/panoptic_{split}2017.json")
    photos, truths = folders(c, f"{split}2017", f"images/{split}2017"), folders(
        c, f"panoptic_{split}2017", f"annotations/panoptic_{split}2017")
    try:
        notes = json.loads(listed.read_text())
        categories = sorted((int(each["id"]), str(each["name"]), int(each["isthing"])) for each in notes["categories"])
        classes = {number: k for k, (number, _, _) in enumerate(categories)}
        images = {each["id"]: str(each["file_name"]) for each in notes["images"]}
        segments = {str(each["file_name"]): (images[each["image_id"]], [
            (int(part["id"]), classes[part["category_id"]], bool(part["iscrowd"])) for part in each["segments_info"]])
            for each in notes["annotations"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--data: {listed} is not COCO's: {type(error).__name__} {error}; wanted images, categories, "
                         "and annotations with segments_info") from error
    if len(categories) >= IGNORE or len({number for number, *_ in categories}) < len(categories):
        raise ValueError(f"--data: {listed} has {len(categories)} categories; wanted at most {IGNORE - 1}, an id each")
    names = evenly(sorted(segments), c.limit)
    paths = list(zip(there([photos / segments[name][0] for name in names], listed),
                     there([truths / name for name in names], listed), strict=True))
    form = Panoptic(tuple(name for _, name, _ in categories),
                    frozenset(k for k, (*_, thing) in enumerate(categories) if not thing))
    return Pairs(paths, partial(read_segments, known={name: segments[name][1] for name in names})), form


def read_segments(path, known):
    """
    A PNG whose colours are numbers of segments, R + 256 G + 65536 B, 0 = void -> H W int64

    known  {name of a file: [(number of a segment, class, crowd)]};  raises ValueError
    """
    with Image.open(path) as file:
        if file.mode != "RGB":
            raise ValueError(f"--data: {path} has mode {file.mode}; wanted RGB, numbers of segments of 24 bits")
        numbers = np.asarray(file).astype(np.int64) @ (1, 256, 65536)
    codes, counts = {0: IGNORE * PER}, {}
    for number, label, crowd in known[path.name]:
        counts[label] = counts.get(label, -1) + 1 - crowd
        codes[number] = label * PER + (CROWD if crowd else min(counts[label], CROWD - 1))
    found, where = np.unique(numbers, return_inverse=True)
    strange = [number for number in found.tolist() if number not in codes]
    if strange:
        raise ValueError(f"--data: {path} has a segment {strange[0]} that its annotation does not list; wanted those "
                         "of segments_info, and 0")
    return np.array([codes[number] for number in found.tolist()])[where].reshape(numbers.shape)
