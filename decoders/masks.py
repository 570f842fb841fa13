"""
What decoders of masks share: which query is meant for which segment, the loss of that, and what the answers say.

    segments_of        numbers H W -> segments and their classes
    sample             an image as a step sees it, with its segments
    match              queries and segments, each with at most one of the other      Hungarian: Carion et al. 2020
    masks_loss         classes of all queries, masks of the matched, at points       Cheng et al. 2022
    semantic           answers -> scores of all classes for each pixel
    panoptic           answers -> one segment for each pixel, its class and score
    instances          answers -> masks that may overlap, best first

Segments are numbers H W, from 1 on; 0 is void, outside of every mask. Dimension letters: see mask2former.py.
"""

import numpy as np
import torch
import torch.nn.functional as F

from engine import crops
from engine.metrics import CROWD, IGNORE

CLASS, MASK, DICE = 2.0, 5.0, 5.0  # weights, of costs and of losses
NOTHING = 0.1                      # weight of the class `none of them`
POINTS = 12544                     # at which masks are compared: one of 64 pixels of the paper's crops of 896
OVERSAMPLED = 3                    # so many times as many are drawn; of these
UNSURE = 0.75                      # of POINTS are those at which a mask is least sure; the others are drawn anew
SURE, WON = 0.8, 0.8               # panoptic: least score of a segment; least share of it that others leave

# --------------------------------------------------------------------------------
# Loss


def segments_of(truth, per=1):
    """
    Numbers H W -> segments H W int64, their classes n int64

    per  numbers of one class, consecutive: 1 = a segment is a class, of an image's whole; void is class IGNORE, and
         so are crowds
    """
    truth = truth.long()
    known = (truth // per != IGNORE) & ((truth % per != CROWD) | (per == 1))
    found, numbers = truth[known].unique(return_inverse=True)
    segments = torch.zeros_like(truth)
    segments[known] = numbers + 1
    return segments, found // per


def sample(row, rng, source, order, side, per=1, scales=crops.SCALES):
    """
    What a step sees of one image:  C H W uint8, its segments, their classes, a seed for the points

    rng  None: as it is, its middle    order  whose truth it has    scales  see crops.py
    """
    image, truth = source.image(row), source.truth(order[row])
    image, truth = crops.held(image, truth, side, IGNORE * per) if rng is None else \
        crops.augmented(image, truth, rng, side, IGNORE * per, per, scales)
    return image, *segments_of(truth, per), torch.tensor(0 if rng is None else rng.integers(2**62))


def read_at(maps, points):
    """B n H W between their pixels at B n P 2 or B 1 P 2, x, y in 0 to 1 -> B n P"""
    if points.shape[1] == 1:
        return F.grid_sample(maps, 2 * points - 1, align_corners=False)[:, :, 0]
    found = F.grid_sample(maps.flatten(0, 1)[:, None], 2 * points.flatten(0, 1)[:, None] - 1, align_corners=False)
    return found[:, 0, 0].unflatten(0, maps.shape[:2])


def costs(logits, found, truths, classes, points, of_class=CLASS):
    """
    logits  O Q n+1    found  O Q h w    truths  m H W    classes  m    points  O 1 P 2
    returns O Q m:  of_class x -probability of the class + 5 x cross entropy of the mask + 5 x dice, both at the points
    """
    x = read_at(found, points)                                                                 # O Q P
    y = read_at(truths.expand(len(x), -1, -1, -1), points)                                     # O m P
    here, away = F.softplus(-x), F.softplus(x)
    entropy = (here @ y.mT + away @ (1 - y).mT) / x.shape[2]
    p = x.sigmoid()
    dice = 1 - (2 * p @ y.mT + 1) / (p.sum(2)[:, :, None] + y.sum(2)[:, None] + 1)
    return MASK * entropy + DICE * dice - of_class * logits.softmax(2)[:, :, classes]


@torch.no_grad()
def match(logits, found, truths, classes, points, of_class=CLASS):
    """Arguments as of costs -> queries O m, where m <= Q: that of each segment; those without one are -1"""
    cost = costs(logits, found, truths, classes, points, of_class).nan_to_num(1e6, 1e6, -1e6).cpu().numpy()
    queries = torch.full((len(cost), len(classes)), -1)
    for o, each in enumerate(cost):
        rows, columns = torch.from_numpy(assignment(each))
        queries[o, columns] = rows
    return queries.to(logits.device)


def assignment(cost):
    """Rows and columns, 2 k int64, whose sum is least. Raises ValueError without scipy."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ValueError("scipy is not installed, and training masks wants it; pip install -e .[decoders]") from error
    return np.stack(linear_sum_assignment(cost)).astype(np.int64)


@torch.no_grad()
def unsure_points(found, n, generator):
    """Of each of M h w masks:  M n 2, most of them where it is least sure"""
    many = torch.rand(len(found), OVERSAMPLED * n, 2, generator=generator).to(found.device)
    doubt = -read_at(found[:, None], many[:, None])[:, 0].abs()
    taken = doubt.topk(int(UNSURE * n), dim=1).indices[:, :, None].expand(-1, -1, 2)
    anew = torch.rand(len(found), n - int(UNSURE * n), 2, generator=generator).to(found.device)
    return torch.cat([many.gather(1, taken), anew], 1)


def masks_loss(found, segments, classes, seeds, n_points=POINTS, of_class=CLASS):
    """
    Sum over all predictions o of  of_class CE_o + 5 BCE_o + 5 dice_o:

        CE_o    of the classes of all queries, weighted mean: 0.1 for a query without a segment
        BCE_o   sum over segments of the mean over points of the cross entropy of its query's mask, over all segments
        dice_o  the same of  1 - (2 sum p y + 1) / (sum p + sum y + 1)

    found     Answers    segments  H W each    classes  m each    seeds  of the points of each image: they are its own
    returns   scalar
    paper:    App. D.10 is silent; Cheng et al. 2022
    differs:  there segments are counted over all ranks' images, here over those that have one loss
    """
    logits, maps = torch.stack(found.logits), torch.stack(found.masks)                         # O B ...
    target = torch.full(logits.shape[:3], logits.shape[3] - 1, device=logits.device)           # O B Q
    total, count = 0, max(sum(len(each) for each in classes), 1)
    for b, (numbers, own, seed) in enumerate(zip(segments, classes, seeds, strict=True)):
        if not len(own):
            continue
        generator = torch.Generator().manual_seed(int(seed))
        truths = (numbers == torch.arange(1, len(own) + 1, device=numbers.device)[:, None, None]).float()
        points = torch.rand(len(logits), 1, n_points, 2, generator=generator).to(maps.device)
        queries = match(logits[:, b], maps[:, b], truths, own, points, of_class)                         # O m
        o, k = (queries >= 0).nonzero(as_tuple=True)
        target[o, b, queries[o, k]] = own[k]
        total = total + mask_terms(maps[o, b, queries[o, k]], truths, k, n_points, generator) / count
    weight = torch.ones(logits.shape[3], device=logits.device)
    weight[-1] = NOTHING
    return total + of_class * sum(F.cross_entropy(x.flatten(0, 1), y.flatten(), weight)
                               for x, y in zip(logits, target, strict=True))


def mask_terms(maps, truths, k, n_points, generator):
    """Masks M h w of segments k of truths m H W -> 5 BCE + 5 dice, summed over the masks"""
    points = unsure_points(maps, n_points, generator)                                          # M P 2
    x = read_at(maps[:, None], points[:, None])[:, 0]                                          # M P
    y = torch.cat([read_at(truths[i][None, None], points[k == i].view(1, 1, -1, 2)).view(-1, n_points)
                   for i in range(len(truths))])
    x = torch.cat([x[k == i] for i in range(len(truths))])
    p = x.sigmoid()
    dice = 1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)
    return MASK * F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1).sum() + DICE * dice.sum()

# --------------------------------------------------------------------------------
# What answers say


def semantic(logits, masks, size):
    """B Q n+1, B Q h w -> B n H W:  sum over queries of  p(class) p(mask)"""
    masks = F.interpolate(masks.float(), size, mode="bilinear", align_corners=False).sigmoid()
    return torch.einsum("bqn,bqhw->bnhw", logits.float().softmax(2)[..., :-1], masks)


def panoptic(logits, masks, size, stuff=(), sure=SURE, won=WON):
    """
    Of one image:  Q n+1, Q h w -> segments H W int64, 0 where there is none; [(class, score)] of segments 1, 2, ...

    stuff  classes of which an image has one segment at most
    sure   least score of a query    won  least share of a query's own mask in which no other one beats it
    """
    scores, classes = logits.float().softmax(1).max(1)
    kept = (classes < logits.shape[1] - 1) & (scores > sure)
    scores, classes = scores[kept], classes[kept]
    segments, known, merged = torch.zeros(size, dtype=torch.int64, device=masks.device), [], {}
    if not kept.any():
        return segments, known
    masks = F.interpolate(masks[None, kept].float(), size, mode="bilinear", align_corners=False)[0].sigmoid()
    winner = (scores[:, None, None] * masks).argmax(0)
    for q, (label, score) in enumerate(zip(classes.tolist(), scores.tolist(), strict=True)):
        own = masks[q] >= 0.5
        mine = winner == q
        seen = mine & own
        if not seen.any() or mine.sum() < won * own.sum():
            continue
        if label in merged:
            segments[seen] = merged[label]
            continue
        known.append((label, score))
        segments[seen] = len(known)
        if label in stuff:
            merged[label] = len(known)
    return segments, known


def instances(logits, masks, size, things, top=100):
    """
    Of one image:  Q n+1, Q h w -> masks k H W bool, classes k, scores k, best first; every query may have many classes

    score  p(class) x mean of p(mask) where it is at least a half
    """
    p = logits.float().softmax(1)[:, list(things)].flatten()
    scores, index = p.topk(min(top, len(p)))
    masks = F.interpolate(masks[None].float(), size, mode="bilinear", align_corners=False)[0]
    masks = masks[index // len(things)]
    inside = masks > 0
    scores = scores * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    order = scores.argsort(descending=True)
    classes = torch.tensor(list(things), device=scores.device)[index % len(things)]
    return inside[order], classes[order], scores[order]
