"""
How far a network's time lies above that of its matrix products alone, which no rearrangement of the rest gets below.

    Products    the products that a call makes, as PyTorch's operators: recorded once, then replayed by themselves
    limit       forward passes and training steps, whole: time over that of their products, in one run
    parts       where the rest is, operator by operator

Attention counts as scaled_dot_product_attention of the same sizes, whatever computes it. Weights are replayed in their
own places, as many of them as the network reads; what flows through it is one tensor for each shape.
"""

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from engine import trials
from engine.timing import medians
from model import SIZES, ViT

LINEAR = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::convolution_backward"}
SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FORWARDS = {"s, 8 x 256 px": (8, 256, 1.05), "s, 1 x 224 px": (1, 224, 1.08)}  # images, pixels, the goal
STEPS = {"tiny": (["--size", "tiny", "--batch", "32"], 1.4), "s": (["--size", "s", "--batch", "4"], 1.2)}
DRY = {"tiny": (trials.TINY, 1.4)}
SMALLEST = 0.015               # share of the time from which on an operator has a row of its own


class Products(TorchDispatchMode):
    """
    with products: function()          what it multiplies, forward and backward, is kept
    products()                         that alone, once more; .linears and .attention are its two parts

    weights  tensors that stay where they are
    """
    def __init__(self, weights):
        super().__init__()
        self.places = {x.untyped_storage().data_ptr() for x in weights}
        self.stand_ins, self.linear_calls, self.attention_calls = {}, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function._schema.name
        if name in LINEAR:
            self.linear_calls.append((function, [self.stand_in(x) for x in args], kwargs or {}))
        elif name == SDPA._qualified_op_name:
            self.attend(args[0].shape)
        elif name == BACK._qualified_op_name:
            self.attend(args[0].shape, back=True)
        elif name in ("nanodino::rope_attention", "nanodino::rope_attention_backward"):
            back = name.endswith("backward")
            tables, n_images, heads = args[4:] if back else args[1:4]
            for cos, B in zip(tables[::2], n_images, strict=True):
                shape = B, heads, len(cos), 2 * cos.shape[-1]                              # B A N E
                self.attend(shape, back)
        return out

    def stand_in(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        if x.untyped_storage().data_ptr() in self.places:
            return x.detach()
        key = x.shape, x.stride(), x.dtype
        if key not in self.stand_ins:
            size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            self.stand_ins[key] = torch.randn(max(size, 1)).to(x.dtype).as_strided(x.shape, x.stride())
        return self.stand_ins[key]

    def attend(self, shape, back=False):
        q = self.stand_in(torch.empty(shape))
        if not back:
            self.attention_calls.append((SDPA.default, [q, q, q], {}))
        elif q.numel():
            self.attention_calls.append((BACK.default, [q, q, q, q, *SDPA(q, q, q), 0.0, False], {}))

    @torch.no_grad()
    def linears(self):
        for function, args, kwargs in self.linear_calls:
            function(*args, **kwargs)

    @torch.no_grad()
    def attention(self):
        for function, args, kwargs in self.attention_calls:
            function(*args, **kwargs)

    def __call__(self):
        self.linears()
        self.attention()


def limit(machine, report, compiled):
    dry = machine.shapes == "dry"
    for name, (n, side, goal) in FORWARDS.items():
        vit = ViT(SIZES["tiny" if dry else "s"]).eval()
        images = torch.randn(1 if dry else n, 3, 32 if dry else side, 32 if dry else side)
        ways = dict(ours=torch.no_grad()(vit))
        if theirs := trials.hugging_face(vit.config):
            ways["transformers"] = torch.no_grad()(theirs)
        against_products(machine, report, f"forward {name}", ways, vit.parameters(), (images,), goal)
    for name, (argv, goal) in (DRY if dry else STEPS).items():
        step = trials.Step(machine, [*argv, "--precision", "fp32"])
        weights = [p for part in (step.student, step.teacher) for p in part.parameters()]
        against_products(machine, report, f"training step {name}", dict(ours=step), weights, (), goal)


def against_products(machine, report, what, ways, weights, arguments, goal):
    """Rows of one call: each way over the products of ours; then ours, part by part."""
    ours, products = ways["ours"], Products(list(weights))
    with products:
        ours(*arguments)
    timed = {name: lambda way=way: way(*arguments) for name, way in ways.items()}
    timed |= {"products alone": products, "linears": products.linears, "attention": products.attention}
    times = medians(machine, timed, rounds=5)
    least = times["products alone"].seconds
    for name, t in times.items():
        missed = name == "ours" and t.seconds > goal * least and machine.shapes != "dry"
        report.add("limit", what=what, way=name, ms=t.seconds * 1e3, spread=t.spread, over_products=t.seconds / least,
                   goal=goal if name == "ours" else None, **dict(flag="OVER its goal") if missed else {})
    alone = {"linear": times["linears"].seconds, "attention": times["attention"].seconds}
    for name, seconds, share, kind in parts(lambda: ours(*arguments)):
        report.add("parts", what=what, operator=name, ms=seconds * 1e3, share=share,
                   over_products=seconds / alone[kind] if kind in alone else None)


def parts(run):
    """[operator, seconds in it alone, share of all, linear or attention or rest] of a call, the longest first."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    rows = {}
    for event in found.events():
        kind = kind_of(event)
        name = {"linear": "linear products", "attention": "attention"}.get(kind, event.name)
        rows[name, kind] = rows.get((name, kind), 0.0) + event.self_cpu_time_total * 1e-6
    total = sum(rows.values())
    large = {key: seconds for key, seconds in rows.items() if seconds >= SMALLEST * total}
    large["all others", "rest"] = total - sum(large.values())
    return [(name, seconds, seconds / total, kind) for (name, kind), seconds in
            sorted(large.items(), key=lambda row: -row[1])]


def kind_of(event):
    """Of an operator, or of the one that calls it: a product copies its bias to where it adds the rest."""
    while event is not None:
        if event.name in LINEAR or "attention" in event.name:
            return "linear" if event.name in LINEAR else "attention"
        event = event.cpu_parent
    return "rest"
