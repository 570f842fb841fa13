"""
Ranks in groups, one for each student: who trains what, and what travels between them.

    make_plan, assign   ranks for each student, so that all need the same time     DINOv3 §5.2
    fit, expected       what a step of each costs, on any number of ranks
    make_group          this rank's group, and what it keeps of the batch; kept_by: the same of each rank
    share               images and what the teacher says, to the ranks that keep them     DINOv3 §5.2, Fig. 12

Dimension letters: see the top of model.py.
"""

import time

import numpy as np
import torch
import torch.distributed as dist

from engine.ranks import PATIENCE, Ranks

# --------------------------------------------------------------------------------
# Plan


def make_plan(c, ranks, counts, prepare):
    """
    [(first rank, ranks, names)] of the groups. A rank in no group runs the teacher alone.

    counts   {name: ranks}, as the user says; all 0 = as the times say, or all students in turn on all ranks, if there
             are fewer ranks than students
    prepare  ("teacher" or name, ranks, images on each) -> () -> a step of these ranks, to be timed
    """
    S, names = ranks.count, list(counts)
    if not any(counts.values()):
        if S < len(names) or len(names) == 1:
            if c.batch % S:
                raise ValueError(f"--batch {c.batch} is not divisible by {S} ranks; write how many a student has, "
                                 "as in --students s:2, or change the batch")
            return [(0, S, names)]
        costs = fit(c, ranks, names, prepare)
        counts = assign(costs, S, c.batch)
        if ranks.main:
            print(describe(costs, counts, S, c.batch), flush=True)
    if sum(counts.values()) > S or any(c.batch % n for n in counts.values()):
        raise ValueError(f"--students {c.students}: {sum(counts.values())} ranks, for a batch of {c.batch}; there are "
                         f"{S} ranks, and those of each student must divide the batch")
    firsts = np.cumsum([0, *counts.values()]).tolist()
    return [(first, n, [name]) for first, (name, n) in zip(firsts[:-1], counts.items(), strict=True)]


def fit(c, ranks, names, prepare):
    """
    {"teacher" or name: its cost}: seconds for an image, for a step, and for a step if it is sharded. The first two from
    two sizes of the batch on one rank, while all ranks do the same; the last from all ranks together.
    """
    def fastest(step):
        times = []
        for _ in range(3):  # the first warms up
            start = clock(ranks)
            step()
            times.append(clock(ranks) - start)
        return min(times)
    alone, costs = Ranks(0, 1, ranks.device, None), {}
    n = max(c.batch * len(names) // (2 * ranks.count * c.koleo_group), 1) * c.koleo_group  # about half a slice
    for name in ("teacher", *names):
        times = [fastest(prepare(name, on, images)) for on, images in ((alone, n), (alone, 2 * n), (ranks, n))]
        small, large, sharded = ranks.mean(torch.tensor(times, device=ranks.device)).tolist()
        image = min(max((large - small) / n, 0), small / n)
        costs[name] = image, small - n * image, max(sharded - small, 0)
    return costs


def expected(cost, batch, n_ranks):
    """Seconds of a step: B/N C, plus what does not shrink with the slice.    paper: §5.2 has the first term alone"""
    image, step, sharding = cost
    return batch / n_ranks * image + step + sharding * (n_ranks > 1)


def assign(costs, n_ranks, batch):
    """
    Ranks for each student, so that the slowest is as fast as can be: the shortest time in which all of them are done,
    if each has the fewest ranks, a divisor of the batch, that keep to it.
    """
    divisors = [n for n in range(1, n_ranks + 1) if batch % n == 0]
    times = {name: {n: expected(cost, batch, n) for n in divisors} for name, cost in costs.items() if name != "teacher"}
    for limit in sorted(t for each in times.values() for t in each.values()):
        counts = {name: next((n for n in divisors if t[n] <= limit), n_ranks + 1) for name, t in times.items()}
        if sum(counts.values()) <= n_ranks:
            return counts


def describe(costs, counts, n_ranks, batch):
    """
    The times to expect, in words.    paper: §5.2: a step takes B/N_T C_T + max over students of B/N_S C_S

    idle  share of a step in which a rank waits for the slowest group, mean over all ranks
    """
    ms = {name: 1000 * expected(costs[name], batch, n) for name, n in (counts | dict(teacher=n_ranks)).items()}
    slowest = max(ms[name] for name in counts)
    idle = (slowest - sum(n * ms[name] for name, n in counts.items()) / n_ranks) / (ms["teacher"] + slowest)
    students = ", ".join(f"{name}:{n} {ms[name]:.0f} ms" for name, n in counts.items())
    return (f"plan: teacher on all {n_ranks} ranks {ms['teacher']:.0f} ms, then {students}; "
            f"a step {ms['teacher'] + slowest:.0f} ms, in which ranks idle {100 * idle:.0f} % on average")


def make_group(c, ranks, plan):
    """This rank's group as Ranks, the samples of the global batch that the rank keeps, the group's students."""
    found = Ranks(0, 1, ranks.device, None), slice(0, 0), []
    for first, n, names in plan:
        if ranks.main:
            print(f"ranks {first} to {first + n - 1}: {' and '.join(names)}, {c.batch // n} images each")
        group, files, members = ranks.group, ranks.files, list(range(first, first + n))
        if n < ranks.count:  # all ranks make each of the groups
            group = dist.new_group(members)
            files = dist.new_group(members, backend="gloo", timeout=PATIENCE)
        if first <= ranks.rank < first + n:
            keep = kept_by(c, ranks, plan)[ranks.rank]
            found = Ranks(ranks.rank - first, n, ranks.device, group, files), keep, names
    return found


def kept_by(c, ranks, plan):
    """The samples of the global batch that each rank keeps: of its group's, as many as the others; none without one."""
    keeps = [slice(0, 0)] * ranks.count
    for first, n, _ in plan:
        b = c.batch // n
        keeps[first : first + n] = [slice(own * b, (own + 1) * b) for own in range(n)]
    return keeps


def wait(ranks):
    """Until all ranks are here."""
    if ranks.group is not None:
        dist.barrier(ranks.group)


def clock(ranks, idle=True):
    """Seconds; idle: after what the device has still to do."""
    if idle and ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

# --------------------------------------------------------------------------------
# What travels


def share(c, ranks, batch, keeps, counts):
    """
    Of all ranks' parts of the global batch the samples that this rank keeps, each sent to it alone; the bytes received.

    batch    of this rank, with cls  (G b) Z  and patches  M Z  of the teacher; `kept`: masks of what it will keep
    keeps    samples that each rank keeps; ranks' parts are b samples each, and what lies beyond the batch goes nowhere
    counts   masked patches of each crop, known to the host:  (G b) of this rank's part,  (G kept)
    differs: images and features travel as bfloat16 where autocast rounds them to that; the logits, K wide, never do
    """
    b, received, wire = len(batch["indices"]), 0, torch.bfloat16 if c.precision == "bf16" else torch.float32
    keep, first = keeps[ranks.rank], ranks.rank * b
    sends = [overlap(slice(first, first + b), other, first) for other in keeps]
    comes = [overlap(slice(rank * b, (rank + 1) * b), keep, keep.start) for rank in range(ranks.count)]

    def exchange(x, rows_out, rows_in):
        """rows_out of x to each rank, rows_in from each; of any dtype: gloo has no bfloat16, but bytes"""
        nonlocal received
        sent = x.flatten(1).contiguous().view(torch.uint8)
        out = sent.new_empty(sum(rows_in), sent.shape[1])
        dist.all_to_all_single(out, sent, rows_in, rows_out, group=ranks.group)
        received += out.nbytes
        return out.view(x.dtype).unflatten(1, x.shape[1:]).split(rows_in)

    def travel(x, views):
        """(views b) ... -> (views kept) ..., in the order of the global batch"""
        x = x.unflatten(0, (views, b))
        sent = torch.cat([x[:, part].flatten(0, 1) for part in sends])
        parts = exchange(sent, *([views * (part.stop - part.start) for part in each] for each in (sends, comes)))
        return torch.cat([part.unflatten(0, (views, len(part) // views)) for part in parts], dim=1).flatten(0, 1)

    def travel_patches(x):
        """M Z -> M' Z of the kept crops"""
        own, kept = (count.unflatten(0, (2, len(count) // 2)) for count in counts)             # G b, G kept
        crops = x.split(own.flatten().tolist())                                                # (G b) of rows Z
        sent = torch.cat([x[:0], *(crops[view * b + i] for part in sends for view in (0, 1)
                                   for i in range(part.start, part.stop))])
        rows_out = [int(own[:, part].sum()) for part in sends]
        rows_in = [kept[:, part].sum(1).tolist() for part in comes]                            # S of G
        parts = exchange(sent, rows_out, [sum(rows) for rows in rows_in])
        parts = [part.split(rows) for part, rows in zip(parts, rows_in, strict=True)]
        return torch.cat([part[view] for view in (0, 1) for part in parts])

    views = dict(global_crops=2, local_crops=c.n_local, cls=2)
    out = {name: travel(batch[name].to(wire), n).float() for name, n in views.items() if n}
    out |= dict(patches=travel_patches(batch["patches"].to(wire)).float(),
                indices=travel(batch["indices"].to(batch["cls"].device)[:, None], 1)[:, 0])
    return out | batch.get("kept", {}), received


def overlap(a, b, origin):
    """What two slices have in common, counted from an origin; empty ones at 0."""
    start, stop = max(a.start, b.start) - origin, min(a.stop, b.stop) - origin
    return slice(start, stop) if start < stop else slice(0, 0)
