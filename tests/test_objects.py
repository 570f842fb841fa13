"""decoders/objects.py: known answers, brute force, transformers, and the loss in loops."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from decoders import objects
from decoders.detr import Answer, Answers


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_boxes(n, seed=0):
    """centre x, y, width, height in an image of 100 pixels"""
    g = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(n, 2, generator=g) * 80 + 10, torch.rand(n, 2, generator=g) * 30 + 5], 1)


def test_encoding_is_not_the_inverse_of_decoding():
    """Ten pixels at a width of 50: the L1 loss is 0 at 0.02 pixels from the truth."""
    box, target = torch.tensor([[[100.0, 90, 50, 40]]]), torch.tensor([[[110.0, 90, 60, 40]]])
    deltas = objects.encode(box, target)
    assert deltas[0, 0].tolist() == pytest.approx([10 / 50.1, 0, math.log(60 / 50.1), math.log(40 / 40.1)], abs=1e-6)
    back = objects.decode(box, deltas, torch.tensor([[400, 300]]))
    assert (back - target)[0, 0, 0].item() == pytest.approx(-0.02, abs=1e-3)


def test_decoding_cuts_at_the_image_and_the_centre_moves():
    box = torch.tensor([[[20.0, 20, 30, 30]]])
    found = objects.decode(box, torch.tensor([[[-0.5, 0, 9.0, 0]]]), torch.tensor([[64, 48]]))
    assert found[0, 0].tolist() == [32, 20, 64, 30]
    grown = objects.decode(box, torch.tensor([[[0, 0, 9.0, -9.0]]]), torch.tensor([[10_000, 48]]))[0, 0]
    low, high = 0, 20 + 15 * 1000 / 16  # the step is clamped
    assert grown.tolist() == pytest.approx([(low + high) / 2, 20, high - low, 30 * 16 / 1000])


def test_overlap():
    unit, next_to_it = torch.tensor([0.5, 0.5, 1, 1]), torch.tensor([2.5, 0.5, 1, 1])
    assert [x.item() for x in objects.overlap(unit, next_to_it)] == pytest.approx([0, -1 / 3])
    half = torch.tensor([1.0, 0.5, 1, 1])
    assert [x.item() for x in objects.overlap(unit, half)] == pytest.approx([1 / 3, 1 / 3])
    from torchvision.ops import box_iou, generalized_box_iou
    a, b = some_boxes(20), some_boxes(30, 1)
    for ours, theirs in zip(objects.overlap(a[:, None], b), (box_iou, generalized_box_iou), strict=True):
        torch.testing.assert_close(ours, theirs(objects.corners(a), objects.corners(b)))
    torch.testing.assert_close(objects.centred(objects.corners(a)), a)


def test_assignment_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(200):
        cost = rng.normal(size=(6, 4))
        rows, columns = objects.assignment(torch.from_numpy(cost))
        best = min(sum(cost[row, k] for k, row in enumerate(each)) for each in permutations(range(6), 4))
        assert cost[rows, columns].sum() == pytest.approx(best) and sorted(columns.tolist()) == [0, 1, 2, 3]


def test_what_is_not_finite_is_said():
    with pytest.raises(ValueError, match="a class or a box is not finite; try a smaller --lr"):
        objects.assignment(torch.tensor([[1.0, math.nan]]))


def test_scipy_is_named_if_it_is_missing(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ValueError, match=r"scipy is not installed; pip install -e .\[decoders\]"):
        objects.assignment(torch.zeros(1, 1))


@pytest.mark.parametrize("seed", range(0, 60, 4))
def test_match_by_hand(seed):
    logits, deltas, before = some(7, 5, seed=seed), some(7, 4, seed=seed + 1) * 0.2, some_boxes(7, seed + 2)
    found = objects.decode(before[None], deltas[None], torch.tensor([[100, 100]]))[0]
    boxes, labels = some_boxes(3, seed + 3), torch.tensor([4, 0, 4])
    cost = np.zeros((7, 3))
    for q in range(7):
        for k in range(3):
            p = 1 / (1 + math.exp(-logits[q, labels[k]]))
            classes = -0.25 * (1 - p) ** 2 * math.log(p + 1e-8) + 0.75 * p**2 * math.log(1 - p + 1e-8)
            (cx, cy, w, h), (tx, ty, tw, th) = before[q].tolist(), boxes[k].tolist()
            aim = (tx - cx) / (w + 0.1), (ty - cy) / (h + 0.1), math.log(tw / (w + 0.1)), math.log(th / (h + 0.1))
            steps = sum(abs(a - b) for a, b in zip(deltas[q].tolist(), aim, strict=True))
            cost[q, k] = 2 * classes + steps - 2 * objects.overlap(found[q], boxes[k])[1].item()
    rows, columns = objects.match(logits, deltas, before, found, boxes, labels)
    best = min(permutations(range(7), 3), key=lambda each: sum(cost[row, k] for k, row in enumerate(each)))
    assert dict(zip(columns.tolist(), rows.tolist(), strict=True)) == dict(enumerate(best))


def test_focal_loss():
    logits, quality = torch.full((100, 12), -math.log(99)), torch.zeros(100, 12)
    quality[3, 4] = 0.7
    assert objects.focal(logits, quality).sum().item() == pytest.approx(1.12929, abs=1e-5)
    from torchvision.ops import sigmoid_focal_loss
    x, right = some(30, 7), (some(30, 7, seed=1) > 1).float()
    torch.testing.assert_close(objects.focal(x, right * 0.3), sigmoid_focal_loss(x, right))


def test_iou_aware_loss_is_transformers():
    from transformers.loss.loss_lw_detr import LwDetrImageLoss
    theirs = LwDetrImageLoss(matcher=None, num_classes=5, focal_alpha=0.25, losses=[], group_detr=1)
    logits, boxes = some(1, 9, 5).requires_grad_(), some_boxes(9)[None] / 100
    rows, columns = torch.tensor([6, 1, 3]), torch.tensor([2, 0, 1])
    near = boxes[0, rows[columns.argsort()]] + torch.tensor([[0.01], [0.02], [0.6]])  # the last overlaps nothing
    truth = dict(class_labels=torch.tensor([2, 4, 2]), boxes=near)
    exact = theirs.loss_labels(dict(logits=logits, pred_boxes=boxes), [truth], [(rows, columns)], 3)["loss_ce"]
    labels, iou = truth["class_labels"][columns], objects.overlap(boxes[0, rows], truth["boxes"][columns])[0]
    quality = torch.zeros(1, 9, 5)
    quality[0, rows, labels] = objects.qualities(logits[0, rows, labels], iou)
    assert quality.max() > 0.02 and quality[quality > 0].min() == pytest.approx(0.01)
    ours = objects.aware(logits, quality).sum() / 3
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (ours, exact)))


def answer_of(queries, seed, B=2, C=4):
    logits, deltas = some(B, queries, C, seed=seed), some(B, queries, 4, seed=seed + 1) * 0.2
    before = torch.stack([some_boxes(queries, seed + k) for k in range(B)])
    sizes = torch.full((B, 2), 100)
    return Answer(logits, deltas, before, objects.decode(before, deltas, sizes))


def by_hand(answer, truths, n, repeats=1, binary=False, aware=False, giou=2.0):
    total = 0.0
    for k, (boxes, labels) in enumerate(truths):
        boxes, labels = boxes.repeat(repeats, 1), (labels * (not binary)).repeat(repeats)
        p = answer.logits[k].double().sigmoid()
        chosen = {}
        if len(labels):
            rows, columns = objects.match(*(x[k] for x in answer), boxes, labels)
            chosen = dict(zip(rows.tolist(), columns.tolist(), strict=True))
        for q in range(len(p)):
            right = labels[chosen[q]].item() if q in chosen else None
            iou = objects.overlap(answer.boxes[k, q], boxes[chosen[q]])[0].item() if q in chosen else 0
            for c in range(p.shape[1]):
                x = p[q, c].item()
                if aware and c == right:
                    t = max(x**0.25 * iou**0.75, 0.01)
                    total += 2 * (-t * math.log(x) - (1 - t) * math.log(1 - x))
                elif aware:
                    total += 2 * -(x**2) * math.log(1 - x)
                elif c == right:
                    total += 2 * 0.25 * (1 - x) ** 2 * -math.log(x)
                else:
                    total += 2 * 0.75 * x**2 * -math.log(1 - x)
            if q in chosen:
                aim = objects.encode(answer.before[k, q], boxes[chosen[q]])
                total += (answer.deltas[k, q] - aim).abs().sum().item()
                total += giou * (1 - objects.overlap(answer.boxes[k, q], boxes[chosen[q]])[1].item())
    return total / (n * repeats)


@pytest.mark.parametrize("form, giou", [("focal", 2.0), ("aware", 4.0)])
def test_the_loss_of_all_layers_in_loops(form, giou):
    answers = Answers([answer_of(8, 0), answer_of(8, 10)], [answer_of(24, 20), answer_of(24, 30)], answer_of(40, 40),
                      torch.full((2, 2), 100))
    truths = [(some_boxes(3, 50), torch.tensor([3, 1, 3])), (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))]
    given = [dict(boxes=objects.corners(boxes), labels=labels) for boxes, labels in truths]
    found = objects.detection_loss(answers, given, 3, getattr(objects, form), giou)
    more = dict(aware=form == "aware", giou=giou)
    exact = sum(by_hand(answer, truths, 3, **more) for answer in answers.layers)
    exact += sum(by_hand(answer, truths, 3, repeats=6, **more) for answer in answers.repeated)
    exact += by_hand(answers.proposals, truths, 3, binary=True, **more)
    assert found.item() == pytest.approx(exact, rel=1e-5)


def test_images_without_objects_have_a_loss_of_their_classes():
    answer = answer_of(8, 0)
    logits = answer.logits.requires_grad_()
    answers = Answers([answer._replace(logits=logits)], [], answer, None)
    nothing = [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))] * 2
    loss = objects.detection_loss(answers, nothing, 0)
    loss.backward()
    assert 0 < loss < 1e3 and logits.grad.abs().sum() > 0


def test_more_objects_than_queries():
    answer = answer_of(3, 0, B=1)
    rows, columns = objects.match(*(x[0] for x in answer), some_boxes(5), torch.tensor([0, 1, 2, 3, 0]))
    assert rows.tolist() == [0, 1, 2] and len(set(columns.tolist())) == 3

# --------------------------------------------------------------------------------


@pytest.mark.parametrize("decay, power", [("linear", 1), ("quadratic", 2)])
def test_soft_nms(decay, power):
    boxes = torch.tensor([[0.0, 0, 100, 100], [0, 0, 100, 80], [0, 0, 100, 70], [0, 0, 100, 80], [50, 50, 90, 90]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.0009]), torch.tensor([1, 1, 1, 2, 1])
    found = objects.soft_nms(boxes, scores, labels, decay)
    # the second overlaps the first by .8; the third by .7, no more than that, but is not yet behind the second
    second, third = 0.8 * 0.2**power, 0.7
    second_after = second * (1 - 0.875) ** power  # the third, now better, overlaps it by 70 / 80
    exact = sorted([(0.9, 1), (third, 1), (0.6, 2), (second_after, 1)], reverse=True)
    exact = [each for each in exact if each[0] >= 0.001]
    assert len(exact) == 5 - power
    assert found["scores"].tolist() == pytest.approx([score for score, _ in exact], rel=1e-5)
    assert found["labels"].tolist() == [label for _, label in exact] and found["boxes"].shape == (5 - power, 4)
    assert scores[1] == pytest.approx(0.8)


def test_soft_nms_from_where_to_where():
    """What overlaps the best by .705 is lowered, by .695 not; below a thousandth it goes."""
    boxes = torch.tensor([[0.0, 0, 1000, 1000], [0, 0, 1000, 705], [295, 0, 990, 1000]])
    for k, score in (1, 0.5 * 0.295), (2, 0.5):
        found = objects.soft_nms(boxes[[0, k]], torch.tensor([0.9, 0.5]), torch.tensor([1, 1]), "linear")
        assert found["scores"].tolist() == pytest.approx([0.9, score])
    for score, n in (0.0036, 2), (0.0032, 1):
        found = objects.soft_nms(boxes[:2], torch.tensor([0.9, score]), torch.tensor([1, 1]), "linear")
        assert len(found["scores"]) == n


def test_soft_nms_of_nothing():
    found = objects.soft_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), "linear")
    assert found["boxes"].shape == (0, 4)
