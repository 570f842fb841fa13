"""tasks/keypoints.py: an oracle finds keypoints, noise does not; the score against plain loops."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from test_tracking import Oracle as Tracked
from test_tracking import write

from engine.features import Frozen, Pixels
from engine.views import squared
from sets import things as sets_things
from sets.videos import moving
from tasks import TASKS, keypoints

Oracle = partial(Tracked, view=squared)


def test_oracle_finds_keypoints():
    """The feature of a patch is how near it lies to each keypoint of each object of its frame."""
    c = TASKS["keypoints"].config(resolution=96, limit=6)
    pairs, things = sets_things.open_pairs(c)
    assert len(pairs) >= 6 and all(pair["a"][0] == pair["b"][0] for pair in pairs)
    assert torch.equal(things.load((2, 1)), torch.from_numpy(moving(2, 96)[1].image).permute(2, 0, 1))

    def nearness(things, i):
        (index, frame), (y, x) = things.names[i], np.mgrid[:48, :48] * 2 + 1
        points = moving(index, 96)[frame].keypoints[..., :2].reshape(-1, 2)
        return np.stack([np.exp(-((x - px) ** 2 + (y - py) ** 2) / 8) for px, py in points] + [0 * x + 1e-3], -1)

    found, lost = (keypoints.run((pairs, things), Oracle(nearness, noise), c) for noise in (False, True))
    assert found["recall_middles"] > 85 > 25 > lost["recall_middles"]


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
    return TASKS["spair"].config(data=str(root), resolution=240, workers=0)


def test_spair_folder(tmp_path):
    points = [[10.0, 10.0], [50.0, 30.0]]
    c = spair(tmp_path, [("cat", (60, 40), (60, 40), [0, 0, 59, 39], points, points)])
    c = replace(c, out=str(tmp_path / "out"))
    found = keypoints.run(sets_things.open_pairs(c), Frozen(Pixels(), TASKS["spair"], c), c)
    assert found == dict(recall=100.0, recall_middles=100.0, n_pairs=1, n_keypoints=2)   # itself
    with Image.open(tmp_path / "out/spair.png") as file:
        lines = np.asarray(file).astype(int)
    assert lines.shape == (404, 804, 3) and abs(lines[67, 67] - (70, 230, 120)).max() < 5        # a green dot at 10, 10


def found_by_hand(m, other, point, size, other_size, middles):
    """
    Where the feature at a pixel's place lies in the other image: x, y in pixels.

    middles  patch j of n has its middle at (j + 0.5) / n; else, as in Probe3D, it is asked at j / (n - 1), and j / n is
             the answer
    """
    h, w, _ = m.shape
    m, other = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=2, keepdims=True) for x in (m, other))
    x, y = (min(max(p / max(size) * n - 0.5 if middles else p / max(size) * (n - 1), 0), n - 1)
            for p, n in zip(point, (w, h), strict=True))
    asked = sum(max(1 - abs(i - y), 0) * max(1 - abs(j - x), 0) * m[i, j] for i in range(h) for j in range(w))
    _, i, j = max((float(asked @ other[i, j]), i, j) for i in range(len(other)) for j in range(len(other[0])))
    return (j + 0.5 * middles) / w * max(other_size), (i + 0.5 * middles) / h * max(other_size)


def test_right_is_a_tenth_of_the_box_away():
    """The answer is the middle of the patch that is asked for; boxes are 50 pixels, images 100, patches 10."""
    at = np.array([[15.0, 15], [55, 85], [85, 45], [35, 65]])
    off = np.array([[4.95, 0], [-3.5, 3.5], [0, 5.05], [-3.6, -3.6]])                   # 4.95, 4.95, 5.05, 5.09
    pair = dict(a="a", b="b", at=at, bt=at + off, kind="thing", box=50, sides=(100, 100))
    things = sets_things.Things([pair], None)
    oracle = Oracle(lambda things, i: np.eye(100).reshape(10, 10, 100))
    found = keypoints.run(([pair], things), oracle, TASKS["keypoints"].config(resolution=96))
    assert found["recall_middles"] == 50 and found["n_keypoints"] == 4


@pytest.mark.parametrize("middles, score", [(False, "recall"), (True, "recall_middles")])
def test_keypoints_are_the_loop(middles, score, tmp_path, monkeypatch):
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
            answer = found_by_hand(maps[f"{kind}/a{k}.png"], maps[f"{kind}/b{k}.png"], point, size, other,
                                   middles)
            right.setdefault(kind, []).append(math.dist(answer, truth) <= 0.1 * max(box[2] - box[0], box[3] - box[1]))
    oracle = Oracle(lambda things, i: maps[things.names[i]])
    found = keypoints.run(sets_things.open_pairs(c), oracle, c)
    assert found[score] == pytest.approx(100 * np.mean([np.mean(each) for each in right.values()]), abs=1e-9)
    assert 5 < found[score] < 80 and found["recall"] != found["recall_middles"]
    assert found["n_keypoints"] == sum(map(len, right.values()))
    monkeypatch.setattr(sets_things, "OF_CLASS", 2)
    drawn = [[pair["a"] for pair in sets_things.spair_pairs(replace(c, seed=seed))[0]] for seed in (0, 0, *range(9))]
    assert drawn[0] == drawn[1] and {name for names in drawn for name in names} == {
        f"{note[0]}/a{k}.png" for k, note in enumerate(notes)} and {len(names) for names in drawn} == {5}
