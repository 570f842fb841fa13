"""Ranks in groups: the plan against all plans there are, and what is gathered against what one rank alone has."""

import itertools
from dataclasses import replace

import pytest
import torch

from data import Batches, colour_batch
from engine import groups
from engine.groups import assign, describe, fit, kept_by, make_group, make_plan, share
from engine.ranks import Ranks
from engine.sources import open_source
from recipes import TrainConfig

CONFIG = TrainConfig(batch=12, group=3, global_size=32, local_size=16, n_local=2, patch_size=8, precision="fp32")


def on(rank, count):
    return Ranks(rank, count, torch.device("cpu"), object() if count > 1 else None)

# --------------------------------------------------------------------------------
# Plan


@pytest.mark.parametrize("n_ranks, batch", [(3, 12), (8, 48), (8, 6), (12, 60), (16, 7)])
@pytest.mark.parametrize("costs", [
    ((1, 0, 0), (1, 0, 0), (1, 0, 0)), ((1, 0, 0), (2, 0, 0), (5, 0, 0)), ((9, 0, 0), (1, 3, 0), (1, 0, 0)),
    ((1, 5, 20), (1, 2, 90), (3, 0, 7)),  # sharding may cost more than it saves
])
def test_assign_is_the_best_of_all(n_ranks, batch, costs):
    def slowest(plan):
        return max(batch / n * image + step + (sharding if n > 1 else 0)
                   for (image, step, sharding), n in zip(costs, plan, strict=True))
    divisors = [n for n in range(1, n_ranks + 1) if batch % n == 0]
    possible = [p for p in itertools.product(divisors, repeat=3) if sum(p) <= n_ranks]
    found = assign(dict(zip("abc", costs, strict=True)) | dict(teacher=(100, 0, 0)), n_ranks, batch)
    assert list(found) == list("abc") and tuple(found.values()) in possible
    assert slowest(found.values()) == min(slowest(plan) for plan in possible)


@pytest.fixture
def timed(monkeypatch):
    """timed(seconds) -> a step that takes them, by a clock that is never late; the first call takes twice as long"""
    now = [0.0]
    monkeypatch.setattr(groups, "clock", lambda ranks: now[0])

    def make(seconds):
        calls = iter([2, 1, 1.5])
        return lambda: now.__setitem__(0, now[0] + next(calls) * seconds)
    return make


@pytest.mark.parametrize("batch, images", [(48, 12), (12, 3)])
def test_fit_finds_what_an_image_a_step_and_sharding_cost(timed, batch, images):
    """two students on four ranks: a slice is batch / 2, half of it is measured in whole sets of KoLeo"""
    truth, asked = dict(teacher=(0.25, 0.0, 0.0), a=(0.5, 2.0, 4.0), b=(0.125, 3.0, 0.0)), []

    def prepare(name, ranks, n):
        asked.append((ranks.count, n))
        image, step, sharding = truth[name]
        return timed(image * n + step + sharding * (ranks.count > 1))
    ranks = on(0, 4)
    ranks.mean = lambda x: x
    assert fit(replace(CONFIG, batch=batch, koleo_group=3), ranks, ["a", "b"], prepare) == truth
    assert asked == [(1, images), (1, 2 * images), (4, images)] * 3


def test_fit_of_a_noisy_clock_is_never_negative(timed):
    times = iter([3.0, 2.0, 1.0, 1.0, 9.0, 2.0])
    costs = fit(CONFIG, on(0, 1), ["a"], lambda *_: timed(next(times)))
    assert costs == dict(teacher=(0.0, 3.0, 0.0), a=(1 / 16, 0.0, 1.0))


def test_describe_counts_idle_ranks():
    """B = 8 on 4 ranks: teacher 2 x 10 ms; a 8/3 x 24 + 10 + 6 = 80 ms, b 8 x 5 = 40 ms: one of 4 waits 40 of 100 ms"""
    said = describe(dict(teacher=(0.01, 0, 0), a=(0.024, 0.01, 0.006), b=(0.005, 0, 0.1)), dict(a=3, b=1), 4, 8)
    assert said == ("plan: teacher on all 4 ranks 20 ms, then a:3 80 ms, b:1 40 ms; a step 100 ms, in which ranks idle "
                    "10 % on average")


def test_plans(capsys, monkeypatch):
    def plan(n_ranks, **counts):
        return make_plan(CONFIG, on(0, n_ranks), counts, None)
    assert plan(1, a=0, b=0) == [(0, 1, ["a", "b"])]                       # in turn
    assert plan(4, a=0) == [(0, 4, ["a"])]
    assert plan(2, a=0, b=0, c=0) == [(0, 2, ["a", "b", "c"])]
    assert plan(4, a=1, b=2) == [(0, 1, ["a"]), (1, 2, ["b"])]             # the last rank runs the teacher alone
    monkeypatch.setattr(groups, "fit", lambda *_: dict(teacher=(1, 0, 0), a=(1, 0, 0), b=(3, 0, 0)))
    assert plan(4, a=0, b=0) == [(0, 1, ["a"]), (1, 3, ["b"])]
    assert "a:1 12000 ms, b:3 12000 ms; a step 15000 ms, in which ranks idle 0 %" in capsys.readouterr().out


@pytest.mark.parametrize("n_ranks, counts", [(1, dict(a=1, b=1)), (8, dict(a=5, b=1))])
def test_plans_that_cannot_be(n_ranks, counts):
    c = replace(CONFIG, batch=12)
    object.__setattr__(c, "students", "a:5")
    with pytest.raises(ValueError, match="there are . ranks, and those of each student must divide the batch"):
        make_plan(c, on(0, n_ranks), counts, None)


def test_plan_of_the_released_run():
    """48, 48, 80, 120 of 296 ranks: 1,920 images, 7 on each rank for the teacher, of which the last are cut"""
    c, ranks = replace(CONFIG, batch=1920), on(0, 296)
    keeps = kept_by(c, ranks, make_plan(c, ranks, dict(s=48, sp=48, b=80, l=120), None))
    assert [sum(keep.stop - keep.start == n for keep in keeps) for n in (40, 24, 16)] == [96, 80, 120]
    assert 295 * -(-1920 // 296) > 1920 and keeps[0] == slice(0, 40) and keeps[-1] == slice(1904, 1920)


def test_one_group_of_all_ranks_divides_the_batch():
    with pytest.raises(ValueError, match="--batch 12 is not divisible by 5 ranks; write how many"):
        make_plan(CONFIG, on(0, 5), dict(a=0), None)


def test_groups_keep_the_whole_batch_each(monkeypatch):
    monkeypatch.setattr(groups.dist, "new_group", lambda members, **_: tuple(members))
    made = [make_group(CONFIG, on(rank, 6), [(0, 2, ["a"]), (2, 3, ["b"])]) for rank in range(6)]
    assert [(own.rank, own.count, own.group) for own, _, _ in made[:5]] == [
        (0, 2, (0, 1)), (1, 2, (0, 1)), (0, 3, (2, 3, 4)), (1, 3, (2, 3, 4)), (2, 3, (2, 3, 4))]
    assert [(keep.start, keep.stop) for _, keep, _ in made] == [(0, 6), (6, 12), (0, 4), (4, 8), (8, 12), (0, 0)]
    assert [names for _, _, names in made] == [["a"]] * 2 + [["b"]] * 3 + [[]]

# --------------------------------------------------------------------------------
# What travels


def sharing(c, n_ranks, keeps):
    """share() on each of the ranks, in one process: once to hear what all send, once to receive it."""
    sent, source, b = [], open_source("shapes", 24), -(-c.batch // n_ranks)
    parts = [Batches(c, source, rank * b, b) for rank in range(n_ranks)]
    for part, keep in zip(parts, keeps, strict=True):
        part.kept = Batches(c, source, keep.start, keep.stop - keep.start) if keep.stop else None
    parts = [colour_batch(part[0], c) for part in parts]
    for part in parts:  # in place of features: the number of the image and crop, and of the patch
        part["cls"] = (part["indices"][None] + torch.tensor([[0], [100]])).flatten()[:, None].float()
        part["patches"] = torch.stack([part["cls"][part["masked"] // 16, 0], part["masked"] % 16.0], dim=1)

    def send(out, x, rows_in, rows_out, group):
        sent[-1].append(x.split(rows_out))
        out.zero_()

    def receive(out, x, rows_in, rows_out, group):
        found = [each[len(done)][at] for each in sent]
        assert [len(rows) for rows in found] == rows_in
        done.append(out.copy_(torch.cat(found)))

    def call(rank, part):
        kept = part["kept"]["masks"].sum(1) if "kept" in part else torch.zeros(0, dtype=torch.int64)
        return share(c, on(rank, n_ranks), part, keeps, [part["masks"].sum(1), kept])
    shared = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups.dist, "all_to_all_single", send)
        for rank, part in enumerate(parts):
            sent.append([])
            call(rank, part)
        patch.setattr(groups.dist, "all_to_all_single", receive)
        for at, part in enumerate(parts):
            done = []
            shared.append(call(at, part))
    return shared


@pytest.mark.parametrize("group", [3, 4, 12])
@pytest.mark.parametrize("n_ranks, counts", [
    (2, (1, 1)), (4, (3, 1)), (6, (2, 3)), (12, (4, 6)), (5, (2, 3)), (7, (2, 4))])
def test_share_gives_each_rank_its_samples(n_ranks, counts, group):
    """ranks' parts cut across the groups of masks, and groups' parts across the ranks'; padded where they must be"""
    c = replace(CONFIG, group=group)
    plan = [(end - n, n, [str(n)]) for end, n in zip(itertools.accumulate(counts), counts, strict=True)]
    keeps = kept_by(c, on(0, n_ranks), plan)
    for (shared, _), keep in zip(sharing(c, n_ranks, keeps), keeps, strict=True):
        if not keep.stop:
            assert len(shared["indices"]) == len(shared["patches"]) == len(shared["global_crops"]) == 0
            continue
        whole = colour_batch(Batches(c, open_source("shapes", 24), keep.start, keep.stop - keep.start)[0], c)
        for name in ("global_crops", "local_crops", "masks", "masked", "weights", "indices"):
            assert torch.equal(shared[name], whole[name]), name
        cls = (whole["indices"][None] + torch.tensor([[0], [100]])).flatten().float()
        assert torch.equal(shared["cls"][:, 0], cls)
        assert torch.equal(shared["patches"], torch.stack([cls[whole["masked"] // 16], whole["masked"] % 16.0], dim=1))


@pytest.mark.parametrize("precision, size", [("fp32", 4), ("bf16", 2)])
def test_received_bytes_are_those_of_the_arithmetic(precision, size):
    """of what a rank keeps, and of nothing else"""
    c = replace(CONFIG, precision=precision)
    shared, received = sharing(c, 4, kept_by(c, on(0, 4), [(0, 2, ["a"]), (2, 2, ["b"])]))[0]
    images = 6 * 3 * (2 * 32 * 32 + 2 * 16 * 16)
    masked = int(16 * (0.1 + 0.4 / 3)) + int(16 * (0.1 + 0.8 / 3)) + 8  # of each 6 crops, 3
    assert received == size * (images + 6 * 2 * 1 + 2 * masked * 2) + 6 * 8
    assert shared["global_crops"].dtype == torch.float32
