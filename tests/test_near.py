"""Neighbours and copies, beside plain numpy; and the threshold at which copies are told."""

import numpy as np
import pytest
import torch

from engine import near
from engine.near import alike, calibrate, cells_of, components, copies, groups_of, nearest

CPU = torch.device("cpu")


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float16)


def vectors(n=300, d=12, seed=0):
    return unit(np.random.default_rng(seed).normal(size=(n, d)))


def test_neighbours_are_those_of_numpy(monkeypatch):
    monkeypatch.setattr(near, "BLOCK", 32)
    x = vectors()
    rows, cosines = nearest(x[:70], x, 5, CPU)
    exact = x[:70].astype(np.float64) @ x.astype(np.float64).T
    want = np.argsort(-exact, axis=1, kind="stable")[:, :5]
    assert (rows == want).all() and np.abs(cosines - np.take_along_axis(exact, want, 1)).max() < 1e-6
    assert (rows[:, 0] == np.arange(70)).all()


def test_of_equal_neighbours_the_first_row_comes_first(monkeypatch):
    monkeypatch.setattr(near, "BLOCK", 4)
    x = np.repeat(vectors(3), 20, axis=0)
    assert nearest(x[:1], x, 7, CPU)[0].tolist() == [[*range(7)]]


def test_pairs_are_all_those_above(monkeypatch):
    monkeypatch.setattr(near, "BLOCK", 64)
    x = vectors()
    exact = x.astype(np.float64) @ x.astype(np.float64).T
    want = np.argwhere(np.triu(exact > 0.6, 1))
    assert len(want) > 100 and (alike(x, 0.6, 0, CPU) == want).all()


def test_of_many_vectors_those_that_share_a_cell(monkeypatch):
    """planted copies lie in the same cells as what they are copies of"""
    monkeypatch.setattr(near, "ALL", 100)
    monkeypatch.setattr(near, "CELL", 100)
    x = vectors(400)
    x = np.concatenate([x, unit(x[:80] + 0.02 * np.random.default_rng(1).normal(size=(80, 12)))])
    cells = cells_of(x, 10, 0, CPU)
    assert np.bincount(np.concatenate(cells), minlength=480).tolist() == [2] * 480
    assert all((np.diff(rows) > 0).all() for rows in cells)
    found = set(map(tuple, alike(x, 0.97, 0, CPU).tolist()))
    assert len({(i, 400 + i) for i in range(80)} - found) <= 1                             # measured: 0


def test_a_chain_hangs_together():
    pairs = np.array([[5, 7], [1, 5], [2, 3], [8, 9], [3, 8]])
    assert components(10, pairs).tolist() == [0, 1, 2, 2, 4, 1, 6, 1, 2, 2]
    long = np.stack([np.arange(99), np.arange(1, 100)], 1)
    assert (components(100, np.random.default_rng(0).permutation(long)) == 0).all()
    assert components(3, np.empty((0, 2), np.int64)).tolist() == [0, 1, 2]


def test_the_most_central_of_a_component_comes_first():
    x = unit(np.array([[1, 0], [1, 0.3], [1, 0.6], [-1, 0], [0, 1]], float))
    assert [rows.tolist() for rows in groups_of(x, np.array([0, 0, 0, 3, 4]))] == [[1, 0, 2]]
    assert [rows.tolist() for rows in groups_of(x, np.array([0, 1, 1, 0, 4]))] == [[0, 3], [1, 2]]
    assert groups_of(x, np.arange(5)) == []


def test_copies_of_a_picture():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    found = copies(np.random.default_rng(1), image)
    assert {kind: each.shape for kind, each in found.items()} == dict(
        jpeg=(40, 60, 3), cropped=(32, 48, 3), halved=(20, 30, 3), mirrored=(40, 60, 3), recoloured=(40, 60, 3))
    assert (found["mirrored"] == image[:, ::-1]).all()
    assert not any((each == image).all() for kind, each in found.items() if each.shape == image.shape)
    again = copies(np.random.default_rng(1), image)
    assert all((found[kind] == again[kind]).all() for kind in found)


def test_the_threshold_parts_copies_from_others():
    same = dict(jpeg=np.array([0.99, 0.98, 0.97, 0.96]), cropped=np.array([0.9, 0.85, 0.8, 0.4]))
    others = np.array([0.3, 0.5, 0.6, 0.7])
    found = calibrate(same, others)
    assert 0.7 < found.threshold < 0.8 and found.recall == dict(jpeg=1, cropped=0.75) and found.others == 0
    crowded = calibrate(same, np.concatenate([others, [0.999]]))      # a real copy in the pile moves nothing
    assert crowded.threshold == pytest.approx(found.threshold) and crowded.others == 0.2 and crowded.wrong == 0


def test_real_copies_are_told_from_pictures_that_are_alike():
    """of 100 pictures 30 have a real copy, as near as copies that were made; 5 are of one blue sky, less near"""
    rng = np.random.default_rng(0)
    same = dict(jpeg=rng.uniform(0.9, 1, 1000))
    others = np.concatenate([rng.uniform(0.9, 1, 30), rng.uniform(0.905, 0.915, 5), rng.uniform(0, 0.5, 65)])
    found = calibrate(same, others)
    assert 0.91 < found.threshold < 0.97 and found.recall["jpeg"] > 0.3 and found.wrong < 0.03   # 0.96, 0.42, 0.015


def test_how_near_copies_are(monkeypatch):
    """of vectors that are an image's mean colour and its first row"""
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (3, 40, 50), dtype=np.uint8)) for _ in range(9)]

    def embed(some):
        return np.stack([np.concatenate([x.float().mean((1, 2)), x[:, 0, :9].flatten().float()]) for x in some])
    x, seen = unit(embed(images)), []
    found, others = near.try_copies(x, lambda i: seen.append(int(i)) or images[i], embed, 0, CPU)
    assert seen == [*range(9)] and list(found) == ["jpeg", "cropped", "halved", "mirrored", "recoloured"]
    flipped = embed([image.flip(2) for image in images])
    exact = [a.astype(np.float64) @ b / np.linalg.norm(b) for a, b in zip(x, flipped, strict=True)]
    assert np.abs(found["mirrored"] - exact).max() < 1e-6                # measured: 6e-8
    cosines = x.astype(np.float64) @ x.astype(np.float64).T
    np.fill_diagonal(cosines, -1)
    assert np.abs(others - cosines.max(1)).max() < 1e-6
    monkeypatch.setattr(near, "TRIED", 4)
    few, _ = near.try_copies(x, images.__getitem__, embed, 0, CPU)
    assert len(few["jpeg"]) == 4
