"""
Whether a kernel of csrc/ is right where it is to run: small ragged inputs among NaNs, against the equations in float64.

    failure    what is wrong with a kernel, in words, or None

ops.py asks at the first use of each (op, dtype, head width, device). Some milliseconds each; dimension letters: see the
top of model.py.
"""

import math
from zlib import crc32

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # of the largest value; about five roundings
SHAPES = (5, 67, 1), (130, 264, 0)  # n, K, elements off a multiple of 16 bytes: with vector loads and without
TEMPERATURES = 0.1, 0.06            # of student, teacher
COLOURS = [                         # rows of data.py's table: in three orders, grey, blurred, solarised alone
    [1, 0.75, 1.5, 1.25, 0.1, 0, 1, 2, 3, 0, 0, 0], [1, 1.2, 0.7, 0.9, -0.1, 3, 2, 1, 0, 0, 0.7, 1],
    [1, 1.4, 1.2, 1.1, 0.3, 2, 0, 3, 1, 1, 2.0, 0], [0] * 9 + [1, 0.9, 1], [0] * 10 + [0.3, 0], [0.0] * 11 + [1]]
NORMAL = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)  # mean, std
CHECKSUMS = {(13, 21): 1081116042, (12, 20): 2394616413}  # H, W: of Pillow's levels, as int16


def failure(op, dtype, E, device):
    """Why the kernel is not to run: it takes no such tensors, does not run, or is wrong. None = it is right."""
    if op == "rope_attention" and device.startswith("cuda"):
        if dtype not in (torch.float16, torch.bfloat16) or E not in (64, 128):
            return f"kernels take bfloat16 and float16 with heads of 64 or 128 channels, not {str(dtype)[6:]} of {E}"
    elif dtype not in (torch.float32, torch.bfloat16) and not device.startswith("cuda"):
        return "kernels take float32 and bfloat16"
    place = torch.device(device)
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad(), torch.autocast(
                place.type, enabled=False), saved_tensors_hooks(same, same):  # what recomputes counts what is saved
            pairs = list(CHECKS[op](dtype, E, place))
    except RuntimeError as error:
        return f"it does not run ({str(error).splitlines()[0]})"
    worst = max((distance(ours, exact) for ours, exact in pairs), key=lambda e: math.inf if math.isnan(e) else e)
    return None if worst <= LIMITS[dtype] else f"its error is {worst:.1e} where {LIMITS[dtype]:.0e} is the most"


def same(tensor):
    return tensor


def distance(ours, exact):
    """Of the largest value."""
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


def normal(place, dtype, *shape, seed, off=0, spread=1.0):
    """Random numbers of `dtype`, `off` elements off a multiple of 16 bytes, NaN before and after them."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread
    around = torch.full((x.numel() + 64,), math.nan, dtype=dtype, device=place)
    return around[32 + off : 32 + off + x.numel()].view(shape).copy_(x)


def stale(place, *sizes):
    """Memory that the next tensors of these many bytes will probably take, left full of NaNs."""
    for size in sizes:
        torch.full((size // 4 + 1,), math.nan, device=place)


# --------------------------------------------------------------------------------
# Each op: pairs of what it returns and of what it should


def sinkhorn_pass(dtype, _, place):
    for n, K, off in SHAPES:
        x, log_u = normal(place, dtype, n, K, seed=0, off=off, spread=0.5), None
        z = x.double() / TEMPERATURES[1]
        for exact in z.logsumexp(0), None:
            if log_u is not None:
                exact = (z - (z + log_u.double()).logsumexp(1, keepdim=True)).logsumexp(0)
            stale(place, 4 * K)
            log_r = torch.ops.nanodino.sinkhorn_pass(x, log_u, TEMPERATURES[1])
            yield log_r, exact
            log_u = -log_r


def sinkhorn(dtype, _, place):
    for n, K, off in SHAPES:
        x, exact = normal(place, dtype, n, K, seed=0, off=off, spread=0.5), 0.0
        z = x.double() / TEMPERATURES[1]
        for iterations in 1, 2:
            exact = -(z - (0 if iterations == 1 else (z + exact).logsumexp(1, keepdim=True))).logsumexp(0)
            stale(place, 4 * K)
            yield torch.ops.nanodino.sinkhorn(x, TEMPERATURES[1], iterations), exact


def sinkhorn_targets(dtype, _, place):
    for n, K, off in SHAPES:
        x, log_u = normal(place, dtype, n, K, seed=0, off=off, spread=0.5), normal(place, torch.float32, K, seed=1)
        stale(place, 4 * n * K)
        ours = torch.ops.nanodino.sinkhorn_targets(x, log_u, TEMPERATURES[1], torch.float32)
        yield ours, (x.double() / TEMPERATURES[1] + log_u.double()).softmax(-1)


def assignment_loss(dtype, _, place):
    for B, K, off in (2, 67, 1), (3, 264, 0):
        student = normal(place, dtype, 3, B, K, seed=0, off=off)
        teacher, log_u = normal(place, dtype, 2, B, K, seed=1, off=off), normal(place, torch.float32, K, seed=2)
        weights = normal(place, torch.float32, B, seed=3).abs()
        pairs = torch.tensor([[0.0, 1], [1, 0], [0.5, 0.5]], device=place)
        stale(place, 4 * student.numel(), student.element_size() * student.numel(), 12 * B)
        ours = torch.ops.nanodino.assignment_loss(student, teacher, log_u, weights, pairs, *TEMPERATURES)
        x = student.double().requires_grad_()
        q = (teacher.double() / TEMPERATURES[1] + log_u.double()).softmax(-1)
        log_p = (x / TEMPERATURES[0]).log_softmax(-1)
        exact = -torch.einsum("st,b,tbk,sbk->s", pairs.double(), weights.double(), q, log_p)
        yield ours[0], exact.detach()
        yield ours[1], torch.autograd.grad(exact.sum(), x)[0]


def rope_attention(dtype, E, place):
    """With the gradient where there is a kernel for it."""
    n_images, tokens, A = [2, 1], [7, 70], 2
    T = sum(n * N for n, N in zip(n_images, tokens, strict=True))
    qkv, dout = (normal(place, dtype, T, k * A * E, seed=k) for k in (3, 1))
    angles = [normal(place, torch.float32, N, E // 2, seed=N) for N in tokens]
    tables = [f(angle) for angle in angles for f in (torch.cos, torch.sin)]
    stale(place, 4 * T * A, *(k * T * A * E * qkv.element_size() for k in (1, 3)))
    out, lse = torch.ops.nanodino.rope_attention(qkv.detach(), tables, n_images, A)
    x, exact = qkv.double().requires_grad_(), []
    rows = x.split([n * N for n, N in zip(n_images, tokens, strict=True)])
    for part, n, angle in zip(rows, n_images, angles, strict=True):
        turn = torch.polar(torch.ones_like(angle), angle).cdouble()                            # N E/2
        q, k, v = part.view(n, len(angle), 3, A, E).permute(2, 0, 3, 1, 4)                     # B A N E each
        q, k = (torch.complex(*y.chunk(2, -1)) * turn for y in (q, k))
        y = ((q @ k.mH).real / E ** 0.5).softmax(-1) @ v
        exact.append(y.transpose(1, 2).reshape(-1, A * E))
    exact = torch.cat(exact)
    yield out, exact.detach()
    if place.type == "cpu":
        dqkv = torch.ops.nanodino.rope_attention_backward(dout, qkv, out, lse, tables, n_images, A)
        yield dqkv, torch.autograd.grad(exact, x, dout.double())[0]


def cut(dtype, _, place):
    """Beside PyTorch's own, at sizes that 16 does not divide and ones that it does; shrunk, and made larger."""
    image = (torch.arange(70 * 90 * 3, device=place) ** 2 // 7 % 256).to(torch.uint8).view(70, 90, 3).permute(2, 0, 1)
    for (top, left, h, w), size, flip in ((0, 0, 70, 90), 32, False), ((33, 5, 37, 11), 45, True):
        stale(place, 3 * size * size)
        ours = torch.ops.nanodino.cut(image, (top, left, h, w), flip, size)
        exact = torch.nn.functional.interpolate(image[None, :, top : top + h, left : left + w], (size, size),
                                                mode="bicubic", antialias=True)[0]
        yield ours, (exact.flip(-1) if flip else exact).double()


def colours(dtype, _, place):
    """Bytes, normalised: a checksum tells them from all others. Each operation, by whole vectors and beside them."""
    table = torch.tensor(COLOURS, device=place)
    mean, std = (torch.tensor(x, dtype=torch.float64, device=place).view(3, 1, 1) for x in NORMAL)
    for (H, W), checksum in CHECKSUMS.items():
        place_of = torch.arange(len(COLOURS) * 3 * H * W, device=place)
        crops = (place_of ** 2 // 7 % 256).to(torch.uint8).view(-1, 3, H, W)
        stale(place, 4 * crops.numel())
        ours = torch.ops.nanodino.colours(crops, table, *NORMAL)
        levels = (ours.double() * std + mean).mul(255).round()
        yield ours, (levels / 255 - mean) / std
        found = crc32(levels.clamp(-1, 256).short().cpu().numpy().tobytes())
        yield torch.tensor(float(found == checksum)), torch.tensor(1.0)


CHECKS = dict(sinkhorn=sinkhorn, sinkhorn_pass=sinkhorn_pass, sinkhorn_targets=sinkhorn_targets,
              assignment_loss=assignment_loss, rope_attention=rope_attention, cut=cut, colours=colours)
