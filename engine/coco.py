"""
Average precision of detections, as COCO has it: to the last digits what pycocotools says.

    Objects       what is in an image
    coco_scores   AP, AP50, AP75, and of small, medium and large objects                     Lin et al. 2014
    placed        one image, one class: which detection is right, at each of ten overlaps

Boxes are left, top, right, bottom, in pixels; float64.
"""

from typing import NamedTuple

import numpy as np

OVERLAPS = np.linspace(0.5, 0.95, 10)  # IoU from which on a detection is right
RECALLS = np.linspace(0, 1, 101)       # at which precision is read
AREAS = dict(ap=(0, 1e10), ap_small=(0, 32**2), ap_medium=(32**2, 96**2), ap_large=(96**2, 1e10))  # square pixels
COUNTED = 100                          # detections of a class in an image


class Objects(NamedTuple):
    boxes: np.ndarray      # m 4
    labels: np.ndarray     # m int
    crowds: np.ndarray     # m bool: what lies in one is neither right nor wrong
    areas: np.ndarray      # m: that of the object itself where it is known, else of its box
    size: tuple = ()       # H W
    dropped: int = 0       # others that are of no use


def coco_scores(found, truths):
    """
    found    of each image (boxes n 4, scores n, labels n)    truths  Objects of each
    returns  {ap, ap50, ap75, ap_small, ap_medium, ap_large}, in percent; None for an area of which there is no object
    """
    classes = np.unique(np.concatenate([truth.labels[~truth.crowds] for truth in truths] + [np.zeros(0, int)]))
    by_area = {name: [] for name in AREAS}
    for label in classes:
        images = [of_class(*each, label) for each in zip(found, truths, strict=True)]
        for name, area in AREAS.items():
            curve = precisions([placed(*image, area) for image in images])
            by_area[name] += [curve] if curve is not None else []
    every = np.array(by_area["ap"]).reshape(-1, len(OVERLAPS), len(RECALLS))
    scores = dict(ap=every, ap50=every[:, :1], ap75=every[:, 5:6],
                  **{name: np.array(by_area[name]) for name in list(AREAS)[1:]})
    return {name: 100 * float(x.mean()) if x.size else None for name, x in scores.items()}


def of_class(found, truth, label):
    """-> boxes n 4 and scores n of the best detections of a class, best first; Objects of it"""
    boxes, scores, labels = found
    rows = np.flatnonzero(labels == label)
    rows = rows[np.argsort(-scores[rows], kind="stable")][:COUNTED]
    there = truth.labels == label
    return boxes[rows].astype(float), scores[rows], Objects(*(x[there] for x in truth[:4]))


def placed(boxes, scores, truth, area):
    """
    Best first, each detection takes the object that it overlaps most, of those that are left, if by enough.

    returns  scores n;  right, counted 10 n bool: at each of OVERLAPS;  how many objects count
    """
    ignored = truth.crowds | (truth.areas < area[0]) | (truth.areas > area[1])
    order = np.argsort(ignored, kind="stable")  # an object that counts goes before all others
    ignored, crowds, iou = ignored[order], truth.crowds[order], overlaps(boxes, truth)[:, order]
    n, m = iou.shape
    left, right = np.ones((len(OVERLAPS), m), bool), np.zeros((len(OVERLAPS), n), bool)
    outside = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    outside = (outside < area[0]) | (outside > area[1])
    counted = np.tile(~outside, (len(OVERLAPS), 1))
    for k in range(n if m else 0):
        enough = (left | crowds) & (iou[k] >= np.minimum(OVERLAPS, 1 - 1e-10)[:, None])        # 10 m
        for part in enough & ~ignored, enough & ignored & ~(enough & ~ignored).any(1, keepdims=True):
            best = m - 1 - np.where(part, iou[k], -1)[:, ::-1].argmax(1)                       # of equal ones the last
            hit = np.flatnonzero(part.any(1))
            left[hit, best[hit]] = False
            right[hit, k] = counted[hit, k] = ~ignored[best[hit]]
    return scores, right, counted, int((~ignored).sum())


def overlaps(boxes, truth):
    """IoU n m; of a crowd the share of the detection that lies in it"""
    low = np.maximum(boxes[:, None, :2], truth.boxes[:, :2])
    inside = (np.minimum(boxes[:, None, 2:], truth.boxes[:, 2:]) - low).clip(0).prod(-1)
    own, theirs = ((x[:, 2:] - x[:, :2]).prod(1) for x in (boxes, truth.boxes))
    union = own[:, None] + np.where(truth.crowds, 0, theirs - inside)
    return inside / np.maximum(union, np.spacing(1))


def precisions(images):
    """What `placed` says of all images of a class -> precision at RECALLS, 10 101; None if no object counts"""
    scores, right, counted, n = zip(*images, strict=True)
    if not sum(n):
        return None
    order = np.argsort(-np.concatenate(scores), kind="stable")
    right, counted = (np.concatenate(x, 1)[:, order] for x in (right, counted))
    hits, misses = (right & counted).cumsum(1).astype(float), (~right & counted).cumsum(1)
    recall, precision = hits / sum(n), hits / (hits + misses + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    at = np.stack([np.searchsorted(row, RECALLS, side="left") for row in recall])              # 10 101
    return np.take_along_axis(np.pad(precision, ((0, 0), (0, 1))), at, 1)
