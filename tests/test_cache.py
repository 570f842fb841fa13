"""The teacher's words on disk: runs with them, without, and half with them are equal; what is found and what is not."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_distill import SHORT
from test_train import MICRO, rows

import distill
import recipes
import train
from data import Batches
from engine.cache import Cached, folder_of
from engine.ranks import Ranks
from engine.sources import open_source
from model import SIZES

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process loads by itself


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "teacher"
    train.main([*MICRO, "--out", str(out), "--stop_after", "2"])
    return out


def run(teacher, out, *words):
    """Numbers of each step, without its times, and what is saved at the end."""
    distill.main(["--teacher", str(teacher), "--students", "tiny_half", *SHORT, "--out", str(out), *map(str, words)])
    times = "ms_teacher", "ms_share", "ms_student", "images_per_s", "waiting"
    found = [{name: x for name, x in row.items() if name not in times} for row in rows(out / "tiny_half")]
    return found, load_file(out / "tiny_half/teacher.safetensors")


def configure(teacher, cache, *words):
    base = ["--teacher", teacher, "--students", "tiny_half", *SHORT, "--cache", cache]
    return distill.configure([str(word) for word in (*base, *words)])


def same(a, b):
    return a[0] == b[0] and all(torch.equal(a[1][key], b[1][key]) for key in a[1].keys() | b[1].keys())


def files(cache):
    return {path: path.stat().st_ino for path in cache.rglob("*") if path.is_file()}


def silence(monkeypatch):
    def asked(*_):
        raise AssertionError("the teacher was run")
    monkeypatch.setattr(distill, "teacher_says", asked)

# --------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("mode", ["heads", "features"])
def test_cold_warm_and_without_are_equal_bit_for_bit(teacher, tmp_path, monkeypatch, capsys, mode):
    words, cached = ["--mode", mode], ["--cache", tmp_path / "cache"]
    without = run(teacher, tmp_path / "without", *words)
    assert same(run(teacher, tmp_path / "cold", *words, *cached), without)
    # 2 crops of 8 images; patches: a crop of 16 is masked by 0.3, one by 0.5, in 4 groups; in mode features all
    n, Z = (16 + 4 * (4 + 8), 16) if mode == "heads" else (16 + 16 * 16, SIZES["tiny"].width)
    said = f"the cache takes {4 * n * Z:,} bytes for each step, {16 * n * Z:,} for the run; "
    kept = files(tmp_path / "cache")
    assert said in capsys.readouterr().out
    assert len(kept) == 4 and all(0 < path.stat().st_size - 4 * n * Z < 200 for path in kept)  # names and shapes
    silence(monkeypatch)
    assert same(run(teacher, tmp_path / "warm", *words, *cached), without)
    assert same(run(teacher, tmp_path / "worker", *words, *cached, "--workers", 1), without)
    assert said in capsys.readouterr().out and files(tmp_path / "cache") == kept


def test_what_is_cut_short_or_damaged_is_completed(teacher, tmp_path, monkeypatch):
    cached = "--cache", tmp_path / "cache"
    without = run(teacher, tmp_path / "without")
    run(teacher, tmp_path / "parts", *cached, "--stop_after", 2)
    first, second = kept = list(files(tmp_path / "cache"))
    first.write_bytes(first.read_bytes()[:100])
    assert same(run(teacher, tmp_path / "again", *cached), without)
    after = files(tmp_path / "cache")
    assert len(after) == 4 and after.keys() > set(kept) and load_file(first).keys() == load_file(second).keys()
    silence(monkeypatch)
    run(teacher, tmp_path / "parts", "--resume")
    assert same(run(teacher, tmp_path / "warm", *cached), without)


@pytest.mark.parametrize("words, found", [
    (["--lr", "0.1"], True), (["--students", "tiny"], True), (["--steps", 5], True), (["--local_weight", 2], True),
    (["--seed", 1], False), (["--batch", 16], False), (["--global_size", 48], False), (["--mask_share", 1], False),
    (["--grey", 1], False), (["--n_local", 1], False), (["--mode", "features"], False),
])
def test_what_shapes_the_batch_or_the_answer_misses_and_nothing_else(teacher, tmp_path, words, found):
    def path(*more):
        c = configure(teacher, tmp_path, *more)
        folder = folder_of(c, distill.make_teacher(c, ALONE), CPU)
        return Cached(c, open_source("shapes", 24, c.seed), 0, c.batch, folder)[0]["path"]
    assert (path(*words) == path()) is found


def test_another_teacher_misses(teacher, tmp_path):
    c = configure(teacher, tmp_path)
    networks = distill.make_teacher(c, ALONE)
    folder = folder_of(c, networks, CPU)
    assert folder.is_dir() and folder_of(c, networks, CPU) == folder != folder_of(c, networks, torch.device("meta"))
    assert folder_of(replace(c, precision="bf16"), networks, CPU) != folder
    with torch.no_grad():
        networks["ibot_head"].mlp[0].bias[-1] += 1e-6
    assert folder_of(c, networks, CPU) != folder


def test_a_photo_that_changes_or_breaks_has_another_name(tmp_path):
    rng = np.random.default_rng(0)
    c = recipes.TrainConfig(batch=4, group=2, global_size=32, local_size=16, patch_size=8)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i:02}.png")

    def batches():
        cached = Cached(c, open_source(tmp_path), 0, 4, tmp_path / "cache")
        return [cached[step] for step in range(3)]  # an epoch
    before, names = batches(), [batch["indices"].tolist() for batch in batches()]
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{names[0][1]:02}.png")
    (tmp_path / f"{names[2][0]:02}.png").write_bytes(b"broken")
    after = batches()
    assert [a["path"] == b["path"] for a, b in zip(before, after, strict=True)] == [False, True, False]
    plain = Batches(c, open_source(tmp_path), 0, 4)[1]
    assert torch.equal(after[1]["global_crops"], plain["global_crops"])
    assert torch.equal(after[1]["local_crops"], plain["local_crops"])

# --------------------------------------------------------------------------------
# Disks


def test_a_full_disk_is_said_once_and_the_run_goes_on(teacher, tmp_path, monkeypatch, capsys):
    def full(path, data):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    without = run(teacher, tmp_path / "without")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert same(run(teacher, tmp_path / "run", "--cache", tmp_path / "cache"), without)
    assert capsys.readouterr().out.count("No space left on device; nothing more is kept, the run goes on") == 1
    assert not files(tmp_path / "cache")


def test_a_folder_that_cannot_be_made_ends_in_one_line(teacher, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--cache .*file/cache: no folder can be written there .Not a directory"):
        run(teacher, tmp_path / "run", "--cache", tmp_path / "file/cache")
