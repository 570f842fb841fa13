"""
The linears of transformer blocks in float8: e4m3 with a scale for each row. Heads and patch embedding stay bfloat16.

    convert          a backbone, whose blocks multiply so from then on
    there, check     whether a device can
    linear           y = x W^T + b and the gradient of x in float8; that of W in bfloat16
    PRODUCTS         how each kind of device multiplies; tests and bench.py lend the CPU `emulated`

A product wants rows along what it sums over: those of x and W for y, those of y's gradient and columns of W for x's.
Written here because torchao 0.18's nearest recipe has one scale for all columns of W, and drops the mask of qkv's bias.
paper: §3.2, of the 7B    Dimension letters: see the top of model.py; here a linear's D -> F.
"""

import math

import torch
from torch import nn

from model import MaskedBiasLinear

LARGEST = torch.finfo(torch.float8_e4m3fn).max    # 448
SMALLEST = torch.finfo(torch.float32).tiny        # of scales: a row of zeros is divided by it
CAPABILITY = 8, 9                                 # of CUDA devices, from which they multiply float8


def quantised(x):
    """
    A matrix as rows of float8 and what each is multiplied by:  n K -> n K float8_e4m3fn, contiguous;  n 1 float32

        scale = largest |x| in the row / 448;   a row with inf or nan in it is nan
    """
    largest = torch.linalg.vector_norm(x, math.inf, dim=1, keepdim=True, dtype=torch.float32)
    scale = (largest / LARGEST).clamp(min=SMALLEST)
    return (x / scale).to(torch.float8_e4m3fn, memory_format=torch.contiguous_format), scale


def scaled(a, b, scale_a, scale_b):
    """diag(scale_a) a b^T diag(scale_b), added up in float32    a  n K, b  m K, float8 -> n m bfloat16"""
    # not use_fast_accum: it adds up in about 14 bits, and what that would save has not been measured
    return torch._scaled_mm(a, b.t(), scale_a, scale_b.t(), out_dtype=torch.bfloat16)


def emulated(a, b, scale_a, scale_b):
    """What `scaled` finds, but for the order of its sums, on any device."""
    with torch.autocast(a.device.type, enabled=False):
        return (a.float() @ b.float().t() * scale_a * scale_b.t()).bfloat16()


PRODUCTS = dict(cuda=scaled)


def product(a, b):
    """a b^T    a  n K, b  m K, bfloat16 -> n m bfloat16"""
    (a, scale_a), (b, scale_b) = quantised(a), quantised(b)
    return PRODUCTS[a.device.type](a, b, scale_a, scale_b)


class Product(torch.autograd.Function):
    """y = x W^T.    x  T D bfloat16    W  F D, any float dtype; rounded to bfloat16 first, as shards travel"""
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight.bfloat16())                                      # T F

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return product(grad, weight.bfloat16().t()), grad.t() @ x                 # T D, F D


def linear(x, weight, bias=None):
    """F.linear under autocast, in float8.    x  T D    returns  T F bfloat16"""
    y = Product.apply(x.bfloat16(), weight)
    return y if bias is None else y + bias.to(y.dtype)


class Linear8(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class MaskedBiasLinear8(MaskedBiasLinear):
    def forward(self, x):
        return linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


OURS = {nn.Linear: Linear8, MaskedBiasLinear: MaskedBiasLinear8}


def convert(backbone):
    """Its blocks' linears, in place, before they are sharded or compiled; their parameters and names stay."""
    for part in backbone.blocks.modules():
        if isinstance(part, nn.Linear):
            part.__class__ = OURS[type(part)]


def there(device):
    """Whether a device multiplies float8."""
    return device.type in PRODUCTS and (device.type != "cuda" or torch.cuda.get_device_capability(device) >= CAPABILITY)


def check(device):
    """Raises ValueError for a device that does not multiply float8."""
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if not there(device):
        here = "CUDA of capability {}.{}".format(*found) if found else device.type
        raise ValueError("--precision fp8 wants CUDA of capability {}.{} or more, as an L4 or an H100 has; here is {}; "
                         "take --precision bf16".format(*CAPABILITY, here))
