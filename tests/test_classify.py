"""engine/classify.py: control and few shots; random problems for the tests of what classifies."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import run

from engine import classify
from tasks import TASKS

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def problem(n, D, n_classes, spread, seed=0):
    """n points around n_classes centres: x n D, labels n; other seeds, same centres."""
    centres = np.random.default_rng(99).normal(size=(n_classes, D))
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    return torch.tensor(centres[labels] + spread * rng.normal(size=(n, D))).float(), torch.tensor(labels)


def shuffled(features, seed=0):
    x, labels = features
    return x, labels[torch.tensor(np.random.default_rng(seed).permutation(len(labels)))]


def test_the_mean_patch_stands_beside_the_class_token():
    tokens = SimpleNamespace(cls=torch.ones(3, 2), patches=torch.zeros(3, 4), labels=torch.tensor([0, 1, 1]))
    for patches, row in (False, [1.0, 1]), (True, [1.0, 1, 0, 0, 0, 0]):
        x, labels = classify.columns(tokens, patches)
        assert x.tolist() == [row] * 3 and labels.tolist() == [0, 1, 1]


def test_shots_are_of_each_class_and_their_scores_are_averaged():
    train, seen = problem(60, 3, 4, 1), []

    def score(part, val):
        seen.append(part)
        return dict(size=len(seen))

    found = classify.classify(train, train, 4, TASKS["knn"].config(shots=3), score)
    assert found == dict(size=3, std_size=2**0.5, chance=25, n_train=12, n_val=60)  # 1, 2, 3, 4, 5
    for x, labels in seen:
        assert labels.bincount().tolist() == [3] * 4 and x.shape == (12, 3)
    assert len({tuple(x.flatten().tolist()) for x, _ in seen}) == 5                 # five draws


def photo(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((30, 40, 3), colour, np.uint8)).save(path)


@pytest.mark.parametrize("task, metric, words", [("knn", "top1_k10", []), ("linear", "top1", ["--iterations", 100]),
                                                 ("logreg", "top1", []), ("retrieval", "map", [])])
def test_control_is_at_chance(task, metric, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split in "train", "val":
        for name, colour in zip("abcd", (RED, GREEN, BLUE, (200, 200, 0)), strict=True):
            for i in range(15):
                photo(tmp_path / f"{split}/{name}/{i}.png", np.add(colour, i))
    words = ["--task", task, "--weights", "pixels", "--data", tmp_path, "--resolution", 32, *words]
    plain, found = run(capsys, *words), run(capsys, *words, "--control")
    assert plain[metric] == 100 and found["control"] and 20 < found["chance"] < 30
    assert abs(found[metric] - found["chance"]) <= 25


def test_few_shots(capsys):
    """One draw of five is not another; with as many images as there are, all draws are one."""
    words = ["--task", "knn", "--weights", "pixels", "--limit", 60]
    found, all_of_them = run(capsys, *words, "--shots", 2), run(capsys, *words, "--shots", 60)
    assert 20 <= found["n_train"] <= 24 and found["std_top1_k10"] > 0 and all_of_them["n_train"] == 60
    assert all_of_them["std_top1_k10"] == 0 and all_of_them["top1_k10"] == run(capsys, *words)["top1_k10"]
