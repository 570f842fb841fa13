"""
An image in overlapping windows, and what a decoder says of the windows as one map. The side of a window is that of
--resolution, their distance the decoder's: see decoders/.

    windows    an image -> its windows               slide    the windows' answers -> one answer, of the image's size
"""

import torch
import torch.nn.functional as F

from engine.views import scaled


def starts(length, side, stride):
    """Where windows begin; the last one is shifted back to end with the image."""
    return [min(k * stride, length - side) for k in range(max(length - side + stride - 1, 0) // stride + 1)]


def places(size, side, stride):
    """(row, column) of each window of H W, row by row"""
    return [(y, x) for y in starts(size[0], side, stride) for x in starts(size[1], side, stride)]


def enlarged(size, side):
    """H W once its short side is `side`"""
    scale = side / min(size)
    return tuple(max(side, round(x * scale)) for x in size)


def windows(image, side, stride, short=0):
    """C H W -> square views that cover it, row by row; its short side becomes `short`, 0 = theirs"""
    image = scaled(image, short or side)
    return [image[..., y : y + side, x : x + side] for y, x in places(image.shape[1:], side, stride)]


def resized(map, size):
    """C h w -> C H W, bilinear"""
    return F.interpolate(map[None], size, mode="bilinear", align_corners=False)[0]


def slide(answers, size, side, stride, short=0):
    """
    answers  of each window of an image of H W, in the order of `windows`: C h w
    returns  C H W: each enlarged to its window, their mean where they overlap, resized to the image
    """
    H, W = enlarged(size, short or side)
    total, visits = 0, torch.zeros(H, W, device=answers[0].device)
    for (y, x), answer in zip(places((H, W), side, stride), answers, strict=True):
        total = total + F.pad(resized(answer, (side, side)), (x, W - side - x, y, H - side - y))
        visits[y : y + side, x : x + side] += 1
    return resized(total / visits, size)
