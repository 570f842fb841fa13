"""demo.py: a run that is interrupted goes on, and one that is trained is left alone; its options; its table's tasks."""

import json

import pytest
from test_train import MICRO, rows

import demo
import evaluate
import recipes
import train


@pytest.fixture
def small(tmp_path, monkeypatch):
    """the demo with the smallest run's options, and its folder"""
    monkeypatch.setattr(demo, "OUT", tmp_path / "demo")
    monkeypatch.setattr(demo, "OPTIONS", MICRO)
    return tmp_path / "demo"


def test_an_interrupted_run_goes_on_and_its_seconds_add_up(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "OPTIONS", [*MICRO, "--stop_after", "2"])
    with pytest.raises(KeyboardInterrupt):
        demo.train_or_resume()
    assert json.loads((small / "seconds.json").read_text()) > 0
    (small / "seconds.json").write_text("1000")
    seconds = demo.train_or_resume()
    assert [row["step"] for row in rows(small)] == list(range(6)) and 1000 < seconds < 2000
    capsys.readouterr()
    assert demo.train_or_resume() == seconds
    assert "is trained already" in capsys.readouterr().out
    train.main([*MICRO, "--out", str(tmp_path / "whole")])
    assert (tmp_path / "whole/teacher.safetensors").read_bytes() == (small / "teacher.safetensors").read_bytes()


@pytest.mark.parametrize("left", ["config.json", "checkpoints/3/teacher.safetensors"])
def test_what_is_no_run_yet_begins_anew(small, left):
    (small / left).parent.mkdir(parents=True)
    (small / left).write_text("{")
    demo.train_or_resume()
    assert len(rows(small)) == 6
    demo.loss_picture(small / "losses.png")
    assert (small / "losses.png").read_bytes()[1:4] == b"PNG"


def test_options_and_tasks(tmp_path):
    """the demo's run can begin, and every number of its table is one that its task gives"""
    c = recipes.configure([*demo.OPTIONS, "--out", str(tmp_path)])
    assert (c.stage, c.size, c.data) == ("pretrain", "tiny", "shapes")
    for task, (metric, *options) in demo.TASKS.items():
        evaluate.configure(["--weights", "untrained:tiny", "--device", "cpu", "--task", task, *options])
        assert evaluate.TASKS[task].metric == metric
