"""
Sets of images with boxes of their objects: left, top, right, bottom in pixels, the latter two exclusive, n 4.

    VOC        JPEGImages/*.jpg, Annotations/*.xml, those of ImageSets/Main/trainval.txt
    COCO-20k   coco_20k_filenames.txt, annotations/instances_train2014.json, images/train2014/
    DAVIS      JPEGImages/480p/, Annotations/480p/: every frame
"""

import json
from itertools import count, islice
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from engine.metrics import IGNORE
from sets.pairs import (
    GENERATED,
    Pairs,
    Scenes,
    below,
    evenly,
    folders,
    images_below,
    keyed,
    lines,
    paired,
    scene,
    there,
    verified,
)

VOC_LIST, COCO_LIST = "ImageSets/Main/trainval.txt", "coco_20k_filenames.txt"
CORNERS = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # left, top, width, height -> corners
THUMB = 48               # pixels a side, to choose scenes by


def scene_boxes(scene):
    """left, top, right, bottom of every object that can be seen, in pixels, the latter two exclusive:  n 4"""
    return instance_boxes(scene.instances)


def instance_boxes(instances):
    """H W, 0 = background, 255 = ignored -> n 4"""
    boxes = []
    for k in np.unique(instances):
        if 0 < k < IGNORE:
            rows, cols = np.nonzero(instances == k)
            boxes.append([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1])
    return np.array(boxes, float).reshape(-1, 4)


def read_boxes(path):
    """VOC's .xml, each object's own box, not its parts': pixels from 1, both ends inside; or a .png of instances"""
    if path.suffix == ".png":
        with Image.open(path) as file:
            if file.mode not in ("P", "L"):
                raise ValueError(f"--data: {path} has mode {file.mode}; wanted numbers of objects, grey or a palette's")
            return instance_boxes(np.asarray(file))
    try:
        boxes = [thing.find("bndbox") for thing in ElementTree.parse(path).findall("object")]
        found = [[float(box.find(name).text) for name in ("xmin", "ymin", "xmax", "ymax")] for box in boxes]
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--data: {path} is not VOC's: {error}; wanted object/bndbox with xmin to ymax") from error
    return np.array(found, float).reshape(-1, 4) - (1, 1, 0, 0)


def inside(boxes, size, path):
    """Raises ValueError for a box that is empty, or leaves its image, as if one of them were turned."""
    (H, W), wrong = size, (boxes[:, 2:] <= boxes[:, :2]).any(1) | (boxes[:, :2] < -1).any(1)
    if (wrong | (boxes[:, 2] > W + 1) | (boxes[:, 3] > H + 1)).any():
        raise ValueError(f"--data: {path} has a box that does not lie in its image of {W}x{H} pixels")


def small_objects(c):
    """Scenes in which no object's box takes near half the image: in others the whole image is a right answer."""
    numbers = (i for i in count() if 0 < largest_share(scene_boxes(scene(i, THUMB, 1001))) < 0.45)
    return Scenes(list(islice(numbers, c.limit or GENERATED[1])), 1001, c.resolution, scene_boxes)


def largest_share(boxes):
    return max(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist(), default=0) / THUMB**2


def coco_boxes(root):
    """COCO-20k: {name of a photo: boxes} of its list, crowds left out;  images/train2014/, or train2014/"""
    path = root / "annotations/instances_train2014.json"
    try:
        notes = json.loads(path.read_text())
        names, boxes = {note["id"]: note["file_name"] for note in notes["images"]}, {}
        for note in notes["annotations"]:
            if not note["iscrowd"]:
                boxes.setdefault(names[note["image_id"]], []).append(note["bbox"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--data: {path} is not COCO's: {type(error).__name__} {error}; wanted images and annotations "
                         "of 2014") from error
    listed = [Path(line).name for line in lines(root / COCO_LIST, "names, as in COCO_train2014_000000000009.jpg")]
    return {name: np.array(boxes.get(name, []), float).reshape(-1, 4) @ CORNERS for name in listed}


def open_discovery(c):
    """Pairs: VOC, COCO-20k or DAVIS, as the folder says; scenes of shapes. Raises ValueError."""
    if c.data == "shapes":
        return small_objects(c)
    root = Path(c.data)
    pairs = Pairs(*(coco_pairs if (root / COCO_LIST).is_file() else voc_pairs)(c, root))
    verified(c, pairs, inside)
    return pairs


def coco_pairs(c, root):
    """(image, its name) of each; what reads a truth"""
    folder, boxes = folders(c, "images/train2014", "train2014"), coco_boxes(root)
    names = evenly(list(boxes), c.limit)
    photos = there([folder / name for name in names], root / COCO_LIST)
    return list(zip(photos, names, strict=True)), boxes.__getitem__


def voc_pairs(c, root):
    """(image, truth) of each; what reads a truth"""
    images, truths = (folders(c, f"{name}/480p", name) for name in ("JPEGImages", "Annotations"))
    files, listed = [path for path in truths.rglob("*") if path.suffix in (".xml", ".png")], root / VOC_LIST
    photos = [path for path in images_below(images) if path.suffix.lower() in (".jpg", ".jpeg")]
    if listed.is_file():
        names = [name.split()[0] for name in lines(listed, "names")]
        there([images / f"{name}.jpg" for name in names], listed)
        there([truths / f"{name}.xml" for name in names], listed)
        wanted = set(names)
        files, photos = ([path for path in each if path.stem in wanted] for each in (files, photos))
    return paired(c, keyed(photos, below(images)), keyed(files, below(truths))), read_boxes
