"""sets/variants.py: the layouts of ImageNet's other test sets, and top-1 and mCE against loops."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import run

from engine import metrics
from engine.sources import open_source
from sets import variants
from tasks import linear

COLOURS = dict(n01=(200, 0, 0), n02=(0, 200, 0), n03=(0, 0, 200), n04=(200, 200, 0))


def photo(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((30, 40, 3), colour, np.uint8)).save(path)


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    number = 0
    for name, colour in COLOURS.items():
        for i in range(4):
            photo(tmp_path / f"imagenet/train/{name}/{name}_{i}.png", np.add(colour, i))
        number += 1
        photo(tmp_path / f"imagenet/val/{name}/ILSVRC2012_val_{number:08}.png", colour)
    return tmp_path


def evaluated(imagenet, capsys, tests):
    words = ["--task", "linear", "--weights", "pixels", "--data", imagenet / "imagenet", "--resolution", 32]
    return run(capsys, *words, "--iterations", 60, "--tests", tests)


def test_every_layout(imagenet, capsys):
    for i, (name, colour) in enumerate(COLOURS.items()):
        if i % 2:
            photo(imagenet / f"imagenet-r/{name}/a.png", colour)                # two of the four classes
        photo(imagenet / f"v2/{i}/a.png", colour)
        photo(imagenet / f"v2/{i}/b.png", COLOURS["n01"])
    (imagenet / "real.json").write_text(json.dumps([[0], [], [2, 1], [0, 2]]))  # the second image shows nothing
    found = evaluated(imagenet, capsys, f"{imagenet}/imagenet-r,{imagenet}/v2,{imagenet}/real.json")
    assert found["top1"] == found["top1_imagenet-r"] == 100
    assert found["top1_v2"] == pytest.approx(100 * 5 / 8) and found["top1_real"] == pytest.approx(100 * 2 / 3)


def test_corruptions(imagenet, capsys):
    """Severity 4 and 5 of the fog turn all to the first class: 3 of 4 images are wrong there."""
    for severity in range(1, 6):
        for name, colour in COLOURS.items():
            photo(imagenet / f"c/fog/{severity}/{name}/a.png", colour if severity < 4 else COLOURS["n01"])
    found = evaluated(imagenet, capsys, imagenet / "c")
    assert found["mce"] == pytest.approx(100 * 2 * 75 / sum(metrics.ALEXNET["fog"])) and found["n_corruptions"] == 1


def write_objectnet(root, first=0, **changes):
    """
    Four ImageNet classes, by wnid n01 red, n02 green, n03 blue, n04 yellow; their ids of 2012 are 2, 0, 3, 1. The label
    Cool has two of them, Warm one, Nothing none; yellow is of no label.
    """
    files = {"folder_to_objectnet_label.json": json.dumps(dict(cool="Cool", warm="Warm", odd="Nothing")),
             "objectnet_to_imagenet_1k.json": json.dumps(dict(Cool="blue; green, leaf", Warm="red")),
             "pytorch_to_imagenet_2012_id.json": json.dumps({str(k): i + first for k, i in enumerate((2, 0, 3, 1))}),
             "imagenet_to_label_2012_v2": "green, leaf\nyellow\nred\nblue\n", **changes}
    (root / "mappings").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / "mappings" / name).write_text(text)


@pytest.mark.parametrize("first", [0, 1])
def test_objectnets_labels_are_sets_of_classes(tmp_path, monkeypatch, first):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_objectnet(tmp_path, first)
    for folder, name in ("cool", "a"), ("odd", "b"), ("warm", "c"), ("warm", "d"):
        photo(tmp_path / f"images/{folder}/{name}.png", (9, 9, 9))
    found = variants.open_objectnet(tmp_path, 4)
    assert [found.answers[found.source.label(i)] for i in range(len(found.source))] == [{1, 2}, {0}, {0}]
    assert found.columns == [0, 1, 2]


def test_objectnet(imagenet, capsys):
    """Two of three are right, and a folder of no ImageNet class does not count; the red frame is cut away."""
    write_objectnet(imagenet / "on")
    for folder, colour in ("cool", "n02"), ("cool", "n03"), ("warm", "n02"), ("odd", "n01"):
        image = np.full((24, 28, 3), (255, 0, 0), np.uint8)
        image[2:-2, 2:-2] = COLOURS[colour]
        (imagenet / f"on/images/{folder}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(imagenet / f"on/images/{folder}/{colour}.png")
    assert evaluated(imagenet, capsys, imagenet / "on")["top1_objectnet"] == pytest.approx(100 * 2 / 3)
    source = variants.open_objectnet(imagenet / "on", 4).source
    for i, colour in enumerate(("n02", "n03", "n02")):
        assert torch.equal(source.load(i), torch.tensor(COLOURS[colour])[:, None, None].expand(3, 20, 24))


@pytest.mark.parametrize("changes, says", [
    ({"objectnet_to_imagenet_1k.json": '{"Cool": "grey"}'}, "should know 'grey' once"),
    ({"imagenet_to_label_2012_v2": "red\nred\nblue\ngreen, leaf"}, "should know 'red' once"),
    ({"folder_to_objectnet_label.json": "{}"}, "should know 'cool' once"),
    ({"pytorch_to_imagenet_2012_id.json": '{"0": 1}'}, "is of 1 ids and 4 names, but train has 4 classes")])
def test_objectnet_mistakes(tmp_path, monkeypatch, changes, says):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photo(tmp_path / "images/cool/a.png", (0, 0, 0))
    write_objectnet(tmp_path, **changes)
    with pytest.raises(ValueError, match=says):
        variants.open_objectnet(tmp_path, 4)
    (tmp_path / "mappings/imagenet_to_label_2012_v2").unlink()
    with pytest.raises(ValueError, match="has no imagenet_to_label_2012_v2; wanted folder_to"):
        variants.open_objectnet(tmp_path, 4)


def test_numbers_are_sorted_as_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for k in 10, 2, 0:
        photo(tmp_path / f"v2/{k}/a.png", (0, 0, 0))
    found = variants.by_folder(tmp_path / "v2", [f"n{i:02}" for i in range(11)])
    assert [found.answers[found.source.label(i)] for i in range(3)] == [{0}, {10}, {2}] and found.columns == [0, 2, 10]


def test_top1_chooses_among_the_columns():
    rng = np.random.default_rng(0)
    logits, rows = torch.tensor(rng.normal(size=(50, 9))), torch.tensor(rng.integers(0, 4, 50))
    variant = variants.Variant(None, [{1}, {4, 8}, set(), {6}], [1, 4, 6, 8])
    right = [max([1, 4, 6, 8], key=lambda k: logits[i, k]) in variant.answers[rows[i]]  # noqa: B023
             for i in range(50) if variant.answers[rows[i]]]
    head = linear.Head(9, 9).double()
    head.linear.load_state_dict(dict(weight=torch.eye(9), bias=torch.zeros(9)))
    guess = head.likeliest(logits, variant.columns)
    assert len(right) < 50 and variants.top1(guess, rows, variant) == pytest.approx(100 * np.mean(right))


def test_mistakes(imagenet, capsys):
    photo(imagenet / "other/cat/a.png", (0, 0, 0))
    photo(imagenet / "far/7/a.png", (0, 0, 0))
    (imagenet / "real.json").write_text("[[0]]")
    for tests, says in (("other", "folder cat that train has not"), ("far", "folder 7, but train has 4 classes"),
                        ("none", "is no folder and no real.json"),
                        ("real.json", "has 1 images, but val has a number 4")):
        with pytest.raises(ValueError, match=says):
            evaluated(imagenet, capsys, imagenet / tests)
    with pytest.raises(ValueError, match="--tests: knn does not read it"):
        run(capsys, "--task", "knn", "--weights", "pixels", "--tests", "x")
    val = open_source(imagenet / "other")
    with pytest.raises(ValueError, match="goes by the numbers in val's names"):
        variants.open_real(imagenet / "real.json", val, 4)
