"""
Fused operations. Each function ends with its definition in PyTorch, which is the reference; csrc/ only makes it faster.

    python setup.py build_ext --inplace     builds csrc/ for this machine: C++ for the CPU, CUDA where there is nvcc

    describe, use_kernels    which path runs, and the choice of it
    sinkhorn_pass, sinkhorn_targets    balanced assignments of teacher logits             DINOv3 §3.2
    assignment_loss                    cross-entropies against them, never writing them   DINOv3 §3.2, eq. 1
    rope_attention                     positions, then attention, of packed crop groups   DINOv3 §3.2

This file alone imports the extension. Dimension letters: see the top of model.py.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F

BUILT = importlib.util.find_spec("nanodino_C") is not None
if BUILT:
    try:
        import nanodino_C  # registers torch.ops.nanodino.*
    except ImportError as error:  # built, but for another torch: fail here and now
        raise ImportError(f"ops: csrc is built but broken ({error}); python setup.py build_ext --inplace") from error
OPS = "sinkhorn_pass", "sinkhorn_targets", "assignment_loss", "rope_attention"
KERNELS = {(op, key.lower()) for op in OPS for key in ("CPU", "CUDA")  # asked once: torch.compile cannot
           if BUILT and torch._C._dispatch_has_kernel_for_dispatch_key(f"nanodino::{op}", key)}
mode = "auto"


def use_kernels(choice):
    """auto: where they are built; off: never; on: raise ValueError if they are not built."""
    global mode
    if choice not in ("auto", "off", "on"):
        raise ValueError(f"--kernels {choice} is not known; choose auto, off or on")
    if choice == "on" and not BUILT:
        raise ValueError("--kernels on: csrc is not built here; run python setup.py build_ext --inplace, or take auto")
    mode = choice


def have(op, device):
    """Whether torch.ops.nanodino.<op> is to run on tensors of this device."""
    return mode != "off" and (op, device.type) in KERNELS


def describe(device):
    """Which path runs on this device, in words."""
    if not BUILT:
        return "PyTorch (csrc not built)"
    if mode == "off":
        return "PyTorch (--kernels off)"
    if not have("sinkhorn_pass", device):
        return f"PyTorch (csrc not built for {device.type})"
    built = Path(nanodino_C.__file__).stat().st_mtime
    stale = any(path.stat().st_mtime > built for path in Path(__file__).with_name("csrc").glob("*"))
    return "csrc, as it was built before its last change: run python setup.py build_ext --inplace" if stale else "csrc"

# --------------------------------------------------------------------------------
# Sinkhorn-Knopp and the cross-entropies of its assignments


def for_kernels(x):
    """In one piece, and in a dtype that the kernels read."""
    known = x.dtype in (torch.float32, torch.bfloat16) or x.is_cuda and x.dtype == torch.float16
    return (x if known else x.float()).contiguous()


def sinkhorn_pass(logits, temperature, log_u=None):
    """
    What one half iteration over columns adds up; the new log u is minus it. Ranks add theirs up in between.

        log r_k = log sum_b v_b exp(logits_bk / temperature),   v_b = 1 / sum_k u_k exp(logits_bk / temperature)

    logits   n K, any float dtype
    log_u    K float32, of the last pass; None = the first one, v = 1
    returns  K float32
    """
    if have("sinkhorn_pass", logits.device):
        return torch.ops.nanodino.sinkhorn_pass(for_kernels(logits), log_u, temperature)
    x = logits.float() / temperature
    return (x if log_u is None else x - (x + log_u).logsumexp(1, keepdim=True)).logsumexp(0)


def sinkhorn_targets(logits, temperature, log_u, dtype=torch.float32):
    """softmax over k of logits_bk / temperature + log u_k.    logits  n K    log_u  K float32    returns  n K"""
    if have("sinkhorn_targets", logits.device):
        return torch.ops.nanodino.sinkhorn_targets(for_kernels(logits), log_u, temperature, dtype)
    return (logits.float() / temperature + log_u).softmax(-1).to(dtype)


def cross_entropies(student, targets, weights, pairs, temperature):
    """
    loss_s = -sum_b weights_b sum_t pairs_st sum_k targets_tbk log_softmax(student_sb / temperature)_k

    student  S B K    targets  T B K float32    weights  B float32    pairs  S T float32    returns  S float32
    """
    log_p = (student.float() / temperature).log_softmax(-1)                       # S B K
    dots = torch.einsum("sbk,tbk->stb", log_p, targets)
    return -(dots * pairs[:, :, None] * weights).sum((1, 2))


def assignment_loss(student, teacher, log_u, weights, pairs, student_temp, teacher_temp, overwrite=False):
    """
    cross_entropies(student, sinkhorn_targets(teacher), ...), of which the kernel never writes the targets, and computes
    the gradient with the loss.

    student, teacher  S B K and T B K, any float dtype; the teacher gets no gradient
    overwrite         the student's logits may become their gradient: nothing else will read them
    """
    if have("assignment_loss", student.device) and (student.device.type == "cpu" or len(teacher) <= 2):
        student, teacher = for_kernels(student), for_kernels(teacher.detach())
        if student.dtype != teacher.dtype:
            student, teacher = student.float(), teacher.float()
        rest = teacher, log_u, weights, pairs, student_temp, teacher_temp
        if overwrite and student.requires_grad and not student.is_leaf and not torch.compiler.is_compiling():
            return OverwrittenLoss.apply(student, *rest)
        return torch.ops.nanodino.assignment_loss(student, *rest)[0]
    targets = sinkhorn_targets(teacher.detach(), teacher_temp, log_u)             # T B K
    return cross_entropies(student, targets, weights, pairs, student_temp)


class OverwrittenLoss(torch.autograd.Function):
    """assignment_loss whose gradient takes the place of the student's logits; autograd notices if others need them."""
    @staticmethod
    def forward(ctx, student, *rest):
        ctx.grad = student.detach()                                               # S B K, the same memory
        return torch.ops.nanodino.assignment_loss_(ctx.grad, *rest)

    @staticmethod
    def backward(ctx, grad_loss):
        if ctx.grad is None:
            raise ValueError("assignment_loss: a second backward of logits that were overwritten; pass overwrite=False")
        grad, ctx.grad = ctx.grad, None
        for part, factor in zip(grad, grad_loss, strict=True):  # 0-dim factors: no copy of the gradient in float32
            part.mul_(factor)
        return (grad, *[None] * 6)


if BUILT:
    @torch.library.register_fake("nanodino::sinkhorn_pass")
    def _(logits, log_u, temperature):
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
        scaled = [part * factor for part, factor in zip(grad, grad_losses, strict=True)]
        return (scaled[0][None] if len(scaled) == 1 else torch.stack(scaled), *[None] * 6)

    torch.library.register_autograd("nanodino::assignment_loss", scale_grad, setup_context=keep_grad)

# --------------------------------------------------------------------------------
# RoPE attention


def rotate(x, cos, sin):
    """Turns the pairs (x[e], x[e + E/2]) by the token's angles, in float32.    x  B N ... E    returns like x"""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def attention(q, k, v):
    """softmax(q k^T / sqrt(E)) v, the softmax in float32.    q, k, v, returns  B A N E"""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and q.shape[2] <= 128:
        # to train: forward and backward take a sixth of the time of the CPU's fused kernel at N = 21 and 69, at
        # three times its error, as the scores are rounded to bf16 (8e-3 against 3e-3 of the largest value, E = 64)
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

    The kernels keep qkv, the result and a float32 for each token and head for the backward pass, and turn again there.
    On a CPU they take bfloat16 and float32, on CUDA bfloat16 and float16 with E = 64 or 128; else the definition runs.
    """
    kind, E = qkv.device.type, qkv.shape[1] // (3 * heads)
    if torch.is_autocast_enabled(kind):
        qkv = qkv.to(torch.get_autocast_dtype(kind))
    fits = (qkv.dtype in (torch.float32, torch.bfloat16) if kind == "cpu" else
            qkv.dtype in (torch.float16, torch.bfloat16) and E in (64, 128))
    if fits and have("rope_attention", qkv.device):
        tables = [table for pair in rope for table in pair]
        return torch.ops.nanodino.rope_attention(qkv, tables, n_images, heads)[0]
    out = []
    rows = qkv.split([n * len(cos) for n, (cos, _) in zip(n_images, rope, strict=True)])
    for x, n, (cos, sin) in zip(rows, n_images, rope, strict=True):
        x = x.view(n, len(cos), 3, heads, E)                                  # B N 3 A E
        q, k = rotate(x[:, :, :2], cos, sin).permute(2, 0, 3, 1, 4)           # 2 of B A N E
        y = attention(q, k, x[:, :, 2].transpose(1, 2))                       # B A N E
        out.append(y.transpose(1, 2).reshape(n * len(cos), heads * E))        # (B N) D
    return torch.cat(out) if len(out) > 1 else out[0]


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
