"""engine/curves.py: runs found and read, torn rows left out; marks where uniform predictions lie; what is drawn."""

import json
import math
import sys

import pytest
from PIL import Image
from test_train import run

import visualize
from engine import curves
from engine.curves import column, find_runs, marks, panels

CONFIG = dict(dino_prototypes=64, ibot_prototypes=32, mask_share=0.25)


def write(path, rows, config=CONFIG, end=""):
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    if config is not None:
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_runs_are_found_and_rows_that_a_kill_cut_short_left_out(tmp_path):
    rows = [dict(step=step, loss=1.0 / (step + 1)) for step in range(3)]
    a = write(tmp_path / "x/a", rows, end='{"step": 3, "lo')
    family = tmp_path / "family"
    write(family / "s", rows[:1], config="{")
    write(family / "b", rows[:2], config="[]")
    write(tmp_path / "y/a", rows)
    found = find_runs([str(a), str(family), str(a)])
    assert list(found) == ["a", "b", "s"] and found["a"] == (CONFIG, rows)
    assert found["b"] == ({}, rows[:2]) and found["s"] == ({}, rows[:1])
    assert list(find_runs([str(a), str(tmp_path / "y/a")])) == [str(a), str(tmp_path / "y/a")]  # both are called a


def test_panels_and_columns():
    rows = [dict(step=0, lr=1.0, zebra=1, loss=3.0, skipped=0, word="x"),
            dict(step=10, lr=1.0, zebra=2, loss=math.inf, skipped=0, gram=0.5)]
    assert panels(dict(a=({}, rows))) == ["loss", "gram", "lr", "zebra"]  # but for FIRST, what never changes is none
    assert column(rows, "loss") == ([0], [3.0]) and column(rows, "gram") == ([10], [0.5])


def test_marks_are_where_uniform_predictions_lie():
    assert marks("dino_global", CONFIG) == marks("dino_local", CONFIG) == {"ln K": math.log(64)}
    assert marks("ibot", CONFIG) == {"uniform": 0.25 * math.log(32)} and marks("dino_entropy", {}) == {"uniform": 1}
    assert marks("loss", CONFIG) == marks("dino_global", {}) == marks("ibot", dict(ibot_prototypes="x")) == {}


def test_what_is_drawn(monkeypatch):
    """two runs of many rows, one of another K: each with its thin line and its mean, both marks, a log scale"""
    from matplotlib.figure import Figure
    many = [dict(step=10 * i, dino_global=5 + (-1) ** i, grad_norm_backbone=1000.0 ** (i % 2)) for i in range(200)]
    runs = dict(a=(CONFIG, many), b=(CONFIG | dict(dino_prototypes=8), many), c=({}, [dict(step=0, koleo=1.0)]))
    axis = Figure().subplots()
    curves.panel(axis, "dino_global", runs, ["r", "g", "b"])
    lines = axis.get_lines()
    assert [text.get_text() for text in axis.texts] == ["ln K = 4.159", "ln K = 2.079"]
    assert [line.get_ydata()[0] for line in lines[4:]] == pytest.approx([math.log(64), math.log(8)], abs=1e-3)
    thin, mean = lines[:2]
    assert len(thin.get_xdata()) == 200 and set(mean.get_ydata()) == {5.0}  # over four rows
    assert (mean.get_xdata()[0], mean.get_xdata()[-1]) == (20, 1980) and axis.get_yscale() == "linear"
    axis = Figure().subplots()
    curves.panel(axis, "grad_norm_backbone", runs, ["r", "g", "b"])
    assert axis.get_yscale() == "log" and not axis.texts


def test_two_runs_as_a_picture(tmp_path, capsys):
    run(tmp_path / "a", "--steps", "3")
    run(tmp_path / "b", "--steps", "2", "--dino_prototypes", "32")
    out = tmp_path / "new/curves.png"
    visualize.main(["curves", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)])
    said = capsys.readouterr().out.splitlines()[-1]
    n = len(panels(find_runs([str(tmp_path)])))
    assert said == f"wrote {out}: 2 runs, {n} panels" and n >= 13
    picture = Image.open(out)
    assert picture.width == 4 * 385 and len(picture.convert("RGB").getcolors(10**6)) > 50


@pytest.mark.parametrize("words, says", [
    (["curves", "--out", "x.png"], "RUN: none in the command; name folders of runs"),
    (["curves", ".", "--out", "x.png"], r"RUN \.: no metrics.jsonl there"),
    (["curves", "nowhere", "--out", "x.png"], "RUN nowhere: no metrics.jsonl there"),
    (["curves", "torn", "--out", "x.png"], "RUN torn: metrics.jsonl has no row yet"),
    (["curves", "fine", "--out", "x.html"], "write both, OUT a .png"),
])
def test_mistakes(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    if "." not in words:
        write(tmp_path / "torn", [], end='{"step"')
        write(tmp_path / "fine", [dict(step=0, loss=1.0)])
    with pytest.raises(ValueError, match=says):
        visualize.main(words)
    assert not list(tmp_path.glob("x.*"))


def test_without_matplotlib_it_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = write(tmp_path / "run", [dict(step=0, loss=1.0)])
    with pytest.raises(ValueError, match=r'pip install -e "\.\[demo\]"'):
        visualize.main(["curves", str(folder), "--out", str(tmp_path / "x.png")])
