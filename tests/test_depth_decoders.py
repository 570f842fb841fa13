"""decoders/depth.py: losses by hand, and what they must not see."""

import math

import pytest
import torch

from decoders import depth


def scene(seed, n=2, size=(24, 20)):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, *size, generator=g) * 5 + 0.5


def test_bins():
    assert depth.evenly(1, 3, 5).tolist() == [1, 1.5, 2, 2.5, 3]
    canopy = depth.mixed(0.001, 96, 256)
    assert canopy[0] == pytest.approx(0.008) and canopy[-1] == pytest.approx(96, rel=1e-6)
    assert (canopy.diff() > 0).all()


def test_mean_of_bins():
    logits = torch.tensor([1.0, -3.0, 0.5])[:, None, None]
    found = depth.mean_of_bins(logits, torch.tensor([1.0, 2.0, 4.0]))
    assert found.item() == pytest.approx((1.1 * 1 + 0.1 * 2 + 0.6 * 4) / 1.8)


def test_scale_and_shift_are_forgiven():
    found, truth, counted = scene(0), scene(1), scene(2) > 2
    a, b = (depth.relative_loss(x, truth, counted) for x in (found, 3 * found + 7))
    assert abs(a - b) / a < 1e-6
    assert depth.relative_loss(3 * truth + 7, truth, counted) < 5e-6                           # measured: 1.6e-6
    assert a > 0.1


def test_relative_loss_in_loops():
    found, truth, counted = scene(3, 1, (9, 8)), scene(4, 1, (9, 8)), scene(5, 1, (9, 8)) > 2
    H, W = 9, 8

    def standardised(d):
        values = sorted(d[0, y, x].item() for y in range(H) for x in range(W) if counted[0, y, x])
        median = values[(len(values) - 1) // 2]
        scale = sum(abs(v - median) for v in values) / len(values)
        return [[(d[0, y, x].item() - median) / scale for x in range(W)] for y in range(H)]
    f, t = standardised(found), standardised(truth)
    r = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(f, t, strict=True)]
    there = counted[0].tolist()
    total = sum(abs(r[y][x]) for y in range(H) for x in range(W) if there[y][x]) / counted.sum().item()
    for k in 1, 2, 4, 8:
        ys, xs = range(0, H, k), range(0, W, k)
        n = sum(there[y][x] for y in ys for x in xs)
        steps = [abs(r[y + k][x] - r[y][x]) for y in ys for x in xs if y + k < H and there[y][x] and there[y + k][x]]
        steps += [abs(r[y][x + k] - r[y][x]) for y in ys for x in xs if x + k < W and there[y][x] and there[y][x + k]]
        total += 2 * sum(steps) / max(n, 1)
    assert depth.relative_loss(found, truth, counted).item() == pytest.approx(total, rel=1e-5)


def test_images_without_truth_count_for_nothing():
    found, truth, counted = scene(6).requires_grad_(), scene(7), scene(8) > 2
    nothing = torch.stack([counted[0], torch.zeros_like(counted[0])])
    assert depth.relative_loss(found, truth, nothing) == depth.relative_loss(found[:1], truth[:1], counted[:1])
    none = depth.relative_loss(found, truth, torch.zeros_like(counted))
    none.backward()
    assert none == 0 and (found.grad == 0).all()


def test_absolute_loss():
    found, truth = torch.tensor([[[1.0, 2.0, 9.0]]]), torch.tensor([[[2.0, 2.0, 0.0]]])
    g = torch.tensor([math.log(1.001 / 2.001), 0.0], dtype=torch.float64)
    exact = (g.var() + 0.15 * g.mean() ** 2).sqrt().item()
    assert depth.absolute_loss(found, truth, truth > 0).item() == pytest.approx(exact, rel=1e-5)
    assert depth.known(torch.tensor([0.0, 1.0, 10.0, 11.0]), 10).tolist() == [False, True, True, False]


def test_alignment_is_least_squares():
    found, truth, counted = (scene(i, 1)[0] for i in (9, 10, 11))
    counted = counted > 2
    A = torch.stack([found[counted], torch.ones_like(found[counted])], 1).double()
    s, t = torch.linalg.lstsq(A, truth[counted].double()[:, None]).solution[:, 0]
    torch.testing.assert_close(depth.aligned(found, truth, counted), (s * found + t).float())


@pytest.mark.parametrize("size, before", [((101, 90), (5, 3)), ((32, 32), (0, 0)), ((33, 17), (7, 7))])
def test_padding_is_around_the_middle(size, before):
    x = depth.padded(torch.ones(1, 1, *size), 16)
    H, W = (-(-n // 16) * 16 for n in size)
    assert x.shape == (1, 1, H, W) and x.sum() == size[0] * size[1]
    assert x[0, 0].nonzero()[0].tolist() == list(before)
