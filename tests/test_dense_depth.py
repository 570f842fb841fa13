"""Depth in dense.py: bins and loss against loops, an oracle against noise, and the layouts that people have."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_dense import Oracle, Source, photo, write

import dense
from evaluate import EvaluateConfig


def test_decode_is_the_mean_of_the_bins():
    logits = torch.tensor(np.random.default_rng(0).normal(size=(256, 2, 3)))
    found = dense.decode(logits, 10.0)
    for y in range(2):
        for x in range(3):
            weights = [max(v, 0) + 0.1 for v in logits[:, y, x].tolist()]
            bins = [0.001 + k * (10 - 0.001) / 255 for k in range(256)]
            exact = sum(w * b for w, b in zip(weights, bins, strict=True)) / sum(weights)
            assert found[y, x].item() == pytest.approx(exact, rel=1e-6)


def test_loss_is_the_equation_on_known_pixels():
    rng = np.random.default_rng(0)
    logits, truth = torch.tensor(rng.normal(size=(256, 4, 5))), rng.uniform(-3, 14, (4, 5)).clip(0)
    depth = dense.decode(logits, 10.0).numpy()
    pairs = zip(depth.ravel(), truth.ravel(), strict=True)
    g = [math.log(d + 1e-3) - math.log(t + 1e-3) for d, t in pairs if 0 < t <= 10]
    mean = sum(g) / len(g)
    exact = math.sqrt(sum((v - mean) ** 2 for v in g) / (len(g) - 1) + 0.15 * mean**2)
    ours, = dense.depth_loss([logits], [torch.tensor(truth)], 10.0)
    assert len(g) < 20 and ours.item() == pytest.approx(exact, rel=1e-6)


def test_oracle_knows_depth_and_noise_does_not(monkeypatch):
    """A depth for each image, one of eight; the oracle names it."""
    def rooms(n, seed):
        picked = np.random.default_rng(seed).integers(1, 9, n)
        return Source([np.full((16, 16), depth, np.float32) for depth in picked])

    def name(truth):
        return np.eye(9)[truth[::16, ::16].astype(int)]

    monkeypatch.setattr(dense, "open_depth", lambda c: (rooms(64, 0), rooms(20, 1), dense.Depths()))
    c = EvaluateConfig(task="depth", resolution=16, iterations=100, lr=0.1)
    found = dense.depth(Oracle(name), c)
    assert found["rmse"] < 0.4 and found["delta1"] > 0.95 and 1.5 < found["chance_rmse"] < 3
    assert dense.depth(Oracle(name, noise=True), c)["rmse"] > 1.3
    assert dense.depth(Oracle(name), replace(c, control=True))["rmse"] > 1.3


@pytest.mark.parametrize("task, rows, cols", [("nyu", (45, 471), (41, 601)), ("depth", (0, 480), (0, 640))])
def test_scored_pixels(task, rows, cols):
    truth = np.full((480, 640), 3, np.float32)
    truth[100, 100], truth[101, 101] = 0, 10
    found = dense.scored_pixels(truth, dense.DEPTH[task]).numpy()
    exact = np.zeros((480, 640), bool)
    exact[slice(*rows), slice(*cols)] = True
    exact[100, 100] = exact[101, 101] = False
    np.testing.assert_array_equal(found, exact)


def test_folder_and_lists(tmp_path):
    folder, lists = tmp_path / "folder", tmp_path / "lists"
    for split in "train", "test":
        for i in 3, 1:
            write(folder / split / f"rgb_{i}.jpg", photo())
            write(folder / split / f"depth_{i}.png", np.full((40, 60), 1000 * i, np.uint16))
        write(lists / "input/day/0.jpg", photo(0, (400, 1300)))
        write(lists / "gt_depth/drive/0.png", np.full((400, 1300), 512, np.uint16))
        (lists / f"kitti_eigen_{split}.txt").write_text("day/0.jpg drive/0.png 721.5\nday/1.jpg None 721.5\n")
    train, val, form = dense.open_depth(EvaluateConfig(task="nyu", data=str(folder)))
    assert [train.truth(i)[0, 0] for i in (0, 1)] == [1, 3] and len(val) == 2 and form.top == 10
    train, val, form = dense.open_depth(EvaluateConfig(task="kitti", data=str(lists)))
    assert len(train) == len(val) == 1 and form.top == 80
    assert train.truth(0).shape == (352, 1216) and train.image(0).shape == (3, 352, 1216) and train.truth(0).max() == 2


def test_lower_middle_is_kittis_crop():
    array = np.arange(375 * 1242).reshape(375, 1242)
    np.testing.assert_array_equal(dense.lower_middle(array, (352, 1216)), array[23:, 13:1229])


def test_images_without_depth_are_named(monkeypatch):
    rooms = Source([np.full((16, 16), 3, np.float32)] * 4), Source([np.zeros((16, 16), np.float32)])
    monkeypatch.setattr(dense, "open_depth", lambda c: (*rooms, dense.Depths()))
    oracle = Oracle(lambda truth: np.eye(9)[truth[::16, ::16].astype(int)])
    c = EvaluateConfig(task="depth", resolution=16, iterations=2)
    with pytest.raises(ValueError, match="val image 0 has no known depth below 10.0 m; leave it out"):
        dense.depth(oracle, c)
    monkeypatch.setattr(dense, "open_depth", lambda c: (*rooms[::-1], dense.Depths()))
    with pytest.raises(ValueError, match="no train image has a known depth below 10.0 m"):
        dense.depth(oracle, c)
