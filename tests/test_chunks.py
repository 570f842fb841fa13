"""chunks.py: arrays come back as they were, shares add up to what one process makes, and nothing is left behind."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from engine import chunks, features
from engine.chunks import Computed, Job, Keyed, Stored, make, named, share
from engine.ranks import Ranks
from tasks import TASKS

ROOT = Path(__file__).parents[1]
C, ALONE = TASKS["segmentation"].config(workers=0), Ranks()
NOTHING = torch.nn.Identity()


def arrays_of(i):
    """Image i has 1 + i % 3 arrays, of shapes of their own."""
    rng = np.random.default_rng(i)
    return [rng.integers(0, 99, (k + 1, 2, i + 1)).astype(np.float16) for k in range(1 + i % 3)]


def as_is(worker, images):
    return dict(named(images))


def job(c, n=11, size=3, function=arrays_of):
    folder = Keyed(NOTHING, c, {})
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
        Keyed(NOTHING, replace(C, cache=str(tmp_path / "file")), {})


def test_ranks_that_see_another_disk_are_told(monkeypatch):
    monkeypatch.setattr(chunks, "PATIENCE", 0)
    monkeypatch.setattr(chunks, "exchange", lambda *args: None)         # the other rank has done its share, elsewhere
    with pytest.raises(ValueError, match="00000003.safetensors has not arrived from the rank that made it: ranks of"):
        make([job(C)], None, C, Ranks(0, 2))
    work = job(C)
    work.folder.path.rmdir()
    with pytest.raises(ValueError, match="is not there: ranks of several machines need a --cache"):
        share([work], None, C, Ranks(1, 2))


def test_sigterm_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "evaluate.py", *"--task segmentation --weights pixels --device cpu".split()]
    run = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("nanodino-*/*")):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 143 and not list(tmp_path.glob("nanodino-*"))

# --------------------------------------------------------------------------------
# Two processes: the lines of JSON of one, and an error of either in one line

SHORT = "--device cpu --workers 0 --batch 8"
TASKS = ["--task knn --weights untrained:tiny --limit 40", "--task tracking --weights pixels --limit 3 --resolution 64",
         "--task segmentation --weights untrained:tiny --limit 8 --resolution 64 --iterations 4 --control",
         "--task discovery --weights pixels --limit 7 --resolution 64"]
SCRIPT = """
import sys
import evaluate
from engine import features
features.ROWS, features.CHUNK = 8, 3
for line in sys.argv[1:]:
    try:
        evaluate.main(line.split())
    except ValueError as error:
        print("error:", error)
"""


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


def test_two_ranks_are_one(broken, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "ROWS", 8)
    monkeypatch.setattr(features, "CHUNK", 3)
    for line in TASKS:
        evaluate.main(f"{line} {SHORT}".split())
    one = said_by(capsys.readouterr().out)
    with pytest.raises(ValueError, match="^unreadable .*4.png"):
        evaluate.main(f"{broken} {SHORT}".split())
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", str(tmp_path / "script.py")]
    command += [f"{line} {SHORT}" for line in (broken, *TASKS)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    error, *two = said_by(done.stdout)                                  # of rank 0: the other says nothing
    assert error["error"].startswith("error: rank 1: unreadable") and "4.png" in error["error"]
    assert [row.pop("ranks") for row in one + two] == [1] * 4 + [2] * 4 and one == two
    assert not list((tmp_path / "tmp").glob("nanodino-*"))
