"""engine/profile.py: which steps are in the trace; a run that is cut short; ranges; what is asked of a GPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import MICRO, run

import recipes
import train
from engine import profile
from engine.profile import table, tracer
from engine.ranks import Ranks

ROOT = Path(__file__).parents[1]
ALONE = Ranks(0, 1, torch.device("cpu"), None)


def steps_of(out, name="Optimizer.step#"):
    """Optimizer steps in the trace."""
    events = json.loads((out / "profile.json").read_text())["traceEvents"]
    return sum(event["name"].startswith(name) and event["ph"] == "X" for event in events)


def test_the_trace_has_these_steps_and_a_table_is_printed(tmp_path, capsys):
    run(tmp_path / "run", "--steps", "3", "--profile", "1,3")
    said = capsys.readouterr().out.splitlines()
    assert steps_of(tmp_path / "run") == 2
    first = next(i for i, line in enumerate(said) if line.startswith("of a step, over 2, "))
    lines = said[first + 1 : first + 1 + profile.ROWS]
    shares = [float(line.split()[0]) for line in lines]
    assert shares == sorted(shares, reverse=True) and 30 < sum(shares) <= 100.1 and any("aten::" in x for x in lines)
    assert said[first + 1 + profile.ROWS] == f"trace: {tmp_path}/run/profile.json"


def test_a_run_that_is_cut_short_leaves_what_it_has(tmp_path):
    c, ends = replace(recipes.TrainConfig(), out=str(tmp_path), profile=(0, 9)), [False, False, False, True]
    trace = tracer(c, ALONE, 10)
    for leave in ends:
        trace(leave)
        torch.ones(3).argmax()
    assert steps_of(tmp_path, "aten::argmax") == 3


def test_an_error_within_a_trace_is_an_error_and_no_crash(tmp_path):
    script = f"""
from dataclasses import replace
import torch, recipes
from engine.profile import tracer
from engine.ranks import Ranks
trace = tracer(replace(recipes.TrainConfig(), out={str(tmp_path)!r}, profile=(0, 9)), Ranks(), 10)
for _ in range(3):
    trace(False)
    torch.ones(3).argmax()
raise torch.OutOfMemoryError("made to fail")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "OutOfMemoryError: made to fail" in done.stderr
    assert steps_of(tmp_path, "aten::argmax") == 3


def test_a_resumed_run_counts_its_own_steps_and_does_not_trace_again(tmp_path):
    out = tmp_path / "run"
    run(out, "--profile", "1,2", "--stop_after", "2")
    (out / "profile.json").unlink()
    run(out, "--resume", "--stop_after", "1")
    assert not (out / "profile.json").exists()
    run(out, "--resume", "--profile", "0,3")
    assert steps_of(out) == 3


@pytest.mark.parametrize("words, says", [
    (["--profile", "4,7"], "--profile 4,7: this run does 6 steps; name two numbers up to that"),
    (["--profile", "1,3", "--stop_after", "2"], "--profile 1,3: this run does 2 steps"),
    (["--profile", "3,1"], r"--profile is 3,1; it must be in \[0, 1e7\] rising"),
    (["--profile", "3"], "--profile wants 2 numbers"),
])
def test_ranges(tmp_path, words, says):
    with pytest.raises(ValueError, match=says):
        train.main([*MICRO, "--out", str(tmp_path / "run"), *words])
    assert not (tmp_path / "run/profile.json").exists() and not (tmp_path / "run/teacher.safetensors").exists()


def test_off_and_other_ranks_trace_nothing(tmp_path):
    for c, ranks in ((recipes.TrainConfig(), ALONE), (replace(recipes.TrainConfig(), profile=(0, 2)), Ranks(1, 2))):
        trace = tracer(replace(c, out=str(tmp_path)), ranks, 5)
        assert [trace(leave) for leave in (False, False, True)] == [None] * 3
    assert not list(tmp_path.iterdir())


def test_table_by_hand():
    events = [SimpleNamespace(key=key, self_cpu_time_total=time, self_device_time_total=other, count=count)
              for key, time, other, count in (("ProfilerStep#1", 9e9, 0, 1), ("b", 1000, 3000, 2), ("a", 3000, 0, 8))]
    assert table(events, 2, "cpu").splitlines() == ["of a step, over 2, 2.0 ms of cpu:",
        " 75.0 %      1.500 ms        4 x  a", " 25.0 %      0.500 ms        1 x  b"]
    assert table(events, 2, "cuda").splitlines()[1] == "100.0 %      1.500 ms        1 x  b"


def test_a_gpu_that_runs_out_of_memory_says_what_fills_it(tmp_path, monkeypatch, capsys):
    """every rank watches its own; here a stand-in for CUDA's allocator"""
    asked, observers = [], []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda max_entries: asked.append(max_entries))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: open(path, "w").close())
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", observers.append, raising=False)
    c = replace(recipes.TrainConfig(), out=str(tmp_path), profile=(2, 3))
    tracer(c, Ranks(3, 4, torch.device("cuda")), 5)
    assert asked == [profile.ENTRIES] and not list(tmp_path.iterdir())
    observers[0](3, 5 * 2**20, 7, 0)
    assert (tmp_path / "memory.3.pickle").exists() and "out of memory: 5 MiB more" in capsys.readouterr().out
