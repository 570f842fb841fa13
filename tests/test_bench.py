"""bench.py: every call for a GPU rehearsed, as make gpu-NAME DRY=1 does; the levels of the CPU's kernels; mistakes."""

import itertools
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
from engine import versus


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] if name == "gpu-test" else [])
                                  for name in bench.ON_A_GPU if name.startswith("gpu-")])
def test_rehearsal(name, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(bench.__file__).parent)
    bench.main([name, "--dry", "--out", str(tmp_path)])
    found = json.loads((tmp_path / f"{name}.json").read_text())
    text = (tmp_path / f"{name}.md").read_text()
    rows = [row for table in found["tables"].values() for row in table]
    assert rows and all(f"**{table}**" in text for table in found["tables"]) and "rehearsal" in found["device"]
    assert "WRONG" not in text and "no time was left" not in text
    assert not [row for row in rows if row.get("note")]                 # a way or a size that failed
    assert "at" not in found and len(list(tmp_path.iterdir())) <= 4


def test_every_call_leaves_what_was_measured_before_its_time_was_over(tmp_path):
    bench.main(["gpu-2", "--dry", "--minutes", "0", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu-2.json").read_text())
    assert found["tables"].keys() == {"limits"} and "Sinkhorn 9 x 40: no time was left" in found["notes"]


def test_levels_run_apart_and_are_put_together(tmp_path, monkeypatch):
    monkeypatch.delenv("NANODINO_CPU", raising=False)
    monkeypatch.setattr(bench.ops, "BUILT", True)
    monkeypatch.setattr(bench.ops, "LEVELS", ["baseline", "avx2"])
    started = []

    def run(words, check, env):
        started.append((words[2], env["NANODINO_CPU"]))
        Path(words[4]).write_text(json.dumps(dict(tables=dict(Sinkhorn=[dict(way="ours", ms=len(started))]))))
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=run))
    bench.main(["sinkhorn", "--json", str(tmp_path / "cpu.json")])
    assert started == [("sinkhorn", "avx2"), ("sinkhorn", "baseline")]
    assert json.loads((tmp_path / "cpu.json").read_text())["tables"]["Sinkhorn"] == [
        dict(level="avx2", way="ours", ms=1), dict(level="baseline", way="ours", ms=2)]


@pytest.mark.parametrize("name, table", [("sinkhorn", "Sinkhorn"), ("loss", "Sinkhorn, loss, gradient"),
                                         ("attention", "attention")])
def test_one_level(name, table, tmp_path, monkeypatch):
    """What torch.compile makes is left to the highest level."""
    monkeypatch.setenv("NANODINO_CPU", bench.ops.LEVEL)
    monkeypatch.setattr(bench.ops, "LEVELS", [bench.ops.LEVEL, "higher"])
    monkeypatch.setitem(versus.SHAPES, "cpu", dict(sinkhorn=[(4, 16, None)], ibot=[(4, 16, None)], dino=[],
                                                   attention=[([2], [16], 1, 16)]))
    bench.main([name, "--json", str(tmp_path / "cpu.json")])
    rows = json.loads((tmp_path / "cpu.json").read_text())["tables"][table]
    assert {row["way"] for row in rows} >= {"ours", "definition"} and not [r for r in rows if "compiled" in r["way"]]
    assert all(row["ms"] > 0 and row["base_over_this"] > 0 for row in rows)


def test_steps_rehearsed(tmp_path, monkeypatch):
    monkeypatch.setenv("NANODINO_CPU", bench.ops.LEVEL)
    bench.main(["steps", "--dry", "--json", str(tmp_path / "steps.json")])
    found = json.loads((tmp_path / "steps.json").read_text())
    steps, beside, saves = found["tables"].values()
    ways = ["kernels off", "kernels auto", "checkpointing selective", "checkpointing full", "compiled"]
    ways += ["transformers' blocks, kernels off"] if find_spec("transformers") else []
    assert [row["way"] for row in steps] == ways
    assert all(row["ms"] > 0 and row["peak_mb"] >= 0 for row in steps) and "rehearsal" in found["device"]
    assert [row["way"] for row in beside] == ["alone", "beside"]
    assert all(row["longest_ms"] >= row["ms"] > 0 for row in beside)
    assert saves[0]["copy_mb"] > 1 and saves[0]["waits_ms"] > 0 < saves[0]["copies_ms"]


def test_vectors_beside_the_network(tmp_path):
    bench.main(["embed", "--dry", "--json", str(tmp_path / "cpu.json")])
    (rows,) = json.loads((tmp_path / "cpu.json").read_text())["tables"].values()
    assert [row["way"] for row in rows] == ["network", "embed"] and rows[0]["base_over_this"] == 1
    assert all(row["images_per_s"] > 0 and "6 photos" in row["what"] for row in rows)
    assert all((row["base_over_this"] < 0.95) == ("flag" in row) for row in rows)


def test_what_takes_long_is_left_out_if_nothing_is_named(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(bench, "on_cpu", lambda names, config: ran.extend(names))
    bench.main(["--out", str(tmp_path)])
    assert "inference" not in ran and "steps" not in ran and {"embed", "augment", "gram"} < set(ran)
    bench.main(["inference", "--out", str(tmp_path)])
    assert ran[-1] == "inference"


@pytest.mark.parametrize("name, table", [("augment", "photo to crops"), ("loader", "batches of photos")])
def test_photos(name, table, tmp_path, monkeypatch):
    monkeypatch.setenv("NANODINO_CPU", bench.ops.LEVEL)
    bench.main([name, "--dry", "--json", str(tmp_path / "cpu.json")])
    found = json.loads((tmp_path / "cpu.json").read_text())["tables"]
    assert all(row["images_per_s"] > 0 for row in found[table])
    if name == "augment":
        assert len(found[table]) == 3 and sum(row["share"] for row in found["parts of ours"]) == pytest.approx(1)
        return
    assert {(row["form"], row["cache"], row["workers"]) for row in found[table]} == set(itertools.product(
        ("folder", "tar", "zip"), ("warm", "cold"), (0, 1, 2)))
    parts = found["parts of a photo's time"]
    assert [row["part"] for row in parts] == 3 * ["read", "decode", "crop", "colours", "collate"]
    assert sum(row["share"] for row in parts) == pytest.approx(3) and all(row["ms"] > 0 for row in parts)


def test_help_names_everything(capsys):
    bench.main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in bench.ON_CPU | bench.ON_A_GPU if not name.startswith("check-"))
    assert "check-OP" in said and all(f"--{field} " in said for field in vars(bench.BenchConfig()))


@pytest.mark.parametrize("argv, says", [
    (["sinkhorn", "losses"], "unknown benchmark 'losses'; choose from augment, loader, data, embed"),
    (["gpu-2"], "gpu-2: no GPU here; add --dry to rehearse it"),
    (["gpu-2", "--minute", "3"], "did you mean --minutes"), (["gpu-2", "--minutes", "x"], "--minutes wants float"),
    (["inference", "--sizes", "s,7b"], "--sizes s,7b: choose from s, b, l, as in s,b,l"),
])
def test_mistakes(argv, says, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=says):
        bench.main([*argv, "--out", str(tmp_path)])
