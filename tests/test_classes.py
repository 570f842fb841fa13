"""sets/classes.py: folders of classes and generated ones, what is wrong with them, and some images of a set."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from test_members import make_tar

from engine.sources import open_source
from sets.classes import Chosen, Files, limited, open_splits
from tasks import TASKS


def folders(root, counts):
    for place, n in counts.items():
        (root / place).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(np.full((20, 30, 3), i, np.uint8)).save(root / place / f"{i}.png")


def test_train_and_val_shapes_differ():
    """No image of one is in the other."""
    train, val = open_splits(TASKS["knn"].config(limit=30))
    assert len(train) == len(val) == 30 and train.classes == val.classes and len(train.classes) == 12
    images = torch.stack([source.load(i) for source in (train, val) for i in range(30)])
    assert len(images.flatten(1).unique(dim=0)) == 60
    assert not torch.equal(train.load(0), open_source("shapes", 1, seed=0).load(0))    # nor what train.py sees


def test_limit_is_evenly_spaced(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders(tmp_path, {"train/a": 4, "train/b": 4, "val/a": 1, "val/b": 1})
    train, val = open_splits(TASKS["knn"].config(data=str(tmp_path), limit=4))
    assert [train.load(i)[0, 0, 0].item() for i in range(4)] == [0, 2, 0, 2] and len(val) == 2
    assert [train.label(i) for i in range(4)] == [0, 0, 1, 1] and train.paths == ["a/0.png", "a/2.png", "b/0.png",
                                                                                 "b/2.png"]


@pytest.mark.parametrize("form", ["csv", "tar"])
def test_splits_may_be_files(tmp_path, monkeypatch, form):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders(tmp_path, {"all/a": 2, "all/b": 1, "all/c": 1})
    if form == "csv":
        (tmp_path / "train.csv").write_text("path,label\nall/b/0.png,b\nall/a/1.png,a\nall/c/0.png,a\n")
        (tmp_path / "val.csv").write_text("path,label\nall/a/0.png,a\nall/c/0.png,b\n")
    else:
        for split, rows in dict(train=("b/0", "a/1"), val=("a/0", "b/0")).items():
            with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
                for row in rows:
                    tar.add(tmp_path / f"all/{row}.png", f"{row}.png")
    c = TASKS["knn"].config(data=str(tmp_path))
    train, val = open_splits(c)
    assert train.classes == val.classes == ["a", "b"] and [val.label(i) for i in (0, 1)] == [0, 1]
    assert [train.label(i) for i in range(len(train))] == ([1, 0, 0] if form == "csv" else [0, 1])
    assert train.load(0).shape == (3, 20, 30)
    if form == "csv":
        (tmp_path / "val.csv").write_text("path\nall/a/0.png\n")
        with pytest.raises(ValueError, match="val.csv has no labels; knn wants the class of each image"):
            open_splits(c)


def test_chosen_and_files(tmp_path):
    folders(tmp_path, {"a": 3})
    files = Files([tmp_path / f"a/{i}.png" for i in range(3)])
    assert len(limited(files, 0)) == 3 and [limited(files, 2).label(i) for i in range(2)] == [0, 1]
    some = Chosen(files, [2, 0], labels=[7, 8], border=2)
    assert len(some) == 2 and some.label(0) == 7 and some.load(0).shape == (3, 16, 26) and some.load(0).max() == 2


@pytest.mark.parametrize("counts, says", [
    ({"train/a": 1, "train/b": 1, "val/a": 1, "val/c": 1}, "different classes: b, c"),
    ({"train/a": 1, "val/a": 1}, "train has 1 class folders; knn wants at least 2"),
    ({"train/a": 1, "train/b": 1}, "has no folder val; knn wants train/CLASS/ and val/CLASS/, or a file each, val.csv"),
    ({"val/a": 1}, "has no folder train")])
def test_odd_folders(counts, says, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders(tmp_path, counts)
    with pytest.raises(ValueError, match=says):
        open_splits(TASKS["knn"].config(data=str(tmp_path)))


def imagenet(root, below=""):
    """Two classes to train on, four images of val in one folder."""
    folders(root, {f"{below}train/n01440764": 2, f"{below}train/n03995372": 2})
    (root / f"{below}val").mkdir()
    for i in range(1, 5):
        Image.new("RGB", (30, 20)).save(root / f"{below}val/ILSVRC2012_val_{i:08}.JPEG")
    return TASKS["knn"].config(data=str(root))


def devkit(root, numbers="490\n1\n1\n490\n"):
    """Numbers of classes that are not in the order of their names; one of a class with children."""
    rows = [(1, "n03995372", "plane", 0), (490, "n01440764", "tench", 0), (1001, "n00001740", "entity", 2)]
    synsets = np.array(rows, [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")])
    (root / "ILSVRC2012_devkit_t12/data").mkdir(parents=True)
    savemat(root / "ILSVRC2012_devkit_t12/data/meta.mat", dict(synsets=synsets[:, None]))
    (root / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt").write_text(numbers)


def test_imagenets_val_as_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    c = imagenet(tmp_path / "photos")
    with pytest.raises(ValueError, match="has no folders of classes; wanted val/CLASS/, or ImageNet's LOC_val"):
        open_splits(c)
    devkit(tmp_path / "photos")
    train, val = open_splits(c)
    assert [val.label(i) for i in range(4)] == [0, 1, 1, 0] and val.classes == train.classes and len(val) == 4
    assert val.load(2).shape == (3, 20, 30) and val.paths[0] == "ILSVRC2012_val_00000001.JPEG"


def test_imagenets_val_as_kaggle_has_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    c = imagenet(tmp_path / "photos", "ILSVRC/Data/CLS-LOC/")
    rows = "".join(f"ILSVRC2012_val_{i:08},{name} 85 1 499 272 {name} 1 2 3 4\n" for i, name in (
        (4, "n03995372"), (1, "n01440764"), (2, "n01440764"), (3, "n03995372")))
    (tmp_path / "photos/LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    assert [open_splits(c)[1].label(i) for i in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize("numbers, says", [
    ("490\n1\n1\n", "ground_truth.txt calls ILSVRC2012_val_00000004.JPEG None; wanted a folder of train"),
    ("490\n1\n1\n1001\n", "calls ILSVRC2012_val_00000004.JPEG n00001740; wanted a folder of train")])
def test_imagenets_val_of_other_classes(numbers, says, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    c = imagenet(tmp_path / "photos")
    devkit(tmp_path / "photos", numbers)
    with pytest.raises(ValueError, match=says):
        open_splits(c)
    (tmp_path / "photos/ILSVRC2012_devkit_t12/data/meta.mat").write_bytes(b"no matrix")
    with pytest.raises(ValueError, match="meta.mat cannot be read: .*; wanted ImageNet's meta.mat"):
        open_splits(c)


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """train and val as folders of shards, of the photos that lie in folders beside them; returns their root."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders(tmp_path / "folders", {"train/a": 4, "train/b": 4, "val/a": 1, "val/b": 1})
    for split in "train", "val":
        photos = {str(path.relative_to(tmp_path / "folders" / split)): path.read_bytes()
                  for path in sorted((tmp_path / "folders" / split).rglob("*.png"))}
        (tmp_path / "packed" / split).mkdir(parents=True)
        make_tar(tmp_path / "packed" / split / "0.tar", photos)
    return tmp_path / "packed"


def test_shards_for_folders(shards):
    for limit in 0, 3:
        for ours, theirs in zip(*(open_splits(TASKS["knn"].config(data=str(root), limit=limit))
                                  for root in (shards, shards.parent / "folders")), strict=True):
            assert ours.classes == theirs.classes and len(ours) == len(theirs)
            assert all(ours.label(i) == theirs.label(i) for i in range(len(ours)))
            assert all(torch.equal(ours.load(i), theirs.load(i)) for i in range(len(ours)))


@pytest.mark.parametrize("files, says", [
    ({"a/1.png": b"", "b/1.png": b"", "c.png": b""}, "val/1.tar/c.png lies in no class folder"),
    ({"1.png": b"", "1.cls": b"c"}, "have different classes: a, b, c"),
    ({"1.png": b""}, "have different classes: a, b")])
def test_shards_without_classes(shards, files, says):
    (shards / "val/0.tar").unlink()
    make_tar(shards / "val/1.tar", files)
    with pytest.raises(ValueError, match=says):
        open_splits(TASKS["knn"].config(data=str(shards)))
