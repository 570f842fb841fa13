"""
What a step of text.py needs: arithmetic alone, nothing is started.

    python text.py --recipe full --weights dinov3_vitl16.pth --plan --ranks 32      a table; last, one JSON object

    parameters    of the towers and the backbone
    flops         of a pair, by network; each part of several goes through the towers twice
    memory        bytes of a rank, by kind
    saved_bytes   what a graph keeps, to check them by

float32 throughout, as towers and tokens are kept; autocast saves some of what the graph takes. Letters: see model.py.
"""

import json

import torch

from engine.plan import F32, H100, Plan, rows

SAVED_TEXT = 16       # widths t that a text block keeps of each token for its backward pass
SAVED_HEAD = 10, 4    # widths D, and widths F, of a block of the vision head


def parameters(towers, backbone):
    return {name: sum(p.numel() for p in part.parameters()) for name, part in (
        ("text", towers.text_model), ("head", towers.visual_model), ("backbone", backbone))}


def shapes(c, vit):
    """N of an image, D, F of the vision head"""
    return 1 + vit.n_registers + (c.resolution // vit.patch_size) ** 2, vit.width


def flops(c, towers, vit):
    """Of one pair: multiplications and additions of all products. A backward pass is two forward ones."""
    (N, D), t, n = shapes(c, vit), c.width, c.context
    F = towers.visual_model["head"].config.hidden
    mlp = (2 if vit.ffn == "mlp" else 3) * vit.width * vit.hidden
    backbone = vit.depth * N * (2 * (4 * D * D + mlp) + 4 * N * D) + 2 * (N - 1 - vit.n_registers) * (
        vit.in_chans * vit.patch_size ** 2 * D)
    head = c.head_blocks * N * (2 * (4 * D * D + 3 * D * F) + 4 * N * D)
    text = c.depth * n * (2 * 12 * t * t + 4 * n * t) + 2 * t * 2 * D
    passes = 3 if c.accumulate == 1 else 4
    seen = backbone if c.augment else 0
    return dict(backbone=seen, head=passes * head, text=passes * text, pair=seen + passes * (head + text))


def memory(c, towers, vit, n, ranks):
    """
    By kind; a step holds all of it at once.

    tokens    of the backbone, of the rank's whole batch    graph  of one part    logits  of it against everyone
    """
    (N, D), b, t = shapes(c, vit), c.batch // ranks, c.width
    trained = n["text"] + n["head"]
    wide, hidden = SAVED_HEAD
    of_pair = c.head_blocks * N * (wide * D + hidden * towers.visual_model["head"].config.hidden) + N * D
    of_pair += c.depth * c.context * SAVED_TEXT * t
    found = dict(weights=F32 * (trained + n["backbone"]), gradients=F32 * trained, moments=2 * F32 * trained,
                 tokens=F32 * b * N * D, graph=F32 * b // c.accumulate * of_pair, logits=6 * F32 * b * c.batch)
    return found | dict(peak=sum(found.values()))


def report(c, towers, backbone):
    """Prints the table, and one JSON object last.    towers, backbone  on the meta device"""
    vit, n, plan = backbone.config, parameters(towers, backbone), Plan()
    if c.batch % (c.ranks * c.accumulate):
        raise ValueError(f"--batch {c.batch} is not divisible by --ranks {c.ranks} x --accumulate {c.accumulate}")
    work, bytes = flops(c, towers, vit), memory(c, towers, vit, n, c.ranks)
    seconds = c.batch * work["pair"] / (c.ranks * H100 * plan.mfu)
    print(f"{c.recipe}, {c.steps:,} steps of {c.batch:,} pairs in {c.accumulate} parts on {c.ranks} ranks: "
          + ", ".join(f"{name} {size:,}" for name, size in n.items()) + " parameters")
    for line in (*rows("GFLOP a pair", work, 1e9), *rows("MB of a rank", bytes, 1e6)):
        print(line)
    print(f"{seconds:.3g} s a step, {seconds * c.steps * c.ranks / 3600:,.0f} device hours at {plan.mfu:g} of an "
          f"H100's {H100 / 1e12:.0f} TFLOP/s: not measured")
    print(json.dumps(dict(recipe=c.recipe, ranks=c.ranks, batch=c.batch, accumulate=c.accumulate, parameters=n,
                          flops=work, bytes=bytes, seconds=seconds)))


def saved_bytes(module, run):
    """Bytes that autograd keeps of run(), each storage once, parameters aside: what SAVED_* are measured by."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run()
    return sum(size for place, size in kept.items() if place not in own)
