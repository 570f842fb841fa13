"""engine/loggers.py: what TensorBoard's file and W&B's get; a run that goes on; one that is missing, or fails."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_profile import steps_of
from test_train import MICRO, rows, run

import distill
import train
from engine import loggers
from engine.loggers import Loggers, check_loggers
from recipes import TrainConfig


class FakeWandb:
    """What wandb.init was asked for, and what was logged."""
    def __init__(self):
        self.runs, self.rows = [], []

    def init(self, **asked):
        self.runs.append(asked)
        return SimpleNamespace(log=lambda row, step: self.rows.append((asked["id"], step, row)))


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(loggers, "find_spec", lambda name: True)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def test_wandb_has_the_rows_and_a_resumed_run_is_the_same(tmp_path, wandb):
    out = tmp_path / "run"
    run(out, "--log", "wandb", "--stop_after", "3")
    found = run(out, "--resume")
    first, second = wandb.runs
    assert first["id"] == second["id"] == (out / "wandb/id").read_text() and second["resume"] == "allow"
    assert first["project"] == "nanodino" and first["config"]["depth"] == 2
    assert first["dir"] == first["name"] == str(out)
    assert [step for _, step, _ in wandb.rows] == list(range(6))
    assert [row["loss"] for _, _, row in wandb.rows] == pytest.approx([row["loss"] for row in found], rel=1e-5)


def test_wandb_begins_anew_where_a_run_does(tmp_path, wandb):
    c = TrainConfig(log="wandb")
    for _ in range(2):
        Loggers(c).write(tmp_path, dict(step=0))
    both = Loggers(c)
    for out in tmp_path / "a", tmp_path / "b", tmp_path / "a":  # students of one process
        out.mkdir(exist_ok=True)
        both.write(out, dict(step=7))
    assert len(wandb.runs) == 4 and len({asked["id"] for asked in wandb.runs}) == 4


def test_the_file_of_tensorboard_read_back(tmp_path):
    """a run that was killed after step 4 and goes on from its checkpoint at 3 shows each step once"""
    pytest.importorskip("tensorboard", reason='TensorBoard is not installed: pip install -e ".[log]"')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    out = tmp_path / "run"
    run(out, "--log", "tensorboard", "--stop_after", "3")
    Loggers(TrainConfig(log="tensorboard")).write(out, dict(step=3, loss=99.0))  # what the kill made void
    found = run(out, "--resume")
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == found[0].keys() - {"step"}
    for name in "loss", "koleo", "lr", "cls_rank":
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx({row["step"]: row[name] for row in found}, rel=1e-5)
    assert len(events.Scalars("loss")) == 6


@pytest.mark.long
def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason='W&B is not installed: pip install -e ".[log]"')
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONSOLE", "off")  # it would go on to read what pytest captures
    out = tmp_path / "run"
    run(out, "--log", "wandb", "--steps", "2")
    wandb.teardown()
    (written,) = (out / "wandb").glob(f"offline-run-*/run-{(out / 'wandb/id').read_text()}.wandb")
    assert b"dino_global" in written.read_bytes()


@pytest.mark.parametrize("text, says", [
    ("tensorbord", "--log tensorbord is not known; write tensorboard, wandb, or tensorboard,wandb"),
    (",wandb", "--log  is not known"),
    ("tensorboard,wandb", r'--log tensorboard: tensorboard is not installed; pip install -e "\.\[log\]"'),
])
def test_unknown_or_missing_is_one_line_before_the_first_step(tmp_path, monkeypatch, text, says):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=says):
        train.main([*MICRO, "--out", str(tmp_path / "run"), "--log", text])
    assert not (tmp_path / "run").exists()
    check_loggers("")


def test_one_that_fails_costs_a_line_and_no_run(tmp_path, wandb, monkeypatch, capsys):
    def failing(c, out, first):
        def write(row):
            if row["step"] >= 2:
                raise RuntimeError("no route\nto host")
        return write
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", failing)
    found = run(tmp_path / "run", "--log", "tensorboard,wandb")
    said = [line for line in capsys.readouterr().out.splitlines() if "--log" in line]
    assert said == ["step 2: --log tensorboard fails and is left out: no route"]
    assert len(found) == 6 and [step for _, step, _ in wandb.rows] == list(range(6))
    monkeypatch.setattr(wandb, "init", None)  # another that cannot even begin
    assert len(run(tmp_path / "next", "--log", "wandb", "--steps", "2")) == 2
    assert "step 0: --log wandb fails and is left out: 'NoneType'" in capsys.readouterr().out


def test_config_and_rows_are_those_of_a_run_without(tmp_path, wandb):
    plain, logged = run(tmp_path / "a", "--steps", "2"), run(tmp_path / "b", "--steps", "2", "--log", "wandb")
    assert [row["loss"] for row in plain] == [row["loss"] for row in logged] == \
        [row["loss"] for row in rows(tmp_path / "b")]
    assert json.loads((tmp_path / "b/config.json").read_text())["log"] == "wandb"


def test_each_student_of_a_distillation_has_its_own(tmp_path, wandb):
    """and --profile traces the steps of all of them"""
    run(tmp_path / "teacher", "--steps", "2")
    words = "--students tiny,tiny_half --steps 2 --batch 8 --workers 0 --device cpu --log_every 1 --precision fp32"
    distill.main([*words.split(), "--log", "wandb", "--profile", "1,2", "--teacher", str(tmp_path / "teacher"),
                  "--out", str(tmp_path / "family")])
    ids = {asked["name"]: asked["id"] for asked in wandb.runs}
    assert set(ids) == {str(tmp_path / "family" / name) for name in ("tiny", "tiny_half")}
    for name, id in ids.items():
        assert [step for own, step, _ in wandb.rows if own == id] == [row["step"] for row in rows(Path(name))] == [0, 1]
    assert steps_of(tmp_path / "family") == 2  # one optimizer each
