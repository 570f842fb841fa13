"""
Fused operations. Each function ends with its definition in PyTorch, which is the reference; csrc/ only makes it faster.

    python setup.py build_ext --inplace     builds csrc/ for this machine: C++ for the CPU, CUDA where there is nvcc

    CHOICES, use_kernels, describe     which path runs, by measurement; the user's word on it; the same in words
    sinkhorn, sinkhorn_pass, sinkhorn_targets    balanced assignments of teacher logits   DINOv3 §3.2
    assignment_loss                    cross-entropies against them, never writing them   DINOv3 §3.2, eq. 1
    rope_attention                     positions, then attention, of packed crop groups   DINOv3 §3.2
    recomputed                         a block, and what of it stays for the backward pass

This file alone imports the extension. Dimension letters: see the top of model.py.
"""

import importlib.util
import os
import platform
from contextlib import nullcontext
from functools import cache, partial
from math import inf
from pathlib import Path
from zlib import crc32

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

BUILT = importlib.util.find_spec("nanodino_C") is not None
if BUILT:
    try:
        import nanodino_C  # noqa: F401  registers torch.ops.nanodino.*
    except ImportError as error:  # built, but for another torch: fail here and now
        raise ImportError(f"ops: csrc is built but broken ({error}); python setup.py build_ext --inplace") from error
OPS = "sinkhorn", "sinkhorn_pass", "sinkhorn_targets", "assignment_loss", "rope_attention", "cut", "colours"
KERNELS = {(op, key.lower()) for op in OPS for key in ("CPU", "CUDA")  # asked once: torch.compile cannot
           if BUILT and hasattr(torch.ops.nanodino, op)  # else built before it was there
           and torch._C._dispatch_has_kernel_for_dispatch_key(f"nanodino::{op}", key)}
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CPU_BF16 = torch.cpu._is_avx512_bf16_supported()
*LEVELS, LEVEL = torch.ops.nanodino.cpu_levels() if BUILT else [""]  # of this processor; the one that runs
mode = "auto"

# --------------------------------------------------------------------------------
# Which path runs

# {(op, device): [(up to so many prototypes, or tokens x E; path)]}. Paths: kernel, csrc's; sdpa, the definition, whose
# attention is PyTorch's; cudnn, the same with the rotation compiled and that backend first; compiled, the definition in
# one torch.compile.
CHOICES = {(op, device): [(inf, "kernel")] for op in OPS for device in ("cpu", "cuda")}
# the quickest on an H200 (`make gpu-bench-3`): forward alone, and to train, of which csrc has only the CPU's backward
CHOICES["rope_attention", "cuda"] = [(264 * 64, "kernel"), (inf, "cudnn")]
CHOICES["rope_attention", "cuda", "trained"] = [(inf, "compiled")]
if LEVEL == "baseline" and platform.machine() in ("x86_64", "AMD64"):  # each fused multiply-add by way of double:
    CHOICES["rope_attention", "cpu"] = [(inf, "sdpa")]                 # a tenth to a half of PyTorch's speed, LOG.md


def use_kernels(choice):
    """auto: where CHOICES has them; off: never; on: the same as auto, but raise ValueError where one cannot run."""
    global mode
    if choice not in ("auto", "off", "on"):
        raise ValueError(f"--kernels {choice} is not known; choose auto, off or on")
    if choice == "on" and not BUILT:
        raise ValueError("--kernels on: csrc is not built here; run python setup.py build_ext --inplace, or take auto")
    check_level()
    mode = choice


def check_level():
    asked = os.environ.get("NANODINO_CPU") or LEVEL
    if asked != LEVEL and BUILT:
        raise ValueError(f"NANODINO_CPU={asked}: this processor has {', '.join(LEVELS)}; choose one, or unset it")


def readable(op, x):
    """The dtype in which the kernels get x: its own, or float32; attention takes no other than its own."""
    known = torch.float32, torch.bfloat16, *([torch.float16] if x.is_cuda else [])
    return x.dtype if x.dtype in known or op == "rope_attention" else torch.float32


def have(op, device):
    """Whether csrc is built for this device, and wanted."""
    return mode != "off" and (op, device.type) in KERNELS


def path(op, x, size, E=0):
    """What runs on x, of so many prototypes or tokens x E, with heads E wide: see CHOICES."""
    if mode != "off":
        trained = x.requires_grad and torch.is_grad_enabled()
        for most, name in constant_ways(op, readable(op, x), E, x.device, mode, trained):
            if size <= most:
                return name
    return "sdpa"


@torch.compiler.assume_constant_result  # torch.compile asks it, instead of looking through the cache and into the proof
def constant_ways(*key):
    return ways(*key)


@cache
def ways(op, dtype, E, device, mode, trained):
    """
    CHOICES for such tensors, with the definition where the kernel cannot run: it takes none such, or is not right on
    this device, which its first use finds out in milliseconds. One line says so; ValueError under --kernels on.
    """
    if not have(op, device):
        return ()
    choices = CHOICES[op, device.type]
    if trained:
        choices = CHOICES.get((op, device.type, "trained"), choices)
    why = obstacle(op, dtype, E, str(device)) if "kernel" in dict(choices).values() else None
    if why and mode == "on":
        raise ValueError(f"--kernels on: {op} in {str(dtype)[6:]} on {device}: {why}; take --kernels auto")
    return tuple((most, "sdpa" if why and name == "kernel" else name) for most, name in choices)


@cache
def obstacle(op, dtype, E, device):
    check_level()
    from engine.proof import failure  # here, as who runs definitions alone needs no proof
    why = failure(op, dtype, E, device)
    if why and mode != "on":
        print(f"ops: {op} in {str(dtype)[6:]} on {device}: {why}; its definition in PyTorch runs", flush=True)
    return why


def describe(device):
    """Which path runs on this device, in words."""
    if not BUILT:
        return "PyTorch (csrc not built)"
    if mode == "off":
        return "PyTorch (--kernels off)"
    if not have("sinkhorn_pass", device):
        return f"PyTorch (csrc not built for {device.type})"
    sources = b"".join(file.read_bytes() for file in sorted(Path(__file__).with_name("csrc").glob("*")))
    if crc32(sources) != torch.ops.nanodino.built_from():
        return "csrc, as it was built before its last change: run python setup.py build_ext --inplace"
    level, key = f" {LEVEL}" if device.type == "cpu" else "", ("rope_attention", device.type)
    said = [", ".join(name if most == inf else f"{name} to {most // 64} tokens of 64" for most, name in CHOICES[how])
            for how in (key, (*key, "trained")) if how in CHOICES]
    return f"csrc{level}" + ("" if said == ["kernel"] else f", attention by {'; to train '.join(said)}")

# --------------------------------------------------------------------------------
# Sinkhorn-Knopp and the cross-entropies of its assignments


def for_kernels(x):
    """In one piece, and in a dtype that these kernels read."""
    return x.to(readable("", x)).contiguous()


def sinkhorn(logits, temperature, n_iterations):
    """log u after so many passes over rows that one rank holds all of; None after none.    returns  K float32"""
    if n_iterations and have("sinkhorn", logits.device) and path("sinkhorn", logits, logits.shape[1]) == "kernel":
        return torch.ops.nanodino.sinkhorn(for_kernels(logits), temperature, n_iterations)
    log_u = None
    for _ in range(n_iterations):
        log_u = -sinkhorn_pass(logits, temperature, log_u)
    return log_u


def sinkhorn_pass(logits, temperature, log_u=None):
    """
    What one half iteration over columns adds up; the new log u is minus it. Ranks add theirs up in between.

        log r_k = log sum_b v_b exp(logits_bk / temperature),   v_b = 1 / sum_k u_k exp(logits_bk / temperature)

    logits   n K, any float dtype
    log_u    K float32, of the last pass; None = the first one, v = 1
    returns  K float32
    """
    if path("sinkhorn_pass", logits, logits.shape[1]) == "kernel":
        return torch.ops.nanodino.sinkhorn_pass(for_kernels(logits), log_u, temperature)
    x = logits.float() / temperature
    return (x if log_u is None else x - (x + log_u).logsumexp(1, keepdim=True)).logsumexp(0)


def sinkhorn_targets(logits, temperature, log_u, dtype=torch.float32):
    """softmax over k of logits_..k / temperature + log u_k.    logits  ... K    log_u  K float32    returns  ... K"""
    if path("sinkhorn_targets", logits, logits.shape[-1]) == "kernel":
        flat = for_kernels(logits).flatten(0, -2)
        return torch.ops.nanodino.sinkhorn_targets(flat, log_u, temperature, dtype).view(logits.shape)
    return (logits.float() / temperature + log_u).softmax(-1).to(dtype)


def cross_entropies(student, targets, weights, pairs, temperature):
    """
    loss_s = -sum_b weights_b sum_t pairs_st sum_k targets_tbk log_softmax(student_sb / temperature)_k

    student  S B K    targets  T B K float32    weights  B float32    pairs  S T float32    returns  S float32
    """
    log_p = (student.float() / temperature).log_softmax(-1)                       # S B K
    dots = torch.einsum("sbk,tbk->stb", log_p, targets)
    return -(dots * pairs[:, :, None] * weights).sum((1, 2))


def assignment_loss(student, teacher, log_u, weights, pairs, student_temp, teacher_temp, factors=None):
    """
    cross_entropies(student, sinkhorn_targets(teacher), ...), of which the kernel never writes the targets, and computes
    the gradient with the loss.

    student, teacher  S B K and T B K, any float dtype; the teacher gets no gradient
    factors           S float32, not 0: what the losses will be multiplied with before they are added up; the gradient,
                      multiplied already, takes the place of the student's logits, which nothing else may read
    raises            RuntimeError in the backward pass, on CUDA sometime after, if they were multiplied with others
    """
    fits = student.device.type == "cpu" or len(teacher) <= 2
    if fits and path("assignment_loss", student, student.shape[-1]) == "kernel":
        student, teacher = for_kernels(student), for_kernels(teacher.detach())
        if student.dtype != teacher.dtype:
            student, teacher = student.float(), teacher.float()
        rest = teacher, log_u, weights
        temperatures = student_temp, teacher_temp
        if factors is None or not student.requires_grad or student.is_leaf or torch.compiler.is_compiling():
            return torch.ops.nanodino.assignment_loss(student, *rest, pairs, *temperatures)[0]
        return OverwrittenLoss.apply(student, factors, *rest, pairs * factors[:, None], *temperatures)
    targets = sinkhorn_targets(teacher.detach(), teacher_temp, log_u)             # T B K
    return cross_entropies(student, targets, weights, pairs, student_temp)


class OverwrittenLoss(torch.autograd.Function):
    """assignment_loss whose gradient takes the place of the student's logits."""
    @staticmethod
    def forward(ctx, student, factors, *rest):
        ctx.grad, ctx.factors = student.detach(), factors                         # S B K, the same memory
        torch.autograd.graph.increment_version(student)  # so that autograd notices who else needs the logits
        return torch.ops.nanodino.assignment_loss_(ctx.grad, *rest) / factors

    @staticmethod
    def backward(ctx, grad_losses):
        if ctx.grad is None:
            raise ValueError("assignment_loss: a second backward of logits that were overwritten; pass no factors")
        grad, ctx.grad = ctx.grad, None
        off = (grad_losses - ctx.factors).abs()
        others = (off > 1e-4 * ctx.factors.abs()) & (off < inf)
        grad[..., 0] += (off * 0)[:, None]  # what is not finite stays so, and is seen in the gradient's norm
        torch._assert_async(~others.any(), "assignment_loss: the losses were not multiplied with their factors")
        return (grad, *[None] * 7)


if BUILT:
    @torch.library.register_fake("nanodino::sinkhorn")
    @torch.library.register_fake("nanodino::sinkhorn_pass")
    def _(logits, *_):
        return logits.new_empty(logits.shape[1:], dtype=torch.float32)

    @torch.library.register_fake("nanodino::sinkhorn_targets")
    def _(logits, log_u, temperature, dtype):
        return torch.empty_like(logits, dtype=dtype)

    @torch.library.register_fake("nanodino::assignment_loss")
    def _(student, teacher, log_u, weights, pairs, student_temp, teacher_temp):
        return student.new_empty(student.shape[:1], dtype=torch.float32), torch.empty_like(student)

    @torch.library.register_fake("nanodino::assignment_loss_")
    def _(student, teacher, log_u, weights, pairs, student_temp, teacher_temp):
        return student.new_empty(student.shape[:1], dtype=torch.float32)

    def keep_grad(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)

    def scale_grad(ctx, grad_losses, grad_grad):
        grad, = ctx.saved_tensors
        scaled = torch.mul(grad, grad_losses[:, None, None], out=torch.empty_like(grad))  # in float32, rounded once
        return scaled, *[None] * 6

    torch.library.register_autograd("nanodino::assignment_loss", scale_grad, setup_context=keep_grad)

# --------------------------------------------------------------------------------
# RoPE attention


def rotate(x, cos, sin):
    """Turns the pairs (x[e], x[e + E/2]) by the token's angles, in float32.    x  B N ... E    returns like x"""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@cache
def compiled(function):
    """function(x, cos, sin), x  B N 3 A E, as torch.compile makes it; as it is, with a line, where it cannot."""
    whole = torch.compile(function)
    try:
        x = torch.zeros(1, 2, 3, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        whole(x, *torch.ones(2, 2, 1, 1, 32, device="cuda")).sum().backward()
    except Exception as error:  # of Triton, of a missing C compiler, of the driver; the eager one is right anyway
        print(f"ops: no torch.compile here ({str(error).splitlines()[0]}); {function.__name__} is eager", flush=True)
        return function
    return whole


def attention(q, k, v):
    """softmax(q k^T / sqrt(E)) v, the softmax in float32.    q, k, v, returns  B A N E"""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and q.shape[2] <= 128 and CPU_BF16:
        # to train: forward and backward take a sixth of the time of the CPU's fused kernel at N = 21 and 69, at three
        # times its error, as the scores are rounded to bf16 (8e-3 against 3e-3 of the largest value, E = 64); where the
        # processor does not multiply bf16, five times as long
        scores = (q @ k.mT).float() * q.shape[-1] ** -0.5                     # B A N N
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def rope_attention(qkv, n_images, rope, heads):
    """
    Attention within each image, of queries and keys turned by their positions: crops of several sizes in one call.

        q, k, v = qkv of one image and head;  q, k = rotate(q), rotate(k);  out = softmax(q k^T / sqrt(E)) v

    qkv       T 3 A E flattened to T D, contiguous: all tokens of the first crop group's images, then of the next
    n_images  of each crop group
    rope      cos, sin of each crop group, N 1 1 E/2 float32 each, as from rope_tables: N is read off them
    returns   T D: heads side by side, as the projection wants them

    On a CPU the kernel takes bfloat16 and float32, keeps qkv, the result and a float32 for each token and head for the
    backward pass, and turns again there; on CUDA it takes bfloat16 and float16 with E = 64 or 128, and has no backward
    pass. Else the definition runs.
    """
    kind, E = qkv.device.type, qkv.shape[1] // (3 * heads)
    if kind != "meta" and torch.is_autocast_enabled(kind):
        qkv = qkv.to(torch.get_autocast_dtype(kind))
    ways = [path("rope_attention", qkv, len(cos) * E, E) for cos, _ in rope]
    if {"kernel"}.issuperset(ways):
        return attention_kernel(qkv, n_images, rope, heads)
    rows = qkv.split([n * len(cos) for n, (cos, _) in zip(n_images, rope, strict=True)])
    out = [attention_kernel(x, [n], [angles], heads) if way == "kernel" else
           attention_by_parts(x.view(n, len(angles[0]), 3, heads, E), *angles, way)
           for x, n, angles, way in zip(rows, n_images, rope, ways, strict=True)]
    return torch.cat(out) if len(out) > 1 else out[0]


def attention_kernel(qkv, n_images, rope, heads):
    tables = [table for pair in rope for table in pair]
    return torch.ops.nanodino.rope_attention(qkv, tables, n_images, heads)[0]


def attention_by_parts(x, cos, sin, way="sdpa"):
    """Rotation, then attention, of one crop group.    x  B N 3 A E    way  see CHOICES    returns  (B N) D"""
    turn, backends = rotate, nullcontext()
    if way != "sdpa" and not torch.compiler.is_compiling():
        if way == "compiled":
            return compiled(attention_by_parts)(x, cos, sin)
        turn, backends = compiled(rotate), sdpa_kernel(BACKENDS, set_priority=True)
    q, k = turn(x[:, :, :2], cos, sin).permute(2, 0, 3, 1, 4)                 # 2 of B A N E
    with backends:
        y = attention(q, k, x[:, :, 2].transpose(1, 2))                       # B A N E
    return y.transpose(1, 2).flatten(0, 1).flatten(1)                         # (B N) D


if BUILT:
    @torch.library.register_fake("nanodino::rope_attention")
    def _(qkv, tables, n_images, heads):
        return qkv.new_empty(len(qkv), qkv.shape[1] // 3), qkv.new_empty(heads, len(qkv), dtype=torch.float32)

    @torch.library.register_fake("nanodino::rope_attention_backward")
    def _(dout, qkv, out, lse, tables, n_images, heads):
        return torch.empty_like(qkv)

    def keep_qkv(ctx, inputs, output):
        qkv, tables, ctx.n_images, ctx.heads = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(qkv, *output, *tables)

    def grad_qkv(ctx, dout, _):
        qkv, out, lse, *tables = ctx.saved_tensors
        rest = qkv, out, lse, tables, ctx.n_images, ctx.heads
        return torch.ops.nanodino.rope_attention_backward(dout.contiguous(), *rest), [None] * len(tables), None, None

    torch.library.register_autograd("nanodino::rope_attention", grad_qkv, setup_context=keep_qkv)

# --------------------------------------------------------------------------------
# What stays for the backward pass

PRODUCTS = {"aten::mm", "aten::_scaled_mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution",
            "nanodino::rope_attention", "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_efficient_attention",
            "aten::_scaled_dot_product_cudnn_attention"}


def keep_products(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op._schema.name in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


SOME = partial(create_selective_checkpoint_contexts, keep_products)
RECOMPUTED = dict(none=None, selective=dict(context_fn=SOME), full={})  # from the most memory to the least


def recomputed(how, block, *args):
    """
    block(*args), of which stays for the backward pass

        none       all that autograd wants      full  its arguments alone: the block runs twice
        selective  what products and attention have found; the rest, which is quick, runs twice
    """
    if RECOMPUTED[how] is None or not torch.is_grad_enabled():
        return block(*args)
    return checkpoint(block, *args, use_reentrant=False, **RECOMPUTED[how])
