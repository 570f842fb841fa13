"""engine/probe.py: classifiers side by side are those of torch.optim.SGD, each by itself. See also test_linear.py."""

import torch
import torch.nn.functional as F

from engine import probe

RATES = 0.5, 0.02


def test_classifiers_side_by_side_are_those_that_torch_trains_alone():
    """All samples in every step, so that their order is of no matter"""
    x, y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    start, _ = probe.trained(x, y, 3, RATES, 12, 0, 7)
    weight, bias = probe.trained(x, y, 3, RATES, 12, 9, 7)
    assert start.std() < 0.02
    for r, rate in enumerate(RATES):
        w, b = start.view(5, 2, 3)[:, r].clone().requires_grad_(), torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.SGD([w, b], rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        for _ in range(9):
            optimizer.zero_grad()
            F.cross_entropy(x @ w + b, y).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(weight.view(5, 2, 3)[:, r], w.detach(), rtol=0, atol=2e-6)
        torch.testing.assert_close(bias.view(2, 3)[r], b.detach(), rtol=0, atol=2e-6)
    parts = list(probe.scored(x, y, weight, bias, 2))
    assert len(parts) == 1 and torch.equal(parts[0][1], y)
    torch.testing.assert_close(parts[0][0][:, 1], x @ weight.view(5, 2, 3)[:, 1] + bias.view(2, 3)[1])


def test_another_loss_is_summed_over_samples():
    x, y = torch.randn(6, 4), torch.rand(6, 2)
    weight, bias = probe.trained(x, y, 2, (0.1,), 6, 1, 0, lambda logits, y: (logits[:, 0] * y).sum())
    start, _ = probe.trained(x, y, 2, (0.1,), 6, 0, 0)
    torch.testing.assert_close(start - weight, 0.1 * x.T @ y / 6)
    torch.testing.assert_close(-bias, 0.1 * y.mean(0))
