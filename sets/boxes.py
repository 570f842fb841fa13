"""
Sets of images with boxes of their objects: left, top, right, bottom in pixels, the latter two exclusive, n 4.

    VOC      JPEGImages/*.jpg, Annotations/*.xml, those of ImageSets/Main/trainval.txt
    DAVIS    JPEGImages/480p/, Annotations/480p/: every frame
"""

from itertools import count, islice
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from engine.metrics import IGNORE
from sets.pairs import GENERATED, Pairs, Scenes, folders, images_below, paired, scene

VOC_LIST = "ImageSets/Main/trainval.txt"
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
    """VOC's .xml, pixels from 1, both ends inside; or a .png of instances"""
    if path.suffix == ".png":
        with Image.open(path) as file:
            return instance_boxes(np.asarray(file))
    found = [[float(box.find(name).text) for name in ("xmin", "ymin", "xmax", "ymax")]
             for box in ElementTree.parse(path).iter("bndbox")]
    return np.array(found, float).reshape(-1, 4) - (1, 1, 0, 0)


def small_objects(c):
    """Scenes in which no object's box takes near half the image: in others the whole image is a right answer."""
    numbers = (i for i in count() if 0 < largest_share(scene_boxes(scene(i, THUMB, 1001))) < 0.45)
    return Scenes(list(islice(numbers, c.limit or GENERATED[1])), 1001, c.resolution, scene_boxes)


def largest_share(boxes):
    return max(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist(), default=0) / THUMB**2


def open_discovery(c):
    """VOC: JPEGImages/*.jpg, Annotations/*.xml, those of ImageSets/Main/trainval.txt;  DAVIS: every frame"""
    if c.data == "shapes":
        return small_objects(c)
    images, truths = (folders(c, f"{name}/480p", name) for name in ("JPEGImages", "Annotations"))
    files, listed = [path for path in truths.rglob("*") if path.suffix in (".xml", ".png")], Path(c.data, VOC_LIST)
    if listed.is_file():
        names = set(listed.read_text().split())
        files = [path for path in files if path.stem in names]
    roots = {".jpg": images, ".jpeg": images}

    def key(path):
        return path.relative_to(roots.get(path.suffix.lower(), truths)).with_suffix("")

    photos = [path for path in images_below(images) if path.suffix.lower() in roots]
    return Pairs(paired(c, photos, files, key), read_boxes)
