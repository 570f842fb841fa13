"""engine/archives.py: the same photos from a folder, tars and zips; every failure; damage drawn from seeds."""

import errno
import io
import json
import os
import pickle
import random
import signal
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import forks
import numpy as np
import pytest
import torch
from PIL import Image
from test_members import make_tar, make_zip
from test_train import run

from data import Batches, loader
from engine import archives, progress
from engine.archives import Archives, is_archive
from engine.sources import open_source
from recipes import RECIPES


def photo(seed, side=24):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


NAMES = ["a/1.png", "b/2.png", "a/3.png", "c/d/4.png", "b/5.png", "top.png"]  # not in their order
FILES = {name: photo(k) for k, name in enumerate(NAMES)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(archives, "WAITS", (0, 0, None))


def packed(root, form, files=FILES):
    """FILES as --data takes them in this form."""
    root.mkdir(parents=True, exist_ok=True)
    items = sorted(files.items())
    if form in ("tar", "zip", "gnu", "pax"):
        make = dict(zip=make_zip, tar=make_tar).get(form) or (lambda path, files: make_tar(path, files, form))
        return make(root / f"x.{'zip' if form == 'zip' else 'tar'}", files)
    if form == "deflated":
        return make_zip(root / "x.zip", files, zipfile.ZIP_DEFLATED)
    if form == "folder":
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return root
    make_tar(root / "x-08.tar", dict(reversed([items[-1], *items[:2]])))  # a folder's files come before its folders
    make_zip(root / "x-09.zip", dict(items[2:3]))
    make_tar(root / "x-10.tar", dict(items[3:-1]), "pax")
    if form == "shards":
        return root
    (root / "x-09.zip").unlink()
    make_tar(root / "x-09.tar", dict(items[2:3]))
    if form == "braces":
        return root / "x-{08..10}.tar"
    shards = [dict(url=f"x-{k}.tar", nsamples=1, filesize=1) for k in ("08", "09", "10")]
    (root / "lists").mkdir()
    (root / "lists/train.json").write_text(json.dumps(dict(wids_version=1, base="..", shardlist=shards)))
    return root / "lists/train.json"


FORMS = "tar", "gnu", "pax", "zip", "deflated", "shards", "braces", "wids"

# --------------------------------------------------------------------------------
# The same photos


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_folder_is_the_folder(form, tmp_path):
    folder, source = (open_source(packed(tmp_path / name, name)) for name in ("folder", form))
    assert isinstance(source, Archives) and len(source) == len(folder) == 6 and source.classes == folder.classes
    for i in range(6):
        assert source.name(i).endswith(f"/{folder.paths[i]}") and torch.equal(source.load(i), folder.load(i))
        data, name = source.raw(i)
        assert data == FILES[folder.paths[i]] and name == source.name(i)
    assert [source.label(i) for i in range(1, 6)] == [folder.label(i) for i in range(1, 6)] == [0, 0, 1, 1, 2]
    with pytest.raises(ValueError, match="top.png has no label: neither a .cls or .json beside it nor a folder"):
        source.label(0)


def test_batches_are_those_of_the_folder(tmp_path):
    """Bit for bit, here and from workers that are forked with files open."""
    c = replace(RECIPES["tiny"], batch=4, group=4, global_size=32, local_size=16, n_local=2)
    c = replace(c, patch_size=c.vit.patch_size)
    want = [Batches(c, open_source(packed(tmp_path / "folder", "folder")), 0, 4)[step] for step in range(4)]
    for form in "shards", "deflated":
        batches = Batches(c, open_source(packed(tmp_path / form, form)), 0, 4)
        for found in [batches[step] for step in range(4)], loader(batches, range(4), 2):
            for ours, folders in zip(found, want, strict=True):
                assert ours.keys() == folders.keys() and ours["broken"] == []
                assert all(torch.equal(x, folders[k]) for k, x in ours.items() if isinstance(x, torch.Tensor))


def test_threads_and_started_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.index.OPEN", 1)  # each opens what another has just closed
    source = pickle.loads(pickle.dumps(open_source(packed(tmp_path, "shards"))))
    want = [source.raw(i) for i in range(6)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(source.raw, [*range(6)] * 60)) == want * 60


def test_few_files_are_open(tmp_path):
    for k in range(70):
        make_tar(tmp_path / f"{k}.tar", {"1.png": FILES["a/1.png"]})
    source = open_source(tmp_path)

    def held():
        return sum(os.readlink(f"/proc/self/fd/{fd}").endswith(".tar") for fd in os.listdir("/proc/self/fd")
                   if os.path.exists(f"/proc/self/fd/{fd}"))
    assert len(source) == 70 and held() == 0
    for i in range(70):
        source.raw(i)
    assert held() == 64
    del source
    assert held() == 0


def test_a_digest_is_of_names_sizes_and_counts(tmp_path):
    one, other = (open_source(packed(tmp_path / name, "shards")).digest() for name in "ab")
    assert one == other
    make_tar(tmp_path / "b/x-10.tar", {"a/1.png": FILES["a/1.png"]})
    assert open_source(tmp_path / "b").digest() != one
    (tmp_path / "a/x-08.tar").rename(tmp_path / "a/x-07.tar")
    assert open_source(tmp_path / "a").digest() != one

LOSSES = "loss", "dino_global", "dino_local", "ibot", "koleo", "grad_norm_backbone"


@pytest.fixture
def one_thread():
    """As a run that is forked has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_losses_are_those_of_the_folder(tmp_path, one_thread):
    """Bit for bit, ten steps; and from a tar whose run is killed in the middle, by a worker as well."""
    def losses(form, *words, start=True):
        data = packed(tmp_path / form, form) if start else f"{tmp_path}/{form}/x.tar"
        found = run(tmp_path / f"run-{form}", "--data", str(data), "--steps", "10", *words)
        return [[row[name] for name in LOSSES] for row in found]
    want = losses("folder")
    assert len(want) == 10 and len({tuple(row) for row in want}) == 10
    assert losses("zip") == want
    began = forks.start(tmp_path / "run-tar", "--data", str(packed(tmp_path / "tar", "tar")), "--steps", "10",
                        "--save_every", "4", prepare=lambda rank: kill_at(6))
    assert began.wait()[0] == [-signal.SIGKILL]
    assert losses("tar", "--resume", "--workers", "1", start=False) == want


def kill_at(step):
    """This process ends when it is about to log that step."""
    log = progress.Progress.log

    def ending(self, out, row):
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        log(self, out, row)
    progress.Progress.log = ending


# --------------------------------------------------------------------------------
# What --data names


def test_what_is_an_archive(tmp_path):
    packed(tmp_path / "shards", "shards")
    packed(tmp_path / "photos", "folder")
    (tmp_path / "photos/a/x.tar").touch()
    (tmp_path / "x.json").write_text('{"images": []}')
    for path, is_one in {"shards": True, "photos": False, "photos/a": False, "x.json": False, "gone.json": False,
                         "gone.tar": True, "A.ZIP": True, "x.tar.gz": True, "x.tgz": True, "x.jpg": False}.items():
        assert is_archive(tmp_path / path) == is_one, path
    (tmp_path / "shards/.hidden").mkdir()
    assert is_archive(tmp_path / "shards")
    (tmp_path / "shards/folder").mkdir()
    assert not is_archive(tmp_path / "shards")


def test_braces(tmp_path):
    assert [path.name for path in archives.spelt_out(tmp_path / "a{1..2}-{009..011}.tar")] == [
        "a1-009.tar", "a1-010.tar", "a1-011.tar", "a2-009.tar", "a2-010.tar", "a2-011.tar"]
    with pytest.raises(ValueError, match="counts from 5 to 3; wanted the first number, then the last"):
        archives.spelt_out("a-{5..3}.tar")


@pytest.mark.parametrize("path, says", [
    ("x.tar.gz", "x.tar.gz is compressed as a whole, so that no image in it can be read by its place.*: unpack it"),
    ("packed", "x.tgz is compressed"), ("gone.tar", "1 of 1 shards of .*gone.tar are not there: .*gone.tar$"),
    ("a-{0..6}.tar", r"7 of 7 shards of .* are not there: .*a-0.tar, .*a-1.tar, .*a-4.tar, \.\.\.$"),
    ("empty.tar", "no image in .*empty.tar; looked in 1 shards for samples with .bmp .gif"),
    ("words.zip", "no image in .*words.zip"), ("fifo.tar", "are not there"),
    ("gzip.tar", "gzip.tar: it is compressed, so that no member can be read by its place: gunzip it"),
    ("x.json", "x.json is no list of shards .KeyError.'url'.*wanted the JSON of wids"),
    ("none.json", "none.json lists no shard"), ("broken.json", "broken.json is no list of shards"),
    ("twice.tar", "twice.tar: 1.PNG follows another png of the same sample"),
    ("locked.zip", "locked.zip: 1.png is locked by a password: unpack it")])
def test_mistakes(path, says, tmp_path):
    for name in "x.tar.gz", "packed/x.tgz":
        (tmp_path / "packed").mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x1f\x8b")
    make_tar(tmp_path / "empty.tar", {})
    make_zip(tmp_path / "words.zip", {"1.txt": b"x"})
    os.mkfifo(tmp_path / "fifo.tar")
    (tmp_path / "gzip.tar").write_bytes(b"\x1f\x8b" + bytes(999))
    (tmp_path / "x.json").write_text('{"wids_version": 1, "shardlist": [{}]}')
    (tmp_path / "none.json").write_text('{"wids_version": 1, "shardlist": []}')
    (tmp_path / "broken.json").write_text('{"wids_version": 1,')
    make_tar(tmp_path / "twice.tar", [("1.png", b"x"), ("1.PNG", b"y")])
    locked = make_zip(tmp_path / "locked.zip", {"1.png": b"x"})
    locked.write_bytes(locked.read_bytes().replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"))
    with pytest.raises(ValueError, match=says) as caught:
        open_source(tmp_path / path)
    assert "\n" not in str(caught.value)

# --------------------------------------------------------------------------------
# Failures


def test_a_shard_that_is_cut_short_is_named_and_counted(tmp_path, capsys):
    root = packed(tmp_path, "shards")
    path = root / "x-10.tar"
    path.write_bytes(path.read_bytes()[: path.read_bytes().rindex(b"c/d/4.png") + 600])  # of its data 88 bytes are left
    source = open_source(root)
    assert len(source) == 5 and all(source.load(i).shape == (3, 24, 32) for i in range(5))
    assert "1 of 3 shards are cut short; their whole images are kept; the first, x-10.tar, is cut short at byte" in (
        capsys.readouterr().out)
    open_source(root)
    assert capsys.readouterr().out == ""  # it has been said


def test_damage_in_the_middle_names_the_byte(tmp_path):
    path = packed(tmp_path, "tar")
    data = bytearray(path.read_bytes())
    data[data.index(b"c/d/4.png")] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x.tar: byte \d+: no header of a tar$"):
        open_source(path)


def test_images_that_cannot_be_read_are_named(tmp_path):
    source = open_source(packed(tmp_path, "tar", FILES | {"a/0.png": b"no image"}))
    with pytest.raises(OSError, match="x.tar/a/0.png: "):
        source.load(1)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOENT])
@pytest.mark.parametrize("times", [2, 3])
def test_three_tries(number, times, tmp_path, monkeypatch):
    """Of what the system fails at; then the image is unreadable, and another stands in for it."""
    source, failed, before = open_source(packed(tmp_path, "tar")), [], os.open

    def failing(path, *args):
        if str(path).endswith(".tar") and len(failed) < times:
            failed.append(path)
            raise OSError(number, os.strerror(number), str(path))
        return before(path, *args)
    monkeypatch.setattr(os, "open", failing)
    if times < 3:
        assert source.raw(1) == (FILES["a/1.png"], f"{tmp_path}/x.tar/a/1.png")
    else:
        with pytest.raises(OSError, match=f"x.tar/a/1.png: {os.strerror(number)}"):
            source.raw(1)
    assert len(failed) == times


def test_a_shard_that_vanishes(tmp_path):
    source = open_source(packed(tmp_path, "shards"))
    (tmp_path / "x-10.tar").unlink()
    with pytest.raises(OSError, match="x-10.tar/image 1: No such file or directory"):
        source.load(5)
    assert source.load(0).shape == (3, 24, 32)
    batches = Batches(replace(RECIPES["tiny"], batch=6), source, 0, 6)
    broken = []
    assert {batches.read(0, i, broken)[0] for i in range(6)} == {0, 1, 2, 3} and len(broken) >= 2


def test_a_shard_that_changes_while_it_is_used(tmp_path):
    source = open_source(packed(tmp_path, "tar"))
    os.utime(tmp_path / "x.tar", (1, 1))
    with pytest.raises(OSError, match="image 0: it has changed since its index was made; start again, and it is ind"):
        source.load(0)
    assert open_source(tmp_path / "x.tar").load(0).shape == (3, 24, 32)

# --------------------------------------------------------------------------------
# The command


def test_index_says_what_there_is(tmp_path, capsys):
    path = packed(tmp_path, "tar", FILES | {"a/README.txt": b""})
    for verb in "made", "checked":
        archives.main([str(path)])
        said = capsys.readouterr().out.splitlines()
        assert any(f"x.tar: {verb} in" in line and "6 images of" in line and "3 classes" in line for line in said)
        assert any("1 of 6 images have no label" in line for line in said)
        found = json.loads(said[-1])
    assert dict(found, seconds=0, digest=0, bytes=0, shard_bytes=0) == dict(
        shards=1, images=6, bytes=0, shard_bytes=0, classes=3, unlabelled=1, cut=0, others=0, made=False, seconds=0,
        digest=0) and found["bytes"] == sum(map(len, FILES.values()))
    archives.main([str(make_tar(tmp_path / "y.tar", {"1.jpg": b"x", "1.a.jpg": b"x"}))])
    assert "1 images are passed over: their samples have one already" in capsys.readouterr().out
    for argv, says in ([], "one PATH"), (["--x"], "one PATH"), ([str(tmp_path / "cache")], "wanted a tar, a zip"):
        with pytest.raises(ValueError, match=says):
            archives.main(argv)

# --------------------------------------------------------------------------------
# Damage


def damaged(rng, data):
    """Bytes of an archive, hurt once or twice, mostly where headers are."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 3)):
        kind, at = rng.randrange(7), rng.randrange(len(data))
        if rng.random() < 0.6:
            at = at // 512 * 512 + rng.choice((0, 124, 135, 148, 156, 257, 345)) if rng.random() < 0.5 else max(
                0, len(data) - rng.randrange(1, 300))
        at = min(at, len(data) - 1)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + rng.randrange(1, 12)] = rng.randbytes(rng.randrange(1, 12))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + rng.choice((1, 100, 512, 1024))]
        elif kind == 4:
            data[at : at + 512] = bytes(512)
        elif kind == 5:
            other = rng.randrange(len(data)) // 512 * 512
            data[at:at] = data[other : other + 512]
        else:
            data[at : at + 4] = rng.choice((b"\xff" * 4, b"PK\5\6", b"PK\1\2", b"PK\6\7", b"\x1f\x8b\0\0", b"9999"))
        if not data:
            break
    return bytes(data)


def trial(seed, folder):
    """One damaged archive, opened and read whole: refused, accepted, or what a user would see as a bug."""
    rng = random.Random(seed)
    small = {name: photo(k, 4) for k, name in enumerate(NAMES)} | {"a/1.cls": b"3", "a/3.json": b'{"label": 1}'}
    files = {name: small[name] for name in sorted(small) if rng.random() < 0.8}
    form = rng.choice(("tar", "gnu", "pax", "zip", "deflated", "wide"))
    if rng.random() < 0.3:
        files["long" * rng.choice((20, 30) if form == "tar" else (30, 80)) + "/1.png"] = photo(9, 4)
    if form == "wide":
        path = make_zip(folder / "x.zip", files, force_zip64=True)
    else:
        path = packed(folder, form, files)
    path.write_bytes(damaged(rng, path.read_bytes()))
    broken = 0
    try:
        source = open_source(path)
        for i in range(len(source)):
            for read in source.load, source.label:
                try:
                    read(i)
                except (OSError, ValueError) as error:
                    assert "\n" not in str(error), error
                    broken += read == source.load
            assert source.name(i).startswith(f"{path}/")
        source.digest()
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith("--data: "), error
        return "refused"
    finally:
        for left in folder.iterdir():
            left.unlink()
    return "broken" if broken else "whole"


class Late(BaseException):
    """No `except Exception` may hold it."""


def trials(seeds, folder, patience=5):
    def ring(*_):
        raise Late
    before, found = signal.signal(signal.SIGALRM, ring), []
    folder.mkdir()
    try:
        for seed in seeds:
            signal.alarm(patience)
            try:
                found.append(trial(seed, folder))
            except BaseException as error:
                raise AssertionError(f"seed {seed}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return {kind: found.count(kind) for kind in found}


def test_damage(tmp_path):
    assert trials(range(60), tmp_path / "x").keys() == {"refused", "broken", "whole"}


@pytest.mark.long
def test_much_damage(tmp_path):
    print(trials(range(60, 1160), tmp_path / "x"))
