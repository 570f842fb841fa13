"""
The ops: right first, then how fast, beside what others write and, on a GPU, beside what the card can do.

    check        an op's kernels against float64, shape by shape, the smallest first; ten repeats bit for bit
    limits       copy, matrix product, reads from L2
    sinkhorn     balanced assignments        loss    with the cross-entropies and their gradient
    attention    beside SDPA with rotations in eager and compiled PyTorch; the choice that follows

Each adds rows to a Report; what a machine is and which shapes it gets: timing.py. Ways that count as ours take the
kernels wherever they are built, whatever ops.py would choose.
"""

import math
from functools import partial

import torch

import ops
from engine.opponents import (
    TEMPERATURE,
    attention_arguments,
    attention_errors,
    attention_written_out,
    both_ways,
    by_clusters,
    by_kernels,
    by_sdpa,
    in_calls,
    logits_like,
    our_dino,
    our_loss,
    relative,
    same,
    textbook_dino,
    textbook_loss,
    textbook_sinkhorn,
    turned,
    with_kernels,
)
from engine.report import verdict
from engine.timing import medians, rotating
from losses import assignments, sinkhorn_knopp

REPEATS = 10
HALF = torch.bfloat16, torch.float16
# n, K: neither is a multiple of what a kernel works in, or one alone is; the last is the 7B recipe's
SINKHORN_CHECKS = [(1, 5), (3, 16), (8, 31), (9, 33), (37, 1003), (130, 264), (5, 9000), (37, 40_000), (32, 70_001),
                   (2, 140_001), (1274, 98_304)]
LOSS_CHECKS = [(1, 1, 1, 5), (2, 1, 2, 33), (5, 2, 3, 64), (1, 1, 37, 1003), (3, 2, 2, 20_001), (1, 1, 37, 40_000),
               (1, 1, 20, 98_304), (10, 2, 16, 65_536)]
ATTENTION_CHECKS = [([1], [(1, 1)]), ([2], [(4, 4)]), ([1], [(3, 11)]), ([2, 3], [(7, 7), (3, 3)]),
                    ([2, 5], [(14, 14), (6, 6)]), ([2], [(16, 16)]), ([1, 1, 1], [(21, 21), (1, 2), (7, 7)]),
                    ([1], [(32, 32)]), ([1], [(48, 48)])]

SHAPES = dict(  # of each kind of machine; a goal of report.py stands beside some
    cpu=dict(
        sinkhorn=[(64, 65_536, None), (256, 65_536, None), (32, 262_144, None), (128, 4096, None), (64, 256, None)],
        ibot=[(64, 65_536, None), (256, 65_536, None), (128, 4096, None), (64, 256, None)], dino=[],
        attention=[  # images, patches a side, heads, head width: 3 to 16 a side are tiny's and the recipes' crops
            ([64], [3], 6, 64), ([64], [4], 6, 64), ([64], [5], 6, 64), ([32], [7], 6, 64), ([16], [14], 6, 64),
            ([16], [16], 6, 64), ([8], [16], 3, 128), ([2], [32], 6, 64)]),
    cuda=dict(
        sinkhorn=[(1274, 98_304, "G1"), (32, 262_144, "G2"), (4941, 65_536, None), (128, 65_536, None)],
        ibot=[(1274, 98_304, "G3"), (4941, 65_536, "G4")],
        dino=[(10, 2, 16, 262_144), (10, 2, 64, 65_536)],  # student's and teacher's crops, images, prototypes
        attention=[  # 16 and 32 heads as of L and 7B
            ([128], [16], 16, 64), ([512], [7], 16, 64), ([32], [16], 32, 128), ([128], [7], 32, 128),
            ([160], [14], 16, 64), ([32], [32], 16, 64), ([128, 512], [16, 7], 16, 64), ([40], [14], 32, 128),
            ([64], [21], 16, 64), ([8], [32], 32, 128), ([12], [48], 16, 64), ([16], [21], 32, 128),
            ([4], [48], 32, 128), ([19, 76], [16, 7], 32, 128)]),
    dry=dict(sinkhorn=[(9, 40, "G1"), (3, 33, None)], ibot=[(5, 64, "G3")], dino=[(4, 2, 2, 33)],
             attention=[([2], [2], 1, 64), ([1, 1], [3, 1], 1, 128)]))

# --------------------------------------------------------------------------------
# Right


def cases_of_sinkhorn(device, dtype, emulated):
    for n, K in SINKHORN_CHECKS:
        x = logits_like(n, K, device, dtype)

        def kernel(x=x):
            log_u = None
            for _ in range(3):
                log_u = -ops.sinkhorn_pass(x, TEMPERATURE, log_u)
            return [ops.sinkhorn_targets(x, TEMPERATURE, log_u),
                    ops.sinkhorn_targets(x, TEMPERATURE, log_u, torch.bfloat16)]
        yield f"{n} x {K}", n * K, kernel, lambda x=x: [textbook_sinkhorn(x.double())] * 2, [2e-6, 2e-3]


def cases_of_loss(device, dtype, emulated):
    for S, T, B, K in LOSS_CHECKS:
        student, teacher = (logits_like(n * B, K, device, dtype).view(n, B, K) for n in (S, T))
        pairs, weights = torch.rand(S, T, device=device), torch.rand(B, device=device)
        log_u, by = torch.randn(K, device=device), torch.rand(S, device=device)

        def run(x, loss, rest=(teacher, log_u, weights, pairs), by=by, **more):
            leaf = x.detach().requires_grad_()
            losses = loss(leaf * 1, *rest, 0.1, TEMPERATURE, **more)
            return [losses.detach(), torch.autograd.grad(losses, leaf, by.to(losses.dtype))[0]]

        def exact(student, teacher, log_u, weights, pairs, student_temp, teacher_temp):
            q = (teacher.double() / teacher_temp + log_u.double()).softmax(-1)
            log_p = (student / student_temp).log_softmax(-1)
            return -torch.einsum("st,b,tbk,sbk->s", pairs.double(), weights.double(), q, log_p)

        def kernel(student=student, run=run, by=by):
            plain = run(student, ops.assignment_loss)
            return [*plain, run(student, ops.assignment_loss, factors=by)[1]]

        def true(student=student, run=run, exact=exact):
            found = run(student.double(), exact)
            return [*found, found[1]]
        floor = max(2e-6, torch.finfo(dtype).eps / 2)  # rounded as the gradient, and again when it is scaled
        yield f"S {S} T {T} B {B} K {K}", S * B * K, kernel, true, [2e-6, floor, floor]


def cases_of_attention(device, dtype, emulated):
    for n_images, grids in ATTENTION_CHECKS:
        for E in 64, 128:
            qkv, grad, *rest = attention_arguments(device, dtype, n_images, grids, 2, E)
            off = torch.cat([qkv.new_zeros(1), qkv.flatten()])[1:].view_as(qkv)  # at no multiple of 16 bytes
            off = off.clone() if emulated else off                           # what aligns it is the binding

            def kernel(qkv=qkv, off=off, rest=rest):
                off = qkv if ops.mode == "off" else off
                return [ops.rope_attention(qkv, *rest), ops.rope_attention(off, *rest)]

            def true(qkv=qkv, rest=rest):
                return [attention_written_out(qkv.double(), *rest)] * 2
            yield f"B {n_images} grids {grids} E {E}", qkv.numel(), kernel, true, [1e-6] * 2


CASES = dict(sinkhorn=cases_of_sinkhorn, loss=cases_of_loss, attention=cases_of_attention)


def check(machine, report, op, largest=math.inf):
    """
    A row for each shape and dtype. A kernel is right if its error is at most twice its definition's, or below what
    float32 sums can be off by; the smallest shape that is wrong is named, and the next dtype goes on.

    largest  elements: larger shapes are left out
    """
    device, kinds = machine.device, [*HALF, torch.float32] if op != "attention" else list(HALF)
    if machine.kind == "cpu":
        kinds = [torch.bfloat16, torch.float32]  # a CPU's kernels read no float16
    if machine.shapes == "dry":
        kinds, largest = kinds[:1], min(largest, 3000)
    for dtype in kinds:
        wrong = None
        torch.manual_seed(0)
        emulated = machine.shapes == "dry"
        for shape, size, kernel, true, floors in CASES[op](device, dtype, emulated):
            if size > largest or wrong and report.over:
                continue
            report.head["at"] = f"{op} {dtype} {shape}"  # if this process dies, here
            report.save()
            try:
                row = compared(device, kernel, true, floors)
                if op != "attention" and row["verdict"] == "right" and (machine.kind == "cuda" or emulated):
                    row = compared(device, kernel, true, floors, by_clusters)
                    row["verdict"] += " by clusters" * (row["verdict"] != "right")
                machine.synchronize()
            except (RuntimeError, ValueError) as error:
                row = dict(verdict=f"WRONG: {str(error).strip().splitlines()[0][:150]}")
            report.add("kernels", op=op, dtype=str(dtype)[6:], shape=shape, **row)
            if row["verdict"].startswith("WRONG") and not wrong:
                wrong = f"{op} {str(dtype)[6:]}: the smallest shape that is wrong: {shape}"
                if not answers(machine):
                    report.note(f"{wrong}; the device answers no more, nothing else of {op} was asked")
                    return
        report.note(wrong or f"{op} {str(dtype)[6:]}: right at every shape")
    report.head.pop("at", None)


def answers(machine):
    """Whether the device can still be used: an address that is not its own takes a process's context down."""
    try:
        machine.synchronize()
    except RuntimeError:
        return False
    return True


def compared(device, kernel, true, floors, run=by_kernels):
    exact = true()
    poison = [torch.full_like(x, math.nan, dtype=torch.float32) for x in exact]  # what is not written shall show
    del poison
    ours, plain = run(kernel), with_kernels("off", kernel)
    errors = [[relative(x, y) for x, y in zip(found, exact, strict=True)] for found in (ours, plain)]
    fine = [a <= max(2 * b, floor) for a, b, floor in zip(*errors, floors, strict=True)]  # nan is not
    equal = 1
    while equal < REPEATS and all(map(same, ours, run(kernel))):
        equal += 1
    word = "right" if all(fine) and equal == REPEATS else "WRONG"
    return dict(error=max(errors[0]), definition=max(errors[1]), equal=equal, goal=verdict("G20", dict(equal=equal)),
                verdict=word)


# --------------------------------------------------------------------------------
# The card


def limits(machine, report):
    """{copy, l2: bytes/s; gemm: FLOP/s} of this card, on random data."""
    device, dry = machine.device, machine.shapes == "dry"
    n, side = 1 << (12 if dry else 31), 64 if dry else 8192
    source, target = torch.randn(n // 4, device=device), torch.empty(n // 4, device=device)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    small = torch.randn((1 << 10 if dry else 24 << 20) // 4, device=device)
    again = small.expand(16, -1)                                             # 16 reads of what fits in L2
    times = medians(machine, dict(copy=lambda: target.copy_(source), gemm=lambda: a @ b, l2=lambda: again.sum(1)))
    found = dict(copy=2 * n / times["copy"].seconds, gemm=2 * side ** 3 / times["gemm"].seconds,
                 l2=16 * small.numel() * 4 / times["l2"].seconds)
    report.add("limits", what=f"copy of {n / 1e9:.2g} GB, read and written", value=found["copy"] / 1e12, unit="TB/s",
               spread=times["copy"].spread)
    report.add("limits", what=f"bf16 product {side}^3", value=found["gemm"] / 1e12, unit="TFLOP/s",
               spread=times["gemm"].spread)
    report.add("limits", what="16 sums of 24 MB, from L2", value=found["l2"] / 1e12, unit="TB/s",
               spread=times["l2"].spread)
    return found

# --------------------------------------------------------------------------------
# Fast: Sinkhorn-Knopp and the losses


def rows_of(machine, report, table, shape, ways, sets, floor_bytes, goal, card, exact=None):
    """
    Times all ways, of which the first is the base and "ours" the one that the goal is for, and adds a row for each.

    ways  {name: (function, figure of GOALS that the ratio to it is)}    card  of `limits`; {} = not asked
    exact  what each way should return, of a set whose third tensor, which ours overwrites, is the first again
    """
    failed, first = {}, next(iter(ways))
    times = medians(machine, {name: way for name, (way, _) in ways.items()}, sets, failed=failed)
    memory = {name: machine.peak(partial(ways[name][0], *sets[0])) for name in times}
    base, ours = times.get(first), times.get("ours")
    for name, (way, _) in ways.items():
        if name in failed:
            report.add(table, shape=shape, way=name, note=failed[name])
            continue
        t, row = times[name], {}
        if exact is not None and len(sets[0]) > 2:
            sets[0][-1].detach().copy_(sets[0][0])
        result = way(*sets[0]) if exact is not None else None
        if isinstance(result, torch.Tensor) and result.shape == exact.shape:
            row["error"] = relative(result, exact)
        del result
        if name == "ours" and goal:
            measured = {figure: times[n].seconds / t.seconds for n, (_, figure) in ways.items() if n in times}
            share = memory[name] / max(memory[first], 1) if base else None
            row["goal"] = verdict(goal, dict(measured, ms=t.seconds * 1e3, memory=share), card["copy"])
        if name.startswith("ours") and base and t.seconds > base.seconds:
            row["flag"] = f"SLOWER than the {first}"
        report.add(table, shape=shape, way=name, ms=t.seconds * 1e3, spread=t.spread, timed=t.how,
                   base_over_this=base and base.seconds / t.seconds, this_over_ours=ours and t.seconds / ours.seconds,
                   gb_per_s=floor_bytes / t.seconds / 1e9, of_copy=floor_bytes / t.seconds / card["copy"] if card else
                   None, peak_mb=memory[name] / 1e6, **row)


def sinkhorn(machine, report, card, compiled=True):
    for n, K, goal in SHAPES[machine.shapes]["sinkhorn"]:
        if report.over:
            report.note(f"Sinkhorn {n} x {K}: no time was left")
            continue
        sets = rotating(machine, lambda n=n, K=K: (logits_like(n, K, machine.device),))
        define = partial(sinkhorn_knopp, temperature=TEMPERATURE)
        ways = {"textbook": (textbook_sinkhorn, "eager")}
        if compiled:
            ways |= {"textbook, compiled": (machine.compile(textbook_sinkhorn), "compiled"),
                     "definition, compiled": (partial(with_kernels, "off", machine.compile(define)), None)}
        ways |= {"definition": (partial(with_kernels, "off", define), None),
                 "ours": (lambda x: by_kernels(assignments, x, TEMPERATURE).log_u, None),
                 "ours, float32 targets": (partial(by_kernels, define), None)}
        if machine.shapes != "cpu":
            ways["ours, by clusters"] = lambda x: by_clusters(assignments, x, TEMPERATURE).log_u, None
        exact = textbook_sinkhorn(sets[0][0].double())
        rows_of(machine, report, "Sinkhorn", f"{n} x {K}", ways, sets, 6 * n * K, goal, card, exact)
        del exact, sets, ways
        machine.release()


def loss(machine, report, card, compiled=True):
    here = SHAPES[machine.shapes]
    shapes = [(f"iBOT {n} x {K}", (n, K), (n, K), textbook_loss, our_loss, goal) for n, K, goal in here["ibot"]]
    shapes += [(f"DINO {S} and {T} crops of {B}, K {K}", (S, B, K), (T, B, K), textbook_dino, our_dino, None)
               for S, T, B, K in here["dino"]]
    for title, student, teacher, textbook, ours, goal in shapes:
        if report.over:
            report.note(f"{title}: no time was left")
            continue

        def make(student=student, teacher=teacher):
            x, y = (logits_like(math.prod(s[:-1]), s[-1], machine.device).view(s) for s in (student, teacher))
            return x, y, x.clone()
        sets = rotating(machine, make)
        ways = {"textbook": (lambda *x, f=textbook: f(*x[:2]), "eager")}
        if compiled:
            fused = machine.compile(textbook_sinkhorn)
            ways |= {"textbook, Sinkhorn compiled": (lambda *x, f=textbook, g=fused: f(*x[:2], sinkhorn=g), "mixed")}
        ways |= {"definition": (partial(with_kernels, "off", ours), None), "ours": (partial(by_kernels, ours), None)}
        if machine.shapes != "cpu" and "iBOT" in title:
            ways["ours, by clusters"] = partial(by_clusters, ours), None
        floor = 6 * (math.prod(student) + math.prod(teacher))
        fits = math.prod(student) < 2e8                                      # 3 GB in float64, each of several
        exact = textbook(*(x.double() for x in sets[0][:2])) if fits else None
        rows_of(machine, report, "Sinkhorn, loss, gradient", title, ways, sets, floor, goal, card, exact)
        del exact, sets, ways
        machine.release()

# --------------------------------------------------------------------------------
# Fast: attention


def attention(machine, report, card, compiled=True):
    """A row for each way and shape; then which is the fastest for each E and N: what the choice of ops.py is to be."""
    chosen = []
    kinds = [torch.float32, torch.bfloat16] if machine.shapes == "cpu" else [torch.bfloat16]
    for *shape, dtype in [(*shape, dtype) for shape in SHAPES[machine.shapes]["attention"] for dtype in kinds]:
        n_images, sides, heads, E = shape
        N = [side * side + 5 for side in sides]
        title = f"{str(dtype)[6:]} B {'+'.join(map(str, n_images))} N {'+'.join(map(str, N))} A {heads} E {E}"
        if report.over:
            report.note(f"attention {title}: no time was left")
            continue
        shape = dtype, n_images, [(side, side) for side in sides], heads, E
        sets = rotating(machine, lambda shape=shape: attention_arguments(machine.device, *shape)[:2])
        rest = attention_arguments(machine.device, *shape)[2:]
        ways = attention_ways(machine, len(n_images) > 1, compiled and (machine.backends or sides == [16]))
        flop = 4 * heads * E * sum(n * m * m for n, m in zip(n_images, N, strict=True))
        asked = "written out", "ours"
        errors = attention_errors({name: ways[name] for name in asked}, machine.device, *shape)
        forward = {n: lambda x, _, f=f, rest=rest: torch.no_grad()(f)(x, *rest) for n, f in ways.items()}
        both = {n: lambda x, g, f=f, rest=rest: both_ways(f, x, g, *rest) for n, f in ways.items()}
        best = {}
        for direction, runs, products, tensors in ("forward", forward, 1, 4), ("both ways", both, 3.5, 12):
            failed = {}
            times = medians(machine, runs, sets, rounds=10, failed=failed)
            moved = tensors * sets[0][1].nbytes
            floor = max(moved / card["copy"], products * flop / card["gemm"]) if card else None
            rates = {name: products * flop / t.seconds / 1e9 for name, t in times.items()}
            best[direction] = attention_rows(report, title, direction, times, failed, rates, floor, errors, N, card)
        if len(N) == 1:
            chosen.append(dict(dtype=str(dtype)[6:], E=E, N=N[0], **best))
        del sets, runs, forward, both, ways
        machine.release()
    for row in sorted(chosen, key=lambda row: (row["dtype"], row["E"], row["N"])):
        report.add("the fastest for attention", **row)


def attention_ways(machine, packed, compiled):
    """{name: function of qkv and the rest}; the first is the base."""
    def by(backend, turn, *arguments):
        with machine.sdpa(backend):
            return by_sdpa(turn, *arguments)
    ways = {"written out": attention_written_out, "ours": partial(by_kernels, ops.rope_attention),
            "definition": partial(with_kernels, "off", ops.rope_attention)}
    if compiled:
        spin, whole = machine.compile(turned), machine.compile(ops.rope_attention)
        ways |= {"definition, compiled": partial(with_kernels, "off", whole)}
    for backend in machine.backends:
        ways |= {f"{backend}, eager": partial(by, backend, turned), f"{backend}, compiled": partial(by, backend, spin)}
    return ways | ({"ours, calls": partial(by_kernels, in_calls)} if packed else {})


GOAL_OF = {(261, "forward"): "G5", (261, "both ways"): "G6", (54, "both ways"): "G7", (1029, "both ways"): "G8",
           (2309, "both ways"): "G8b"}


def attention_rows(report, title, direction, times, failed, rates, floor, errors, N, card):
    """Adds a row for each way; returns the fastest in words, with its lead."""
    for name, note in failed.items():
        report.add("attention", shape=title, direction=direction, way=name, note=note)
    base, ours = times.get("written out"), times.get("ours")
    others = {name: t.seconds for name, t in times.items() if not name.startswith("ours")}
    best = min(others, key=others.get) if others else None
    goal = None if not card else GOAL_OF.get((N[0], direction)) if len(N) == 1 else "G9"
    for name, t in times.items():
        row = {}
        if name == "ours" and goal:
            apart = times.get("ours, calls")
            calls = apart and apart.seconds / t.seconds
            measured = dict(eager=base and base.seconds / t.seconds, best=best and others[best] / t.seconds,
                            ms=t.seconds * 1e3, calls=calls)
            row["goal"] = verdict(goal, measured, card["copy"])
        if name == "ours" and base and t.seconds > base.seconds:
            row["flag"] = "SLOWER than written out"
        report.add("attention", shape=title, direction=direction, way=name, ms=t.seconds * 1e3, spread=t.spread,
                   timed=t.how, base_over_this=base and base.seconds / t.seconds,
                   this_over_ours=ours and t.seconds / ours.seconds, gflop_per_s=rates[name],
                   of_limit=floor and floor / t.seconds, error=errors.get(name), **row)
    if not (ours and best):
        return best
    ahead = others[best] / ours.seconds
    return f"ours, {ahead:.2f}x {best}" if ahead >= 1 else f"{best}, {1 / ahead:.2f}x ours"
