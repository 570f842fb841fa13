"""versus.py: a kernel that is wrong is found and named, and so is one that is slow; the rest runs in test_bench.py."""

import math
from types import SimpleNamespace

import pytest
import torch

import ops
from engine import versus
from engine.report import Report
from engine.timing import Cpu, Rehearsal


@pytest.fixture
def report():
    return Report("check", None, Rehearsal())


def verdicts(report):
    return {row["shape"]: row["verdict"] for row in report.tables["kernels"]}


def fault(monkeypatch, name, wrong):
    """An op whose kernel, but not its definition, gives wrong(result, arguments)."""
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *a, **k: wrong(right(*a, **k), a) if ops.mode != "off" else right(*a, **k))


@pytest.mark.parametrize("op", versus.CASES)
def test_right_kernels_are_right(op, report):
    versus.check(Rehearsal(), report, op, largest=3000)
    assert set(verdicts(report).values()) == {"right"} and "right at every shape" in report.notes[0]
    assert "at" not in report.head


def test_smallest_wrong_shape_is_named_and_the_rest_goes_on(monkeypatch, report):
    fault(monkeypatch, "sinkhorn_targets", lambda q, a: q * (1 + 1e-2 * (q.shape[1] > 20)))
    versus.check(Rehearsal(), report, "sinkhorn", largest=300)
    assert verdicts(report) == {"1 x 5": "right", "3 x 16": "right", "8 x 31": "WRONG", "9 x 33": "WRONG"}
    assert report.notes == ["sinkhorn bfloat16: the smallest shape that is wrong: 8 x 31"]


@pytest.mark.parametrize("value", [math.nan, 0.5])
def test_one_element_of_a_gradient_is_enough(monkeypatch, report, value):
    def wrong(out, arguments):
        return torch.cat([out[:-1], torch.full_like(out[-1:], value)])
    fault(monkeypatch, "rope_attention", wrong)
    versus.check(Rehearsal(), report, "attention", largest=4000)
    assert all(verdict == "WRONG" for verdict in verdicts(report).values())


def test_other_bits_another_time_are_noticed(monkeypatch, report):
    calls = []

    def wrong(losses, arguments):
        calls.append(0)
        return losses * (1 + 2 ** -22 * (len(calls) == 9))
    fault(monkeypatch, "assignment_loss", wrong)
    versus.check(Rehearsal(), report, "loss", largest=5)
    row, = report.tables["kernels"]
    assert row["verdict"] == "WRONG" and row["equal"] < 10 and row["goal"].startswith("G20 not met")


def test_a_kernel_that_raises_ends_no_call(monkeypatch, report):
    def wrong(x, arguments):
        raise RuntimeError("misaligned address\n")
    fault(monkeypatch, "rope_attention", wrong)
    versus.check(Rehearsal(), report, "attention", largest=3000)
    assert set(verdicts(report).values()) == {"WRONG: misaligned address"}


def test_attention_is_called_after_the_fastest(report):
    times = {name: SimpleNamespace(seconds=seconds, spread=0, how="") for name, seconds in (
        ("written out", 3.0), ("ours", 1.0), ("flash", 1.5))}
    rates, card = dict.fromkeys(times, 1.0), dict(copy=4.3e12)
    said = versus.attention_rows(report, "2", "forward", times, {}, rates, 1.0, {}, [261], card)
    assert said == "ours, 1.50x flash"
    assert ["goal" in row for row in report.tables["attention"]] == [False, True, False]
    times["ours"].seconds = 2.0
    said = versus.attention_rows(report, "2", "forward", times, {}, rates, 1.0, {}, [261], card)
    assert said == "flash, 1.33x ours"


def test_a_lost_device_is_asked_nothing_more(monkeypatch, report):
    class Lost(Rehearsal):
        def synchronize(self):
            raise RuntimeError("an illegal memory access was encountered")
    versus.check(Lost(), report, "sinkhorn", largest=300)
    assert len(report.tables["kernels"]) == 1 and "answers no more" in report.notes[0]


def test_what_is_slower_says_so(report):
    class Scripted(Cpu):
        def clock(self, run, times):
            run()
            return {"a": 2.0, "b": 1.0, "c": 3.0}[said.pop()]
    said, x = [], torch.ones(2, dtype=torch.float64)
    ways = {name: (lambda name=name: (said.append(name), x)[1], figure)
            for name, figure in (("a", "eager"), ("b", "compiled"), ("c", None))}
    ways = dict(textbook=ways["a"], compiled=ways["b"], ours=ways["c"])
    card = dict(copy=4.3e12)
    versus.rows_of(Scripted(), report, "ops", "2", ways, [()], 6e9, "G1", card, x)
    base, compiled, ours = report.tables["ops"]
    assert ours["flag"] == "SLOWER than the textbook" and "flag" not in base and "flag" not in compiled
    assert ours["base_over_this"] == pytest.approx(2 / 3) and compiled["this_over_ours"] == pytest.approx(1 / 3)
    assert ours["gb_per_s"] == pytest.approx(2) and ours["error"] == 0
    assert ours["goal"] == "G1 not met: eager 0.667, wanted 14; compiled 0.333, wanted 5; ms 3e+03, wanted 0.3"
