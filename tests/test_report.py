"""report.py: what meets a goal, and what is left of a call that ended early."""

import json

import pytest

from engine.report import COPY, GOALS, Report, shown, verdict
from engine.timing import Rehearsal


def test_verdicts():
    fast = dict(eager=14.0, compiled=5.0, ms=0.30)
    assert verdict("G1", fast) == "G1 met"
    assert verdict("G1", fast | dict(eager=13.9)) == "G1 not met: eager 13.9, wanted 14"
    assert verdict("G1", fast | dict(ms=0.31)) == "G1 not met: ms 0.31, wanted 0.3"
    assert verdict("G1", fast | dict(ms=0.41), COPY / 1.4) == "G1 met"                  # a card with slower memory
    assert verdict("G1", fast | dict(ms=0.43), COPY / 1.4) == "G1 not met: ms 0.43, wanted 0.42"
    assert verdict("G3", dict(mixed=6, eager=10, ms=0.6)) == "G3 not met: memory not measured, wanted 0.294"
    assert verdict("G3", dict(mixed=6, eager=10, ms=0.6, memory=0.3)).endswith("memory 0.3, wanted 0.294")
    assert verdict("G13", dict(images_per_s=float("nan"))) != "G13 met"
    for name, goal in GOALS.items():
        assert goal.keys() - {"what"}, name


def test_rows_are_kept_at_once(tmp_path, capsys):
    path = tmp_path / "new/gpu-9.json"
    report = Report("gpu-9", path, Rehearsal(), budget=1e9)
    report.add("ops", way="ours", ms=0.12345, note=None)
    assert json.loads(path.read_text())["tables"] == dict(ops=[dict(way="ours", ms=0.12345, note=None)])
    report.add("ops", way="a | b", error=float("nan"))
    report.keep("other", [dict(n=3)])
    report.note("remark")
    assert not report.over and "ops:  way ours   ms 0.123\n" in capsys.readouterr().out
    report.close()
    text = path.with_suffix(".md").read_text()
    for line in "| way | ms | note | error |", "| ours | 0.123 |  |  |", "| a / b |  |  | nan |":
        assert line in text
    assert text.startswith("## 20") and "bench.py gpu-9" in text and "rehearsal" in text and text.endswith("remark\n")
    assert sorted(p.name for p in path.parent.iterdir()) == ["gpu-9.json", "gpu-9.md"]


def test_budget_and_no_file(tmp_path):
    report = Report("bench", None, Rehearsal(), budget=0)
    report.add("ops", ms=1.0)
    report.close()
    assert report.over and not list(tmp_path.iterdir())


@pytest.mark.parametrize("value, text", [(None, ""), (1234.6, "1235"), (0.00012345, "0.000123"), (7, "7"),
                                         ("a\nb", "a b")])
def test_cells(value, text):
    assert shown(value) == text
