"""
What decoders of depth share: the values that their bins stand for, the mean of them, and what they are trained on.

    evenly, mixed      n bins of the depths from near to far                       DINOv3 App. D.2, D.11; canopy: D.13
    mean_of_bins       logits of the bins -> depth
    absolute_loss      of the logarithms, scale mostly forgiven                    Eigen et al. 2014; App. D.2
    relative_loss      scale and shift forgiven, edges kept                        Ranftl et al. 2020; App. D.11
    aligned            the scale and shift that fit a truth best                   App. D.11
    Depth              a backbone and its decoder: images -> metres

Metres, float32. Dimension letters: see the top of model.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

STRIDES = 1, 2, 4, 8     # pixels: of the gradient term
EDGES = 2.0              # its weight beside the other's

# --------------------------------------------------------------------------------
# Bins


def evenly(near, far, n=256):
    """n depths, both ends among them"""
    return torch.linspace(near, far, n)


def mixed(near, far, n=256):
    """
    n heights of a canopy: the first evenly in the logarithm, the last evenly, in between a mixture of both

    paper:   §8, App. D.13; the released head's form. It has bins to far / 8, and takes the mean times 8
    """
    t = torch.linspace(1, 0, n)
    logarithmic = torch.linspace(math.log(near), math.log(far / 8), n).exp()
    return 8 * (t * logarithmic + (1 - t) * evenly(near, far / 8, n))


def mean_of_bins(logits, bins, least=0.1):
    """
    ... n h w -> ... h w:  sum_k v_k bins_k / sum_k v_k,  v = relu(logits) + least

    least  no bin has less; 0.1 for depth, 1e-8 for canopies, as released
    """
    v = logits.float().relu()
    bins = bins.to(v)
    both = torch.einsum("...khw,jk->j...hw", v, torch.stack([bins, torch.ones_like(bins)]))    # one pass over v
    return (both[0] + least * bins.sum()) / (both[1] + least * len(bins))

# --------------------------------------------------------------------------------
# Losses: of predictions and truths, both B H W; truths that are not known are 0


def known(truth, far):
    return (truth > 0) & (truth <= far)


def absolute_loss(found, truth, counted):
    """
    sqrt(var(g) + 0.15 mean(g)^2),  g = ln(found + 0.001) - ln(truth + 0.001) over the pixels that count

    differs: the released code leaves out the variance for the first 100 steps
    """
    g = (found[counted] + 1e-3).log() - (truth[counted] + 1e-3).log()
    return (g.var() + 0.15 * g.mean() ** 2 + 1e-12).sqrt()


def standardised(depth, counted):
    """
    One image without its scale and shift:  (d - median) / mean |d - median|, over the pixels that count, 0 elsewhere

    paper: App. D.11 has the losses of Depth Anything V2; of an even number the lower middle is the median
    """
    median = depth[counted].median()
    scale = (depth[counted] - median).abs().mean().clamp(min=1e-6)
    return torch.where(counted, (depth - median) / scale, 0)


def relative_loss(found, truth, counted):
    """
    Mean over the images of  mean |r| + 2 sum over strides k of mean |r[+k] - r| down and across,  r the difference of
    both, standardised. Images that count nothing are left out.

    paper:   App. D.11: the losses of Depth Anything V2, 1 : 2
    differs: strides 1, 2, 4, 8 as in MiDaS, where the released code has 1, 2, 4, 6, and differences two pixels apart
    """
    terms = []
    for f, t, there in zip(found, truth, counted, strict=True):
        if there.any():
            r = standardised(f, there) - standardised(t, there)
            terms.append(r.abs().sum() / there.sum() + EDGES * sum(edges(r, there, k) for k in STRIDES))
    return torch.stack(terms).mean() if terms else found.sum() * 0


def edges(r, there, stride):
    """Mean over a coarser grid of how much r, H W, changes from one pixel to the next, down and across"""
    r, there = r[::stride, ::stride], there[::stride, ::stride]
    both = there[1:] & there[:-1], there[:, 1:] & there[:, :-1]
    steps = (r[1:] - r[:-1]).abs() * both[0], (r[:, 1:] - r[:, :-1]).abs() * both[1]
    return sum(step.sum() for step in steps) / there.sum().clip(min=1)


def aligned(found, truth, counted):
    """found H W as s found + t, whose squared distance to the truth is least where it counts; in float64"""
    f, t = found[counted].double(), truth[counted].double()
    f0, t0 = f - f.mean(), t - t.mean()
    scale = (f0 * t0).sum() / (f0 * f0).sum().clamp(min=1e-12)
    return (scale * (found.double() - f.mean()) + t.mean()).float()

# --------------------------------------------------------------------------------
# A decoder on its backbone


def padded(images, patch):
    """B C H W -> whole patches, zeros around the middle; of an odd number the larger part below and to the right"""
    missing = [-n % patch for n in images.shape[-2:]]
    (top, left), (bottom, right) = [n // 2 for n in missing], [n - n // 2 for n in missing]
    return F.pad(images, (left, right, top, bottom))


class Depth(nn.Module):
    """images B 3 H W, normalised -> B h' w' metres, in the decoder's own resolution, the padding not cut away"""

    def __init__(self, backbone, head, layers, bins, least, heights=False):
        """head  list of Features, of `layers` -> B n h' w'    heights  of canopies, and no depth"""
        super().__init__()
        self.backbone, self.head, self.layers, self.least, self.heights = backbone, head, layers, least, heights
        self.register_buffer("bins", bins, persistent=False)

    @torch.no_grad()
    def forward(self, images):
        x = padded(images, self.backbone.config.patch_size)
        return mean_of_bins(self.head(self.backbone.layers(x, self.layers)), self.bins, self.least)
