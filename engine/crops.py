"""
An image and the truth of its pixels, changed together: scaled, cut, mirrored; and recoloured, the image alone.

    augmented    what a step of training sees, side x side         the released code's, for segmentation: App. D.1, D.10
    recoloured   brightness, contrast, saturation, hue
    held         the same size, nothing random
    turned       what is seen from above: quarter turns
    truths_on    of features that are on disk: the truths, in 16 pixels a patch

Images C H W uint8; truths H W arrays of integers, whose `per` consecutive numbers are of one class.
"""

from functools import partial

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from engine.images import resize
from engine.views import GREY, nearest

SCALES = 0.5, 2.0        # of the short side
TRIES, MOST = 10, 0.75   # crops that are drawn; share of the known pixels that one class may have, until the last
HALF = 0.5               # how often an image is mirrored, and each colour changed
BRIGHTER = 32            # levels, at most
FACTOR = 0.5             # of contrast and saturation: 1 +- this
HUE = 0.5                # of the circle of colours, either way


def augmented(image, truth, rng, side, void, per=1, scales=SCALES):
    """
    image C H W, truth H W -> side side: the short side becomes 0.5 to 2 times that, or as `scales` says; cut at random,
    up to ten times until no class has more than three quarters of it; mirrored, recoloured; outside GREY and void

    void  the number in truth of what is not known, or more
    """
    H, W = image.shape[1:]
    short = int(side * rng.uniform(*scales))
    size = [max(round(x * short / min(H, W)), 1) for x in (H, W)]
    image = tv.resize(image, size, InterpolationMode.BILINEAR, antialias=True)
    truth = nearest(truth, size)
    for _ in range(TRIES):
        top, left = (int(rng.integers(max(n - side, 0) + 1)) for n in size)
        cut = truth[top : top + side, left : left + side]
        if balanced(cut, void, per):
            break
    image = image[:, top : top + side, left : left + side]
    if rng.random() < HALF:
        image, cut = image.flip(2), cut[:, ::-1]
    return padded(recoloured(image, rng), cut, side, void)


def balanced(truth, void, per):
    """Has it more than one class, none of which has nearly all of it?"""
    _, counts = np.unique(truth[truth < void] // per, return_counts=True)
    return len(counts) > 1 and counts.max() / counts.sum() < MOST


def padded(image, truth, side, void):
    """Below and to the right"""
    picture = torch.tensor(GREY, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
    known = np.full((side, side), void, truth.dtype)
    h, w = truth.shape
    picture[:, :h, :w], known[:h, :w] = image, truth
    return picture, torch.from_numpy(known)


def recoloured(image, rng):
    """
    Each of four changes in half of the cases, rounded after each; contrast before or after the colours

    paper: numbers of the released code
    """
    last = rng.random() < HALF
    changes = [lambda x: x.float() + rng.uniform(-BRIGHTER, BRIGHTER),
               lambda x: tv.adjust_saturation(x, rng.uniform(1 - FACTOR, 1 + FACTOR)),
               lambda x: tv.adjust_hue(x, rng.uniform(-HUE, HUE))]
    changes.insert(3 if last else 1, lambda x: x.float() * rng.uniform(1 - FACTOR, 1 + FACTOR))
    for change in changes:
        if rng.random() < HALF:
            image = change(image).round().clamp(0, 255).to(torch.uint8)
    return image


def held(image, truth, side, void):
    """image C H W, truth H W -> side side: the short side becomes that, and the middle is cut out"""
    H, W = image.shape[1:]
    size = [max(round(x * side / min(H, W)), side) for x in (H, W)]
    image, truth = tv.resize(image, size, InterpolationMode.BILINEAR, antialias=True), nearest(truth, size)
    top, left = (n // 2 - side // 2 for n in size)
    return padded(image[:, top : top + side, left : left + side], truth[top : top + side, left : left + side], side,
                  void)


def turned(row, rng, source, order, size):
    """
    Of what is seen from above: image `row` of a source, C H W, and truth order[row], H W, of `size`; if there is an rng
    turned by quarters, where they are square, and mirrored
    """
    image, truth = resize(source.image(row), *size), torch.from_numpy(nearest(source.truth(order[row]), size))
    if rng is not None:
        quarters, flip = rng.integers(4) if size[0] == size[1] else 2 * rng.integers(2), rng.integers(2)
        image, truth = (x.rot90(int(quarters), (-2, -1)) for x in (image, truth))
        image, truth = (x.flip(-1) if flip else x for x in (image, truth))
    return image.contiguous(), truth.contiguous()


def truth_at(i, source, order, sizes):
    return [nearest(source.truth(order[i]), sizes[i])]


def truths_on(maps, source, order, frozen):
    """Stored maps h w D of a source -> its truths order[i], 16h 16w each, stored as they are"""
    sizes = [(16 * h, 16 * w) for h, w, _ in maps.shapes]
    return frozen.keep("train truths", partial(truth_at, source=source, order=order, sizes=sizes), len(source)).row
