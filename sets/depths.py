"""
Sets of images with a depth for every pixel.

    NYU, and their like   train/rgb_NAME.jpg, train/depth_NAME.png, also sync_depth_; or a list of image, depth, focal:
                          nyu_train.txt, nyudepthv2_train_files_with_gt.txt with sync/ and official_splits/test/
    KITTI                 the same: kitti_eigen_train.txt with input/ and gt_depth/, eigen_train_files_with_gt.txt with
                          the raw drives and data_depth_annotated/
"""

from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.task import skip
from sets.pairs import (
    Pairs,
    alike,
    below,
    evenly,
    folders,
    generated,
    images_below,
    keyed,
    lines,
    paired,
    there,
    verified,
)

FLAT = 14.0       # metres, no scene of shapes is deeper
NEAREST = 0.001   # metres, what lies nearer is not known
SHALLOW = 1 / 500  # of the last bin: no image's median depth is so small, if the unit is right; chosen by eye

STARTS = dict(nyu="nyu", kitti=("kitti", "eigen"))  # of the lists' names: they come in one folder

# where a list's paths may begin, of images and of depths, the first that has the file
ROOTS = dict(train=(("sync", "input", ""), ("sync", "gt_depth", "data_depth_annotated",
                                                       "data_depth_annotated/train", "data_depth_annotated/val", "")),
             test=(("official_splits/test", "input", ""),
                   ("official_splits/test", "gt_depth", "data_depth_annotated", "data_depth_annotated/train",
                    "data_depth_annotated/val", "")))


@dataclass(frozen=True)
class Depths:
    unit: float = 1000         # what a metre is in the file
    top: float = 10.0          # metres: the last bin; what lies deeper does not count
    scored: tuple = (0, 1, 0, 1)   # shares of height and width: rows from, to, columns from, to
    trained: tuple = (0, 1, 0, 1)  # the same, of what is trained on
    crop: tuple = ()           # height and width of the middle of the lower edge that is used; empty = all


# differs: NYU's images are whole in training, and depths beyond 43:608, 45:472 not known; there the images are cut
SETS = dict(depth=Depths(), nyu=Depths(scored=(45 / 480, 471 / 480, 41 / 640, 601 / 640),
                                       trained=(45 / 480, 472 / 480, 43 / 640, 608 / 640)),
            kitti=Depths(256, 80.0, (0.40810811, 0.99189189, 0.03594771, 0.96405229), crop=(352, 1216)))


def read_depth(path, unit, trained=(0, 1, 0, 1)):
    """A file of depths -> H W float32, metres; 0 = not known.    trained  shares, as Depths has them: beyond is 0"""
    with Image.open(path) as file:
        if not file.mode.startswith(("I", "F")):
            raise ValueError(f"--data: {path} has mode {file.mode}, {len(file.getbands())} x 8 bits; wanted one of 16 "
                             f"bits, {unit:g} a metre")
        depth = np.asarray(file).astype(np.float32) / unit
    return np.where(within(depth.shape, trained), depth, 0)


def within(size, shares):
    """H W bool: which pixels lie inside, rows from, to, columns from, to, rounded down as Garg's crop is"""
    (H, W), (top, bottom, left, right) = size, shares
    inside = np.zeros(size, bool)
    rows, cols = ([int(share * n + 1e-6) for share in ends] for n, ends in ((H, (top, bottom)), (W, (left, right))))
    inside[slice(*rows), slice(*cols)] = True
    return inside


def lower_middle(array, crop):
    """The middle columns of the lower rows of C H W or H W."""
    height, width = crop
    left = (array.shape[-1] - width) // 2
    return array[..., array.shape[-2] - height :, left : left + width]


def plausible(truth, size, path, form, scored=False):
    """Raises ValueError for a truth in another unit, or too small for the crop, or that leaves nothing to score."""
    alike(truth, size, path)
    if form.crop and (truth.shape[0] < form.crop[0] or truth.shape[1] < form.crop[1]):
        raise ValueError(f"--data: {path} has {truth.shape[1]}x{truth.shape[0]} pixels; wanted at least "
                         f"{form.crop[1]}x{form.crop[0]}")
    known = truth[truth > 0]
    if known.size and not SHALLOW * form.top < np.median(known) <= form.top:
        raise ValueError(f"--data: {path} is {np.median(known):.3g} m deep at its median, at {form.unit:g} a metre, "
                         f"wanted {SHALLOW * form.top:g} to {form.top:g} m: it is in another unit, or of another set")
    if scored and not scored_pixels(lower_middle(truth, form.crop) if form.crop else truth, form).any():
        raise ValueError(f"--data: {path} has no known depth below {form.top:g} m to score; leave it out")
    return known.size > 0


def open_depth(c):
    """train, val, and how depth is kept"""
    form = SETS[c.task]
    if c.data == "shapes":
        return *generated(c, attrgetter("depth")), Depths(top=FLAT)
    crop = partial(lower_middle, crop=form.crop) if form.crop else None
    train = Pairs(depth_pairs(c, "train"), partial(read_depth, unit=form.unit, trained=form.trained), crop)
    val = Pairs(depth_pairs(c, "test", "val"), partial(read_depth, unit=form.unit), crop)
    if not any(verified(c, train, partial(plausible, form=form))):
        raise ValueError(f"--data: no depth of train of {c.data} is known; wanted values above 0")
    verified(c, val, partial(plausible, form=form, scored=True))
    return train, val, form


def depth_pairs(c, *split):
    """train/rgb_NAME.jpg, train/depth_NAME.png; or a list of image, depth, focal"""
    lists = [path for folder in (Path(c.data), Path(c.data, "train_test_inputs")) for name in split
             for end in ("", "_files_with_gt") for path in folder.glob(f"*{name}{end}.txt")
             if path.name.startswith(STARTS.get(c.task, ""))]
    if len(lists) > 1:
        raise ValueError(f"--data: {lists[0]} and {lists[1]} are both lists of {split[0]}; leave one of them")
    if not lists:
        root = folders(c, *split)
        files = images_below(root)
        kinds = [[p for p in files if p.name.startswith(kind)] for kind in ("rgb_", ("depth_", "sync_depth_"))]
        return paired(c, *(keyed(each, lambda path: below(root)(path).parent / numbered(path)) for each in kinds))
    rows = [line.split() for line in lines(lists[0], "image, depth, focal length")]
    known = evenly([row[:2] for row in rows if len(row) > 1 and row[1] != "None"], c.limit)
    if unknown := sum(len(row) < 2 or row[1] == "None" for row in rows):
        skip(f"{unknown} images of {lists[0]}, which have no depth", unknown)
    places = [[located(c.data, roots, row[k]) for row in known] for k, roots in enumerate(ROOTS[split[0]])]
    return list(zip(*(there(paths, lists[0]) for paths in places), strict=True))


def numbered(path):
    """What image and depth of one scene have in their names alike"""
    return path.stem.removeprefix("sync_").removeprefix("depth_").removeprefix("rgb_")


def located(data, roots, name):
    """Where a list's file lies, below the first of the roots that has it"""
    paths = [Path(data, root, name.lstrip("/")) for root in roots]
    return next((path for path in paths if path.is_file()), paths[-1])


def scored_pixels(truth, form):
    """H W bool: inside the set's crop, and of a depth that counts"""
    return torch.from_numpy(within(truth.shape, form.scored) & (truth > NEAREST) & (truth < form.top))
