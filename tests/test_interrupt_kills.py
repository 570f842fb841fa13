"""
Kills at any time: of a run, of its saves behind the steps and its resumes, at every event of the file system; nothing
is lost.

The long forms: 100 kills at random times, and every event: pytest -m long tests/test_interrupt_kills.py
"""

import os
import random
import shutil
import signal
import sys
import time

import pytest
from forks import start
from test_saver import late
from test_train import MICRO, rows

from engine.checkpoint import newest, saved

WORDS = [*MICRO, "--save_every", "2", "--keep", "2", "--resume", "auto"]
EVENTS = {"open", "os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "os.truncate"}


def finish(out, base=WORDS):
    codes, _ = start(out, base=base).wait()
    assert codes == [0], out.with_name(out.name + ".log").read_text()


def numbers(out):
    times = "images_per_s", "waiting"
    return [{name: x for name, x in row.items() if name not in times} for row in rows(out)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    finish(out)
    assert [row["step"] for row in rows(out)] == list(range(6))
    return out


def same(out, whole):
    """Rows, losses, weights and what is left of checkpoints, as if nothing had happened."""
    assert numbers(out) == numbers(whole)
    assert [step for step, _ in saved(out)] == [6, 4]
    assert sorted(path.name for path in out.rglob("*")) == sorted(path.name for path in whole.rglob("*"))
    for name in "teacher.safetensors", "checkpoints/6/0.safetensors", "checkpoints/6/step.json", \
            "checkpoints/4/teacher.safetensors":
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def kill_at_random_times(out, whole, times, rng):
    """Kills the run again and again; begins anew when it has its steps. Returns the kills that fell into a run."""
    kills = lost = 0
    while kills < times:
        shutil.rmtree(out, ignore_errors=True)
        before, done = 0, False
        while not done:
            group = start(out, base=WORDS)
            time.sleep(rng.uniform(0, 1.5) if kills < times else 60)
            group.look()
            if group.codes:
                assert group.codes == {0: 0}, group.text()
                done = True
                continue
            group.signal(signal.SIGKILL)
            group.wait()
            kills += 1
            after = newest(out)[0] if saved(out) else 0
            lost += after < before
            before = after
            if kills == times:
                finish(out)
                done = True
        same(out, whole)
    assert lost == 0
    return kills


def events(out, kill=None):
    """A prepare() for start(): counts what touches OUT into OUT.events, or dies before the kill-th of them."""
    def prepare(rank):
        late(out, rank, steps=6)  # all of a save but its first event comes two steps later
        seen = [0]

        def hook(event, args):
            if event in EVENTS and (str(args[0]).startswith(f"{out}/") or event in ("os.remove", "os.rmdir")):
                writes = event != "open" or args[1] is None or args[1] != "r" and args[1] != "rb"
                seen[0] += writes
                if kill is not None and seen[0] == kill and writes:
                    os.kill(os.getpid(), signal.SIGKILL)
                if kill is None:
                    out.with_name("events").write_text(str(seen[0]))
        sys.addaudithook(hook)
    return prepare


def kill_at_events(folder, whole, every):
    """A run of two steps goes on; it is killed before each event that touches its folder, and goes on again."""
    base, out = folder / "base", folder / "run"
    finish(base, [*WORDS, "--stop_after", "2"])
    shutil.copytree(base, out)
    assert start(out, base=WORDS, prepare=events(out)).wait()[0] == [0]
    n = int((folder / "events").read_text())
    assert n > 30
    for kill in range(1 + every // 2, n + 1, every):
        shutil.rmtree(out)
        shutil.copytree(base, out)
        assert start(out, base=WORDS, prepare=events(out, kill)).wait()[0] == [-signal.SIGKILL], kill
        assert newest(out)[0] >= 2, kill
        finish(out)
        same(out, whole)
    return n


def test_kills_at_random_times(tmp_path, whole):
    kill_at_random_times(tmp_path / "run", whole, 3, random.Random(0))


def test_kills_at_some_events(tmp_path, whole):
    kill_at_events(tmp_path, whole, 20)


@pytest.mark.long
def test_100_kills_at_random_times(tmp_path, whole):
    kill_at_random_times(tmp_path / "run", whole, 100, random.Random(1))


@pytest.mark.long
def test_kills_at_every_event(tmp_path, whole):
    print(kill_at_events(tmp_path, whole, 1), "events")
