"""tasks/linear.py: agrees with scikit-learn, picks its rate on val, is a function of its seed; its test sets."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from test_classify import problem, shuffled

from engine import chunks, features
from engine.features import Frozen, Pixels
from tasks import TASKS, linear

CPU = torch.device("cpu")
SHORT = TASKS["linear"].config(iterations=200, linear_batch=128)


def test_rates_are_the_papers():
    assert pytest.approx([1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]) == linear.RATES


def test_linear_on_separable_and_on_shuffled():
    train, val = problem(600, 8, 4, 0.1), problem(600, 8, 4, 0.1, seed=1)
    assert linear.sweep(train, val, None, 4, SHORT, CPU)[0]["top1"] == 100
    found = linear.sweep(shuffled(train), shuffled(val, 1), None, 4, SHORT, CPU)[0]
    assert 19 < found["top1"] < 34 and found["lr"] in linear.RATES                            # the best of 13 on 600


def test_linear_agrees_with_scikit_learn():
    train, val = problem(600, 6, 4, 1.2), problem(2000, 6, 4, 1.2, seed=1)
    x, y = (split[0].numpy() for split in (train, val))
    exact = 100 * LogisticRegression(C=1e4, max_iter=1000).fit(x, train[1]).score(y, val[1])
    ours = linear.sweep(train, val, None, 4, replace(SHORT, iterations=1500), CPU)[0]["top1"]
    assert 50 < exact < 95 and abs(ours - exact) < 2


def test_val_picks_the_rate(monkeypatch):
    train, val = problem(600, 6, 4, 1.2), problem(600, 6, 4, 1.2, seed=1)
    for rates in [1e-9, 0.01, 1e4], [0.01, 1e4, 1e-9]:
        monkeypatch.setattr(linear, "RATES", rates)
        found = linear.sweep(train, val, None, 4, SHORT, CPU)[0]
        assert found["lr"] == 0.01 and found["top1"] > 60
        assert linear.sweep(train, shuffled(val), None, 4, SHORT, CPU)[0]["top1"] < 40     # val is only looked at


def test_sweep_is_sgd_by_hand(monkeypatch):
    """From start values of 0.01, momentum 0.9, a cosine to 0, rates times 96 / 256; all samples in every step."""
    monkeypatch.setattr(linear, "RATES", [0.5])
    x, y = problem(96, 2000, 4, 1.2)
    x = x / 40
    heads = (linear.sweep((x, y), (x, y), None, 4, replace(SHORT, iterations=n, linear_batch=96), CPU)[1].linear
             for n in (0, 12))
    start, found = ([value.detach().double().numpy() for value in (head.weight.T, head.bias)] for head in heads)
    (W, b), truth, X, speed = start, np.eye(4)[y], x.double().numpy(), [0, 0]
    assert W.std() == pytest.approx(0.01, rel=0.03) and not b.any()
    for step in range(12):
        logits = X @ W + b
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        rate = 0.5 * 96 / 256 * (1 + np.cos(np.pi * step / 12)) / 2
        speed = [0.9 * v + g for v, g in zip(speed, (X.T @ (p - truth) / 96, (p - truth).mean(0)), strict=True)]
        W, b = W - rate * speed[0], b - rate * speed[1]
    np.testing.assert_allclose(found[0], W, atol=2e-7)                                         # measured 2e-8
    np.testing.assert_allclose(found[1], b, atol=2e-7)
    assert np.abs(W - start[0]).max() > 0.02


def test_linear_is_a_function_of_its_seed():
    train, val = shuffled(problem(100, 6, 4, 1)), problem(100, 6, 4, 1, seed=1)
    results = [linear.sweep(train, val, None, 4, replace(SHORT, seed=seed), CPU)[0] for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("side, margin", [(80, True), (224, True), (256, True), (512, False), (768, False)])
def test_the_margin_is_the_released_codes_at_224_and_none_from_512_on(side, margin):
    """256/224 of the side, or the side; of a picture that is bright but for a frame of 1/25 of its side."""
    image = torch.full((3, 1024, 1024), 100, dtype=torch.uint8)
    image[:, 40:-40, 40:-40] = 200
    (found,) = TASKS["linear"].view_at(side)(image, side, 16)
    assert found.shape == (3, side, side) and (found[:, side // 2].min() > 190) == margin


def test_corruptions_are_seen_whole(tmp_path, monkeypatch):
    """They are stored as crops of 224: what the network sees of one at 224 is the file, pixel by pixel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    for root in "train", "val", "c/fog/1", "c/fog/2", "c/fog/3", "c/fog/4", "c/fog/5":
        for name in "ab":
            (tmp_path / root / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / root / name / "1.png")
    c = TASKS["linear"].config(data=str(tmp_path), tests=f"{tmp_path}/c", resolution=224, workers=0, iterations=1)
    frozen, seen = Frozen(Pixels(), TASKS["linear"], c), {}
    monkeypatch.setattr(frozen, "tokens_of", lambda views: seen.setdefault(len(seen), list(views)) and (
        np.zeros((len(views), 4), np.float32), np.zeros((len(views), 0), np.float32)))
    TASKS["linear"].run(TASKS["linear"].open(c), frozen, c)
    file = torch.from_numpy(pixels).permute(2, 0, 1)
    assert [torch.equal(views[0], file) for views in seen.values()] == [False, False] + [True] * 5


def test_features_of_a_test_set_are_dropped_and_what_was_answered_is_kept(tmp_path, monkeypatch):
    """Five sets, and never more than one of them on disk, if it is not in --cache; the same command asks none again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    for root in "train", "val", *(f"c/fog/{k}" for k in range(1, 6)):
        for k, name in enumerate("ab"):
            (tmp_path / root / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (40 + 100 * k, 9, 9)).save(tmp_path / root / name / "1.png")
    c = TASKS["linear"].config(data=str(tmp_path), tests=f"{tmp_path}/c", resolution=32, workers=0, iterations=9)
    counts, asked = [], []
    write, tokens = features.write, Frozen.tokens
    monkeypatch.setattr(features, "write", lambda path, arrays: write(path, arrays) or counts.append(
        len(list(path.parents[1].glob("*/*.safetensors")))))
    monkeypatch.setattr(Frozen, "tokens", lambda self, name, *args: asked.append(name) or tokens(self, name, *args))
    found = []
    for cache, exact in ("", [3, 4, 5, 6, 7]), (str(tmp_path / "cache"), [4, 6, 8, 10, 12]):
        with chunks.kept(replace(c, cache=cache)) as kept:
            for _ in range(2):
                frozen = Frozen(Pixels(), TASKS["linear"], kept)
                found.append(TASKS["linear"].run(TASKS["linear"].open(kept), frozen, kept))
        assert counts == exact and len(asked) == 9
        counts.clear(), asked.clear()
    assert all(each == found[0] for each in found) and found[0]["n_corruptions"] == 1
