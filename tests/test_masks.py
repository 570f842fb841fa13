"""decoders/masks.py: losses beside transformers', matching beside brute force, answers made by hand."""

import builtins
import math
from itertools import permutations

import pytest
import torch

from decoders import masks
from decoders.mask2former import Answers

REAL = torch.rand


def alike(*shape, generator=None, device=None):
    """Random points, of which all masks and predictions have the same: so many at a time, so many of them"""
    g = torch.Generator().manual_seed(shape[-2])
    return REAL(1, *shape[-2:], generator=g).expand(shape).contiguous()


def answers(seed, layers=3, B=2, Q=6, n=4, size=(10, 12)):
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(B, Q, n + 1, generator=g, requires_grad=True) for _ in range(layers)]
    return Answers(tuple(logits), tuple((3 * torch.randn(B, Q, *size, generator=g)).requires_grad_()
                                        for _ in range(layers)))


def truths(seed, counts=(3, 2), n=4, size=(20, 24)):
    g = torch.Generator().manual_seed(seed)
    segments = [torch.randint(0, m + 1, (size[0] // 4, size[1] // 4), generator=g).repeat_interleave(4, 0)
                .repeat_interleave(4, 1) for m in counts]
    return segments, [torch.randint(0, n, (m,), generator=g) for m in counts]


@pytest.mark.parametrize("counts", [(3, 2), (0, 4)])
def test_the_loss_is_transformers(monkeypatch, counts):
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss
    monkeypatch.setattr(torch, "rand", alike)
    found, (segments, classes) = answers(0), truths(1, counts)
    ours = masks.masks_loss(found, segments, classes, [0, 0], n_points=112)
    config = Mask2FormerConfig(num_labels=4, train_num_points=112)
    weights = dict(loss_cross_entropy=2.0, loss_mask=5.0, loss_dice=5.0)
    theirs = Mask2FormerLoss(config, weights)
    labels = [torch.stack([(s == k + 1).float() for k in range(m)]) if m else torch.zeros(0, *s.shape)
              for s, m in zip(segments, counts, strict=True)]
    rest = [dict(masks_queries_logits=m, class_queries_logits=x)
            for x, m in zip(found.logits[:-1], found.masks[:-1], strict=True)]
    terms = theirs(found.masks[-1], found.logits[-1], labels, classes, rest)
    exact = sum(value * weights["_".join(name.split("_")[:3]).rstrip("_012")] for name, value in terms.items())
    assert len(terms) == 9 and ours.item() == pytest.approx(exact.item(), rel=1e-5)  # measured: 2e-7
    leaves = [*found.logits, *found.masks]
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_how_much_classes_weigh(monkeypatch):
    """Where masks are all alike the matching is that of the classes, whatever they weigh: only they weigh more"""
    found, (segments, classes) = answers(5, layers=2, B=1), truths(6, (3,))
    found = found._replace(masks=tuple(torch.zeros_like(m) for m in found.masks))
    two, three, thirty = (masks.masks_loss(found, segments, classes, [0], 50, of_class=w).item() for w in (2, 3, 30))
    assert thirty - two == pytest.approx(28 * (three - two), rel=1e-5) and three - two > 0.1
    costs = [masks.costs(found.logits[0], found.masks[0], torch.zeros(3, 4, 4), classes[0], torch.rand(1, 1, 9, 2), w)
             for w in (0, 1, 30)]
    torch.testing.assert_close(costs[2] - costs[0], 30 * (costs[1] - costs[0]))


def test_match_is_the_best_of_all():
    found, (segments, classes) = answers(2, layers=2, B=1), truths(3, (3,))
    own = torch.stack([(segments[0] == k + 1).float() for k in range(3)])
    points = torch.rand(2, 1, 50, 2, generator=torch.Generator().manual_seed(4))
    given = torch.stack(found.logits)[:, 0], torch.stack(found.masks)[:, 0], own, classes[0], points
    cost, queries = masks.costs(*given), masks.match(*given)
    for o in range(2):
        best = min(permutations(range(6), 3), key=lambda rows: sum(cost[o, q, k].item() for k, q in enumerate(rows)))
        assert queries[o].tolist() == list(best)


def test_costs_at_one_point():
    """In the middle of a cell of both, where nothing is between pixels"""
    logits, found = torch.randn(1, 2, 4), torch.randn(1, 2, 2, 2)
    own = torch.tensor([[[1.0, 0], [0, 0]]])
    cost = masks.costs(logits, found, own, torch.tensor([2]), torch.tensor([[[[0.25, 0.25]]]]))
    for q in range(2):
        p, share = found[0, q, 0, 0].sigmoid().item(), logits[0, q].softmax(0)[2].item()
        exact = -5 * math.log(p) + 5 * (1 - (2 * p + 1) / (p + 2)) - 2 * share
        assert cost[0, q, 0].item() == pytest.approx(exact, rel=1e-5)


def test_more_segments_than_queries():
    found, (segments, classes) = answers(5, Q=2, B=1), truths(6, (3,))
    queries = masks.match(torch.stack(found.logits)[:, 0], torch.stack(found.masks)[:, 0],
                          torch.rand(3, 20, 24), classes[0], torch.rand(3, 1, 9, 2))
    assert (queries >= 0).sum(1).tolist() == [2, 2, 2] and (queries == -1).sum() == 3
    assert masks.masks_loss(found, segments, classes, [0], 20).isfinite()


def test_points_are_an_image_s_own():
    found, (segments, classes) = answers(7), truths(8)

    def loss(seeds, rows):
        part = Answers(*(tuple(x[rows] for x in each) for each in found))
        return masks.masks_loss(part, [segments[b] for b in rows], [classes[b] for b in rows], seeds, 50).item()
    assert loss([3, 9], [0, 1]) == loss([9, 3], [1, 0]) != loss([3, 4], [0, 1])


def test_nothing_but_void():
    found, (segments, classes) = answers(9), truths(10, (0, 0))
    loss = masks.masks_loss(found, segments, classes, [0, 0], 20)
    logits = torch.stack(found.logits).flatten(1, 2)
    exact = -2 * logits.log_softmax(2)[:, :, -1].mean(1).sum()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_points_are_where_masks_are_least_sure():
    """A column of cells is unsure, the others are not; three quarters of the points lie there"""
    found = torch.full((2, 8, 8), 9.0)
    found[:, :, 3] = 0.1
    points = masks.unsure_points(found, 400, torch.Generator().manual_seed(0))
    doubt = masks.read_at(found[:, None], points[:, None])[:, 0].abs() < 8.99
    assert points.shape == (2, 400, 2) and doubt[:, :300].all() and 40 < (~doubt[0, 300:]).sum() < 90
    assert not torch.equal(points[0], points[1])


def test_segments_of_labels():
    segments, classes = masks.segments_of(torch.tensor([[255, 4], [0, 4]], dtype=torch.uint8))
    assert segments.tolist() == [[0, 2], [1, 2]] and classes.tolist() == [0, 4]
    segments, classes = masks.segments_of(torch.full((2, 2), 255))
    assert segments.sum() == 0 and len(classes) == 0


def test_segments_of_numbers_without_crowds():
    truth = torch.tensor([[3000, 3001, 3999], [255000, 3001, 7000]])
    segments, classes = masks.segments_of(truth, 1000)
    assert segments.tolist() == [[1, 2, 0], [0, 2, 3]] and classes.tolist() == [3, 3, 7]


def test_scipy_is_named(monkeypatch):
    def without(name, *args):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args)
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"scipy is not installed.*\[decoders\]"):
        masks.assignment(torch.zeros(1, 1).numpy())

# --------------------------------------------------------------------------------
# Answers


def sure(*classes, n=3, score=9.0):
    """Logits of queries that are sure of a class; n: of none"""
    return torch.tensor([[score * (k == label) for k in range(n + 1)] for label in classes])


def test_semantic_is_the_sum_over_queries():
    g = torch.Generator().manual_seed(11)
    logits, found = torch.randn(2, 3, 5, generator=g), torch.randn(2, 3, 4, 4, generator=g)
    scores = masks.semantic(logits, found, (4, 4))
    for b, c, y, x in (0, 0, 0, 0), (1, 3, 2, 1):
        exact = sum(logits[b, q].softmax(0)[c] * found[b, q, y, x].sigmoid() for q in range(3))
        assert scores[b, c, y, x].item() == pytest.approx(exact.item(), rel=1e-5)
    assert masks.semantic(logits, found, (8, 12)).shape == (2, 4, 8, 12)


def scene(*rows):
    return torch.tensor([[9.0 if cell == "#" else -9.0 for cell in row] for row in rows])


def test_panoptic_by_hand():
    found = torch.stack([scene("##..", "##..", "....", "...."),   # 0: a thing
                         scene("..##", "..##", "....", "...."),   # 1: another one of its class
                         scene("....", "....", "##..", "##.."),   # 2, 3: stuff in two parts
                         scene("....", "....", "...#", "...#"),
                         scene("....", "....", "..#.", "..#."),   # 4: not sure
                         scene("####", "####", "####", "####")])  # 5: none of them
    logits = sure(0, 0, 2, 2, 1, 3)
    logits[4] *= 0.2
    segments, known = masks.panoptic(logits, found, (4, 4), stuff={2})
    assert segments.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 0, 3], [3, 3, 0, 3]]
    assert [label for label, _ in known] == [0, 0, 2] and all(score > 0.99 for _, score in known)
    apart, known = masks.panoptic(logits, found, (4, 4))
    assert apart[2, 3] == 4 and len(known) == 4


def test_a_segment_of_which_others_leave_little_is_left_out():
    found = torch.stack([scene("####", "####", "....", "...."), scene("####", "##..", "....", "...."),
                         scene("....", "....", "####", "####")])
    whole = found.clone()
    whole[1] *= 0.5
    segments, known = masks.panoptic(sure(0, 1, 2), whole, (4, 4))
    assert [label for label, _ in known] == [0, 2] and segments[:2].unique().tolist() == [1]
    found[0] *= 0.01  # it wins 2 of its 8 cells
    segments, known = masks.panoptic(sure(0, 1, 2), found, (4, 4))
    assert [label for label, _ in known] == [1, 2] and (segments == 1).sum() == 6 and (segments == 0).sum() == 2
    assert len(masks.panoptic(sure(0, 1, 2), found, (4, 4), won=0.25)[1]) == 3


def test_panoptic_of_nothing():
    segments, known = masks.panoptic(sure(3, 3), torch.randn(2, 4, 4), (8, 8))
    assert segments.shape == (8, 8) and segments.sum() == 0 and known == []


def test_instances_by_hand():
    found = torch.stack([scene("##..", "##.."), scene("..##", "..##")])
    found[1] *= 0.1
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 1.0, 0.0]])
    inside, classes, scores = masks.instances(logits, found, (2, 4), things=[0, 2], top=3)
    p = logits.softmax(1)
    exact = [p[0, 0] * torch.tensor(9.0).sigmoid(), p[1, 2] * torch.tensor(0.9).sigmoid(), p[0, 2]]
    order = sorted(range(3), key=lambda k: -exact[k])
    assert classes.tolist() == [(0, 2, 2)[k] for k in order]
    assert scores.tolist() == pytest.approx([exact[k].item() for k in order], rel=1e-3)
    assert inside[0].tolist() == [[True, True, False, False]] * 2
