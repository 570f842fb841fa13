"""tasks/voc07.py: scikit-learn's answer at the C that it picks; VOC's layout, its difficult objects, its mistakes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve

from engine.features import Frozen, Pixels
from tasks import TASKS, voc07

CLASSES = "bird", "car", "dog"
TASK = TASKS["voc07"]


def score(frozen, **values):
    c = TASK.config(**values)
    return TASK.run(TASK.open(c), frozen, c)


def write_voc(root, splits):
    """splits  {split: [[(class, difficult), ...] of each image]}; every object has a part, which is of no class"""
    for name in "JPEGImages", "Annotations", "ImageSets/Main":
        (root / name).mkdir(parents=True)
    for split, images in splits.items():
        names = [f"{split}_{i:03}" for i in range(len(images))]
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")
        for name, objects in zip(names, images, strict=True):
            (root / f"JPEGImages/{name}.jpg").touch()
            text = "".join(f"<object><name>{k}</name><difficult>{hard:d}</difficult><part><name>head</name></part>"
                           "</object>" for k, hard in objects)
            (root / f"Annotations/{name}.xml").write_text(f"<annotation>{text}</annotation>")


def scenes(n, seed):
    """Features n 5 that tell which of three classes are there, with noise; objects, a fifth of them difficult."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 5))
    there = features[:, :3] + 0.8 * rng.normal(size=(n, 3)) > 0.7
    objects = [[(name, rng.random() < 0.2) for name, seen in zip(CLASSES, row, strict=True) if seen
                for _ in range(rng.integers(1, 3))] for row in there]
    return torch.tensor(features).float(), objects


@pytest.fixture
def voc(tmp_path):
    """A folder of 150 and 400 images, and features of all but the fifth of each."""
    splits = dict(trainval=scenes(150, 0), test=scenes(400, 1))
    write_voc(tmp_path, {name: objects for name, (_, objects) in splits.items()})

    def tokens(name, source, view=None):
        rows = torch.tensor([source.label(i) for i in range(len(source)) if i != 5])
        return SimpleNamespace(cls=splits[name][0][rows], labels=rows)

    return tmp_path, splits, SimpleNamespace(tokens=tokens)


def by_hand(splits):
    """Of each split: features, and of each class its signs: 1 there, -1 not there, 0 only as a difficult object."""
    for features, objects in splits.values():
        rows = [i for i in range(len(objects)) if i != 5]
        signs = [[1 if (k, False) in seen else 0 if (k, True) in seen else -1 for k in CLASSES]
                 for seen in (objects[i] for i in rows)]
        yield features[rows].double().numpy(), np.array(signs)


def eleven_points(truth, sure):
    """Signs n, how sure n -> mean of the largest precisions at 11 recalls, percent; 0 as sign: not counted"""
    precision, recall, _ = precision_recall_curve(truth[truth != 0], sure[truth != 0], pos_label=1)
    return 100 * np.mean([precision[:-1][recall[:-1] >= k / 10 - 1e-9].max() for k in range(11)])


def scikit_learns_map(x, signs, x_val, signs_val, C):
    each = []
    for y, truth in zip(signs.T, signs_val.T, strict=True):
        model = LogisticRegression(C=C, max_iter=1000, tol=1e-12).fit(x[y != 0], y[y != 0])
        each.append(eleven_points(truth, model.predict_proba(x_val)[:, 1]))
    return np.mean(each)


def test_voc07_is_scikit_learns(voc, monkeypatch):
    """The C that a tenth picks, out of three, and what it scores; some images count for nothing in some classes."""
    monkeypatch.setattr(voc07, "PENALTIES", np.array([1e-3, 1e-1, 1e3]))
    ranked, precision = [], voc07.mean_precision
    monkeypatch.setattr(voc07, "mean_precision", lambda *each: ranked.append(len(each[0])) or precision(*each))
    root, splits, frozen = voc
    found = score(frozen, data=str(root))
    (x, signs), test = by_hand(splits)
    assert (signs == 0).sum() > 10 and (found["n_train"], found["n_val"], found["n_classes"]) == (149, 399, 3)
    rng = np.random.default_rng(0)
    held = rng.permutation(149) < 14
    tried = [scikit_learns_map(x[~held], signs[~held], x[held], signs[held], C) for C in voc07.PENALTIES]
    assert found["C"] == voc07.PENALTIES[np.argmax(tried)] and len({round(each) for each in tried}) > 1
    assert found["map"] == pytest.approx(scikit_learns_map(x, signs, *test, found["C"]), rel=1e-6)
    assert found["chance"] + 20 < found["map"] < 99
    assert ranked == [14] * 3 + [399] * 21           # what picks C; 20 random ones, and the score
    random = [[eleven_points(*each) for each in zip(test[1].T, rng.random((399, 3)).T, strict=True)] for _ in range(20)]
    assert found["chance"] == pytest.approx(np.mean(random), rel=1e-9)


def test_voc07_of_shuffled_truth_is_at_chance(voc, monkeypatch):
    monkeypatch.setattr(voc07, "PENALTIES", np.array([1e-3, 1.0]))
    root, _, frozen = voc
    found = score(frozen, data=str(root), control=True)
    assert abs(found["map"] - found["chance"]) < 8 and 20 < found["chance"] < 50


def test_voc2012_from_images(tmp_path, monkeypatch):
    """No test list: train and val. Each image is half of one colour, half of another; one is broken."""
    monkeypatch.setattr(voc07, "PENALTIES", np.array([1e-4, 1e-2]))
    colours, pairs = dict(bird=(255, 0, 0), car=(0, 255, 0), dog=(0, 0, 255)), [(0, 1), (1, 2), (2, 0), (1, 1)]
    images = [[(CLASSES[k], False) for k in pairs[i % 4]] for i in range(40)]
    write_voc(tmp_path, dict(train=images, val=images))
    for split in "train", "val":
        for i, objects in enumerate(images):
            pixels = np.array([[colours[k] for k, _ in objects]], np.uint8).repeat(32, 0).repeat(16, 1)
            Image.fromarray(pixels).save(tmp_path / f"JPEGImages/{split}_{i:03}.jpg")
    (tmp_path / "JPEGImages/val_003.jpg").write_bytes(b"broken")
    c = TASK.config(data=str(tmp_path), resolution=32, workers=0)
    frozen = Frozen(Pixels(), TASK, c)
    found = TASK.run(TASK.open(c), frozen, c)
    assert found["map"] == 100 and found["chance"] < 75
    assert (found["scored"], found["n_train"], found["n_val"]) == ("val", 40, 39)
    c = replace(c, limit=30)
    assert TASK.run(TASK.open(c), frozen, c)["n_train"] == 30


def test_voc07_mistakes(voc):
    root, _, frozen = voc
    for wrong, says in ((dict(data="shapes"), "shapes has no ImageSets/Main/trainval.txt; name a folder as VOCdevkit"),
                        (dict(limit=2), "voc07: all or none of 1 images to fit show")):
        with pytest.raises(ValueError, match=says):
            score(frozen, **dict(data=str(root)) | wrong)
    (root / "Annotations/test_007.xml").write_text("<annotation><object><name>cow</name></object></annotation>")
    with pytest.raises(ValueError, match="test of .* shows cow, which trainval does not"):
        score(frozen, data=str(root))
    (root / "JPEGImages/trainval_003.jpg").unlink()
    with pytest.raises(ValueError, match="trainval.txt names 1 of 150 files that are not there; .*trainval_003.jpg"):
        score(frozen, data=str(root))
    (root / "JPEGImages/trainval_003.jpg").touch()
    (root / "Annotations/trainval_007.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match="trainval_007.xml cannot be read .*; wanted Annotations of all"):
        score(frozen, data=str(root))
    with pytest.raises(ValueError, match="none of the images to score has an object that counts"):
        voc07.mean_precision(np.zeros((2, 1)), np.zeros((2, 1), bool), np.ones((2, 1), bool))


@pytest.mark.parametrize("name", ["voc07", "logreg"])
@pytest.mark.parametrize("side", [224, 512])
def test_no_margin_is_cut_away(name, side):
    """The released 224/224, the paper's 512/512: of a square nothing is lost."""
    image = torch.full((3, 600, 600), 100, dtype=torch.uint8)
    image[:, 24:-24, 24:-24] = 200
    (found,) = TASKS[name].view(image, side, 16)
    assert found.shape == (3, side, side) and found[:, 0].max() == 100 == found[:, :, -1].max()
