"""decoders/adapter.py: deformable attention in loops; where cells are; what is dropped; how it starts."""

import math
from types import SimpleNamespace

import pytest
import torch

from decoders import adapter
from decoders.adapter import Adapter, DeformableAttention, DropPath, centres, sampled
from model import Features


def bilinear(map, x, y):
    """One number of a map h w at column x and row y, in pixels, whose centres are whole numbers; 0 outside"""
    h, w = len(map), len(map[0])
    total, left, top = 0.0, math.floor(x), math.floor(y)
    for i in top, top + 1:
        for j in left, left + 1:
            if 0 <= i < h and 0 <= j < w:
                total += map[i][j] * (1 - abs(x - j)) * (1 - abs(y - i))
    return total


def test_sampled_is_the_loop_points_outside_included():
    g = torch.Generator().manual_seed(0)
    sizes, (B, N, A, E, K) = [(3, 5), (4, 2)], (2, 6, 3, 4, 4)
    values = torch.randn(B, 23, A, E, generator=g)
    places = torch.rand(B, N, A, 2, K, 2, generator=g) * 1.6 - 0.3
    weights = torch.randn(B, N, A, 2, K, generator=g)
    found = sampled(values, sizes, places, weights)
    exact, outside = torch.zeros(B, N, A, E, dtype=torch.float64), 0
    for b in range(B):
        for a in range(A):
            for e in range(E):
                first, maps = 0, []
                for h, w in sizes:
                    maps.append(values[b, first : first + h * w, a, e].double().view(h, w).tolist())
                    first += h * w
                for n in range(N):
                    for level, (h, w) in enumerate(sizes):
                        for k in range(K):
                            x, y = (v.double().item() for v in places[b, n, a, level, k])
                            outside += not (0 <= x <= 1 and 0 <= y <= 1)
                            exact[b, n, a, e] += weights[b, n, a, level, k].double() * bilinear(
                                maps[level], x * w - 0.5, y * h - 0.5)
    error = (found - exact.flatten(2)).norm() / exact.norm()
    assert outside > 500 and error < 2.2e-7  # measured: 1.4e-7


def test_centres_go_row_by_row():
    assert centres([(1, 2), (2, 1)], "cpu").tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]


def test_at_first_heads_look_one_to_four_cells_in_sixteen_directions_at_all_alike():
    attention = DeformableAttention(32, 16, 2, 16)
    offsets = attention.sampling_offsets(torch.randn(1, 1, 32)).view(16, 2, 4, 2)
    for head in range(16):
        x, y = math.cos(head * math.pi / 8), math.sin(head * math.pi / 8)
        for k in range(4):
            for each in offsets[head, :, k]:
                scale = (k + 1) / max(abs(x), abs(y))
                torch.testing.assert_close(each, torch.tensor([x * scale, y * scale]))
    assert (attention.attention_weights(torch.randn(3, 32)) == 0).all()


def test_samples_are_dropped_and_the_others_grow():
    torch.manual_seed(0)
    drop, x = DropPath(0.3), torch.ones(4000, 2)
    out = drop(x)
    assert out[:, 0].unique().tolist() == pytest.approx([0, 1 / 0.7]) and (out[:, 0] == out[:, 1]).all()
    assert (out[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert drop.eval()(x) is x


def test_two_ranks_drop_what_one_does():
    drop, x = DropPath(0.5), torch.ones(16, 1)
    torch.manual_seed(3)
    whole = drop(x)
    parts = []
    for rank in range(2):
        torch.manual_seed(3)
        drop.ranks = SimpleNamespace(rank=rank, count=2)
        parts.append(drop(x[:8]))
    assert torch.equal(torch.cat(parts), whole) and 0 < (whole == 0).sum() < 16


def features(B, D, grid, n=4):
    return [Features(None, None, torch.randn(B, grid[0] * grid[1], D), grid) for _ in range(n)]


@pytest.mark.parametrize("grid", [(4, 6), (8, 12)])
def test_any_patch_gives_the_same_sizes(grid):
    torch.manual_seed(0)
    maps = Adapter(32, stem=8)(features(2, 32, grid), torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 64 // k, 96 // k) for k in (4, 8, 16, 32)]
    assert all(0.5 < m.std() < 2 for m in maps)


def test_sides_that_are_no_multiple():
    with pytest.raises(ValueError, match="Mask2Former: images are 48x64 pixels; both sides must be a multiple of 32"):
        Adapter(32, stem=8)(features(1, 32, (4, 3)), torch.zeros(1, 3, 64, 48))


def test_gradients_reach_all_of_it():
    torch.manual_seed(0)
    module = Adapter(32, stem=8, drop=0.0)
    for layer in module.modules():
        if isinstance(layer, DeformableAttention):  # of a start of zeros, the queries' norms have no gradient
            torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.1)
            torch.nn.init.normal_(layer.attention_weights.weight, std=0.1)
    f, images = features(2, 32, (4, 4)), torch.randn(2, 3, 64, 64)
    before = [x.patches.clone() for x in f]
    sum(m.square().mean() * (k + 1) + m[:, :, 0].sum() for k, m in enumerate(module(f, images))).backward()
    for name, p in module.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    assert all(torch.equal(x.patches, y) for x, y in zip(f, before, strict=True))
    assert adapter.COARSEST == 32
