"""
What the ops are measured beside, and the arguments of both: the same mathematics as others write it.

    textbook_sinkhorn, textbook_loss    exp, then divisions of the whole matrix; log-softmax
    attention_written_out               q and k turned by cat and rotate-half in float32, transposes, SDPA
    turned, by_sdpa                     the same in two halves, so that either may be compiled, or take another backend
    crops_by_pillow                     a photo's crops, one after another, each operation on bytes
    with_kernels, by_kernels            one call under another choice of kernels, or by them in any case
"""

import torch
import torch.nn.functional as F
from PIL import Image

import ops
from losses import assignments, dino_losses, ibot_loss
from model import rope_tables

TEMPERATURE = 0.07             # of the teacher; the student's is 0.1


def with_kernels(choice, function, *arguments):
    before = ops.mode
    ops.use_kernels(choice)
    try:
        return function(*arguments)
    finally:
        ops.use_kernels(before)


def by_kernels(function, *arguments):
    """
    One call in which the kernels run, where they are built, whatever ops.CHOICES prefers; arguments must fit. Those
    without a backward pass do so only where none is asked for.
    """
    before = ops.path

    def kernel(op, x, *rest):
        trained = x.requires_grad and (op, x.device.type, "trained") in ops.CHOICES
        return before(op, x, *rest) if trained else "kernel"
    ops.path = kernel if ops.BUILT else before
    try:
        return function(*arguments)
    finally:
        ops.path = before


def by_clusters(function, *arguments):
    """The same, in which several blocks share a row of logits on a GPU that can, which nothing chooses."""
    if not ops.BUILT:
        return function(*arguments)
    torch.ops.nanodino.clusters(True)
    try:
        return by_kernels(function, *arguments)
    finally:
        torch.ops.nanodino.clusters(False)


def relative(x, exact):
    """Relative error, of the norm; nan for what holds one."""
    return ((x.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()

def same(a, b):
    """Bit for bit: nan is itself, and 0 is not -0."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))

# --------------------------------------------------------------------------------
# Sinkhorn-Knopp and the cross-entropies


def logits_like(n, K, device, dtype=torch.bfloat16):
    """As of heads whose rows are unit vectors."""
    return torch.randn(n, K, device=device).mul(0.3).to(dtype)


def textbook_sinkhorn(logits):
    q = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE).exp()     # n K
    for _ in range(3):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def textbook_loss(student, logits, sinkhorn=textbook_sinkhorn):
    x, q = student.detach().requires_grad_(), sinkhorn(logits)
    loss = -(q * (x.to(q.dtype) / 0.1).log_softmax(-1)).sum(-1).mean()
    return torch.autograd.grad(loss, x)[0]


def textbook_dino(student, logits, sinkhorn=textbook_sinkhorn):
    """Every student crop beside both of the teacher, but for the global crops' own.  S B K and T B K -> gradient"""
    x, (T, B, _) = student.detach().requires_grad_(), logits.shape
    q = sinkhorn(logits.flatten(0, 1)).unflatten(0, (T, B))
    log_p = (x.to(q.dtype) / 0.1).log_softmax(-1)
    apart = -(q * log_p[:T].flip(0)).sum(-1).mean()                                           # T = 2
    return torch.autograd.grad(apart - (q.mean(0) * log_p[T:]).sum(-1).mean(), x)[0]


def our_loss(student, logits, own=None):
    """As the trainer asks for it: the gradient takes the place of the logits, those of `own`, or of a copy."""
    x, weights = leaf(student, own), torch.ones(len(logits), device=logits.device)
    targets = assignments(logits, TEMPERATURE)
    return torch.autograd.grad(ibot_loss(x.view_as(x), targets, weights, len(x), factor=1.0), x)[0]


def leaf(student, own):
    return (student.clone() if own is None else own).detach().requires_grad_()


def our_dino(student, logits, own=None):
    x, (T, B, _) = leaf(student, own), logits.shape
    targets = assignments(logits.flatten(0, 1), TEMPERATURE).unflatten(0, (T, B))
    return torch.autograd.grad(sum(dino_losses(x.view_as(x), targets, T, factors=(1.0, 1.0))), x)[0]

# --------------------------------------------------------------------------------
# RoPE attention


def gram_written_out(student, teacher):
    """losses.gram_loss, of all images at once."""
    s, t = (F.normalize(x.float(), dim=-1) for x in (student, teacher))
    return (s @ s.mT - t @ t.mT).square().mean()


def with_gradient(loss, student, *rest):
    """The gradient of a loss of the first tensor."""
    return torch.autograd.grad(loss(student, *rest), student)[0]


def attention_arguments(device, dtype, n_images, grids, heads, E):
    """qkv, a gradient of the result, and the rest of rope_attention's arguments.    grids  h, w of each crop group"""
    periods = 100 ** (torch.arange(E // 4) / (E // 4))
    rope = [tuple(x[0].to(device) for x in rope_tables(h, w, 5, periods, [1.0])) for h, w in grids]
    T = sum(n * len(cos) for n, (cos, _) in zip(n_images, rope, strict=True))
    qkv, grad = (torch.randn(T, k * heads * E, device=device, dtype=dtype) for k in (3, 1))
    return qkv, grad, n_images, rope, heads


def turned(qkv, n, cos, sin, heads):
    """q, k, v of one crop group, q and k turned in float32.    qkv  (B N) 3 A E    returns  B A N E each"""
    N, wide = len(cos), torch.promote_types(qkv.dtype, torch.float32)
    cos, sin = (torch.cat([x, x], dim=-1).view(N, -1) for x in (cos, sin))                    # N E
    q, k, v = qkv.view(n, N, 3, heads, -1).permute(2, 0, 3, 1, 4)                             # B A N E
    q, k = ((x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin).to(v.dtype)
            for x in (q.to(wide), k.to(wide)))
    return q, k, v


def by_sdpa(turn, qkv, n_images, rope, heads):
    out = []
    rows = qkv.split([n * len(cos) for n, (cos, _) in zip(n_images, rope, strict=True)])
    for x, n, (cos, sin) in zip(rows, n_images, rope, strict=True):
        out.append(F.scaled_dot_product_attention(*turn(x, n, cos, sin, heads)).transpose(1, 2).reshape(len(x), -1))
    return torch.cat(out)


def attention_written_out(qkv, n_images, rope, heads):
    return by_sdpa(turned, qkv, n_images, rope, heads)


def in_calls(qkv, n_images, rope, heads):
    """A call for each crop group: what packing saves is what it takes longer."""
    rows = qkv.split([n * len(cos) for n, (cos, _) in zip(n_images, rope, strict=True)])
    return torch.cat([ops.rope_attention(x, [n], [r], heads) for x, n, r in zip(rows, n_images, rope, strict=True)])


def both_ways(function, qkv, grad, *rest):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, *rest)
    return out.detach(), torch.autograd.grad(out, qkv, grad.to(out.dtype))[0]


def attention_errors(functions, device, dtype, n_images, *shape):
    """{name: the larger relative error of result and gradient} against float64, for one image of each size."""
    qkv, grad, *rest = attention_arguments(device, dtype, [1] * len(n_images), *shape)
    exact = both_ways(attention_written_out, qkv.double(), grad.double(), *rest)
    return {name: max(map(relative, both_ways(function, qkv, grad, *rest), exact))
            for name, function in functions.items()}

# --------------------------------------------------------------------------------
# Crops


def crops_by_pillow(path, boxes, flips, colours, sizes, mean, std):
    """A file's crops as torchvision makes them of Pillow's images, of what draw_crops has drawn.  -> [3 H W]"""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tv
    jitter = tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue
    image, found = Image.open(path).convert("RGB"), []
    for box, flip, row, size in zip(boxes.tolist(), flips, colours.tolist(), sizes, strict=True):
        x = tv.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC)
        x = tv.hflip(x) if flip else x
        for turn in row[5:9] if row[0] else ():
            x = jitter[int(turn)](x, row[1 + int(turn)])
        x = tv.rgb_to_grayscale(x, 3) if row[9] else x
        x = tv.gaussian_blur(x, 9, row[10]) if row[10] else x
        x = tv.solarize(x, 128) if row[11] else x
        found.append(tv.normalize(tv.to_tensor(x), mean, std))
    return found
