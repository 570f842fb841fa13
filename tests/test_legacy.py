"""engine/legacy.py: checkpoints of torch.distributed.checkpoint go on; a forged one runs nothing."""

import json
import os
import pickle
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from test_train import rows, run
from torch.distributed.checkpoint.state_dict import get_state_dict

import distill
import train
from engine import legacy
from engine.checkpoint import saved
from weights import save_backbone

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def as_of_old(c, ranks, student, teacher, optimizer, gram, step, wait):
    """What a save did when it left the writing to torch."""
    out = Path(c.out)
    student, optimizer = get_state_dict(student, optimizer)
    state = dict(student=student, teacher=teacher.state_dict(), optimizer=optimizer)
    dcp.save(state, checkpoint_id=out / "checkpoint")
    sizes = {file.name: file.stat().st_size for file in (out / "checkpoint").iterdir()}
    (out / "checkpoint/step.json").write_text(json.dumps(dict(step=step, sizes=sizes)))
    save_backbone(teacher["backbone"], out / "teacher.safetensors", "nano", dict(size=c.size, step=step))


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A run of two steps, saved as of old."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "Saver", lambda *args, failed: MagicMock(side_effect=partial(as_of_old, *args)))
        run(tmp_path / "old", "--stop_after", "2")
    return tmp_path / "old"


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint.old"])
def test_an_old_run_goes_on_bit_for_bit(old, tmp_path, name):
    (old / "checkpoint").rename(old / name)
    with pytest.raises(ValueError, match="holds a run already"):
        run(old)
    train.main(["--out", str(old), "--resume", "--save_every", "2", "--keep", "2"])
    run(tmp_path / "whole")
    assert [r["loss"] for r in rows(old)] == [r["loss"] for r in rows(tmp_path / "whole")]
    a, b = (load_file(folder / "teacher.safetensors") for folder in (old, tmp_path / "whole"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [step for step, _ in saved(old)] == [6, 4] and not (old / name).exists()


def test_an_old_run_is_a_teacher(old, tmp_path):
    c = distill.configure(["--teacher", str(old), "--students", "tiny_half", "--out", str(tmp_path / "x")])
    teacher = distill.make_teacher(c, train.start_ranks("cpu"))
    saved = load_file(old / "teacher.safetensors")
    assert all(torch.equal(x, saved[key]) for key, x in teacher["backbone"].state_dict().items())


class Attack:
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("attack", [
    lambda mark: Attack(os.system, f"touch {mark}"), lambda mark: Attack(exec, f"open({str(mark)!r}, 'w')"),
    lambda mark: Attack(torch.load, str(mark)), lambda mark: Attack(getattr, "", "join")])
def test_a_forged_folder_runs_nothing(old, tmp_path, attack):
    mark = tmp_path / "mark"
    data = pickle.dumps(attack(mark))
    (old / "checkpoint/.metadata").write_bytes(data)
    note = json.loads((old / "checkpoint/step.json").read_text())
    note["sizes"][".metadata"] = len(data)
    (old / "checkpoint/step.json").write_text(json.dumps(note))
    before = [path.read_bytes() for path in sorted(old.glob("*")) if path.is_file()]
    for work in (lambda: train.main(["--out", str(old), "--resume"]),
                 lambda: distill.main(["--teacher", str(old), "--students", "tiny_half", "--device", "cpu", "--batch",
                                       "8", "--steps", "1", "--out", str(tmp_path / "x")])):
        with pytest.raises(ValueError, match="nothing of it was executed") as error:
            work()
        assert "\n" not in str(error.value)
    assert not mark.exists()
    assert before == [path.read_bytes() for path in sorted(old.glob("*")) if path.is_file()]


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x04\x95", pickle.dumps(3), pickle.dumps({})])
def test_garbage_is_one_line(tmp_path, data):
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match="cannot be read"):
        legacy.read_pieces(tmp_path)
