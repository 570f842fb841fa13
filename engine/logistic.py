"""
Logistic regression to its optimum, on the device, of features that need not fit in memory.

    w, b = argmin  |w|^2 / 2 + C sum_i cross entropy(x_i w + b, y_i)                  as scikit-learn has it

by L-BFGS, float64 where the device has it, as there. paper: DINOv3 App. D.7.
"""

import torch
import torch.nn.functional as F

from engine.classify import batches

ITERATIONS = 200     # of one C; the next goes on from there
STEEP = 1e-9         # largest entry of the gradient of the mean loss at which the optimum is reached


def fit(x, y, n_classes, C, device, start=None, iterations=ITERATIONS):
    """
    x  n F, a tensor or a Table    y  n    start  what this returns, of another C
    returns  F + 1, n_classes: w, and b as its last row
    """
    kind = torch.float32 if device.type == "mps" else torch.float64
    value = torch.zeros(x.shape[1] + 1, n_classes, dtype=kind, device=device) if start is None else start.clone()
    if start is None:  # the optimum of b while w is 0, as a small C would have it
        value[-1] = (y.bincount(minlength=n_classes).to(value) / len(y)).clamp(min=1e-9).log()
        value[-1] -= value[-1].mean()
    decay = (2 if n_classes == 2 else 1) / (C * len(y))  # of two classes scikit-learn has one w, and our two half of it

    def closure():
        loss, gradient = value.new_zeros(()), torch.zeros_like(value)
        for part, truth in batches(x, y, device):
            part = part.to(kind)
            logits = scores(part, value)
            loss += F.cross_entropy(logits, truth, reduction="sum")
            slope = logits.softmax(1)
            slope[torch.arange(len(truth), device=device), truth] -= 1                         # B n_classes
            gradient[:-1] += part.T @ slope
            gradient[-1] += slope.sum(0)
        value.grad = gradient / len(y)
        value.grad[:-1] += decay * value[:-1]
        return loss / len(y) + decay / 2 * value[:-1].square().sum()

    optimizer = torch.optim.LBFGS([value], max_iter=iterations, max_eval=2 * iterations, tolerance_grad=STEEP,
                                  tolerance_change=1e-13, history_size=10, line_search_fn="strong_wolfe")
    optimizer.step(closure)
    return value.detach()


def scores(x, value):
    """B F -> B n_classes"""
    return torch.addmm(value[-1], x.to(value), value[:-1])


def answers(x, value, device):
    """n F, a tensor or a Table -> the likeliest class, n, on the host"""
    return torch.cat([scores(part.to(device), value).argmax(1).cpu() for part in x.split(2048)])
