"""
Sets of aerial images with the height of what grows there for every pixel.

    a folder    train/rgb_NAME.jpg, train/height_NAME.tif, and test/ or val/ likewise: float32 are metres, 16 bits
                decimetres; not known is nan, below 0, or 65535. Images of other channels: --bands, --scale
    Open-Canopy  canopy_height/, as it was published: opencanopy.py
    shapes      generated scenes: what is near is high, and a scanner has left gaps
"""

from functools import partial

import numpy as np
from PIL import Image

from engine.features import reads
from engine.task import skip
from sets import opencanopy
from sets.depths import FLAT
from sets.pairs import Pairs, alike, below, folders, generated, images_below, keyed, paired, verified

DECIMETRES = 10      # to a metre; Open-Canopy's
NODATA = 65535
EDGE, BLOCK = 3, 50  # pixels that the score cuts at the top and left, of its blocks' sides
SMALLEST = EDGE + BLOCK
TALLEST = 120.0      # metres: no tree is as high
SWATH, GAP = 32, 3   # pixels of `shapes`: how far a scanner's gaps lie apart, how wide they are


def read_heights(path):
    """A file of heights -> H W float32, metres; nan = not known"""
    with Image.open(path) as file:
        if not file.mode.startswith(("I", "F")):
            raise ValueError(f"--data: {path} has mode {file.mode}, {len(file.getbands())} x 8 bits; wanted metres, "
                             "float32, or decimetres, of 16 bits")
        stored, metres = np.asarray(file).astype(np.float32), file.mode.startswith("F")
    if not metres:
        stored = np.where(stored == NODATA, np.nan, stored / DECIMETRES)
    return np.where(np.isfinite(stored) & (stored >= 0), stored, np.nan).astype(np.float32)


def plausible(truth, size, path, scored=False):
    """Whether anything is known. Raises ValueError for heights in another unit, and for none to score."""
    alike(truth, size, path)
    if min(truth.shape) < SMALLEST:
        raise ValueError(f"--data: {path} has {truth.shape[1]}x{truth.shape[0]} pixels; wanted {SMALLEST} or more each "
                         "way")
    known = truth[~np.isnan(truth)]
    if known.size and known.max() > TALLEST:
        raise ValueError(f"--data: {path} is up to {known.max():.4g} m high; wanted at most {TALLEST:g} m: float32 are "
                         "metres, 16 bits decimetres")
    if scored and not known.size:
        raise ValueError(f"--data: {path} has no known height to score; leave it out")
    return known.size > 0


def open_heights(c):
    """train (None under --head), val"""
    if c.data == "shapes":
        return generated(c, heights_of)
    if root := opencanopy.listed(c):
        return opencanopy.open_canopy(c, root)
    train, photo = None, reads(c)
    if not c.head:
        paths = height_pairs(c, "train")
        known = verified(c, Pairs(paths, read_heights), plausible)
        if n := known.count(False):
            skip(f"{n} images of train of which no height is known", n)
        train = Pairs([path for path, there in zip(paths, known, strict=True) if there], read_heights, photo=photo)
        if not len(train):
            raise ValueError(f"--data: no height of train of {c.data} is known")
    val = Pairs(height_pairs(c, "test", "val"), read_heights, photo=photo)
    verified(c, val, partial(plausible, scored=True))
    return train, val


def height_pairs(c, *split):
    root = folders(c, *split)
    files = images_below(root)
    return paired(c, *(keyed([path for path in files if path.name.startswith(kind)], partial(named, root, kind))
                       for kind in ("rgb_", "height_")))


def named(root, kind, path):
    """What image and heights of one place have in their names alike"""
    return below(root)(path).parent / path.stem.removeprefix(kind)


def heights_of(scene):
    y, x = np.indices(scene.depth.shape)
    return np.where((y + x // 3) % SWATH < GAP, np.nan, FLAT - scene.depth).astype(np.float32)
