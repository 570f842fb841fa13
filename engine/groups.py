"""
Ranks in groups, one for each student: who trains what, and what travels between them.

    make_plan, assign   ranks for each student, so that all need the same time     DINOv3 §5.2
    fit, expected       what a step of each costs, on any number of ranks
    make_group          this rank's group, and what it keeps of the batch
    share               the all-gather of images and of what the teacher says      DINOv3 §5.2, Fig. 12

Dimension letters: see the top of model.py.
"""

import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

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
            own, b = ranks.rank - first, c.batch // n
            found = Ranks(own, n, ranks.device, group, files), slice(own * b, (own + 1) * b), names
    return found


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


def share(c, ranks, batch, keep):
    """
    All ranks' parts of the global batch, of which this rank keeps the samples `keep`; and the bytes received.

    batch    of this rank, with cls  (G b) Z  and patches  M Z  of the teacher
    differs: images and features travel as bfloat16 where autocast rounds them to that; the logits, K wide, never do
    """
    S, P, wire = ranks.count, batch["masks"].shape[1], torch.bfloat16 if c.precision == "bf16" else torch.float32
    b, M, received = len(batch["indices"]), len(batch["masked"]), 0
    rows = 2 * b * int(P * c.mask_ratio[1]) if b % c.group else M  # of patches; at most, where M differs between ranks
    low, high = keep.start // b, -(-keep.stop // b)                # ranks that have the samples

    def gather(x):
        """S times the shape of x, of any dtype: gloo has no bfloat16, but bytes"""
        nonlocal received
        out = x.new_empty(S, *x.shape)
        dist.all_gather_into_tensor(out.view(torch.uint8).flatten(0, 1), x.contiguous().view(torch.uint8), ranks.group)
        received += out.nbytes
        return out

    def pick(x, views):
        """S (views b) ... -> (views kept) ..., in the order of the global batch"""
        x = x[low:high].unflatten(1, (views, b)).transpose(0, 1).flatten(1, 2)
        return x[:, keep.start - low * b : keep.stop - low * b].flatten(0, 1)

    views = dict(global_crops=2, local_crops=c.n_local, cls=2)
    out = {name: pick(gather(batch[name].to(wire)), n).float() for name, n in views.items() if n}
    patches = gather(F.pad(batch["patches"].to(wire), (0, 0, 0, rows - M))).flatten(0, 1)    # (S rows) Z
    masks = gather(batch["masks"])                                                           # S (G b) P
    row = masks.flatten(1).cumsum(1) - 1 + rows * torch.arange(S, device=masks.device)[:, None]
    kept = pick(masks, 2)                                                                    # (G kept) P
    masked = kept.flatten().nonzero()[:, 0]                                                  # M of the kept
    return out | dict(patches=patches[pick(row.view_as(masks), 2)[kept]].float(), masked=masked, masks=kept,
                      weights=1 / kept.sum(1).clamp(min=1)[masked // P].float(),
                      indices=pick(gather(batch["indices"].to(masks.device)), 1)), received
