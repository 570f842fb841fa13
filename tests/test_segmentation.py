"""tasks/segmentation.py: an oracle scores 100, noise scores chance; the loss against a loop."""

from functools import partial

import numpy as np
import pytest
import torch

from engine.views import fitted
from tasks import TASKS, segmentation

CPU = torch.device("cpu")


class Source:
    """Images that nobody looks at, with their truths."""

    def __init__(self, truths):
        self.truths = truths

    def __len__(self):
        return len(self.truths)

    def image(self, i):
        return torch.zeros(3, 16, 16, dtype=torch.uint8)

    def truth(self, i):
        return self.truths[i]


class InMemory(list):
    """What Stored is, in memory."""
    row = property(lambda self: Row(m for each in self for m in each))


class Row(list):
    shapes = property(lambda self: [m.shape for m in self])


class Oracle:
    """Frozen features: feature(truth), a patch for each pixel; or noise."""
    device = CPU

    def __init__(self, feature, noise=False):
        self.feature, self.noise = feature, noise
        self.view = self.seen(fitted)

    def seen(self, view):
        return partial(view, side=16, patch=16)

    def maps(self, name, source, views=None):
        found = []
        for i in range(len(source)):
            m = self.feature(source.truth(i)).astype(np.float16)
            m = np.random.default_rng([i, name == "val"]).normal(size=m.shape).astype(np.float16) if self.noise else m
            found.append([m, m[:, ::-1].copy()] if views and views.func.__name__ == "mirrored" else [m])
        return InMemory(found)

    def keep(self, name, function, n, **about):
        return InMemory(function(i) for i in range(n))

    def each(self, name, function, n, **about):
        return InMemory(function(i, self) for i in range(n))


def one_hot(truth, n=5):
    return np.eye(n)[np.where(truth == 255, 0, truth)]


def random_labels(n, seed):
    rng = np.random.default_rng(seed)
    truths = [np.kron(rng.choice(5, (4, 4), p=(0.4, 0.15, 0.15, 0.15, 0.15)), np.ones((4, 4))) for _ in range(n)]
    return Source([truth.astype(np.uint8) for truth in truths])


@pytest.mark.parametrize("noise, control, low, high", [(0, 0, 99, 100), (1, 0, 0, 20), (0, 1, 0, 25)])
def test_oracle_segments_and_noise_does_not(noise, control, low, high):
    data = random_labels(48, 0), random_labels(12, 1), 5
    c = TASKS["segmentation"].config(resolution=16, iterations=200, control=bool(control))
    found = segmentation.run(data, Oracle(one_hot, noise), c)
    assert low <= found["miou"] <= high and 4 < found["chance_miou"] < 12


def test_segmentation_loss_counts_ignored_pixels():
    """Mean over all pixels of the cross entropy, which is 0 where the truth is ignored."""
    rng = np.random.default_rng(0)
    out, truth = torch.tensor(rng.normal(size=(4, 6, 6))), rng.integers(0, 4, (6, 6))
    truth[0] = 255
    log = torch.log_softmax(out, 0)
    exact = -sum(log[truth[y, x], y, x] for y in range(1, 6) for x in range(6)) / 36
    assert sum(segmentation.loss([out], [torch.tensor(truth)])) == pytest.approx(exact.item(), rel=1e-6)
    twice = sum(segmentation.loss([out, 0 * out], [torch.tensor(truth)] * 2))
    assert twice == pytest.approx((exact.item() + 30 / 36 * np.log(4)) / 2, rel=1e-6)
