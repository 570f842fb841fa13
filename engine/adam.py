"""
AdamW whose two moments are bfloat16: four bytes a parameter fewer, on every rank and in every checkpoint.

    AdamW16    torch.optim.AdamW, step by step, in float32; what it keeps is rounded up or down at random
    rounded    so that the mean is right: with beta2 = .999 a step changes the second moment by a thousandth, and
               bfloat16 has 8 bits; rounded to the nearest it would stand still

Where a number is rounded to is a function of (seed, step, the parameter's name, its place): the same on any ranks.
"""

import zlib

import torch

from model import shard

EPS = 1e-8                     # torch's own
MIX = 0x9E3779B97F4A7C15 - 2 ** 64, 0xBF58476D1CE4E5B9 - 2 ** 64  # SplitMix64's two odd numbers, as signed ones


class AdamW16(torch.optim.Optimizer):
    """
    groups  as those of torch.optim.AdamW    names  {parameter: its name}
    at      the step, set before each: what is drawn is a function of it
    found_inf  0-dim: where it is 1 nothing changes, as in torch's fused AdamW
    """
    moments = torch.bfloat16

    def __init__(self, groups, names, betas, seed):
        super().__init__(groups, dict(lr=0.0, weight_decay=0.0, betas=betas))
        self.names, self.seed, self.at, self.found_inf = names, seed, 0, None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self.update(p, group)

    def update(self, p, group):
        state, (beta1, beta2), lr = self.state[p], group["betas"], group["lr"]
        (x, first), (g, _), (kept_m, _), (kept_v, _) = map(shard, (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
        if not x.numel():
            return
        keep = torch.zeros((), dtype=torch.bool, device=x.device) if self.found_inf is None else self.found_inf > 0
        state["step"] += (~keep).to(state["step"])
        t = state["step"].to(x.device)
        m = torch.lerp(kept_m.float(), g, 1 - beta1)
        v = torch.lerp(kept_v.float(), g.square(), 1 - beta2)
        moved = m / (1 - beta1 ** t) / ((v / (1 - beta2 ** t)).sqrt() + EPS)
        x.copy_(torch.where(keep, x, x * (1 - lr * group["weight_decay"]) - lr * moved))
        start = first * (x.numel() // len(x)) if x.ndim else 0
        for number, (kept, value) in enumerate(((kept_m, m), (kept_v, v))):
            key = zlib.crc32(f"{self.seed} {self.at} {self.names[p]} {number}".encode())
            kept.copy_(torch.where(keep, kept, rounded(value, key, start)))


def rounded(x, key, start=0):
    """
    float32 -> bfloat16: the one above or the one below, each as likely as it is near.

    key, start  what is drawn is a function of the key, and of each number's place, from `start` on
    """
    offset = (key * MIX[1] + 2 ** 63) % 2 ** 64 - 2 ** 63      # products wrap around, as on paper
    i = torch.arange(start, start + x.numel(), device=x.device).view(x.shape) * MIX[0] + offset
    i = (i ^ (i >> 30)) * MIX[1]
    drawn = ((i ^ (i >> 27)) >> 24 & 0xFFFF).int()             # what bfloat16 leaves off is 16 bits
    up = ((x.contiguous().view(torch.int32) + drawn) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), up, x).bfloat16()
