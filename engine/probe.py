"""
Linear classifiers on frozen features, one for each learning rate, trained side by side by SGD: they share every batch.

    trained    features, labels -> weights and biases of all of them
    scored     what each of them says of features

Dimension letters: see the top of model.py.
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from engine.classify import batches

MOMENTUM = 0.9
SPREAD = 0.01        # of the weights' start values


def cross_entropy(logits, y):
    """n R classes, and classes n -> summed"""
    return F.cross_entropy(logits.flatten(0, 1), y.repeat_interleave(logits.shape[1]), reduction="sum")


def trained(x, y, n_out, rates, batch, iterations, seed, loss_of=cross_entropy):
    """
    x        n F, a tensor or a Table, y's rows on the device that trains    n_out  outputs of a classifier
    rates    R peaks; cosine to 0    loss_of  (logits n R n_out, y) -> scalar, summed over the n and R
    returns  weight F (R n_out), bias (R n_out)
    """
    (n, width), R, device = x.shape, len(rates), y.device
    rates, generator = torch.as_tensor(rates, device=device), torch.Generator().manual_seed(seed)
    weight = (torch.randn(width, R * n_out, generator=generator) * SPREAD).to(device).requires_grad_()
    bias = torch.zeros(R * n_out, device=device, requires_grad=True)
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    order = torch.empty(0, dtype=torch.long)
    for step in tqdm(range(iterations), desc="linear", unit="it", leave=False, disable=None):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(n, generator=generator)])
        rows, order = order[:batch], order[batch:]
        logits = torch.addmm(bias, x[rows].to(device), weight).view(len(rows), R, n_out)
        gradients = torch.autograd.grad(loss_of(logits, y[rows]) / len(rows), (weight, bias))
        lr = (rates * (1 + torch.cos(torch.tensor(torch.pi * step / iterations))) / 2).repeat_interleave(n_out)
        with torch.no_grad():
            for value, v, gradient in zip((weight, bias), speed, gradients, strict=True):
                value -= lr * v.mul_(MOMENTUM).add_(gradient)
    return weight.detach(), bias.detach()


@torch.no_grad()
def scored(x, y, weight, bias, R):
    """x n F, y n -> for each part of them: logits n R n_out, y"""
    for part, truth in batches(x, y, weight.device):
        yield torch.addmm(bias, part, weight).unflatten(1, (R, -1)), truth
