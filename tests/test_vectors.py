"""engine/vectors.py: what is written is what is read, in three formats; rows of length 1; foreign files."""

import errno
import json
import os
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from engine import vectors
from engine.images import ImageConfig
from engine.vectors import Unit, Vectors, write

FORMATS = ".npz", ".safetensors", ".parquet"
NAMES = [f"{'folder/' * (i % 3)}photo {i} é.jpg" for i in range(10)]
OPTIONS = {field.name: field.default for field in fields(ImageConfig)} | dict(data="?", seed=0, text="")
ABOUT = dict(network="x", mean=[0.5] * 3, digest="", options=OPTIONS)


@pytest.fixture(params=FORMATS)
def suffix(request, monkeypatch):
    if request.param == ".parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(vectors, "ROWS", 4)                             # three parts of ten rows
    return request.param


def table(n=10, d=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def written(path, names=NAMES, **columns):
    columns = dict(cls=table(), patches_mean=table(seed=1), rows=np.arange(10) * 2) | columns
    write(path, ABOUT, columns, lambda i: names[i])
    return Vectors(path), columns


def test_what_is_written_is_read(suffix, tmp_path):
    file, columns = written(tmp_path / f"x{suffix}")
    assert len(file) == 10 and file.about["options"] == json.loads(json.dumps(OPTIONS))
    for name, x in columns.items():
        found = file.columns[name]
        assert found.shape == x.shape and len(found) == 10 and found[:].dtype == x.dtype
        assert (found[:] == x).all() and (found[3:9] == x[3:9]).all() and (found[[7, 0, 5]] == x[[7, 0, 5]]).all()
        assert len(found[10:12]) == 0
    assert [file.name(i) for i in range(10)] == NAMES
    assert os.listdir(tmp_path) == [f"x{suffix}"]


def test_others_read_it_too(tmp_path):
    for name in ("x.npz", "x.safetensors"):
        written(tmp_path / name)
    loaded = np.load(tmp_path / "x.npz")
    assert (loaded["cls"] == table()).all() and loaded["paths"].tolist() == NAMES and loaded["cls"].dtype == np.float32
    from safetensors.numpy import load_file
    loaded = load_file(tmp_path / "x.safetensors")
    assert [row.tobytes().rstrip(b"\0").decode() for row in loaded["paths"]] == NAMES
    assert (loaded["patches_mean"] == table(seed=1)).all()


def test_others_read_the_table(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(vectors, "ROWS", 4)
    written(tmp_path / "x.parquet")
    found = parquet.read_table(tmp_path / "x.parquet")
    assert found["paths"].to_pylist() == NAMES and np.float32(found["cls"].to_pylist()).tolist() == table().tolist()


def test_a_table_without_columns_is_left_out(suffix, tmp_path):
    """pixels have no mean patch"""
    assert "patches_mean" not in written(tmp_path / f"x{suffix}", patches_mean=np.empty((10, 0), np.float32))[0].columns


def test_two_files_of_the_same_are_the_same(tmp_path):
    for name in ("a", "b"):
        for suffix in FORMATS[:2]:
            written(tmp_path / f"{name}{suffix}")
    for suffix in FORMATS[:2]:
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_names_that_are_no_text(tmp_path):
    names = [os.fsdecode(b"ph\xffto.jpg"), *NAMES[1:]]
    for suffix in FORMATS[:2]:
        assert written(tmp_path / f"x{suffix}", names)[0].name(0) == names[0]
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="is no UTF-8, which .parquet wants of names; write .npz"):
        written(tmp_path / "x.parquet", names)
    assert not (tmp_path / "x.parquet").exists() and len(os.listdir(tmp_path)) == 2


def test_names_below_the_file_move_with_it(tmp_path):
    (tmp_path / "a/folder").mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a/folder" / "photo 1 é.jpg")
    file, _ = written(tmp_path / "a/x.npz")
    assert file.name(1) == str(tmp_path / "a" / NAMES[1]) and file.load(1).shape == (3, 6, 8)
    os.rename(tmp_path / "a", tmp_path / "b")
    moved = Vectors(tmp_path / "b/x.npz")
    assert moved.load(1).shape == (3, 6, 8)
    with pytest.raises(OSError, match="photo 2 é.jpg is no longer there"):
        moved.load(2)


def test_images_of_more_channels_are_read_as_they_were_and_shown_as_colours(tmp_path):
    x = np.random.default_rng(0).integers(0, 3000, (6, 8, 4)).astype(np.uint16)
    np.save(tmp_path / "x.npy", x.transpose(2, 0, 1))
    about = ABOUT | dict(mean=[0.5] * 4, options=OPTIONS | dict(scale=3000.0))
    write(tmp_path / "v.npz", about, dict(cls=table(1), rows=np.arange(1)), lambda i: "x.npy")
    file = Vectors(tmp_path / "v.npz")
    assert file.image(0).shape == (4, 6, 8) and np.abs(file.image(0).numpy() - x.transpose(2, 0, 1) / 3000).max() < 1e-6
    assert file.load(0).shape == (3, 6, 8) and file.load(0).dtype == torch.uint8


def test_rows_have_length_one_and_a_direction(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "ROWS", 4)
    file, columns = written(tmp_path / "x.npz")
    both = np.concatenate([columns["cls"], columns["patches_mean"]], 1).astype(np.float64)
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    unit = Unit(file, "cls", "patches_mean")
    assert unit.shape == (10, 10) and len(unit) == 10
    assert np.abs(unit[2:7] - both[2:7]).max() < 1e-7                   # measured: 3e-8
    for bad in np.nan, np.inf:
        x = table()
        x[6, 2] = bad
        with pytest.raises(ValueError, match="y.npz: the vector of photo 6 é.jpg is not finite, or 0"):
            Unit(written(tmp_path / "y.npz", cls=x)[0], "cls")[4:8]
    x = table()
    x[6] = 0
    with pytest.raises(ValueError, match="photo 6 é.jpg is not finite, or 0"):
        Unit(written(tmp_path / "y.npz", cls=x)[0], "cls")[:]


def test_a_full_disk_leaves_nothing(suffix, tmp_path, monkeypatch):
    old, _ = written(tmp_path / f"x{suffix}")

    class Full:
        shape = (10, 5)

        def __len__(self):
            return 10

        def __getitem__(self, rows):
            if rows.start:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return table()[rows]
    with pytest.raises(ValueError, match=rf"x{suffix} cannot be written: No space left on device; name a place"):
        written(tmp_path / f"x{suffix}", cls=Full())
    assert os.listdir(tmp_path) == [f"x{suffix}"] and (Vectors(tmp_path / f"x{suffix}").columns["cls"][:] ==
                                                      old.columns["cls"][:]).all()


def test_foreign_files_are_one_line(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    with pytest.raises(ValueError, match=f"x{suffix} does not exist; python embed.py PHOTOS"):
        Vectors(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=f"x{suffix} is no file of vectors that embed.py left"):
        Vectors(path)
    written(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=f"x{suffix} is no file of vectors") as error:
        Vectors(path).columns["cls"][:]
    assert "\n" not in str(error.value)


def test_foreign_arrays_are_one_line(tmp_path):
    np.savez(tmp_path / "x.npz", cls=table())
    with pytest.raises(ValueError, match="x.npz is no file of vectors"):
        Vectors(tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "x.npz", cls=table(), about=np.array(json.dumps(dict(format=1))))
    with pytest.raises(ValueError, match="is compressed.; make it again"):
        Vectors(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="x.npy: name a file that embed.py has left, .npz, .safetensors, .parquet"):
        Vectors(tmp_path / "x.npy")


def test_another_version_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "FORMAT", 2)
    with monkeypatch.context() as patch:
        patch.setattr(vectors, "FORMAT", 1)
        write(tmp_path / "x.npz", ABOUT, dict(cls=table(), rows=np.arange(10)), lambda i: NAMES[i])
    with pytest.raises(ValueError, match="of another version, or cut short"):
        Vectors(tmp_path / "x.npz")
