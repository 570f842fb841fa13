"""engine/interrupt.py: signals with workers on two ranks; a rank that fails, is killed, or has no data; verdicts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import start
from test_train import MICRO, rows

import train
from engine.checkpoint import newest, saved
from engine.interrupt import Elsewhere, Interrupt, Later, Verdicts, lives
from engine.ranks import Ranks

ROOT = Path(__file__).parents[1]
ALONE = Ranks(0, 1, torch.device("cpu"), None)
ENDLESS = [*MICRO, "--steps", "100000", "--save_every", "100000", "--resume", "auto"]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.05)


def logged(out):
    path = out / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []

# --------------------------------------------------------------------------------
# Signals


def stop_by(out, numbers, workers=1):
    """A run on two ranks with workers gets the signals, its whole group; returns seconds until all have left."""
    before = len(logged(out))
    group = start(out, "--workers", str(workers), ranks=2, base=ENDLESS)
    wait_for(lambda: len(logged(out)) >= before + 3)
    for number in numbers:
        group.signal(number)
        time.sleep(0.02)
    codes, seconds = group.wait()
    assert codes == [0, 0], group.text()
    done = newest(out)[0]
    assert done == len(rows(out)) and f"stopped at step {done}" in group.text()  # nothing that was done is lost
    return seconds


def test_a_signal_to_the_group_saves_and_leaves(tmp_path):
    """twice, as from a scheduler and from torchrun"""
    assert stop_by(tmp_path / "run", [signal.SIGTERM, signal.SIGTERM]) < 25
    assert stop_by(tmp_path / "run", [signal.SIGUSR1]) < 25
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(len(rows(tmp_path / "run"))))


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_20_signals(tmp_path, number):
    seconds = [stop_by(tmp_path / "run", [number] * (1 + i % 2), workers=1 + i % 2) for i in range(20)]
    print(f"\n{number.name}: 20 of 20 saved, {min(seconds):.1f} to {max(seconds):.1f} s")
    assert max(seconds) < 25


def test_a_signal_to_torchrun_saves_and_leaves(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", "train.py", *ENDLESS, "--workers", "1", "--out", str(tmp_path / "run")]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_for(lambda: len(logged(tmp_path / "run")) >= 3, 120)
        os.killpg(run.pid, signal.SIGTERM)
        before = time.monotonic()
        run.wait(60)
        assert time.monotonic() - before < 25
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert newest(tmp_path / "run")[0] == len(rows(tmp_path / "run"))


def test_a_second_signal_counts_after_a_while(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Interrupt() as interrupt:
        for seconds in 0, 0.05, 4.9:
            now[0] = 100 + seconds
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.asked == 100
        now[0] = 106
        os.kill(os.getpid(), signal.SIGUSR1)  # a warning, however often
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

# --------------------------------------------------------------------------------
# Ranks that fail


def fails(out, prepare, words=(), act=None, save_every="2"):
    """Two ranks of which one fails after a while; returns what they say, and the seconds from then until all ended."""
    group = start(out, "--save_every", save_every, *words, ranks=2, prepare=prepare,
                  base=[*MICRO, "--steps", "100000", "--resume", "auto"])
    wait_for(lambda: saved(out) and len(logged(out)) >= 3)
    if act:
        act(group)
    before = time.monotonic()
    wait_for(lambda: group.look() or group.codes)
    codes, _ = group.wait(30)
    seconds = time.monotonic() - before
    assert "hung" not in codes and seconds < 20, group.text()
    said = [line for line in group.text().splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1, group.text()
    assert newest(out)[0] >= 2
    return said[0], group.text(), seconds


def once(name, error, call=8):
    """A prepare(rank) by which rank 1 raises, in that call of train's function."""
    def prepare(rank):
        real, calls = getattr(train, name), []

        def spoilt(*args, **kwargs):
            calls.append(1)
            if rank == 1 and len(calls) == call:
                raise error
            return real(*args, **kwargs)
        setattr(train, name, spoilt)
    return prepare


def test_a_rank_that_raises_ends_all(tmp_path):
    line, text, seconds = fails(tmp_path / "run", once("loss_terms", torch.OutOfMemoryError("CUDA out of memory")))
    print(f"raising: {seconds:.1f} s")
    assert line == "train.py: rank 1: CUDA out of memory" and text.count("Traceback") == 1


def test_a_rank_that_is_killed_ends_all(tmp_path):
    line, text, seconds = fails(tmp_path / "run", lambda rank: None, act=lambda g: os.kill(g.pids[1], signal.SIGKILL))
    print(f"killed: {seconds:.1f} s")
    assert line == "train.py: rank 1 is gone: it was killed, perhaps for want of memory" and "Traceback" not in text


def no_data(rank):
    real = train.Batches.__getitem__

    def empty(self, step):
        if rank == 1 and step == 7:
            raise ValueError("--data: none of 24 images can be read")
        return real(self, step)
    train.Batches.__getitem__ = empty


def full_disk(rank):
    import errno

    from engine import shards
    real, files = os.fsync, []

    def fsync(number):
        files.append(number)
        if rank == 0 and len(files) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(number)
    shards.os.fsync = fsync


def killed_worker(rank):
    real = train.Batches.__getitem__

    def dies(self, step):
        if rank == 1 and step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, step)
    train.Batches.__getitem__ = dies


@pytest.mark.parametrize("prepare, workers, says", [
    (no_data, 1, "train.py: rank 1: --data: none of 24 images can be read"),
    (full_disk, 0, "is not saved: rank 0: [Errno 28] No space left on device: "),
    pytest.param(killed_worker, 1, "DataLoader worker (pid", marks=pytest.mark.long),
])
def test_without_data_or_disk_all_end(tmp_path, prepare, workers, says):
    line, text, seconds = fails(tmp_path / "run", prepare, ["--workers", str(workers)])
    print(f"{prepare.__name__}: {seconds:.1f} s")
    assert says in line and (prepare is killed_worker or "Traceback" not in text)  # torch raises it anywhere
    if prepare is full_disk:
        assert "a checkpoint takes " in line and " are free; the last good checkpoint is " in line
        assert not list((tmp_path / "run/checkpoints").glob("*.new"))


def not_finite(rank):
    real = train.ibot_loss
    calls = []

    def bad(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (float("nan") if rank == 1 and len(calls) == 8 else 1)
    train.ibot_loss = bad


def test_a_loss_that_is_not_finite_on_one_rank_ends_all(tmp_path):
    line, text, _ = fails(tmp_path / "run", not_finite)
    assert line.startswith("train.py: rank 1: step 7, rank 1: loss is nan, ibot is nan; ") and "Traceback" not in text


def test_lives():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert lives(child.pid)
    child.kill()
    time.sleep(0.5)
    assert not lives(child.pid)  # not yet waited for
    child.wait()
    assert not lives(child.pid) and lives(os.getpid())

# --------------------------------------------------------------------------------
# Verdicts


def test_a_verdict_is_read_a_step_later():
    verdicts = Verdicts(ALONE, Interrupt(), str)
    one, nan, indices = torch.ones(()), torch.tensor(torch.nan), torch.tensor([3, 4])
    row = verdicts.judge(0, dict(a=one), dict(g=2 * one), indices)
    assert row == dict(a=1, g=2) and verdicts.skip == 0
    verdicts.judge(1, dict(a=nan), dict(g=one), indices)
    assert verdicts.skip == 1
    with pytest.raises(ValueError, match="step 1, rank 0: a is nan.*Images: 3, 4"):
        verdicts.settle()


def test_who_is_innocent_leaves_the_word_to_others(monkeypatch):
    monkeypatch.setattr(Ranks, "mean", lambda self, x: x * torch.nan)  # another rank's loss is not finite
    verdicts = Verdicts(Ranks(1, 2, torch.device("cpu"), object()), Interrupt(), str)
    verdicts.judge(0, dict(a=torch.ones(())), dict(g=torch.ones(())), torch.tensor([0]))
    with pytest.raises(Elsewhere):
        verdicts.settle()


def test_skips_are_counted_and_forgiven(capsys):
    verdicts = Verdicts(ALONE, Interrupt(), str)
    for step, norm in enumerate([torch.inf, torch.inf, 1.0, torch.nan, torch.inf, torch.inf]):
        verdicts.judge(step, dict(a=torch.ones(())), dict(g=torch.tensor(norm)), torch.tensor([step]))
    assert verdicts.skipped == 4 and capsys.readouterr().out.count("the step is skipped") == 4
    with pytest.raises(ValueError, match="step 5: g is inf; 3 steps in a row"):
        verdicts.settle()


def test_later_keeps_its_numbers():
    assert Later(torch.tensor([1.0, 2.0])).read() == [1, 2]
