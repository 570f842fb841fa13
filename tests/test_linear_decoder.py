"""decoders/linear.py: norm then linear, windows two thirds apart, a fit that finds the answer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from decoders import DECODERS, linear

CPU = torch.device("cpu")


def test_head_is_norm_then_linear():
    head = linear.Head(4, 3).double()
    maps = [torch.randn(2, 3, 4).double(), torch.randn(5, 1, 4).double()]
    x = torch.cat([m.flatten(0, 1) for m in maps])
    unit = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    exact = unit @ head.linear.weight.T + head.linear.bias
    found = head(maps)
    assert [tuple(m.shape) for m in found] == [(3, 2, 3), (3, 5, 1)]
    torch.testing.assert_close(torch.cat([m.flatten(1).T for m in found]), exact)


@pytest.mark.parametrize("side, wanted", [(512, 341), (160, 107), (16, 11), (1, 1)])
def test_windows_are_two_thirds_apart(side, wanted):
    assert linear.stride(side) == wanted
    views = linear.windows(torch.zeros(3, side, 2 * side, dtype=torch.uint8), side)
    assert {view.shape for view in views} == {(3, side, side)} and len(views) in (2, 3)


def test_fit_finds_the_answer_and_keeps_the_generator():
    """Patches that name their class; predict gives what the head says of float16 maps."""
    rng = np.random.default_rng(0)
    truths = [rng.integers(0, 3, (4, 4)) for _ in range(20)]
    maps = [np.eye(3, dtype=np.float16)[truth] for truth in truths]

    def loss(out, truths):
        yield sum(F.cross_entropy(x[None], truth[None]) for x, truth in zip(out, truths, strict=True)) / len(out)

    state, c = torch.get_rng_state(), SimpleNamespace(iterations=60, lr=0.1, seed=0)
    head = DECODERS["linear"].fit("segmentation", maps, truths, 3, loss, c, CPU)
    assert torch.equal(torch.get_rng_state(), state) and not head.training
    found = head.predict(maps[:2])
    assert [tuple(x.shape) for x in found] == [(3, 4, 4)] * 2 and not found[0].requires_grad
    assert all((x.argmax(0).numpy() == truth).all() for x, truth in zip(found, truths[:2], strict=True))
    again = DECODERS["linear"].fit("segmentation", maps, truths, 3, loss, c, CPU)
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True))


def test_peak_is_ten_times_larger_for_few_steps():
    for kind, lr in ("segmentation", 1e-3), ("depth", 3e-4):
        found = [linear.peak(kind, SimpleNamespace(lr=given, iterations=n))
                 for given, n in ((0, 5000), (0, 4999), (0.5, 10))]
        assert found == pytest.approx([lr, 10 * lr, 0.5])
