"""sets/finegrained.py: fake downloads as torchvision and the sets' own lists have them."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from engine.features import Frozen, Pixels
from sets.finegrained import NAMES, open_known
from tasks import TASKS


def photo(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 16, 3), colour, np.uint8)).save(path)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def contents(source):
    """[(grey value of the image, name of its class)]"""
    return [(int(source.load(i)[0, 0, 0]), source.classes[source.label(i)]) for i in range(len(source))]


def fake_cifar10(root, monkeypatch):
    """Two files to train on, one to score; torchvision compares their sums, which are those of the real ones."""
    folder, sums = root / "cifar-10-batches-py", {}
    folder.mkdir()
    for name, content in dict(
            data_batch_1=dict(data=np.repeat(np.uint8([[10], [20]]), 3072, 1), labels=[1, 0]),
            data_batch_2=dict(data=np.full((1, 3072), 30, np.uint8), labels=[1]),
            test_batch=dict(data=np.full((1, 3072), 40, np.uint8), labels=[0]),
            **{"batches.meta": dict(label_names=["cat", "ship"])}).items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", sums.pop("batches.meta"))
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums.pop("test_batch")]])
    monkeypatch.setattr(datasets.CIFAR10, "train_list", list(sums.items()))


def test_cifar10(tmp_path, monkeypatch):
    fake_cifar10(tmp_path, monkeypatch)
    train, test = open_known("cifar10", tmp_path)
    assert contents(train) == [(10, "ship"), (20, "cat"), (30, "ship")] and contents(test) == [(40, "cat")]
    assert train.load(0).shape == (3, 32, 32) and train.load(0).dtype == torch.uint8
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", "another")
    with pytest.raises(ValueError, match="--data cifar10:.*corrupted.*; sets/finegrained.py says what should"):
        open_known("cifar10", str(tmp_path))


def test_food101(tmp_path):
    images = dict(train=dict(pie=["pie/1", "pie/2"], soup=["soup/3"]), test=dict(pie=["pie/4"], soup=["soup/5"]))
    for split, lists in images.items():
        write(tmp_path / f"food-101/meta/{split}.json", json.dumps(lists))
        for path in sum(lists.values(), []):
            photo(tmp_path / f"food-101/images/{path}.jpg", 40 * int(path[-1]))
    train, test = open_known("food101", tmp_path)
    assert contents(train) == [(40, "pie"), (80, "pie"), (120, "soup")]
    assert contents(test) == [(160, "pie"), (200, "soup")]


def test_dtd_is_trained_on_two_of_its_three_parts(tmp_path):
    for k, part in enumerate(("train", "val", "test")):
        write(tmp_path / f"dtd/dtd/labels/{part}1.txt", f"dotted/{k}.jpg", f"woven/{k}.jpg")
        for j, name in enumerate(("dotted", "woven")):
            photo(tmp_path / f"dtd/dtd/images/{name}/{k}.jpg", 100 * j + 20 * k)
    train, test = open_known("dtd", tmp_path)
    assert contents(train) == [(0, "dotted"), (100, "woven"), (20, "dotted"), (120, "woven")]
    assert contents(test) == [(40, "dotted"), (140, "woven")]


def test_pets(tmp_path):
    folder = tmp_path / "oxford-iiit-pet"
    for part, k in ("trainval", 0), ("test", 1):
        write(folder / f"annotations/{part}.txt", f"Abyssinian_{k} 1 1 1", f"basset_hound_{k} 2 2 1")
        photo(folder / f"images/Abyssinian_{k}.jpg", 50 + k)
        photo(folder / f"images/basset_hound_{k}.jpg", 90 + k)
    train, test = open_known("pets", tmp_path)
    assert contents(train) == [(50, "Abyssinian"), (90, "Basset Hound")] and contents(test)[1] == (91, "Basset Hound")


def test_cub(tmp_path):
    folder, names = tmp_path / "CUB_200_2011", ("001.Albatross/a_1.jpg", "002.Auk/b_1.jpg", "001.Albatross/a_2.jpg")
    write(folder / "images.txt", *(f"{i} {name}" for i, name in enumerate(names, 1)))
    write(folder / "train_test_split.txt", "1 1", "2 1", "3 0")
    for i, name in enumerate(names):
        photo(folder / "images" / name, 60 * i)
    train, test = open_known("cub", tmp_path)
    assert contents(train) == [(0, "001.Albatross"), (60, "002.Auk")] and contents(test) == [(120, "001.Albatross")]
    next((tmp_path / "CUB_200_2011/images").rglob("*.jpg")).unlink()
    with pytest.raises(ValueError, match="cub's list names 1 of .* files that are not there; the first: .*jpg"):
        open_known("cub", tmp_path)


def test_sun397(tmp_path):
    """A class may be a folder in a folder."""
    paths = dict(Training_01=["/a/abbey/1.jpg", "/a/arch/indoor/2.jpg"], Testing_01=["/a/arch/indoor/3.jpg"])
    for name, each in paths.items():
        write(tmp_path / f"SUN397/{name}.txt", *each)
        for path in each:
            photo(tmp_path / f"SUN397{path}", 60 * int(path[-5]))
    train, test = open_known("sun397", tmp_path)
    assert contents(train) == [(60, "/a/abbey"), (120, "/a/arch/indoor")]
    assert contents(test) == [(180, "/a/arch/indoor")]


def test_caltech101_draws_thirty_of_each_class(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, n in ("ant", 33), ("bass", 40):
        for i in range(n):
            photo(tmp_path / f"caltech101/101_ObjectCategories/{name}/{i:04}.png", i + 100 * (name == "bass"))
    train, test = open_known("caltech101", tmp_path)
    once = contents(train), contents(test)
    assert sorted(sum(once, [])) == [(i, "ant") for i in range(33)] + [(100 + i, "bass") for i in range(40)]
    assert [sum(name == "ant" for _, name in part) for part in once] == [30, 3] and len(once[0]) == 60
    assert min(once[1])[0] < 30 and [contents(part) for part in open_known("caltech101", tmp_path)] == [*once]


def test_features_of_a_set_with_a_broken_image(tmp_path, capsys):
    """Each image is opened once, for its pixels alone; what cannot be read is named and left out."""
    images = dict(pie=["pie/1", "pie/2"], soup=["soup/3"])
    for split in "train", "test":
        write(tmp_path / f"food-101/meta/{split}.json", json.dumps(images))
    for path in sum(images.values(), []):
        photo(tmp_path / f"food-101/images/{path}.jpg", 40 * int(path[-1]))
    (tmp_path / "food-101/images/pie/2.jpg").write_bytes(b"broken")
    source, opened = open_known("food101", tmp_path)[0], []
    loader = source.items.datasets[0].loader
    source.items.datasets[0].loader = lambda path: (opened.append(path), loader(path))[1]
    found = Frozen(Pixels(), TASKS["knn"], TASKS["knn"].config(resolution=32, workers=0)).tokens("train", source)
    assert found.labels.tolist() == [0, 1] and len(opened) == 3
    assert "image 1 of 3" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_nothing_there(name, tmp_path):
    with pytest.raises(ValueError, match=f"--data {name}:.*; sets/finegrained.py says what should lie there"):
        open_known(name, tmp_path)
