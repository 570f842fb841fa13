"""matching.py: an oracle finds keypoints, noise does not; the score against plain loops; the pictures of matches."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_matching import CPU, Oracle, write

import matching
from engine.features import Patches, PixelPatches
from evaluate import EvaluateConfig


def test_oracle_finds_keypoints():
    """The feature of a patch is how near it lies to each keypoint of each object of its frame."""
    c = EvaluateConfig(task="keypoints", resolution=96, limit=6)
    pairs, load = matching.shapes_pairs(c)
    assert len(pairs) >= 6 and all(pair["a"][0] == pair["b"][0] for pair in pairs)
    assert torch.equal(load((2, 1)), torch.from_numpy(matching.video(2, 96)[1].image).permute(2, 0, 1))

    def nearness(things, i):
        (index, frame), (y, x) = things.names[i], np.mgrid[:48, :48] * 2 + 1
        points = matching.video(index, 96)[frame].keypoints[..., :2].reshape(-1, 2)
        return np.stack([np.exp(-((x - px) ** 2 + (y - py) ** 2) / 8) for px, py in points] + [0 * x + 1e-3], -1)

    found, lost = (matching.keypoints(Oracle(nearness, noise), c) for noise in (False, True))
    assert found["recall"] > 85 > 25 > lost["recall"]


def spair(root, notes):
    """(class, width and height of both images, box, keypoints of both): the files of one pair each"""
    for k, (kind, size, other, box, at, bt) in enumerate(notes):
        for name, (width, height) in (f"a{k}", size), (f"b{k}", other):
            image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
            write(root / f"JPEGImages/{kind}/{name}.png", image)
        note = dict(category=kind, src_imname=f"a{k}.png", trg_imname=f"b{k}.png", src_kps=at, trg_kps=bt,
                    src_imsize=[*size, 3], trg_imsize=[*other, 3], trg_bndbox=box)
        (root / "PairAnnotation/test").mkdir(parents=True, exist_ok=True)
        (root / f"PairAnnotation/test/{k:06}-a-b:{kind}.json").write_text(json.dumps(note))
    return EvaluateConfig(task="spair", data=str(root), resolution=240, workers=0)


def test_spair_folder(tmp_path):
    points = [[10.0, 10.0], [50.0, 30.0]]
    c = spair(tmp_path, [("cat", (60, 40), (60, 40), [0, 0, 59, 39], points, points)])
    c = replace(c, out=str(tmp_path / "out"))
    found = matching.keypoints(Patches(PixelPatches(), c, CPU), c)
    assert found == dict(recall=100.0, n_pairs=1, n_keypoints=2)                  # an image matches itself
    with Image.open(tmp_path / "out/spair.png") as file:
        lines = np.asarray(file).astype(int)
    assert lines.shape == (404, 804, 3) and abs(lines[67, 67] - (70, 230, 120)).max() < 5        # a green dot at 10, 10


def found_by_hand(m, other, point, size, other_size):
    """Where the feature at a pixel's place lies in the other image: x, y in pixels."""
    h, w, _ = m.shape
    m, other = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=2, keepdims=True) for x in (m, other))
    x, y = (min(max(p / max(size) * n - 0.5, 0), n - 1) for p, n in zip(point, (w, h), strict=True))
    asked = sum(max(1 - abs(i - y), 0) * max(1 - abs(j - x), 0) * m[i, j] for i in range(h) for j in range(w))
    _, i, j = max((float(asked @ other[i, j]), i, j) for i in range(len(other)) for j in range(len(other[0])))
    return (j + 0.5) / w * max(other_size), (i + 0.5) / h * max(other_size)


def test_keypoints_are_the_loop(tmp_path, monkeypatch):
    """The mean over classes of their keypoints' mean, where classes differ in both; sides and boxes of any shape."""
    rng, notes = np.random.default_rng(0), []
    for kind in "cat", "cat", "dog", "cat", "dog", "ox":
        size, other = rng.integers(40, 90, (2, 2)).tolist()
        n = int(rng.integers(3, 9))
        box = [5, 5, 5 + 8 * int(rng.integers(4, 9)), 40 + len(notes)]
        notes.append((kind, size, other, box, *[(rng.random((n, 2)) * s).tolist() for s in (size, other)]))
    c, maps = spair(tmp_path, notes), {}
    for k, (kind, size, other, _, at, bt) in enumerate(notes):              # a feature of its own at each keypoint
        for name, sides, points in (f"{kind}/a{k}.png", size, at), (f"{kind}/b{k}.png", other, bt):
            maps[name] = 0.6 * rng.normal(size=(8, 8, 9))
            for axis, (x, y) in enumerate(points):
                maps[name][int(y / max(sides) * 8), int(x / max(sides) * 8), axis] += 3
    maps = {name: m.astype(np.float16) for name, m in maps.items()}
    right = {}
    for k, (kind, size, other, box, at, bt) in enumerate(notes):
        for point, truth in zip(at, bt, strict=True):
            answer = found_by_hand(maps[f"{kind}/a{k}.png"], maps[f"{kind}/b{k}.png"], point, size, other)
            right.setdefault(kind, []).append(math.dist(answer, truth) <= 0.1 * max(box[2] - box[0], box[3] - box[1]))
    oracle = Oracle(lambda things, i: maps[things.names[i]])
    found = matching.keypoints(oracle, c)
    assert found["recall"] == pytest.approx(100 * np.mean([np.mean(each) for each in right.values()]), abs=1e-9)
    assert 10 < found["recall"] < 80 and found["n_keypoints"] == sum(map(len, right.values()))
    monkeypatch.setattr(matching, "OF_CLASS", 2)
    drawn = [[pair["a"] for pair in matching.spair_pairs(replace(c, seed=seed))[0]] for seed in (0, 0, *range(9))]
    assert drawn[0] == drawn[1] and {name for names in drawn for name in names} == {
        f"{note[0]}/a{k}.png" for k, note in enumerate(notes)} and {len(names) for names in drawn} == {5}


def test_squared_pads_with_white():
    (found,) = matching.squared(torch.zeros(3, 20, 40, dtype=torch.uint8), 32)
    assert found.shape == (3, 32, 32) and found[:, :14].max() < 5 and found[:, 18:].min() > 250

# --------------------------------------------------------------------------------
# Pictures


def test_lines_are_green_where_right_and_red_where_not():
    grey = torch.full((3, 60, 90), 128, dtype=torch.uint8)
    start, end = torch.tensor([[0.25, 0.5], [0.75, 0.5]]), torch.tensor([[0.25, 0.1], [0.75, 0.9]])
    sheet = matching.connected(grey, grey, start, end, torch.tensor([True, False]), 200).int()
    assert sheet.shape == (3, 200, 600)
    for row, column, brightest in (50, 150, 1), (50, 330, 1), (150, 150, 0), (150, 570, 0), (50, 240, 1), (150, 360, 0):
        pixel = sheet[:, row, column]
        assert pixel.argmax() == brightest and pixel.max() > 150 > 130 > pixel[1 - brightest]
    assert sheet[:, 100].unique().tolist() == [102]                              # nothing between them; a little darker


def test_apart_takes_the_first_of_those_that_touch():
    points = torch.tensor([[0.5, 0.5], [0.5, 0.51], [0.1, 0.1], [0.9, 0.9], [0.12, 0.1]])
    assert matching.apart(points, 9) == [0, 2, 3] and matching.apart(points, 2) == [0, 2]
