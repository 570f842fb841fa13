"""engine/ranks.py under srun: its variables; two ranks of it save at SIGUSR1 and go on; docs/adapt.md's script."""

import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest
from forks import start
from test_interrupt import wait_for
from test_train import MICRO, rows

import recipes
import train
from data import STOPS
from engine import config
from engine.checkpoint import newest
from engine.interrupt import Peers
from engine.ranks import Ranks, first_host, read_slurm

ROOT = Path(__file__).parents[1]
TASK = dict(SLURM_STEP_NUM_TASKS="16", SLURM_STEP_NUM_NODES="2", SLURM_PROCID="11", SLURM_LOCALID="3",
            SLURM_GTIDS="8,9,10,11,12,13,14,15", SLURM_STEP_NODELIST="gpu[07-08]", SLURM_JOB_ID="4711",
            SLURM_STEP_ID="2")


def test_a_task_of_srun_is_a_rank():
    assert read_slurm(TASK) == dict(RANK="11", WORLD_SIZE="16", GROUP_WORLD_SIZE="2", LOCAL_RANK="3",
                                    LOCAL_WORLD_SIZE="8", MASTER_ADDR="gpu07", MASTER_PORT="24713")
    given = read_slurm(TASK | dict(MASTER_ADDR="10.0.0.1", MASTER_PORT="29500"))
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize("env", [
    {}, TASK | dict(RANK="0"), TASK | dict(SLURM_STEP_NUM_TASKS="1"),   # nobody; torchrun; srun --pty
    dict(SLURM_NTASKS="16", SLURM_PROCID="0", SLURM_LOCALID="0"),       # a batch script, before srun
])
def test_others_are_none(env):
    assert read_slurm(env) == {}


def test_tasks_dealt_in_turn_are_refused():
    with pytest.raises(ValueError, match="tasks 1,3,5 share a node; give it --distribution=block"):
        read_slurm(TASK | dict(SLURM_GTIDS="1,3,5"))


@pytest.mark.parametrize("names, first", [
    ("n1", "n1"), ("n1,n2", "n1"), ("n[003-006,9],m1", "n003"), ("gpu-a[7],b", "gpu-a7"), ("r[1-2]n[10-20]", "r1n10"),
    ("c[01,05-07]-ib,d", "c01-ib")])
def test_first_host(names, first):
    assert first_host(names) == first


def test_ranks_say_where_they_are(monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert str(Ranks(count=16)) == "cpu, 16 ranks on 2 nodes" and str(Ranks()) == "cpu"
    monkeypatch.delenv("GROUP_WORLD_SIZE")
    assert str(Ranks(count=4)) == "cpu, 4 ranks on 1 node"


def srun(out, *words, spoil=lambda rank: None, base=MICRO):
    """Two tasks on one node, without anything of torchrun's."""
    with socket.socket() as free:
        port = 20_000
        while free.connect_ex(("localhost", port)) == 0:
            port += 1

    def prepare(rank):
        for name in list(os.environ):
            if name in ("RANK", "WORLD_SIZE") or name.startswith(("LOCAL_", "MASTER_", "TORCHELASTIC_")):
                del os.environ[name]
        os.environ.update(TASK | dict(
            SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NUM_NODES="1", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank),
            SLURM_GTIDS="0,1", SLURM_STEP_NODELIST="localhost", SLURM_JOB_ID=str(port - 20_000), SLURM_STEP_ID="0"))
        spoil(rank)
    return start(out, *words, ranks=2, prepare=prepare, base=base)


def test_usr1_saves_and_the_requeued_job_goes_on(tmp_path):
    out, words = tmp_path / "run", ["--resume", "auto"]
    group = srun(out, *words, "--steps", "100000", "--save_every", "100000")
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(rows(out)) >= 3)
    group.signal(signal.SIGUSR1)
    assert group.wait()[0] == [0, 0], group.text()
    done = newest(out)[0]
    assert f"stopped at step {done} of 100000" in group.text() and "cpu, 2 ranks on 1 node, " in group.text()
    assert done == len(rows(out))

    def late(rank):
        real = train.report
        train.report = lambda *args: (time.sleep(2 * rank), real(*args))
    group = srun(out, *words, "--steps", str(done + 2), spoil=late)
    assert group.wait()[0] == [0, 0], group.text()  # rank 0, who has the store, waits for the other
    assert "finished" in group.text() and [row["step"] for row in rows(out)] == list(range(done + 2))


def test_the_rank_that_has_the_store_fails(tmp_path):
    def spoil(rank):
        real, calls = train.loss_terms, []

        def fails(*args):
            calls.append(1)
            if rank == 0 and len(calls) == 3:
                raise ZeroDivisionError("made to fail")
            return real(*args)
        train.loss_terms = fails
        Peers.EVERY = 0.5 + 5 * rank  # rank 1 hears of it by its collective that breaks, when the store is gone too
    group = srun(tmp_path / "run", spoil=spoil)
    codes, _ = group.wait()
    assert codes == [2, 2] and group.text().count("Traceback") == 1, group.text()
    assert [line for line in group.text().splitlines() if line.startswith("train.py: ")] == \
        ["train.py: rank 0: made to fail"]


def test_a_mistake_is_told_by_the_first_rank(tmp_path, monkeypatch):
    """srun ends the others then; here nobody does, and the other one says it too."""
    monkeypatch.setattr(config, "PATIENCE", 1)
    group = srun(tmp_path / "run", "--global_size", "33")
    assert group.wait()[0] == [2, 2]
    said = [line.partition("--")[0] for line in group.text().splitlines() if "--global_size 33 is not a mul" in line]
    assert said == ["train.py: ", "train.py: rank 1: "]

# --------------------------------------------------------------------------------
# docs/adapt.md


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Its batch script, in a folder where srun and scontrol write down how they were called."""
    (text,) = re.findall(r"^```bash\n(#!.*?)^```", (ROOT / "docs/adapt.md").read_text(), re.M | re.S)
    for name in "srun", "scontrol":
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/{name}\n[ {name} = scontrol ] || exit $CODE\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "job.sh").write_text(text)
    monkeypatch.chdir(tmp_path)
    return text


def submit(code=0):
    env = os.environ | dict(PATH=f"bin:{os.environ['PATH']}", SLURM_JOB_ID="4711", CODE=str(code))
    subprocess.run(["bash", "job.sh"], env=env, timeout=20)
    return [Path(name).read_text().splitlines() if Path(name).exists() else [] for name in ("srun", "scontrol")]


def test_the_batch_script_asks_for_what_the_trainer_reads(script):
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", script, re.M))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] and int(asked["nodes"]) > 1
    name, before = asked["signal"].split("@")
    assert f"SIG{name}" in [number.name for number in STOPS] and int(before) >= 120
    assert "requeue" in asked


def test_the_batch_script_trains_and_queues_again_until_it_is_done(script, tmp_path):
    (call,), again = submit()
    assert again == ["requeue 4711"]
    words = shlex.split(call)
    words = words[words.index("train.py") + 1 :]
    assert words[words.index("--resume") + 1] == "auto"
    c = recipes.configure(words)
    (tmp_path / c.out / "checkpoints" / str(c.steps)).mkdir(parents=True)
    assert submit()[1] == again, "a run that has all its steps was queued again"


def test_the_batch_script_of_a_run_that_failed_stays_where_it_is(script):
    assert submit(code=2)[1] == []
