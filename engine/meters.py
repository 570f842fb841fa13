"""
Meters that tell a healthy run from a sick one, of a logged step; health.py reads them.

    health            all of them, of targets and features
    of_features       those that need no prototypes
    effective_rank    how many directions a set of vectors spreads over

Dimension letters: see the top of model.py.
"""

import math

import torch
import torch.nn.functional as F

PATCHES = 512  # at least: eigenvalues of 1,000 take 0.2 s of a core, of 520 0.02


@torch.no_grad()
def health(c, targets, features, masks=None):
    """
    of_features, and of the teacher's targets:

    dino_entropy     of each, over ln K: 1 = uniform, 0 = one prototype
    dino_balance     entropy of their mean, over ln K: 1 = all prototypes get the same, 0 = one gets all
    prototypes_used  that are some image's first choice, of the most that this batch can use
    """
    dino = targets["dino"].written().flatten(0, 1)                                # (G B) K
    used = len(dino.argmax(-1).unique()) / min(dino.shape)
    entropy, balance = (entropy_of(x) / math.log(c.dino_prototypes) for x in (dino, dino.mean(0)))
    return dict(dino_entropy=entropy, dino_balance=balance, prototypes_used=used) | of_features(features, masks)


def entropy_of(p):
    """Mean over all rows, nats.    p  ... K, rows sum to 1"""
    return -(p * (p + 1e-30).log()).sum(-1).mean().item()


@torch.no_grad()
def of_features(features, masks=None):
    """
    Of the student's global crops; masked patches are left out.

    cls_rank          effective rank of the class tokens (RankMe)
    patch_rank        the same of some PATCHES of all images' patches, evenly spaced
    patch_neighbours  mean cosine of a patch and the one beside or below it
    patch_others      of any two patches of an image
    patch_cls         of a patch and the class token of its image

    masks    (G B) P bool, True = hidden; None = none is
    """
    x = F.normalize(features.patches.float(), dim=-1)                             # (G B) P D
    seen = torch.ones_like(x[..., :1]) if masks is None else (~masks)[..., None].float()
    x, n = x * seen, seen.sum(1)                                                  # n  (G B) 1
    X, S = (each.unflatten(1, features.grid) for each in (x, seen))               # (G B) h w D or 1
    near, pairs = (sum((each[:, i:, j:] * each[:, : X.shape[1] - i, : X.shape[2] - j]).sum()
                       for i, j in ((0, 1), (1, 0))) for each in (X, S))
    others = (x.sum(1).square().sum() - n.sum()) / (n * (n - 1)).sum()
    cls = (x.sum(1) * F.normalize(features.cls.float(), dim=-1)).sum() / n.sum()
    found = dict(patch_neighbours=near / pairs, patch_others=others, patch_cls=cls)
    some = features.patches.flatten(0, 1) if masks is None else features.patches[~masks]
    some = some[:: max(len(some) // PATCHES, 1)]
    ranks = dict(cls_rank=effective_rank(features.cls).item(), patch_rank=effective_rank(some).item())
    return ranks | {name: value.nan_to_num().item() for name, value in found.items()}


def effective_rank(x):
    """exp of the entropy of the singular values, by way of the eigenvalues of the smaller Gram matrix.    x  n D"""
    x = x.cpu().double()
    gram = x @ x.mT if len(x) < x.shape[1] else x.mT @ x
    spectrum = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = spectrum / spectrum.sum().clamp(min=1e-12)
    return (-(p * (p + 1e-12).log()).sum()).exp()
