"""
What the network sees of an image: each function takes C H W uint8, the side of --resolution and the patch's, and gives
the views, C H W uint8 each. A task names one of them in its record.

    centre_crop      short side to 256/224 of the side, the middle cut out       as everyone classifies at 224
    middle           short side to the side, the middle cut out                  as the paper classifies at 512
    letterbox        the whole image on a black square
    squared          the whole image on a white square, in its upper left
    fitted, mirrored the whole image in whole patches; and its mirror image
    padded           the whole image, its lower and right edge padded to whole patches

and the arithmetic of sizes that tasks share: scaled, nearest. Windows: see sliding.py.
"""

import numpy as np
import torch
import torch.nn.functional as F

from engine.images import resize

GREY = 124, 116, 104   # 0 once it is normalised, to 1/120, for networks that saw photos; those of satellites: to 0.8


def centre_crop(image, side, patch):
    """One square: the short side becomes side * 256/224, then the middle is cut out."""
    H, W = image.shape[1:]
    scale = round(side * 256 / 224) / min(H, W)
    image = resize(image, max(side, round(H * scale)), max(side, round(W * scale)))
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    return [image[:, top : top + side, left : left + side]]


def middle(image, side, patch):
    """One square: the short side becomes `side`, and the middle is cut out."""
    image = scaled(image, side)
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    return [image[:, top : top + side, left : left + side]]


def letterbox(image, side, patch):
    """One square: the long side becomes `side`, black lies on both sides of the short one."""
    scale = side / max(image.shape[1:])
    image = resize(image, *(max(1, round(x * scale)) for x in image.shape[1:]))
    top, left = (side - image.shape[1]) // 2, (side - image.shape[2]) // 2
    return [F.pad(image, (left, side - image.shape[2] - left, top, side - image.shape[1] - top))]


def squared(image, side, patch):
    """One square: padded with white below or to the right, then resized."""
    longest = max(image.shape[1:])
    padding = 0, longest - image.shape[2], 0, longest - image.shape[1]
    return [resize(F.pad(image, padding, value=255), side, side)]


def fitted(image, side, patch):
    """The whole image as one view: its short side becomes `side`, 0 = stays; rounded up to whole patches."""
    short = min(image.shape[1:])
    return [resize(image, *(-(-x * (side or short) // (short * patch)) * patch for x in image.shape[1:]))]


def mirrored(image, side, patch):
    """As fitted, and its mirror image"""
    (view,) = fitted(image, side, patch)
    return [view, view.flip(2)]


def padded(image, side, patch):
    """The whole image as one view: its short side becomes `side`, 0 = stays; then padded with grey to whole patches."""
    image = scaled(image, side) if side else image
    H, W = image.shape[1:]
    out = torch.tensor(GREY, dtype=torch.uint8)[:, None, None].repeat(1, -(-H // patch) * patch, -(-W // patch) * patch)
    out[:, :H, :W] = image
    return [out]


def scaled(image, side):
    """C H W -> its short side becomes `side`, the other follows."""
    scale = side / min(image.shape[1:])
    return resize(image, *(max(side, round(x * scale)) for x in image.shape[1:]))


def nearest(truth, size):
    """H W array -> another size, without mixing values"""
    rows, cols = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, truth.shape, strict=True))
    return np.ascontiguousarray(truth[rows][:, cols])
