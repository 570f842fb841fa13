"""engine/index.py: rows, what is kept of an index that was cut off, who makes it, and damage to it."""

import errno
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from test_members import LONG, make_tar, make_zip

from engine import index
from engine.index import NONE, PACK, ROW, Index, open_index, rows_of
from engine.members import STORED, TAR, Member


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Three, of two, one and three images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return [make_tar(tmp_path / "data/0.tar", {"b/1.jpg": b"x" * 600, "a/1.jpg": b"y"}),
            make_tar(tmp_path / "data/1.tar", {"c/1.jpg": b"z" * 3}),
            make_zip(tmp_path / "data/2.zip", {"a/3.png": b"1", "a/2.png": b"22", "b/2.png": b"333"})]


def opened(shards):
    folder = shards[0].parent
    return open_index(folder, folder / "all.index", [shard.name for shard in shards], shards)


def seen(found):
    """[(shard, size, class)] of all images"""
    rows = [found.row(i) for i in range(len(found))]
    return [(shard, member.size, found.classes[label]) for shard, member, label in rows]


ALL = [(0, 1, "a"), (0, 600, "b"), (1, 3, "c"), (2, 2, "a"), (2, 1, "a"), (2, 3, "b")]


@pytest.fixture
def counted(monkeypatch):
    """Names of the shards that are walked, all by this process."""
    names, walk = [], index.rows_of
    monkeypatch.setattr(index, "cores", lambda: 0)
    monkeypatch.setattr(index, "rows_of", lambda path: (names.append(path.name), walk(path))[1])
    return names

# --------------------------------------------------------------------------------
# Rows


def test_a_row_is_twelve_bytes(tmp_path):
    """block size label head kind; what they say is where the data lie"""
    assert ROW.itemsize == PACK.size == 12
    rows, labels, notes = rows_of(make_tar(tmp_path / "a.tar", {"b/1.jpg": b"x" * 600, LONG: b"y"}, "gnu"))
    assert np.frombuffer(rows, ROW).tolist() == [(1, 600, 0, 1, TAR), (6, 1, 1, 3, TAR)]
    assert labels == ["b", "folder" * 10] and notes == dict(n=2, bytes=601, unlabelled=0, others=0, cut="")
    rows, *_ = rows_of(make_zip(tmp_path / "a.zip", {"1.jpg": b"x" * 600, "2.jpg": b"y"}))
    assert np.frombuffer(rows, ROW).tolist() == [(0, 600, NONE, 0, STORED), (635, 1, NONE, 0, STORED)]


@pytest.mark.parametrize("member", [Member("", 512 * (2**32 - 1), 2**32 - 1, TAR, 255),
                                    Member("", 2**40 - 1, 5, STORED)])
def test_the_largest_that_a_row_holds(member):
    assert index.unpack(index.pack(member, 7)) == (member, 7)
    for wrong in member._replace(start=member.start + 512), member._replace(size=2**32):
        with pytest.raises(ValueError, match="more than an index holds"):
            index.pack(wrong, 7)


def test_order_is_that_of_a_folder(tmp_path):
    names = ["b.jpg", "a/2.jpg", "a-b/1.jpg", "a/b/1.jpg", "a.jpg", "a/b.jpg", "a/c/0.jpg", "ü/1.jpg", "Z.jpg"]
    for name in names:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    walk = [str(Path(folder, file).relative_to(tmp_path / "folder")) for folder, below, files in
            os.walk(tmp_path / "folder") for file in (below.sort(), sorted(files))[1]]
    assert sorted(names, key=index.as_searched) == walk


@pytest.mark.parametrize("files, label", [
    ({"a/1.jpg": b"x", "a/1.cls": b" 7\n"}, "7"), ({"a/1.jpg": b"x", "a/1.cls": b"dog"}, "dog"),
    ({"a/1.json": b'{"label": 3}', "a/1.jpg": b"x"}, "3"), ({"1.jpg": b"x", "1.json": b'{"cls": "cat"}'}, "cat"),
    ({"a/1.jpg": b"x", "a/1.cls": b"", "a/1.json": b'{"label": 3}'}, "3"), ({"a/b/1.jpg": b"x"}, "a"),
    ({"a/1.jpg": b"x", "a/1.json": b"[" * 99_999}, "a"), ({"a/1.jpg": b"x", "a/1.json": b'{"label": [1]}'}, "a"),
    ({"a/1.jpg": b"x", "a/1.json": b'{"label": true}'}, "a"), ({"a/1.jpg": b"x", "a/1.json": b"\xff"}, "a"),
    ({"1.jpg": b"x", "1.json": b"[1]"}, None), ({"1.jpg": b"x"}, None)])
def test_labels(files, label, tmp_path):
    _, labels, notes = rows_of(make_tar(tmp_path / "a.tar", files))
    assert labels == ([] if label is None else [label]) and notes["unlabelled"] == (label is None)


def test_labels_that_are_numbers_are_in_their_order(shards, tmp_path):
    files = {f"{k}.{kind}": b"%d" % k for k in (10, 9, 100) for kind in ("jpg", "cls")}
    path = make_tar(tmp_path / "data/9.tar", files)
    assert opened([path]).classes == ["9", "10", "100"]
    assert opened([path, shards[1]]).classes == ["10", "100", "9", "c"]


def test_the_first_image_of_a_sample_is_it(tmp_path):
    rows, _, notes = rows_of(make_tar(tmp_path / "a.tar", {
        "1.txt": b"", "1.seg.PNG": b"x", "1.jpg": b"yy", "1.mask.png": b"", "2.json": b"{}"}))
    assert np.frombuffer(rows, ROW)["size"].tolist() == [1] and (notes["n"], notes["others"]) == (1, 2)


def test_more_labels_than_there_is_room_for(shards, monkeypatch):
    monkeypatch.setattr(index, "NONE", 2)
    found = opened(shards)
    assert found.classes is None and len(found) == 6

# --------------------------------------------------------------------------------
# The index


def test_all_shards(shards):
    found = opened(shards)
    assert seen(found) == ALL and found.classes == ["a", "b", "c"] and found.made
    assert (found.n_bytes, found.unlabelled, found.cut) == (610, 0, [])
    assert {path.name for path in (shards[0].parent).iterdir()} == {"0.tar", "1.tar", "2.zip", "all.index",
                                                                    "all.index.rows"}
    assert seen(pickle.loads(pickle.dumps(opened(shards)))) == ALL


def test_it_is_made_once(shards, counted):
    opened(shards)
    assert counted == ["0.tar", "1.tar", "2.zip"]
    assert seen(again := opened(shards)) == ALL and len(counted) == 3 and not again.made
    assert seen(opened(shards[1:])) == [(shard - 1, *rest) for shard, *rest in ALL if shard]  # others of them: a line
    assert len(counted) == 3 and seen(opened(shards)) == ALL


def test_a_shard_that_changed_is_done_again(shards, counted):
    opened(shards)
    make_tar(shards[1], {"d/1.jpg": b"z" * 4, "e/1.jpg": b"z"})
    found = opened(shards)
    assert counted[3:] == ["1.tar"] and found.classes == ["a", "b", "d", "e"]  # c is no more
    assert seen(found)[2:4] == [(1, 4, "d"), (1, 1, "e")] and len(found) == 7
    os.utime(shards[2], (1, 1))
    assert len(opened(shards)) == 7 and counted[4:] == ["2.zip"]


def test_what_was_done_is_kept(shards, counted, monkeypatch):
    """As after a kill: rows without a line, half a line"""
    walk = index.rows_of

    def stop(path):
        if path.name == "2.zip":
            raise KeyboardInterrupt
        return walk(path)
    monkeypatch.setattr(index, "rows_of", stop)
    with pytest.raises(KeyboardInterrupt):
        opened(shards)
    monkeypatch.setattr(index, "rows_of", walk)
    base = shards[0].parent / "all.index"
    with open(base, "ab") as file:
        file.write(b'{"version": 1, "sha')
    with open(f"{base}.rows", "ab") as file:
        file.write(b"17 bytes of a row")
    assert seen(opened(shards)) == ALL and counted == ["0.tar", "1.tar", "2.zip"]


@pytest.mark.parametrize("damage", ["line", "lost", "version", "rows", "gone", "flipped", "empty", "list"])
def test_a_damaged_index_is_made_again(damage, shards, counted):
    base = shards[0].parent / "all.index"
    opened(shards)
    lines, rows = base.read_text().splitlines(), Path(f"{base}.rows")
    if damage == "rows":
        rows.write_bytes(rows.read_bytes()[:-13])
    if damage == "gone":
        rows.unlink()
    if damage == "flipped":  # found when the index is added to: in use nothing would check 20 GB
        rows.write_bytes(bytes([rows.read_bytes()[0] ^ 1]) + rows.read_bytes()[1:])
        base.write_text("\n".join(lines[:-1]) + "\n")
    changed = dict(line=["{damaged", *lines[1:]], lost=lines[1:], empty=[], list=["[]", *lines],
                   version=[lines[0].replace('"version": 1', '"version": 0'), *lines[1:]]).get(damage)
    if changed is not None:
        base.write_text("".join(f"{line}\n" for line in changed))
    assert seen(opened(shards)) == ALL
    assert counted[3:] == dict(rows=["2.zip"], flipped=["0.tar"]).get(damage, ["0.tar", "1.tar", "2.zip"])
    assert seen(opened(shards)) == ALL and len(counted) <= 6


def test_it_stands_elsewhere_where_nobody_may_write(shards, monkeypatch, tmp_path):
    before = open

    def refuse(path, mode="r", *args, **kwargs):
        if str(path).startswith(str(tmp_path / "data")) and mode != "r" and mode != "rb":
            raise OSError(errno.EROFS, "Read-only file system")
        return before(path, mode, *args, **kwargs)
    monkeypatch.setattr("builtins.open", refuse)
    assert seen(opened(shards)) == ALL and not (tmp_path / "data/all.index").exists()
    assert not opened(shards).made and len(list((tmp_path / "cache/nanodino").iterdir())) == 2
    (tmp_path / "cache").rename(tmp_path / "moved")
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match="written nowhere: .*all.index: Read-only file system; .*; name another cache"):
        opened(shards)


def test_a_full_disk(shards, monkeypatch):
    def full(base, line):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(index, "append", full)
    with pytest.raises(ValueError, match="all.index: No space left on device; what is done of the index is kept"):
        opened(shards)


def test_shards_that_cannot_be_used_are_told_after_all_others(shards, counted):
    for shard in shards[:2]:
        shard.write_bytes(b"?" * 2000)
    with pytest.raises(ValueError, match="0.tar: byte 0: no header of a tar; so are 1 more"):
        opened(shards)
    make_tar(shards[0], {"a/1.jpg": b""})
    make_tar(shards[1], {"a/1.jpg": b""})
    opened(shards)
    assert counted == ["0.tar", "1.tar", "2.zip", "0.tar", "1.tar"]


def test_one_of_many_processes_makes_it(shards, monkeypatch):
    """Without a process group; and if it dies, another goes on where it stood."""
    walk, marks = index.rows_of, shards[0].parent.parent / "marks"
    monkeypatch.setattr(index, "cores", lambda: 0)

    def marked(path):
        with open(marks, "a") as file:
            file.write(f"{path.name}\n")
        if path.name == "2.zip" and marks.read_text().count("2.zip") == 1:
            os.kill(os.getpid(), 9)
        return walk(path)
    monkeypatch.setattr(index, "rows_of", marked)
    pids = []
    for _ in range(4):
        pids.append(os.fork())
        if not pids[-1]:
            os._exit(0 if seen(opened(shards)) == ALL else 1)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
    assert codes == [-9, 0, 0, 0] and marks.read_text().split() == ["0.tar", "1.tar", "2.zip", "2.zip"]


def test_many_processes_walk(shards, monkeypatch):
    monkeypatch.setattr(index, "cores", lambda: 2)
    walk, here = index.rows_of, os.getpid()

    def elsewhere(path):
        assert os.getpid() != here
        return walk(path)
    monkeypatch.setattr(index, "rows_of", elsewhere)
    assert seen(opened(shards)) == ALL
    monkeypatch.setattr(index, "rows_of", lambda path: os.kill(os.getpid(), 9))
    os.utime(shards[0], (1, 1))
    os.utime(shards[1], (1, 1))
    with pytest.raises(ValueError, match="DataLoader worker.*; what is done of the index is kept"):
        opened(shards)


def test_an_index_of_billions(tmp_path):
    """A sparse file of 20 GB: rows are read by their place, none is held."""
    n, k = 10_000, 168_900
    lines = [dict(shard=f"{i}.tar", size=1, time=1, row=i * n, n=n, bytes=1, unlabelled=0, others=0, cut="")
             for i in range(k)]
    with open(tmp_path / "a.index.rows", "wb") as file:
        file.truncate(PACK.size * n * k)
        file.seek(PACK.size * (n * k - 1))
        file.write(index.pack(Member("", 1024, 77, TAR, 1), 0))
    found = Index(tmp_path / "a.index", lines, json.loads('{"classes": ["a"], "places": [0]}'))
    assert len(found) == 1_689_000_000 and found.row(len(found) - 1) == (k - 1, Member("", 1024, 77, TAR, 1), 0)
    assert found.row(123_456_789)[0] == 12345
