"""
Sets of images with a depth for every pixel.

    NYU, and their like   train/rgb_NAME.jpg, train/depth_NAME.png; or lists of image, depth, focal
    KITTI                 lists kitti_eigen_{train,test}.txt, input/, gt_depth/
"""

from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sets.pairs import Pairs, evenly, folders, generated, images_below, paired

FLAT = 14.0       # metres, no scene of shapes is deeper
NEAREST = 0.001   # metres, what lies nearer is not known


@dataclass(frozen=True)
class Depths:
    unit: float = 1000         # what a metre is in the file
    top: float = 10.0          # metres: the last bin; what lies deeper does not count
    scored: tuple = (0, 1, 0, 1)  # shares of height and width: rows from, to, columns from, to
    crop: tuple = ()           # height and width of the middle of the lower edge that is used; empty = all


SETS = dict(depth=Depths(), nyu=Depths(scored=(45 / 480, 471 / 480, 41 / 640, 601 / 640)),
            kitti=Depths(256, 80.0, (0.40810811, 0.99189189, 0.03594771, 0.96405229), (352, 1216)))


def read_depth(path, unit):
    """A file of depths -> H W float32, metres; 0 = not known"""
    with Image.open(path) as file:
        return np.asarray(file).astype(np.float32) / unit


def lower_middle(array, crop):
    """The middle columns of the lower rows of C H W or H W."""
    height, width = crop
    left = (array.shape[-1] - width) // 2
    return array[..., array.shape[-2] - height :, left : left + width]


def open_depth(c):
    """train, val, and how depth is kept"""
    form = SETS[c.task]
    if c.data == "shapes":
        return *generated(c, attrgetter("depth")), Depths(top=FLAT)
    read = partial(read_depth, unit=form.unit)
    crop = partial(lower_middle, crop=form.crop) if form.crop else None
    return *(Pairs(depth_pairs(c, *split), read, crop) for split in (("train",), ("test", "val"))), form


def depth_pairs(c, *split):
    """train/rgb_NAME.jpg, train/depth_NAME.png; or a list nyu_train.txt, kitti_eigen_train.txt: image, depth, focal"""
    lists = [path for name in split for path in sorted(Path(c.data).glob(f"*{name}.txt"))]
    if not lists:
        files = images_below(folders(c, *split))
        images, depths = ([p for p in files if p.name.startswith(kind)] for kind in ("rgb_", "depth_"))
        return paired(c, images, depths, lambda path: path.stem.partition("_")[2])
    roots = [Path(c.data, name) if Path(c.data, name).is_dir() else Path(c.data) for name in ("input", "gt_depth")]
    rows = [line.split() for line in lists[0].read_text().splitlines() if line.strip()]
    known = [row[:2] for row in rows if len(row) > 1 and row[1] != "None"]
    return evenly([(roots[0] / image.lstrip("/"), roots[1] / depth.lstrip("/")) for image, depth in known], c.limit)


def scored_pixels(truth, form):
    (H, W), (top, bottom, left, right) = truth.shape, form.scored
    inside = np.zeros((H, W), bool)
    inside[int(top * H + 0.5) : int(bottom * H + 0.5), int(left * W + 0.5) : int(right * W + 0.5)] = True
    return torch.from_numpy(inside & (truth > NEAREST) & (truth < form.top))
