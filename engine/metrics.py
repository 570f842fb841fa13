"""
The numbers that the evaluations report, each a function of predictions and truth alone.

    confusion, segmentation_scores   mIoU, mean and overall accuracy                       DINOv3 App. D.1
    panoptic_counts, panoptic_scores  PQ: segments that are found, and how well            Kirillov et al. 2019
    depth_scores                     RMSE, relative error, delta, of one image             Eigen et al. 2014
    region, boundary                 J and F of one object in one frame                    Perazzi et al. 2016
    box_overlap                      IoU of boxes; CorLoc counts those of at least 0.5     Deselaers et al. 2010
    average_precision                of revisited Oxford and Paris, and its three levels   Radenovic et al. 2018
    eleven_point_precision           of VOC2007's classes                                  Everingham et al. 2010
    global_average_precision         one ranking of all queries by confidence              Met: Ypsilantis et al. 2021
    corruption_error                 mCE, relative to AlexNet                              Hendrycks and Dietterich 2019

Truth that is to be left out never enters: labels of 255, depths out of range, junk images.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

IGNORE = 255     # the label of pixels that count for nothing
PER, CROWD = 1000, 999  # panoptic: numbers of a class; that of a crowd, whose objects were not told apart
TOLERANCE = 0.008  # of a boundary's place, as a share of the image's diagonal
LEVELS = dict(  # of revisited Oxford and Paris: (positive, ignored)
    easy=(("easy",), ("junk", "hard")), medium=(("easy", "hard"), ("junk",)), hard=(("hard",), ("junk", "easy")))
ALEXNET = dict(  # top-1 errors in percent at severities 1 to 5: the unit of mCE
    gaussian_noise=(69.528, 82.542, 93.554, 98.138, 99.452), shot_noise=(71.224, 85.108, 93.574, 98.182, 99.146),
    impulse_noise=(78.374, 89.808, 94.87, 98.72, 99.548), defocus_blur=(65.624, 73.202, 85.036, 91.364, 94.714),
    glass_blur=(64.308, 75.054, 88.806, 91.622, 93.344), motion_blur=(58.43, 70.048, 82.108, 89.75, 92.638),
    zoom_blur=(70.008, 76.992, 80.784, 84.198, 87.198), snow=(71.726, 88.392, 86.468, 91.87, 94.952),
    frost=(61.39, 79.734, 88.79, 89.942, 93.43), fog=(67.474, 76.05, 84.378, 87.26, 94.5),
    brightness=(45.14, 48.502, 54.048, 62.166, 72.44), contrast=(64.548, 76.15, 88.874, 97.76, 99.27),
    elastic_transform=(52.596, 70.116, 55.686, 64.076, 80.554), pixelate=(52.218, 54.62, 73.728, 87.092, 91.262),
    jpeg_compression=(51.002, 54.718, 57.294, 65.458, 74.778))

# --------------------------------------------------------------------------------
# Segmentation, depth


def confusion(predicted, truth, n_classes):
    """Pixels of each truth (rows) that were taken for each class:  n_classes n_classes;  255 in truth is left out."""
    counted = truth != IGNORE
    pairs = truth[counted].long() * n_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)


def segmentation_scores(counts):
    """Of the confusion summed over all images, in percent; a class that is neither there nor predicted is left out."""
    counts = counts.double()
    hit, truth = counts.diagonal(), counts.sum(1)
    iou = hit / (truth + counts.sum(0) - hit)                                                  # NaN: left out
    return dict(miou=100 * iou.nanmean().item(), mean_accuracy=100 * (hit / truth).nanmean().item(),
                accuracy=100 * (hit.sum() / counts.sum()).item())


def panoptic_counts(found, truth, n_classes):
    """
    Of one image, both H W, class x 1000 + number:  4 n_classes: sum of IoU of what is found, and how often it is; what
    is found that is not there; what is there and not found. Found is what has an IoU above a half, of one class.

    Void, 255000 and more, is as if it were not there; what lies mostly on it, or on a crowd of its class, is no error.
    """
    both, areas = np.unique(np.stack([truth.ravel(), found.ravel()]), axis=1, return_counts=True)
    shared = dict(zip(map(tuple, both.T.tolist()), areas.tolist(), strict=True))
    sizes = [dict(zip(*(x.tolist() for x in np.unique(each, return_counts=True)), strict=True)) for each in
             (truth, found)]
    void = {f: sum(area for (t, other), area in shared.items() if other == f and t // PER == IGNORE) for f in sizes[1]}
    counts, matched = np.zeros((4, n_classes)), set()
    for (t, f), area in shared.items():
        if t // PER == f // PER != IGNORE and t % PER != CROWD:
            overlap = area / (sizes[0][t] + sizes[1][f] - area - void[f])
            if overlap > 0.5:
                counts[:2, t // PER] += overlap, 1
                matched |= {("truth", t), ("found", f)}
    for f, area in sizes[1].items():
        if f // PER != IGNORE and ("found", f) not in matched:
            left_out = void[f] + shared.get((f // PER * PER + CROWD, f), 0)
            counts[2, f // PER] += left_out <= area / 2
    for t in sizes[0]:
        if t // PER != IGNORE and t % PER != CROWD and ("truth", t) not in matched:
            counts[3, t // PER] += 1
    return counts


def panoptic_scores(counts, stuff):
    """
    Of the sum of all images' counts, in percent, mean over the classes that are there or found:

        PQ = sum of IoU / (n + extra / 2 + missed / 2),  SQ = sum of IoU / n,  RQ = PQ / SQ,  n = how many are found
    """
    overlap, n, extra, missed = counts
    there = (n + extra + missed) > 0
    with np.errstate(invalid="ignore"):
        sq, rq = np.nan_to_num(overlap / n), n / (n + extra / 2 + missed / 2)
    kinds = np.isin(np.arange(len(n)), list(stuff))
    return {name: float(100 * x[there & kind].mean()) if (there & kind).any() else 0.0 for name, x, kind in (
        ("pq", sq * rq, True), ("sq", sq, True), ("rq", rq, True), ("pq_things", sq * rq, ~kinds),
        ("pq_stuff", sq * rq, kinds))}


def depth_scores(predicted, truth):
    """Of one image; both 1-dim, metres, of valid pixels only. The data set's score is the mean over its images."""
    ratio, logs = torch.maximum(truth / predicted, predicted / truth), truth.log() - predicted.log()
    error = truth - predicted
    return dict(rmse=error.square().mean().sqrt().item(), abs_rel=(error.abs() / truth).mean().item(),
                sq_rel=(error.square() / truth).mean().item(), rmse_log=logs.square().mean().sqrt().item(),
                log10=(logs.abs() / math.log(10)).mean().item(), mae=error.abs().mean().item(),
                silog=100 * logs.var(unbiased=False).sqrt().item(),
                **{f"delta{i}": (ratio < 1.25**i).float().mean().item() for i in (1, 2, 3)})

# --------------------------------------------------------------------------------
# Masks and boxes


def region(predicted, truth):
    """J: intersection over union of two masks, H W bool; 1 where neither shows the object."""
    union = (predicted | truth).sum().item()
    return (predicted & truth).sum().item() / union if union else 1.0


def outline(mask):
    """H W bool -> where the pixel differs from the one to its right, below it, or diagonally between."""
    below, right = torch.cat([mask[1:], mask[-1:]]), torch.cat([mask[:, 1:], mask[:, -1:]], 1)
    return (mask ^ below) | (mask ^ right) | (mask ^ torch.cat([right[1:], right[-1:]]))


def boundary(predicted, truth):
    """
    F: harmonic mean of the shares of each mask's outline that lie near the other's. Near is within a disk of
    ceil(0.008 diagonals) pixels. Neither has an outline: 1; one of them has none: 0.
    """
    lines = torch.stack([outline(predicted), outline(truth)])                                  # 2 H W
    n_predicted, n_truth = lines.sum((1, 2)).tolist()
    if not n_predicted or not n_truth:
        return float(n_predicted == n_truth)
    near = widened(lines, math.ceil(TOLERANCE * math.hypot(*truth.shape)))
    precision = (lines[0] & near[1]).sum().item() / n_predicted
    recall = (lines[1] & near[0]).sum().item() / n_truth
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def widened(lines, radius):
    """n H W bool -> what lies within that many pixels of a point that is set: differences of sums of shifted rows"""
    (H, W), near = lines.shape[1:], torch.zeros_like(lines)
    sums = F.pad(lines.to(torch.int16), (radius + 1, radius, radius, radius)).cumsum(2, dtype=torch.int16)
    for down in range(-radius, radius + 1):
        half, row = math.isqrt(radius**2 - down**2), sums[:, radius + down :][:, :H]
        near |= row[..., radius + 1 + half :][..., :W] != row[..., radius - half :][..., :W]
    return near


def box_overlap(box, boxes):
    """IoU of one box with each of n:  4 and n 4, left, top, right, bottom -> n"""
    box, boxes = np.asarray(box, float), np.asarray(boxes, float).reshape(-1, 4)
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])              # n 2
    shared = sides.clip(0).prod(1)
    return shared / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - shared)

# --------------------------------------------------------------------------------
# Rankings


def average_precision(ranked, positive, ignored=()):
    """
    Area under precision over recall, by trapezoids, of one query. None if it has no positive.

        r_j = place of the j-th positive in the ranking without the ignored, all from 0;  n positives
        AP = sum_j (p0 + p1) / 2n,  p0 = j / r_j (1 if r_j = 0),  p1 = (j + 1) / (r_j + 1)

    ranked  indices of the data base, best first
    """
    positive, ignored = set(map(int, positive)), set(map(int, ignored))
    kept = [i for i in map(int, ranked) if i not in ignored]
    places = [r for r, i in enumerate(kept) if i in positive]
    terms = ((j / r if r else 1.0) + (j + 1) / (r + 1) for j, r in enumerate(places))
    return sum(terms) / (2 * len(positive)) if positive else None


def eleven_point_precision(scores, positive, counted):
    """
    Mean over r = 0, 0.1 ... 1 of the largest precision at a recall of at least r. None if there is no positive.

    scores   n, larger is surer; equal ones are taken together
    positive, counted  n bool; what is not counted is as if it were not there
    """
    scores, positive = (np.asarray(x)[np.asarray(counted, bool)] for x in (scores, np.asarray(positive, bool)))
    order = np.argsort(-scores, kind="stable")
    last = np.diff(scores[order], append=np.nan) != 0                                          # of equal scores
    hits, n = positive[order].cumsum(), int(positive.sum())
    precision = hits / np.arange(1, len(hits) + 1)
    at_least = [10 * hits >= k * n for k in range(11)]                                         # exact, as 0.3 is not
    return float(np.mean([precision[last & enough].max() for enough in at_least])) if n else None


def global_average_precision(confidence, right, known):
    """
    All queries in one ranking by confidence:  1/M sum_i precision(i) right(i),  M = known queries, i by rank.

    right  n bool: the answer is the truth    known  n bool: there is a right answer; the others only distract
    """
    right, order = np.asarray(right, bool), np.argsort(-np.asarray(confidence, float), kind="stable")
    hits = right[order]
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / max(np.asarray(known, bool).sum(), 1))


def corruption_error(errors):
    """mCE in percent: errors, {corruption: top-1 errors in percent at severities 1 to 5}, over AlexNet's, averaged."""
    odd = sorted(errors.keys() - ALEXNET.keys()) + [name for name, each in errors.items() if len(each) != 5]
    if odd or not errors:
        raise ValueError(f"corruption_error: {odd[:1] or 'nothing'}; wanted 5 errors for each of {', '.join(ALEXNET)}")
    return 100 * float(np.mean([sum(each) / sum(ALEXNET[name]) for name, each in errors.items()]))
