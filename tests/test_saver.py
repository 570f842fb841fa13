"""
engine/saver.py: what is written behind the steps is what would be written if they waited; what fails there; leaving.
A kill before each event of the file system: test_interrupt_kills.py.
"""

import errno
import os
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from forks import start
from test_interrupt import logged, once, wait_for
from test_train import MICRO, rows

import distill
import train
from engine import checkpoint, saver
from engine.checkpoint import newest, saved
from engine.interrupt import Interrupt, Peers
from engine.ranks import Ranks
from engine.saver import Saver

PAGE = os.sysconf("SC_PAGE_SIZE")
ALONE = Ranks(0, 1, torch.device("cpu"), None)
WORDS = [*MICRO, "--save_every", "2", "--keep", "9"]
ENDLESS = [*MICRO, "--steps", "100000", "--keep", "9"]


def waiting(rank):
    saver.copied = lambda size, free: False


def late(out, rank, steps=2, ahead=2):
    """A rank that writes only when the run has logged two steps more, but for the last save, when none will come."""
    real = checkpoint.write_rows

    def slow(path, rows):
        step = int(path.parent.stem)
        wait_for(lambda: step == steps or len(logged(out)) >= step + ahead)
        return real(path, rows)
    checkpoint.write_rows = slow


def files(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and path.name not in ("metrics.jsonl", "config.json")}


def runs(out, *words, codes=(0,), **more):
    group = start(out, *words, **more)
    assert tuple(group.wait()[0]) == codes, group.text()
    return group.text()

# --------------------------------------------------------------------------------
# The same bytes


@pytest.mark.parametrize("ranks, words", [
    (1, []), (2, ["--moments", "bf16"]),
    pytest.param(4, ["--replicas", "2", "--group", "2", "--koleo_group", "2"], marks=pytest.mark.long)])
def test_what_is_written_late_is_what_was_there(tmp_path, ranks, words):
    """to the byte, though the weights are two steps further by then; and a run goes on from it"""
    more, out, other = dict(ranks=ranks, codes=(0,) * ranks, base=WORDS), tmp_path / "late", tmp_path / "waiting"
    assert "steps wait for checkpoints" not in runs(out, *words, prepare=partial(late, out, steps=6), **more)
    assert runs(other, *words, prepare=waiting, **more).count("steps wait for checkpoints to be written: a copy of") \
        == min(ranks, 2)  # of replicas, those that write
    assert [step for step, _ in saved(out)] == [6, 4, 2] and files(out) == files(other)
    for step in 4, 6:
        shutil.rmtree(out / f"checkpoints/{step}")
    runs(out, **more | dict(base=["--resume"]))
    assert files(out) == files(other)


@pytest.mark.parametrize("students, ranks", [
    (["tiny_half", "convnext_micro"], 1),
    pytest.param(["tiny_half", "convnext_micro", "tiny"], 2, marks=pytest.mark.long)])  # more than ranks: all on both
def test_students_save_side_by_side(tmp_path, students, ranks):
    train.main([*MICRO, "--out", str(tmp_path / "teacher"), "--stop_after", "1"])
    words = ["--teacher", str(tmp_path / "teacher"), "--students", ",".join(students), "--save_every", "1",
             *"""--n_shapes 24 --batch 8 --steps 3 --cooldown 1 --group 2 --koleo_group 8 --workers 0 --log_every 1
                 --device cpu --precision fp32 --keep 9""".split()]
    more = dict(ranks=ranks, codes=(0,) * ranks, base=words, main=distill.main)
    for name, prepare in dict(late=lambda rank: late(tmp_path / "late/tiny_half", rank, 3, 1), waiting=waiting).items():
        runs(tmp_path / name, prepare=prepare, **more)
    assert len(files(tmp_path / "late")) == len(students) * (1 + 3 * (2 + ranks))
    assert files(tmp_path / "late") == files(tmp_path / "waiting")

# --------------------------------------------------------------------------------
# One at a time


@pytest.fixture
def small(tmp_path):
    c = train.configure([*WORDS, "--out", str(tmp_path / "run")])
    student, teacher = (train.build_networks(c, ALONE) for _ in range(2))
    optimizer = train.make_optimizer(c, student)
    train.begin_state(optimizer)
    return c, ALONE, student, teacher, optimizer


def test_the_next_one_waits_and_takes_the_same_memory(small, monkeypatch):
    real, out, copies = checkpoint.write_rows, small[0].out, []

    def slow(path, rows):
        time.sleep(0.2)
        copies.append({x.data_ptr() for x, _, _ in rows.values()})
        return real(path, rows)
    monkeypatch.setattr(checkpoint, "write_rows", slow)
    save = Saver(*small)
    save(1, wait=False)
    assert not saved(out) and save.behind.daemon       # or Python would wait for it after a second Ctrl-C
    save(2, wait=False)
    assert newest(out)[0] == 1
    save(3)
    assert newest(out)[0] == 3 and copies[0] == copies[1] and not copies[1] & copies[2]  # who waits needs no copy


def test_a_failure_is_told_at_once_and_raised_once(small, monkeypatch):
    def full(path, rows):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    told = []
    save = Saver(*small, failed=partial(told.append, "failed"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_rows", full)
        save(1, wait=False)
        wait_for(lambda: told)
        with pytest.raises(ValueError, match="step 1 is not saved: .*Disk quota exceeded; a checkpoint takes"):
            save(2, wait=False)
    save(3)
    assert [step for step, _ in saved(small[0].out)] == [3] and told == ["failed"]


def test_who_leaves_after_an_error_waits(small, monkeypatch):
    real = checkpoint.write_rows
    monkeypatch.setattr(checkpoint, "write_rows", lambda *args: time.sleep(0.2) or real(*args))
    with pytest.raises(ValueError, match="another"), Peers(ALONE):
        Saver(*small)(1, wait=False)
        raise ValueError("another")
    assert newest(small[0].out)[0] == 1


def test_memory_that_is_free(monkeypatch):
    """what a step takes at most, not what is there between two; nor what others have"""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert 0 < saver.free() < saver.device_memory("cpu")
    texts = dict(meminfo="MemTotal: 9 kB\nMemAvailable:   6000000 kB\n", statm=f"9 {2_000_000_000 // PAGE} 9")
    monkeypatch.setattr(saver.Path, "read_text", lambda path: texts[path.name])
    monkeypatch.setattr(saver, "device_memory", lambda kind: 20e9)
    monkeypatch.setattr(saver, "peak", lambda: 5_120_000_000)
    assert saver.free() == pytest.approx(6.144e9 - 5.12e9 + 2e9, abs=PAGE)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert saver.free() == pytest.approx(3.072e9 - 5.12e9 + 2e9, abs=PAGE)
    monkeypatch.setattr(saver, "device_memory", lambda kind: 5e9)
    assert saver.free() == 5e9 - 5.12e9

# --------------------------------------------------------------------------------
# Runs that end


def full_at_20(rank):
    real = checkpoint.write_rows

    def full(path, rows):
        if rank == 1 and path.parent.stem == "20":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, rows)
    checkpoint.write_rows = full


def test_a_full_disk_ends_all_ranks_before_the_next_save(tmp_path):
    text = runs(tmp_path / "run", "--save_every", "10", ranks=2, codes=(2, 2), base=ENDLESS, prepare=full_at_20)
    said = [line for line in text.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1 and "Traceback" not in text
    assert "step 20 is not saved: rank 1: [Errno 28] No space left on device: " in said[0]
    assert "last good checkpoint is " in said[0] and "checkpoints/10" in said[0]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["10"]
    assert 20 <= len(logged(tmp_path / "run")) < 30


def test_the_last_save_is_not_done_before_it_is_written(tmp_path, monkeypatch):
    def full(path, rows):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    monkeypatch.setattr(checkpoint, "write_rows", full)
    with pytest.raises(ValueError, match="step 1 is not saved: .*there is no checkpoint yet"):
        train.main([*MICRO, "--out", str(tmp_path / "run"), "--stop_after", "1"])


def stuck(rank, seconds=600):
    """Writes no rows but those of step 2 for as long."""
    real = checkpoint.write_rows

    def slow(path, rows):
        time.sleep(seconds * (path.parent.stem == "4"))
        return real(path, rows)
    checkpoint.write_rows = slow


def in_flight(out, **more):
    """A run that began to save its fourth step and goes on."""
    group = start(out, "--save_every", "2", base=ENDLESS, **more)
    wait_for(lambda: len(logged(out)) >= 5)
    assert newest(out)[0] == 2 and (out / "checkpoints/4.new").is_dir(), group.text()
    return group


def test_a_kill_loses_the_one_in_flight_alone(tmp_path):
    group = in_flight(tmp_path / "run", prepare=stuck)
    group.signal(signal.SIGKILL)
    group.wait()
    assert newest(tmp_path / "run")[0] == 2
    runs(tmp_path / "run", "--resume", "--steps", "6", base=[])
    assert [step for step, _ in saved(tmp_path / "run")] == [6, 4, 2]
    assert not list((tmp_path / "run/checkpoints").glob("*.new"))


def test_a_signal_waits_for_the_one_in_flight_and_for_the_last(tmp_path):
    group = in_flight(tmp_path / "run", prepare=partial(stuck, seconds=1))
    group.signal(signal.SIGTERM)
    assert group.wait()[0] == [0], group.text()
    done = len(rows(tmp_path / "run"))
    assert [step for step, _ in saved(tmp_path / "run")] == sorted({done, *range(2, done + 1, 2)}, reverse=True)
    assert 4 < done < 8


def test_ctrl_c_twice_does_not_wait(tmp_path):
    def prepare(rank):
        stuck(rank)
        Interrupt.AGAIN = 0.3
    group = in_flight(tmp_path / "run", prepare=prepare)
    group.signal(signal.SIGINT)
    time.sleep(0.5)
    group.look()
    assert not group.codes                             # it waits for what is in flight
    group.signal(signal.SIGINT)
    assert group.wait(5)[0] == [130], group.text()
    assert newest(tmp_path / "run")[0] == 2


@pytest.mark.long
def test_an_error_of_a_rank_waits_for_the_one_in_flight(tmp_path):
    def prepare(rank):
        stuck(rank, seconds=1)
        once("loss_terms", ValueError("no more"), 6)(rank)
    group = start(tmp_path / "run", "--save_every", "2", ranks=2, base=ENDLESS, prepare=prepare)
    assert group.wait()[0] == [2, 2], group.text()
    assert newest(tmp_path / "run")[0] == 4 and "train.py: rank 1: no more" in group.text()
