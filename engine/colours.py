"""
The operations that recolour training crops: of RGB as Pillow and torchvision round them, levels of 0 to 255, whole ones
after each; data.augment applies them, or the kernels of csrc/, which make the same bytes.

    OPERATIONS    column of the table of colours -> operation; what it takes of the amounts drawn
    OF_FLOATS     the same of images that are no RGB photos: N channels from 0 to 1, and nothing is rounded

An operation takes n C H W, float32, and an amount for each of the n crops, n 1 1 1; it returns the like.
"""

import numpy as np
import torch
import torch.nn.functional as F

# columns of the table of colours, one row for each crop; an entry of 0 in APPLY, GREY, SIGMA, SOLARIZE means off
APPLY, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARIZE = 0, 1, 2, 3, 4, slice(5, 9), 9, 10, 11


def luma(x):
    """n 3 H W -> n 1 H W, ITU-R 601, rounded"""
    return ((19595 * x[:, :1] + 38470 * x[:, 1:2] + 7471 * x[:, 2:] + 32768) / 65536).trunc()


def blend(low, x, factor):
    return (low + (x - low) * factor).clamp(0, 255).trunc()


def adjust_brightness(x, factor):
    return blend(0, x, factor)


def adjust_contrast(x, factor):
    n = x[0, 0].numel()
    mean = (2 * luma(x).long().sum((1, 2, 3), keepdim=True) + n) // (2 * n)
    return blend(mean, x, factor)


def adjust_saturation(x, factor):
    return blend(luma(x), x, factor)


def adjust_hue(x, turn):
    """By way of HSV, whose hue and saturation are levels too.    turn  levels, whole"""
    top, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)       # n 1 H W
    chroma, (r, g, b) = top - low, x.split(1, dim=1)
    red, green = top == r, top == g
    lowest = torch.where(red, g, torch.where(green, b, r)) == low
    sector, sign = torch.where(red, 0, torch.where(green, 2, 4)), torch.where(lowest, 1, -1)
    middle = r + g + b - top - low
    hue = sector - sign + sign * ((top - middle) / chroma.clamp(min=1))
    hue = hue / torch.full_like(hue, 6)  # a number's reciprocal would do on CUDA, and round otherwise
    hue = 6 * (((torch.where(hue < 0, hue + 1, hue) * 255).trunc() + turn) % 256)
    share = torch.cat([510 - (hue - 765).abs(), (hue - 510).abs() - 255, (hue - 1020).abs() - 255], dim=1)
    saturation = (chroma / top.clamp(min=1) * 255).trunc()
    return (top + 0.5 - top * saturation * share.clamp(0, 255) * (1 / 65025)).trunc()


def to_grey(x, _):
    return luma(x).expand_as(x)


def blur(x, taps):
    return smooth(x, taps).round()


def smooth(x, taps):
    """9-tap Gaussian, edges mirrored.    taps  5 n 1 1 1: the middle one and those on either side"""
    x = F.pad(x, (4, 4, 4, 4), mode="reflect")
    for dim in 3, 2:
        near = [x.narrow(dim, at, x.shape[dim] - 8) for at in range(9)]
        x = near[4] * taps[0]
        for t in range(1, 5):
            x = x + (near[4 - t] + near[4 + t]) * taps[t]
    return x


def solarize(x, _):
    return torch.minimum(x, 255 - x)


def gaussian_taps(sigma):
    """n -> 5 n, float32"""
    t = np.arange(5)[:, None]
    weight = np.exp(-0.5 * t * t / sigma.astype(np.float64) ** 2)
    return (weight / (weight[0] + 2 * weight[1:].sum(0))).astype(np.float32)


def hue_levels(turn):
    """Of the circle -> levels, as a byte wraps around"""
    return (turn.astype(np.float64) * 255).astype(np.int64).astype(np.uint8)


OPERATIONS = {  # column of the table: operation; what it takes of the amounts drawn
    BRIGHTNESS: (adjust_brightness, np.asarray), CONTRAST: (adjust_contrast, np.asarray),
    SATURATION: (adjust_saturation, np.asarray), HUE: (adjust_hue, hue_levels), GREY: (to_grey, np.asarray),
    SIGMA: (blur, gaussian_taps), SOLARIZE: (solarize, np.asarray)}

# --------------------------------------------------------------------------------
# Of N channels, which may be no colours: grey is their mean, there is no hue


def mix(low, x, factor):
    return (low + (x - low) * factor).clamp(0, 1)


OF_FLOATS = {
    BRIGHTNESS: (lambda x, factor: mix(0, x, factor), np.asarray),
    CONTRAST: (lambda x, factor: mix(x.mean((1, 2, 3), keepdim=True), x, factor), np.asarray),
    SATURATION: (lambda x, factor: mix(x.mean(1, keepdim=True), x, factor), np.asarray),
    GREY: (lambda x, _: x.mean(1, keepdim=True).expand_as(x), np.asarray),
    SIGMA: (smooth, gaussian_taps), SOLARIZE: (lambda x, _: torch.minimum(x, 1 - x), np.asarray)}
