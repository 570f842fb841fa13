"""metrics.py against scikit-learn, scipy and plain loops, on random predictions."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, distance_transform_edt
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    jaccard_score,
    mean_squared_error,
    precision_recall_curve,
    recall_score,
)

from engine import metrics


def labels(seed, shape=(3, 40, 50), n=7):
    """Predictions and truths that agree half of the time; class 5 is nowhere, some truth is ignored."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 2, 3, 4, 6], shape)
    found = np.where(rng.random(shape) < 0.5, truth, rng.choice([0, 1, 2, 3, 4, 6], shape))
    truth = np.where(rng.random(shape) < 0.2, 255, truth)
    return torch.tensor(found), torch.tensor(truth), n


def test_segmentation_scores_are_scikit_learns():
    found, truth, n = labels(0)
    counts = sum(metrics.confusion(a, b, n) for a, b in zip(found, truth, strict=True))
    ours, (y, p) = metrics.segmentation_scores(counts), (x[truth != 255].numpy() for x in (truth, found))
    there = [0, 1, 2, 3, 4, 6]
    exact = dict(miou=jaccard_score(y, p, labels=there, average="macro"), accuracy=accuracy_score(y, p),
                 mean_accuracy=recall_score(y, p, labels=there, average="macro"))
    assert ours == pytest.approx({name: 100 * value for name, value in exact.items()}, rel=1e-12)
    assert counts.sum() == (truth != 255).sum()


def test_a_class_that_is_only_predicted_counts():
    counts = metrics.confusion(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 255]), 4)
    assert metrics.segmentation_scores(counts)["miou"] == pytest.approx(100 * (1 + 1 / 2 + 0) / 3)


def test_depth_scores_are_the_loops():
    rng = np.random.default_rng(0)
    truth, found = rng.uniform(0.5, 10, 500), rng.uniform(0.5, 10, 500)
    pairs, n = list(zip(truth.tolist(), found.tolist(), strict=True)), 500
    logs = [math.log(t) - math.log(f) for t, f in pairs]
    exact = dict(
        rmse=mean_squared_error(truth, found) ** 0.5, abs_rel=sum(abs(t - f) / t for t, f in pairs) / n,
        sq_rel=sum((t - f) ** 2 / t for t, f in pairs) / n, rmse_log=(sum(e * e for e in logs) / n) ** 0.5,
        log10=sum(abs(math.log10(t) - math.log10(f)) for t, f in pairs) / n, mae=sum(abs(t - f) for t, f in pairs) / n,
        silog=100 * math.sqrt(sum(e * e for e in logs) / n - (sum(logs) / n) ** 2),
        **{f"delta{i}": sum(max(t / f, f / t) < 1.25**i for t, f in pairs) / n for i in (1, 2, 3)})
    ours = metrics.depth_scores(torch.tensor(found), torch.tensor(truth))
    assert ours == pytest.approx(exact, rel=1e-6)


def blobs(seed, shape=(120, 90)):
    noise = np.random.default_rng(seed).random((2, *shape))
    return [torch.tensor(binary_dilation(x > 0.999, iterations=9)) for x in noise]


def edge(mask):
    """Pixel by pixel: it differs from its right, lower, or lower right neighbour."""
    H, W = mask.shape

    def differs(y, x):
        return any(mask[y, x] != mask[min(y + dy, H - 1), min(x + dx, W - 1)] for dy, dx in ((0, 1), (1, 0), (1, 1)))

    return np.array([[differs(y, x) for x in range(W)] for y in range(H)])


@pytest.mark.parametrize("seed", range(3))
def test_region_and_boundary(seed):
    found, truth = blobs(seed)
    assert metrics.region(found, truth) == pytest.approx(jaccard_score(truth.flatten(), found.flatten()), rel=1e-12)
    lines, radius = [edge(x.numpy()) for x in (found, truth)], math.ceil(0.008 * math.hypot(120, 90))
    near = [distance_transform_edt(~line) <= radius for line in lines]
    precision, recall = near[1][lines[0]].mean(), near[0][lines[1]].mean()
    exact = 2 * precision * recall / (precision + recall)
    assert 0.05 < exact < 0.95 and metrics.boundary(found, truth) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("shape, reach", [((300, 400), 4), ((301, 400), 5)])
def test_a_boundary_is_near_within_8_thousandths_of_the_diagonal(shape, reach):
    """Of 500 pixels that is 4; of 500.6 it is a little more, and 5 pixels are near."""
    left = torch.arange(shape[1]).expand(shape)
    assert [metrics.boundary(left < 100, left < 100 + off) for off in (reach, reach + 1)] == [1, 0]


def test_region_and_boundary_of_nothing():
    empty, found = torch.zeros(20, 20, dtype=torch.bool), torch.zeros(20, 20, dtype=torch.bool)
    found[5:9, 5:9] = True
    assert metrics.region(empty, empty) == metrics.boundary(empty, empty) == 1
    assert metrics.region(found, empty) == metrics.boundary(found, empty) == metrics.boundary(empty, found) == 0
    assert metrics.region(found, found) == metrics.boundary(found, found) == 1


def test_box_overlap_counts_pixels():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 20, (30, 2, 2)), axis=1).reshape(30, 4) + (0, 0, 1, 1)

    def filled(box):
        out = np.zeros((25, 25), bool)
        out[box[1] : box[3], box[0] : box[2]] = True
        return out

    ours = metrics.box_overlap(corners[0], corners[1:])
    exact = [jaccard_score(filled(corners[0]).ravel(), filled(box).ravel()) for box in corners[1:]]
    np.testing.assert_allclose(ours, exact, rtol=1e-12)
    assert ours.max() > 0 and metrics.box_overlap((0, 0, 2, 2), (0, 0, 1, 2)).tolist() == [0.5]

# --------------------------------------------------------------------------------
# Rankings


def area_by_hand(ranked, positive, ignored):
    """Trapezoids under precision over recall, walking down the ranking."""
    hits, seen, area, before = 0, 0, 0.0, 1.0
    for i in ranked:
        if i in ignored:
            continue
        seen += 1
        hits += i in positive
        precision = hits / seen
        if i in positive:
            area += (before + precision) / 2 / len(positive)
        before = precision
    return area


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("level", metrics.LEVELS)
def test_average_precision_with_junk(seed, level):
    rng = np.random.default_rng(seed)
    ranked = rng.permutation(50)
    truth = dict(zip(("easy", "hard", "junk"), np.split(rng.permutation(50)[:21], (8, 16)), strict=True))
    positive, ignored = (np.concatenate([truth[name] for name in names]) for names in metrics.LEVELS[level])
    ours = metrics.average_precision(ranked, positive, ignored)
    assert ours == pytest.approx(area_by_hand(ranked.tolist(), set(positive), set(ignored)), rel=1e-12)
    assert 0 < ours < 1
    first = np.concatenate([ignored, positive, np.setdiff1d(ranked, np.concatenate([ignored, positive]))])
    assert metrics.average_precision(first, positive, ignored) == 1                    # what is ignored costs nothing


def test_average_precision_of_a_query_without_positives():
    assert metrics.average_precision([0, 1, 2], [], [1]) is None


def eleven_by_hand(scores, positive):
    """Every score is a threshold: precision and recall of what reaches it."""
    points = []
    for threshold in scores:
        taken = [p for s, p in zip(scores, positive, strict=True) if s >= threshold]
        points.append((sum(taken), len(taken)))
    return sum(max(hits / n for hits, n in points if 10 * hits >= k * sum(positive)) for k in range(11)) / 11


@pytest.mark.parametrize("seed, n, distinct", [(0, 80, 1000), (1, 80, 7), (2, 3, 1000), (3, 200, 1000), (4, 60, 1)])
def test_eleven_point_precision(seed, n, distinct):
    """Against the definition, and the curve of scikit-learn: few positives, many; equal scores; what does not count."""
    rng = np.random.default_rng(seed)
    scores, counted = rng.integers(0, distinct, n) / distinct, rng.random(n) < 0.7
    positive = rng.random(n) < 0.15
    positive[:2] = counted[:2] = True, True
    ours = metrics.eleven_point_precision(scores, positive, counted)
    assert ours == pytest.approx(eleven_by_hand(scores[counted].tolist(), positive[counted].tolist()), rel=1e-12)
    precision, recall, _ = precision_recall_curve(positive[counted], scores[counted])
    exact = [precision[:-1][recall[:-1] >= k / 10 - 1e-9].max() for k in range(11)]           # without its own (1, 0)
    assert ours == pytest.approx(np.mean(exact), rel=1e-12) and 0 < ours <= 1
    other = rng.permutation(n)
    assert metrics.eleven_point_precision(scores[other], positive[other], counted[other]) == ours


def test_eleven_point_precision_of_a_class_without_positives():
    assert metrics.eleven_point_precision([1.0, 2.0], [True, False], [False, True]) is None
    assert metrics.eleven_point_precision([1.0, 2.0], [False, True], [True, True]) == 1


def test_global_average_precision():
    """It is scikit-learn's average precision, over the known queries in place of the right ones."""
    rng = np.random.default_rng(0)
    confidence, right, known = rng.random(300), rng.random(300) < 0.4, rng.random(300) < 0.7
    right &= known
    exact = average_precision_score(right, confidence) * right.sum() / known.sum()
    assert metrics.global_average_precision(confidence, right, known) == pytest.approx(exact, rel=1e-12)
    assert metrics.global_average_precision([3, 2, 1], [1, 1, 0], [1, 1, 0]) == 1


def test_corruption_error():
    """AlexNet itself has 100; severities are summed before they are divided, corruptions averaged after."""
    assert metrics.corruption_error({name: list(each) for name, each in metrics.ALEXNET.items()}) == pytest.approx(100)
    errors = {name: np.random.default_rng(i).uniform(0, 100, 5).tolist() for i, name in enumerate(("fog", "snow"))}
    exact = np.mean([np.sum(errors[name]) / np.sum(metrics.ALEXNET[name]) for name in errors])
    assert metrics.corruption_error(errors) == pytest.approx(100 * exact)
    with pytest.raises(ValueError, match="rain.*wanted 5 errors for each of gaussian_noise"):
        metrics.corruption_error(dict(rain=[1, 2, 3, 4, 5]))


# --------------------------------------------------------------------------------
# Panoptic quality


def codes(text):
    """a, A, b, ...: class 0 and number 0, class 0 and number 1, class 1; . is void, # a crowd of class 0"""
    known = {".": 255000, "#": 999} | {letter: 1000 * k for k, letter in enumerate("abc")} | {
        letter: 1000 * k + 1 for k, letter in enumerate("ABC")}
    return np.array([[known[letter] for letter in row] for row in text.split()])


@pytest.mark.parametrize("truth, found, wanted", [
    ("aab aab", "aab aab", [[1, 1], [1, 1], [0, 0], [0, 0]]),
    ("aaaA aaaA", "AAAa AAAa", [[2, 0], [2, 0], [0, 0], [0, 0]]),                # numbers mean nothing
    ("aaaa bbbb", "aaab bbbb", [[0.75, 0.8], [1, 1], [0, 0], [0, 0]]),
    ("aabb aabb", "abbb abbb", [[0, 4 / 6], [0, 1], [1, 0], [1, 0]]),              # a half is not above a half
    ("aa.. aa..", "aaab aabb", [[1, 0], [1, 0], [0, 0], [0, 0]]),                  # void is left out, what lies on it
    ("aab. aabb", "aabb aabb", [[1, 1], [1, 1], [0, 0], [0, 0]]),
    ("bb## bb##", "bbaa bbAA", [[0, 1], [0, 1], [0, 0], [0, 0]]),                  # of a crowd all are right
    ("aa## aa##", "aabb aabb", [[1, 0], [1, 0], [0, 1], [0, 0]]),                  # but those of another class
    ("aabb", "aa..", [[1, 0], [1, 0], [0, 0], [0, 1]]),
])
def test_panoptic_counts_by_hand(truth, found, wanted):
    found = metrics.panoptic_counts(codes(found), codes(truth), 2)
    np.testing.assert_allclose(found, wanted)


def test_panoptic_scores_by_hand():
    counts = np.array([[1.5, 0.9, 0, 0], [2, 1, 0, 0], [1, 0, 0, 3], [1, 1, 0, 0]])
    found = metrics.panoptic_scores(counts, {1})
    a, b = 1.5 / 3, 0.9 / 1.5
    exact = dict(pq=100 * (a + b) / 3, sq=100 * (0.75 + 0.9) / 3, rq=100 * (2 / 3 + 1 / 1.5) / 3,
                 pq_things=100 * a / 2, pq_stuff=100 * b)
    assert found == pytest.approx(exact)
    perfect = metrics.panoptic_counts(codes("abB"), codes("abB"), 2)
    assert metrics.panoptic_scores(perfect, {0}) == dict(pq=100, sq=100, rq=100, pq_things=100, pq_stuff=100)
