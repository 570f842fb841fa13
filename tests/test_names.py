"""engine/names.py: names in a file, made once; what lists may look like; nothing of them in a process's memory."""

import json
import os
import pickle
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.names import FORMAT, MANY, Names, place_of, read_list, scan, write, write_list

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/nanodino"


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for name in "b/deep/2.JPG", "b/1.png", "a/3.png":
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root

# --------------------------------------------------------------------------------
# The file


def made(path, *chunks):
    with open(path, "wb") as file:
        write(file, chunks, dict(of="tests"), "tests")
    return Names(path)


def test_what_goes_in_comes_out(tmp_path):
    first = [f"{i} ü".encode() for i in range(MANY + 3)]
    labels = ["b", "a", None] * (len(first) // 3) + ["c"] * (len(first) % 3)
    names = made(tmp_path / "x", (first, labels), ([], []), ([b"last", b"", b"\xff"], None))
    expected = [os.fsdecode(name) for name in first] + ["last", "", "\udcff"]
    assert list(names) == expected == [names[i] for i in range(len(names))]
    assert names[-1] == "\udcff" and names[-4:-1] == expected[-4:-1] and names[1:9:3] == expected[1:9:3]
    assert names.classes == ["b", "a", "c"] and [names.label(i) for i in (0, 1, 2, 3, -4, -1)] == [0, 1, -1, 0, 2, -1]
    assert names.notes()[0]["of"] == "tests"
    for i in len(names), -len(names) - 1:
        with pytest.raises(IndexError, match=f"{i} of {len(names)} names"):
            names[i]
    assert list(made(tmp_path / "none")) == [] and not made(tmp_path / "none")


def test_a_worker_that_is_not_forked_opens_the_same(tmp_path):
    names = made(tmp_path / "x", ([b"one", b"two"], None))
    again = pickle.loads(pickle.dumps(names))
    assert list(again) == ["one", "two"] and len(pickle.dumps(names)) < 1000
    kept = pickle.dumps(names)
    made(tmp_path / "x", ([b"one", b"three"], None))
    with pytest.raises(ValueError, match="x does not hold the names that it held; start again"):
        pickle.loads(kept)


def test_a_file_that_shrinks_is_no_image_and_no_bug(tmp_path):
    names = made(tmp_path / "x", ([b"one", b"two"], None))
    os.truncate(tmp_path / "x", 2)
    for ask in names.__getitem__, names.label:
        with pytest.raises(OSError, match="x: cut short"):
            ask(0)


@pytest.mark.parametrize("cut", [0, 4, 8, 20, -1, -8, -9])
def test_a_damaged_file_is_made_anew(photos, cache, cut):
    scan(photos)
    memory, = cache.glob("*.names")
    memory.write_bytes(memory.read_bytes()[:cut])
    assert list(scan(photos)) == ["a/3.png", "b/1.png", "b/deep/2.JPG"]
    other = json.dumps(dict(format=FORMAT + 1, n=0, starts=0, classes=[], digest="")).encode()
    for text in b"{damaged", b"{}", b"[]", other:
        memory.write_bytes(text + struct.pack("<q", len(text)))
        assert len(scan(photos)) == 3


def test_no_memory_of_1_7_billion_names(tmp_path):
    """A sparse file as large as theirs: 159 GB of names, 20 GB of places. Both processes draw from it."""
    n = 1_689_000_000
    starts, end = 94 * n, 94 * n + 8 * (n + 1)
    with open(tmp_path / "x", "wb") as file:
        try:
            for i in range(0, n, n // 1000):
                file.seek(94 * i)
                file.write(b"%092d.p" % i)
                file.seek(starts + 8 * i)
                file.write(struct.pack("<qq", 94 * i, 94 * i + 94))
            file.seek(end + 4 * n)
        except OSError:
            pytest.skip("this file system has no sparse files of that size")
        text = json.dumps(dict(format=FORMAT, n=n, starts=starts, classes=[], digest="")).encode()
        file.write(text + struct.pack("<q", len(text)))
    script = """if True:
        import resource, sys, time, torch
        import data, engine.sources
        from engine.names import Names
        from engine.order import Order
        rss = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        before, start = rss(), time.perf_counter()
        source = engine.sources.Files("/", Names(sys.argv[1]))
        opened, n = time.perf_counter() - start, len(source)
        assert all(source.paths[i] == f"{i:092}.p" for i in range(0, n, n // 1000))
        order = Order(source, 0, 4096)
        for step in range(100):
            for i in range(100):
                source.name(next(order(step * 9999, i)))
        print(rss() - before, opened)"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, opened = map(float, done.stdout.split())
    assert grown < 20e6 and opened < 5           # measured 5.3 MB, a block of `deal` among it, and 0.2 ms

# --------------------------------------------------------------------------------
# Folders


def test_a_scan_is_remembered_until_a_folder_changes(photos, monkeypatch):
    before, walk = list(scan(photos)), os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **kwargs: pytest.fail("scanned again"))
    assert list(scan(photos)) == before
    monkeypatch.setattr(os, "walk", walk)
    (photos / "b/deep/0.png").write_bytes(b"")
    os.utime(photos / "b/deep", (2e9, 2e9))  # clocks of file systems are coarse
    assert list(scan(photos)) == ["a/3.png", "b/1.png", "b/deep/0.png", "b/deep/2.JPG"]


def test_classes_are_the_first_folders(photos):
    (photos / "0.png").write_bytes(b"")
    names = scan(photos)
    assert list(names)[0] == "0.png" and names.classes == ["a", "b"]
    assert [names.label(i) for i in range(4)] == [-1, 0, 1, 1]


def test_a_link_to_a_folder_above_ends(photos):
    (photos / "b/again").symlink_to(photos)
    assert list(scan(photos)) == ["a/3.png", "b/1.png", "b/deep/2.JPG"]


def test_a_memory_is_no_must(photos, cache):
    cache.parent.write_text("a file where a folder should be")
    names = scan(photos)
    assert list(names) == ["a/3.png", "b/1.png", "b/deep/2.JPG"] == list(pickle.loads(pickle.dumps(names)))


def test_names_that_no_memory_holds_go_with_the_process_that_made_them(photos, cache, tmp_path, monkeypatch):
    cache.parent.write_text("a file where a folder should be")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = scan(photos)
    reader = os.fork()
    if not reader:
        del names
        os._exit(0)
    os.waitpid(reader, 0)
    assert list(pickle.loads(pickle.dumps(names))) == ["a/3.png", "b/1.png", "b/deep/2.JPG"]
    path = names.path
    del names
    assert path.suffix == ".names" and not path.exists()
    monkeypatch.setattr("engine.names.json.dumps", lambda notes: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scan(photos)
    assert not list(tmp_path.glob("*.names"))


def test_no_room_anywhere_is_one_line(photos, cache, monkeypatch):
    cache.parent.write_text("a file where a folder should be")
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(ValueError, match="--data: no room for the names of .*photos .*; set XDG_CACHE_HOME"):
        scan(photos)


def test_ranks_that_begin_together_make_one(photos, cache, monkeypatch):
    walked, walk = [], os.walk

    def slowly(*args, **kwargs):
        walked.append(args)
        time.sleep(0.3)
        return walk(*args, **kwargs)
    monkeypatch.setattr(os, "walk", slowly)
    with ThreadPoolExecutor(2) as pool:  # a lock is of the file that was opened: threads stand for processes
        found = list(pool.map(scan, [photos, photos]))
    assert len(walked) == 1 and list(found[0]) == list(found[1]) == ["a/3.png", "b/1.png", "b/deep/2.JPG"]
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".names"]

# --------------------------------------------------------------------------------
# Lists


@pytest.mark.parametrize("text, names", [
    ("a.jpg\nb c.jpg\n", ["a.jpg", "b c.jpg"]),
    ("a.jpg\r\n\r\nü.jpg", ["a.jpg", "ü.jpg"]),
    ("\ufeffa.jpg\n /b.jpg \n", ["a.jpg", " /b.jpg "]),
])
def test_text(tmp_path, text, names):
    (tmp_path / "x.txt").write_bytes(text.encode())
    assert list(read_list(tmp_path / "x.txt")) == names


@pytest.mark.parametrize("text, names, classes", [
    ("path\na.jpg\n\"b, c.jpg\"\n", ["a.jpg", "b, c.jpg"], [None, None]),
    ("\ufeffid, path ,label\n7,a.jpg,cat\n\n8,b.jpg,\n", ["a.jpg", "b.jpg"], ["cat", None]),
])
def test_csv(tmp_path, text, names, classes):
    (tmp_path / "x.csv").write_bytes(text.encode())
    found = read_list(tmp_path / "x.csv")
    assert list(found) == names and [found.classes[k] if k >= 0 else None for k in map(found.label, (0, 1))] == classes


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(dict(path=["a.jpg", "ü.jpg"], label=["cat", None])), tmp_path / "x.parquet")
    found = read_list(tmp_path / "x.parquet")
    assert list(found) == ["a.jpg", "ü.jpg"] and (found.classes, found.label(0), found.label(1)) == (["cat"], 0, -1)
    parquet.write_table(pyarrow.table(dict(image=["a.jpg"], bytes=[b""])), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match="y.parquet has no column path, and none of images, .*; it has image, bytes"):
        read_list(tmp_path / "y.parquet")
    (tmp_path / "z.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(ValueError, match="z.parquet is no parquet file: "):
        read_list(tmp_path / "z.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pyarrow is not installed, to read .*x.parquet; pip install -e .\[data\]"):
        read_list(tmp_path / "x.parquet")


@pytest.mark.parametrize("name, data, says", [
    ("x.txt", b"", "x.txt names no image; write one a line"),
    ("x.txt", b"\n\n", "x.txt names no image; write one a line"),
    ("x.txt", b"a.jpg\nb.jpg\n\xff.jpg\n", "x.txt: line 3 is not UTF-8; write paths, one a line"),
    ("x.csv", b"", "x.csv has no column path; its first line is ''"),
    ("x.csv", b"path\n", "x.csv has no rows"),
    ("x.csv", b"file,label\na.jpg,1\n", "x.csv has no column path; its first line is 'file,label', and must name"),
    ("x.csv", b"path,label\na.jpg,1\nb.jpg\n", "x.csv: 'b.jpg' has 1 columns, the first line 2; quote what"),
    ("x.csv", b"path\n\xff.jpg\n", "x.csv is no csv in UTF-8: "),
    ("x.csv", b"path\n\"" + b"a" * 200_000, "x.csv is no csv in UTF-8: field larger"),
])
def test_lists_that_cannot_be_read(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=says) as error:
        read_list(tmp_path / name)
    assert "\n" not in str(error.value) and str(error.value).startswith("--data: ")


def test_lines_are_counted_over_the_whole_list(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.names.MANY", 1)
    (tmp_path / "x.txt").write_bytes(b"a.jpg\n" * 100 + b"\xff\n")
    with pytest.raises(ValueError, match="line 101 is not UTF-8"):
        read_list(tmp_path / "x.txt")
    (tmp_path / "x.txt").write_bytes(b"".join(b"%d.jpg\n" % i for i in range(100)))
    assert list(read_list(tmp_path / "x.txt")) == [f"{i}.jpg" for i in range(100)]


def test_a_list_is_read_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    path.write_text("a.jpg\n")
    read_list(path)
    monkeypatch.setattr("engine.names.lines", lambda path: pytest.fail("read again"))
    assert list(read_list(path)) == ["a.jpg"]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stat = os.stat(path)
    path.write_text("b.jpg\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert list(read_list(path)) == ["b.jpg"]
    path.write_text("b.jpg\nc.jpg\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert list(read_list(path)) == ["b.jpg", "c.jpg"]


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".parquet"])
def test_a_list_that_is_written_is_read(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    names = ["a,b.jpg", 'c"d.jpg', "é/f g.png"]
    write_list(tmp_path / f"x{suffix}", dict(path=names, label=["p", "q", "p"]))
    found = read_list(tmp_path / f"x{suffix}")
    assert list(found) == names and found.classes == ([] if suffix == ".txt" else ["p", "q"])
    (tmp_path / f"y{suffix}").mkdir()
    with pytest.raises(ValueError, match=f"y{suffix} cannot be written"):
        write_list(tmp_path / f"y{suffix}", dict(path=names))
    assert sorted(os.listdir(tmp_path)) == ["cache", f"x{suffix}", f"y{suffix}"]


def test_places_below_a_folder_are_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place_of("a/b.jpg", str(tmp_path)) == "a/b.jpg" and place_of(tmp_path / "b.jpg", str(tmp_path)) == "b.jpg"
    assert place_of("a/b.jpg", str(tmp_path / "c")) == str(tmp_path / "a/b.jpg")
    assert place_of("ab/c.jpg", str(tmp_path / "a")) == str(tmp_path / "ab/c.jpg")
