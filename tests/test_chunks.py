"""chunks.py: arrays come back as they were, shares add up to what one process makes, and nothing is left behind."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import start
from PIL import Image
from test_scans import write_scan
from test_voc07 import write_voc

import evaluate
from engine import chunks, features
from engine.chunks import Computed, Job, Keyed, OnDisk, Stored, index, make, named, share, write
from engine.ranks import Ranks
from tasks import TASKS, logreg, video, voc07

ROOT = Path(__file__).parents[1]
C, ALONE = TASKS["segmentation"].config(workers=0), Ranks()
PROBE = replace(video.SHAPES, epochs=1)


def arrays_of(i):
    """Image i has 1 + i % 3 arrays, of shapes of their own."""
    rng = np.random.default_rng(i)
    return [rng.integers(0, 99, (k + 1, 2, i + 1)).astype(np.float16) for k in range(1 + i % 3)]


def as_is(worker, images):
    return dict(named(images))


def job(c, n=11, size=3, function=arrays_of):
    folder = Keyed({}, c)
    return Job(folder, "test", Computed(function), folder.chunks(range(n), size), as_is)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64, np.uint8])
def test_arrays_come_back_as_they_were(workers, kind):
    def function(i):
        return [x.astype(kind).T for x in arrays_of(i)]                   # not contiguous

    work = job(C, function=function)
    make([work], None, replace(C, workers=workers), ALONE)
    stored, exact = Stored(work), [function(i) for i in range(11)]
    for found, arrays in [*zip(stored, exact, strict=True), (stored[7], exact[7]), (stored[-1], exact[-1])]:
        assert [x.dtype for x in found] == [kind] * len(arrays)
        assert all(np.array_equal(a, b) for a, b in zip(found, arrays, strict=True))
    flat = [x for arrays in exact for x in arrays]
    assert [tuple(shape) for shape in stored.row.shapes] == [x.shape for x in flat]
    assert len(stored) == 11 and all(np.array_equal(a, b) for a, b in zip(stored.row, flat, strict=True))
    with pytest.raises(IndexError):
        stored[11]


def test_shares_of_any_ranks_are_the_files_of_one(tmp_path):
    alone, shared = (job(replace(C, cache=str(tmp_path / name))) for name in ("alone", "shared"))
    make([alone], None, C, ALONE)
    counts = []
    for rank in range(3):
        share([shared], None, C, Ranks(rank, 3))
        counts.append(len(files(shared.folder.path)))
    assert files(alone.folder.path) == files(shared.folder.path) and counts == [2, 3, 4]


def test_several_sources_are_shared_out_by_their_size(tmp_path):
    """Two of four images: each rank has a large file and a small one, not one of them both large ones."""
    jobs = [job(replace(C, cache=str(tmp_path / name)), 4) for name in "ab"]
    share(jobs, None, C, Ranks(1, 2))
    assert [sorted(files(each.folder.path)) for each in jobs] == [[], ["00000000.safetensors", "00000003.safetensors"]]


def test_only_what_is_missing_is_made(tmp_path):
    made = []

    def function(i):
        made.append(i)
        return arrays_of(i)

    c = replace(C, cache=str(tmp_path))
    work = job(c, function=function)
    make([work], None, c, ALONE)
    (work.folder.path / "00000003.safetensors").unlink()                # as if the run had been stopped
    made.clear()
    make([work], None, c, ALONE)
    assert made == [3, 4, 5] and all(np.array_equal(a[0], arrays_of(i)[0]) for i, a in enumerate(Stored(work)))


def test_without_cache_a_folder_goes_with_what_it_holds():
    work = job(C)
    make([work], None, C, ALONE)
    path, row = work.folder.path, Stored(work).row
    assert path.is_dir()
    del work
    assert np.array_equal(row[0], arrays_of(0)[0])                    # the row alone keeps it
    del row
    assert not path.exists()


def test_a_table_is_the_rows_of_all_files(tmp_path):
    """Any rows in any order, of two columns, a slice, parts; nothing is read before it is asked for."""
    rng, files, exact = np.random.default_rng(0), [], []
    for k, n in enumerate((3, 5, 1)):
        arrays = {name: rng.normal(size=(n, D)).astype(np.float32) for name, D in (("cls", 2), ("patches", 3))}
        chunks.write(tmp_path / f"{k}.safetensors", arrays)
        files.append(chunks.index(tmp_path / f"{k}.safetensors"))
        exact.append(np.concatenate([arrays["patches"], arrays["cls"]], 1))
    table, exact = chunks.Table(files, ("patches", "cls")), np.concatenate(exact)
    assert table.shape == exact.shape == (9, 5) and len(table) == 9
    for rows in [4], [8, 0, 3, 2, 4, 4], torch.tensor([2, 3, 4, 5, 7]), slice(1, 8), slice(None), []:
        assert np.array_equal(table[rows].numpy(), exact[rows])
    assert [len(part) for part in table.split(4)] == [4, 4, 1]
    assert np.array_equal(np.concatenate(list(table.split(4))), exact)

# --------------------------------------------------------------------------------
# What goes wrong


def unreadable(i):
    if i == 5:
        raise OSError("five.jpg: cut short")
    return arrays_of(i)


def odd(i):
    raise ValueError(f"{i}.png has mode RGB")


@pytest.mark.parametrize("function, says, workers", [
    (unreadable, "unreadable five.jpg: cut short; this task needs all", 0), (odd, "^0.png has mode RGB$", 1)])
def test_what_cannot_be_read_is_one_line(function, says, workers):
    with pytest.raises(ValueError, match=says) as error:
        make([job(C, function=function)], None, replace(C, workers=workers), ALONE)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(arrays, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(chunks, "save_file", full)
    work = job(replace(C, cache=str(tmp_path)))
    with pytest.raises(ValueError, match="cannot be written: .*No space left.*; name a folder with room, --cache"):
        make([work], None, C, ALONE)
    assert not files(work.folder.path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: .*; name a folder that can be written"):
        Keyed({}, replace(C, cache=str(tmp_path / "file")))


def test_ranks_that_see_another_disk_are_told(monkeypatch):
    monkeypatch.setattr(chunks, "PATIENCE", 0)
    monkeypatch.setattr(chunks, "exchange", lambda *args: None)         # the other rank has done its share, elsewhere
    with pytest.raises(ValueError, match="00000003.safetensors has not arrived from the rank that made it: ranks of"):
        make([job(C)], None, C, Ranks(0, 2))
    work = job(C)
    work.folder.path.rmdir()
    with pytest.raises(ValueError, match="is not there: ranks of several machines need a --cache"):
        share([work], None, C, Ranks(1, 2))


@pytest.mark.parametrize("sign, code", [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)])
def test_what_is_cut_short_goes_on_and_says_the_same(sign, code, tmp_path, monkeypatch, capsys):
    """Stopped after a file or more: they are kept, named, not made again, and gone after success."""
    words = "--task keypoints --weights untrained:tiny --device cpu --workers 0 --limit 120 --resolution 160".split()
    run = subprocess.Popen([sys.executable, "evaluate.py", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                           env=os.environ | {"TMPDIR": str(tmp_path)},
                           preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))  # a shell's & ignores it
    while not (made := list(tmp_path.glob("nanodino-*/*/*.safetensors"))):
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(sign)
    assert f"{made[0].parents[1]} has the features so far; the same command goes on" in run.communicate(timeout=30)[1]
    assert run.returncode == code
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("nanodino-*/*/*.safetensors")}
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "fresh"))
    (tmp_path / "fresh").mkdir()
    evaluate.main(words)
    fresh = said_by(capsys.readouterr().out)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    written, write = [], chunks.write
    monkeypatch.setattr(chunks, "write", lambda path, arrays: written.append(path) or write(path, arrays))
    evaluate.main(words)
    assert said_by(capsys.readouterr().out) == fresh
    assert written and not set(written) & kept.keys() and not list(tmp_path.glob("*/*/*.safetensors"))


def test_two_of_the_same_command_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with chunks.kept(C) as one, chunks.kept(C) as two:
        assert one.cache != two.cache and Path(one.cache).is_dir()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="nothing was made"), chunks.kept(C):
        raise ValueError("nothing was made")
    assert not list(tmp_path.iterdir())

# --------------------------------------------------------------------------------
# Two processes: the lines of JSON of one, and an error of either in one line

ALL = "--device cpu --workers 0 --batch 8"
SHORT = ["--task knn --weights untrained:tiny --limit 20 --layers each",
         "--task segmentation --weights untrained:tiny --limit 8 --resolution 64 --iterations 4 --control",
         "--task tracking --weights pixels --limit 3 --resolution 64"]
LONG = ["--task knn --weights untrained:tiny --limit 40",
        "--task logreg --weights pixels --limit 24 --shots 1", "--task logreg --weights pixels --limit 24",
        "--task linear --weights pixels --resolution 32 --iterations 3 --data DATA/photos --tests DATA/more",
        "--task voc07 --weights pixels --resolution 32 --data DATA/voc",
        "--task retrieval --weights pixels --limit 20",
        "--task depth --weights pixels --limit 4 --iterations 2 --resolution 64",
        "--task discovery --weights pixels --limit 7 --resolution 64",
        "--task keypoints --weights untrained:tiny --limit 4 --resolution 64 --layers each",
        "--task rgbd --weights pixels --resolution 48 --data DATA/scan",
        "--task video --weights pixels --limit 8 --resolution 32"]

def small(change):
    """Files of few rows, so that both ranks have some; few fits of what trains."""
    for module, name, value in ((features, "ROWS", 8), (features, "CHUNK", 3), (video, "SHAPES", PROBE),
                                (logreg, "PENALTIES", [1e-2, 1.0]), (voc07, "PENALTIES", [1e-2, 1.0])):
        change(module, name, value)


def said_by(text):
    """Its lines of JSON, and its errors."""
    lines = [line for line in text.splitlines() if line.startswith(("{", "error:"))]
    found = [json.loads(line) if line.startswith("{") else dict(error=line) for line in lines]
    return [{**row, "seconds": 0} for row in found]


@pytest.fixture
def broken(tmp_path):
    """The fifth image of seven cannot be read: it lies in the second file, which is the second rank's."""
    for kind, shape in ("images", (32, 48, 3)), ("annotations", (32, 48)):
        for i in range(14):
            path = tmp_path / f"data/{kind}/{('training', 'validation')[i // 7]}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 9, shape, dtype=np.uint8)).save(path)
    (tmp_path / "data/images/training/4.png").write_text("<html>")
    return f"--task ade20k --weights pixels --resolution 32 --data {tmp_path}/data"


@pytest.fixture
def data(tmp_path):
    """What shapes do not have: folders of four classes and more of their images, VOC of two classes, a scan."""
    rng, root = np.random.default_rng(0), tmp_path / "sets"

    def photo(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(path, format="png")

    for folder in "photos/train", "photos/val", "more":
        for k in range(20):
            photo(root / folder / "abcd"[k % 4] / f"{k}.png")
    voc, objects = root / "voc", [[("bird", False)], [("bird", False), ("car", False)], [("car", False)]] * 8
    write_voc(voc, dict(trainval=objects, test=objects))
    for path in voc.glob("JPEGImages/*"):
        photo(path)
    (root / "scan").mkdir()
    write_scan(root / "scan")
    return root


def all_of(lines):
    for line in lines:
        try:
            evaluate.main(line.split())
        except ValueError as error:
            print("error:", error)


@pytest.fixture
def one_thread():
    """As each rank has, or sums are taken in another order."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.mark.parametrize("lines", [SHORT, pytest.param(LONG, marks=pytest.mark.long)], ids=["short", "long"])
def test_two_ranks_are_one(lines, broken, data, one_thread, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "lists"))
    small(monkeypatch.setattr)
    lines = [f"{line.replace('DATA', str(data))} {ALL}" for line in lines]
    for line in lines:
        evaluate.main(line.split())
    one = said_by(capsys.readouterr().out)
    with pytest.raises(ValueError, match="^--data: .*4.png or .* cannot be read"):
        evaluate.main(f"{broken} {ALL}".split())
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    ranks = start(tmp_path / "two", ranks=2, main=lambda argv: all_of([f"{broken} {ALL}", *lines]))
    assert ranks.wait(300)[0] == [0, 0], ranks.text()
    error, *two = said_by(ranks.text())                                 # of rank 0: the other says nothing
    assert error["error"].startswith("error: --data: ") and "4.png" in error["error"]
    assert [row.pop("ranks") for row in one + two] == [1] * len(lines) + [2] * len(lines)
    for alone, shared in zip(one, two, strict=True):
        assert alone == shared
    left = {path.parents[1] for path in (tmp_path / "tmp").glob("nanodino-*/*/*.safetensors")}
    assert not left                     # the command that failed did so before it had features to go on with


def test_rows_of_a_file_are_read_where_they_lie(tmp_path):
    x = np.random.default_rng(0).normal(size=(9, 2, 3)).astype(np.float16)
    write(tmp_path / "x.safetensors", dict(a=np.arange(5), b=x))
    rows = pickle.loads(pickle.dumps(OnDisk(index(tmp_path / "x.safetensors")["b"])))
    assert rows.shape == (9, 2, 3) and len(rows) == 9
    for some in slice(None), slice(2, 5), slice(7, 20), slice(9, 20), [4], np.array([8, 0, 3, 3]):
        assert np.array_equal(rows[some], x[some]) and rows[some].dtype == np.float16


@pytest.fixture
def heard():
    """SIGINT, which a shell's background processes have ignored"""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def test_ctrl_c_waits_for_the_end_of_an_image(tmp_path, heard):
    """raised amid a queue of DataLoader it could leave a lock, for which the loader's end would wait for ever"""
    ended = []

    def interrupted(i):
        if i == 5:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # where Python looks for signals
        ended.append(i)
        return arrays_of(i)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        make([job(replace(C, cache=str(tmp_path)), function=interrupted)], None, C, ALONE)
    assert ended[-1] == 5 and signal.getsignal(signal.SIGINT) is before
    with chunks.unhurried() as checked:
        assert checked(3) == 3
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            checked(4)
        with pytest.raises(KeyboardInterrupt):  # a second time it is at once
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
