"""
Sets of images with a depth for every pixel.

    NYU, and their like   train/rgb_NAME.jpg, train/depth_NAME.png, also sync_depth_; or a list of image, depth, focal:
                          nyu_train.txt, nyudepthv2_train_files_with_gt.txt with sync/ and official_splits/test/
    KITTI                 the same: kitti_eigen_train.txt with input/ and gt_depth/, eigen_train_files_with_gt.txt with
                          the raw drives and data_depth_annotated/
    ETH3D, ScanNet, DIODE what Marigold measures: eth3d_filename_list.txt with rgb/ and depth/, float32 as it is;
                          scannet_val_sampled_list_800_1.txt; diode_val_all_filename_list.txt, .npy and their masks
    NYU, KITTI, relative  the lists above, or filename_list_test.txt; other pixels of KITTI count

Not known is 0: what is nan or infinite, too. Images of which nothing is known are not trained on, and counted.
"""

from dataclasses import dataclass, replace
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
INDOORS = 80.0    # metres: nor of this depth, in sets that have deeper ones
ETH3D = 4032, 6048  # height and width, which its files of depth do not say

STARTS = dict(nyu="nyu", kitti=("kitti", "eigen"), nyu_relative=("nyu", "filename_list"),
              kitti_relative=("kitti", "eigen"))  # of the lists' names: they come in one folder
TRAINED = {"depth", "nyu", "kitti", "relative"}  # the others are measured with what was trained elsewhere
LISTS = dict(eth3d="eth3d_filename_list.txt", scannet="scannet_val_sampled_list_800_1.txt",
             diode="diode_val_all_filename_list.txt")

# where a list's paths may begin, of images and of depths, the first that has the file
ROOTS = dict(train=(("sync", "input", ""), ("sync", "gt_depth", "data_depth_annotated",
                                                       "data_depth_annotated/train", "data_depth_annotated/val", "")),
             test=(("official_splits/test", "input", ""),
                   ("official_splits/test", "gt_depth", "data_depth_annotated", "data_depth_annotated/train",
                    "data_depth_annotated/val", "")))


@dataclass(frozen=True)
class Depths:
    unit: float = 1000         # what a metre is in the file
    top: float = 10.0          # metres: what lies deeper does not count
    near: float = NEAREST      # metres: nor what is nearer
    last: float = 0.0          # metres, of the last bin; 0 = top
    relative: bool = False     # scale and shift are forgiven
    scored: tuple = (0, 1, 0, 1)   # shares of height and width: rows from, to, columns from, to
    trained: tuple = (0, 1, 0, 1)  # the same, of what is trained on
    crop: tuple = ()           # height and width of the middle of the lower edge that is used; empty = all

    bins = property(lambda self: self.last or self.top)


BENCHMARK = 352, 1216  # pixels of KITTI's images, of which these shares of rows and columns are scored
GARG, EIGEN = (0.40810811, 0.99189189, 0.03594771, 0.96405229), (0.3324324, 0.91351351, 0.0359477, 0.96405229)

# differs: NYU's images are whole in training, and depths beyond 43:608, 45:472 not known; there the images are cut
# differs: ETH3D has no farthest depth there; none of its rooms and courts is a kilometre deep
SETS = dict(depth=Depths(), nyu=Depths(scored=(45 / 480, 471 / 480, 41 / 640, 601 / 640),
                                       trained=(45 / 480, 472 / 480, 43 / 640, 608 / 640)),
            kitti=Depths(256, 80.0, scored=GARG, crop=BENCHMARK),
            **{name: replace(form, last=100.0, relative=True) for name, form in dict(
                relative=Depths(top=100.0), eth3d=Depths(1, 1000.0), scannet=Depths(), diode=Depths(1, 350.0, 0.6),
                nyu_relative=Depths(scored=(45 / 480, 471 / 480, 41 / 640, 601 / 640)),
                kitti_relative=Depths(256, 80.0, scored=EIGEN, crop=BENCHMARK)).items()})


def read_depth(path, unit, trained=(0, 1, 0, 1)):
    """A file of depths -> H W float32, metres; 0 = not known.    trained  shares, as Depths has them: beyond is 0"""
    with Image.open(path) as file:
        if not file.mode.startswith(("I", "F")):
            raise ValueError(f"--data: {path} has mode {file.mode}, {len(file.getbands())} x 8 bits; wanted one of 16 "
                             f"bits, {unit:g} a metre")
        depth = np.asarray(file).astype(np.float32) / unit
    return np.where(within(depth.shape, trained), depth, 0)


def read_raw(path):
    """ETH3D's: H W float32, row by row, no header, infinite where nothing is known"""
    found = np.fromfile(path, "<f4")
    if found.size != ETH3D[0] * ETH3D[1]:
        raise ValueError(f"--data: {path} holds {found.size:,} numbers; wanted {ETH3D[1]}x{ETH3D[0]} of 32 bits")
    return found.reshape(ETH3D)


def read_masked(path):
    """DIODE's: H W 1 float32, and in another file where they are known"""
    mask = path.with_name(path.stem + "_mask.npy")
    try:
        depth, there = np.load(path), np.load(mask)
    except (OSError, ValueError) as error:
        raise ValueError(f"--data: {path} or {mask.name} cannot be read ({error})") from error
    depth = depth[..., 0] if depth.ndim == 3 else depth
    if depth.dtype != np.float32 or there.shape != depth.shape:
        raise ValueError(f"--data: {path} has {depth.dtype} {depth.shape}, its mask {there.shape}; wanted float32, and "
                         "a mask as large")
    return np.where(there > 0, depth, 0)


READERS = dict(eth3d=read_raw, diode=read_masked)


def finite(path, read):
    """What `read` says, 0 where that is nan or infinite"""
    return np.nan_to_num(read(path), nan=0.0, posinf=0.0, neginf=0.0)


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
    known, least = truth[(truth > 0) & np.isfinite(truth)], SHALLOW * min(form.top, INDOORS)
    if known.size and not least < np.median(known) <= form.top:
        raise ValueError(f"--data: {path} is {np.median(known):.3g} m deep at its median, at {form.unit:g} a metre, "
                         f"wanted {least:g} to {form.top:g} m: it is in another unit, or of another set")
    if scored and not scored_pixels(lower_middle(truth, form.crop) if form.crop else truth, form).any():
        raise ValueError(f"--data: {path} has no known depth below {form.top:g} m to score; leave it out")
    return known.size > 0, bool(np.isnan(truth).any())


def open_depth(c):
    """train, val, and how depth is kept"""
    form = SETS[c.task]
    if c.data == "shapes":
        return *generated(c, attrgetter("depth")), replace(Depths(top=FLAT), last=form.last, relative=form.relative)
    read, train = READERS.get(c.task, partial(read_depth, unit=form.unit)), None
    if not c.head and c.task in TRAINED:
        train = checked(c, depth_pairs(c, "train"), partial(read_depth, unit=form.unit, trained=form.trained), form)
    return train, checked(c, depth_pairs(c, "test", "val"), read, form, scored=True), form


def checked(c, paths, read, form, scored=False):
    """Pairs, each of which is looked into; those to train on without the images of which nothing is known"""
    crop = partial(lower_middle, crop=form.crop) if form.crop else None
    found = verified(c, Pairs(paths, read, crop), partial(plausible, form=form, scored=scored))
    if n := sum(has_nan for _, has_nan in found):
        skip(f"the pixels that are nan of {n} depths; they count as not known", n)
    kept = [path for path, (known, _) in zip(paths, found, strict=True) if known]
    if not kept:
        raise ValueError(f"--data: no depth of train of {c.data} is known; wanted values above 0")
    if len(kept) < len(paths):
        skip(f"{len(paths) - len(kept)} images of train of which no depth is known", len(paths) - len(kept))
    return Pairs(kept, partial(finite, read=read), crop)


def depth_pairs(c, *split):
    """train/rgb_NAME.jpg, train/depth_NAME.png; or a list of image, depth, focal"""
    if c.task in LISTS:
        return listed(c, Path(c.data, LISTS[c.task]), [("", c.task)] * 2)
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
    return listed(c, lists[0], ROOTS[split[0]])


def listed(c, path, roots):
    """Images and depths of a list.    roots  of both: where its paths may begin"""
    rows = [line.split() for line in lines(path, "image, depth, focal length")]
    known = evenly([row[:2] for row in rows if len(row) > 1 and row[1] != "None"], c.limit)
    if unknown := sum(len(row) < 2 or row[1] == "None" for row in rows):
        skip(f"{unknown} images of {path}, which have no depth", unknown)
    places = [[located(c.data, below, row[k]) for row in known] for k, below in enumerate(roots)]
    return list(zip(*(there(paths, path) for paths in places), strict=True))


def numbered(path):
    """What image and depth of one scene have in their names alike"""
    return path.stem.removeprefix("sync_").removeprefix("depth_").removeprefix("rgb_")


def located(data, roots, name):
    """Where a list's file lies, below the first of the roots that has it"""
    paths = [Path(data, root, name.lstrip("/")) for root in roots]
    return next((path for path in paths if path.is_file()), paths[-1])


def scored_pixels(truth, form):
    """H W bool: inside the set's crop, and of a depth that counts"""
    return torch.from_numpy(within(truth.shape, form.scored) & (truth > form.near) & (truth < form.top))
