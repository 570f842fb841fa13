"""
What detectors share: boxes, which answer is for which object, what it has lost, and answers of several views as one.

    corners, centred  boxes as left, top, right, bottom; as centre x, y, width, height, as all others here take them
    decode, encode    a box from another and four numbers, and back
    overlap           IoU and generalised IoU                                           Rezatofighi et al. 2019
    match             queries and objects, each with at most one of the other           Hungarian: Carion et al. 2020
    focal, aware      losses of classes                                      Lin et al. 2017; IA-BCE: Cai et al. 2023
    detection_loss    of all layers, both branches and the proposals                    DINOv3 App. D.9; Plain-DETR
    soft_nms          scores of boxes that overlap better ones, lowered                 Bodla et al. 2017

Boxes are in pixels. B images, Q queries, C classes, m objects.
"""

import math

import torch
import torch.nn.functional as F

FARTHEST = math.log(1000 / 16)   # largest step of a side's logarithm
CLASS, L1, GIOU = 2.0, 1.0, 2.0  # weights in the loss, and in what is matched by
ALPHA, GAMMA = 0.25, 2.0         # of the focal loss; alpha is also the share of p in the quality
REPEATS = 6                      # queries for each object in the second branch
LEAST = 0.01                     # quality of a query that is matched

# --------------------------------------------------------------------------------
# Boxes


def corners(boxes):
    """... centre x, y, width, height -> ... left, top, right, bottom"""
    centre, size = boxes.split(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def centred(boxes):
    """... left, top, right, bottom -> ... centre x, y, width, height"""
    low, high = boxes.split(2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)


def decode(boxes, deltas, sizes):
    """
    centre + size * delta, size * exp(delta); cut to the image, which moves the centre

    boxes, deltas  B Q 4    sizes  B 2, width and height
    """
    (centre, size), (move, grow) = boxes.split(2, -1), deltas.split(2, -1)
    moved = torch.cat([centre + size * move, size * grow.clamp(-FARTHEST, FARTHEST).exp()], -1)
    limit = sizes[:, None].repeat(1, 1, 2).to(boxes)                                           # B 1 4
    return centred(torch.minimum(corners(moved).clamp(min=0), limit))


def encode(boxes, targets):
    """
    The deltas that take boxes ... 4 to targets ... 4

    differs: not decode's inverse: sides are 0.1 pixel longer here, as in the public code of Plain-DETR
    """
    (centre, size), (aim, extent) = boxes.split(2, -1), targets.split(2, -1)
    size = size + 0.1
    return torch.cat([(aim - centre) / size, (extent / size).log()], -1)


def overlap(a, b):
    """... 4 each -> IoU ..., generalised IoU ...: IoU less the share of the box around both that neither has"""
    a, b = corners(a), corners(b)
    inside = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    around = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inside
    iou = inside / union
    return iou, iou - (around - union) / around

# --------------------------------------------------------------------------------
# Which query is for which object


def assignment(cost):
    """Q m -> rows, columns: min(Q, m) pairs whose sum is least"""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ValueError("detr: scipy is not installed; pip install -e .[decoders]") from error
    if not cost.isfinite().all():
        raise ValueError("detr: a class or a box is not finite; try a smaller --lr")
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(rows).to(cost.device), torch.from_numpy(columns).to(cost.device)


@torch.no_grad()
def match(logits, deltas, before, found, boxes, labels):
    """
    One image: logits Q C; deltas, before, found Q 4: found is what deltas make of before; objects: boxes m 4, labels m

    returns  queries, objects: min(Q, m) each
    paper:   costs of Plain-DETR, 2/1/2: positive less negative focal term, L1 of deltas, generalised IoU
    """
    p = logits.sigmoid()[:, labels]                                                            # Q m
    hit, miss = -ALPHA * (1 - p) ** GAMMA * (p + 1e-8).log(), -(1 - ALPHA) * p**GAMMA * (1 - p + 1e-8).log()
    steps = (deltas[:, None] - encode(before[:, None], boxes)).abs().sum(-1)
    return assignment(CLASS * (hit - miss) + L1 * steps - GIOU * overlap(found[:, None], boxes)[1])

# --------------------------------------------------------------------------------
# What is lost


def focal(logits, quality):
    """... logits, and which are right: their quality is not 0 -> ..., to be summed"""
    right = quality > 0
    p, lost = logits.sigmoid(), F.binary_cross_entropy_with_logits(logits, right.float(), reduction="none")
    return torch.where(right, ALPHA * (1 - p) ** GAMMA, (1 - ALPHA) * p**GAMMA) * lost


def aware(logits, quality):
    """
    The same, IoU-aware: where quality t is not 0, -t ln p - (1 - t) ln(1 - p); elsewhere -p^2 ln(1 - p)

    paper: App. D.9 names IA-BCE for COCO; Align-DETR's form: t = p^0.25 IoU^0.75, see `qualities`
    """
    p = logits.sigmoid()
    others = torch.where(quality > 0, 1 - quality, p**GAMMA)
    return -quality * F.logsigmoid(logits) - others * F.logsigmoid(-logits)


def qualities(logits, iou):
    """Of queries that are matched, their logits m and IoU m"""
    return (logits.detach().sigmoid() ** ALPHA * iou.detach() ** (1 - ALPHA)).clamp(min=LEAST)


def answer_loss(answer, objects, n, of_classes, giou):
    """
    2 classes + L1 of deltas + giou (1 - generalised IoU), summed, over n

    answer   detr.Answer of B images    objects  dict(boxes m 4, labels m) of each
    """
    quality, found = torch.zeros_like(answer.logits), 0.0
    for k, each in enumerate(objects):
        if not len(each["labels"]):
            continue
        logits, deltas, before, boxes = (x[k] for x in answer)
        rows, columns = match(logits, deltas, before, boxes, each["boxes"], each["labels"])
        truth, labels = each["boxes"][columns], each["labels"][columns]
        iou, generalised = overlap(boxes[rows], truth)
        quality[k, rows, labels] = qualities(logits[rows, labels], iou)
        steps = (deltas[rows] - encode(before[rows].detach(), truth)).abs().sum()
        found = found + L1 * steps + giou * (1 - generalised).sum()
    return (CLASS * of_classes(answer.logits, quality).sum() + found) / n


def detection_loss(answers, objects, n, of_classes=focal, giou=GIOU):
    """
    Every layer alone; those of the second branch with every object REPEATS times; the proposals, with one class for all

    answers  detr.Answers    objects  dict(boxes m 4: left, top, right, bottom, labels m) of each image
    n        objects of all images of the step    of_classes  focal or aware    returns  scalar
    """
    n = max(n, 1)
    objects = [dict(boxes=centred(each["boxes"]), labels=each["labels"]) for each in objects]
    things = [dict(boxes=each["boxes"], labels=torch.zeros_like(each["labels"])) for each in objects]
    repeated = [dict(boxes=each["boxes"].repeat(REPEATS, 1), labels=each["labels"].repeat(REPEATS)) for each in objects]
    terms = [(answer, objects, n) for answer in answers.layers] + [(answers.proposals, things, n)]
    terms += [(answer, repeated, REPEATS * n) for answer in answers.repeated]
    return sum(answer_loss(*term, of_classes, giou) for term in terms)

# --------------------------------------------------------------------------------
# Answers of several views


def soft_nms(boxes, scores, labels, decay, above=0.7, least=0.001):
    """
    Of each class, best first: the scores of what overlaps it by more than `above` are lowered; below `least` they go.

    boxes    n 4: left, top, right, bottom, of one image, of all its views    scores, labels  n
    decay    linear: (1 - IoU); quadratic: (1 - IoU)^2
    returns  dict(scores, labels, boxes), best first

    paper:   App. D.9 merges views by Soft-NMS, and says no more; `above` and `least` of public code, which is linear
    """
    kept, power = [], dict(linear=1, quadratic=2)[decay]
    everything, scores = centred(boxes.double()), scores.double().clone()
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        while len(rows := rows[scores[rows] >= least]):
            best = rows[scores[rows].argmax()]
            kept.append(best)
            rows = rows[rows != best]
            iou = overlap(everything[best], everything[rows])[0]
            scores[rows] *= torch.where(iou > above, (1 - iou) ** power, 1.0)
    kept = torch.stack(kept) if kept else labels.new_zeros(0)
    kept = kept[scores[kept].argsort(descending=True)]
    return dict(scores=scores[kept].float(), labels=labels[kept], boxes=boxes[kept])
