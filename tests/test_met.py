"""tasks/met.py against scikit-learn and plain loops over queries; exhibits among distractors."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from test_evaluate import run
from test_retrieval import unit

from engine.features import Frozen, Pixels
from tasks import TASKS, met


def test_answers_are_the_formula():
    images, queries, ids = unit(30, 4, 0), unit(8, 4, 1), [i % 11 for i in range(30)]
    found, sure = met.answers(*met.nearest(queries, images), ids, 7, 5.0)
    for i, query in enumerate(queries):
        near = sorted(range(30), key=lambda j: -float(images[j] @ query))[:7]  # noqa: B023
        score = {}
        for j in near:
            score[ids[j]] = max(score.get(ids[j], -1), float(images[j] @ query))
        top = max(score, key=score.get)
        total = sum(math.exp(5 * s) for s in score.values()) + 11 - len(score)
        assert found[i] == top and sure[i].item() == pytest.approx(math.exp(5 * score[top]) / total, rel=1e-9)


def test_whitening_is_scikit_learns():
    x, y = unit(200, 6, 0), unit(20, 6, 1)
    ours = met.whitened([x, y])[1]
    exact = PCA(whiten=True).fit(x.numpy()).transform(y.numpy())
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_allclose((ours @ ours.T).numpy(), exact @ exact.T, atol=1e-6)    # signs and order are free


def test_512_dimensions_are_kept():
    """Of 520: those of the largest variance."""
    x = torch.tensor(np.random.default_rng(0).normal(size=(700, 520)) * np.linspace(3, 1, 520))
    (found,) = met.whitened([x])
    exact = PCA(512, whiten=True, svd_solver="full").fit_transform(x.numpy())
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    assert found.shape == (700, 512)
    np.testing.assert_allclose((found[:20] @ found[:20].T).numpy(), exact[:20] @ exact[:20].T, atol=1e-9)


def test_val_picks_one_of_108_settings(monkeypatch):
    """Nine numbers of neighbours, twelve sharpnesses, and the test set is asked with what was picked."""
    tried, answers = [], met.answers
    monkeypatch.setattr(met, "answers", lambda cosine, *rest: tried.append((cosine.shape[1], *rest[2:])) or answers(
        cosine, *rest))
    ids = [i % 11 for i in range(60)]
    found = met.score((unit(60, 4, 0), ids), (unit(8, 4, 1), list(range(8))), (unit(8, 4, 2), list(range(8))))
    exact = {(50, k, t) for k in (1, 2, 3, 5, 7, 10, 15, 20, 50)
             for t in (0.01, 0.1, 1, 5, 10, 15, 20, 25, 30, 50, 100, 500)}
    assert len(tried) == 109 and set(tried) == exact and tried[-1] == (50, found["neighbours"], found["sharpness"])


def test_met_tells_exhibits_from_distractors(tmp_path, capsys):
    rng, colours = np.random.default_rng(0), np.random.default_rng(1).integers(0, 256, (12, 2, 2, 3))
    rows = dict(MET_database=[], valset=[], testset=[])
    for name, ids in ("MET_database", range(8)), ("valset", (*range(6), None, None)), ("testset", (*range(8), None)):
        for k, exhibit in enumerate(ids):
            pixels = colours[9 if exhibit is None else exhibit].repeat(16, 0).repeat(16, 1) + rng.integers(-3, 4)
            path = tmp_path / "images" / name / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
            key = "id" if name == "MET_database" else "MET_id"
            rows[name].append(dict(path=f"{name}/{k}.png") | ({} if exhibit is None else {key: exhibit}))
        (tmp_path / f"{name}.json").write_text(json.dumps(rows[name]))
    words = ["--task", "met", "--weights", "pixels", "--data", tmp_path, "--resolution", 32]
    found, lost = run(capsys, *words), run(capsys, *words, "--control")
    assert found["accuracy"] == found["gap_minus"] == 100 and 80 < found["gap"] <= 100
    assert (found["n_images"], found["n_queries"]) == (8, 9) and lost["accuracy"] < 50
    assert run(capsys, *words[:-2])["resolution"] == 0                                   # as large as they are


def test_met_is_seen_as_large_as_it_is():
    """500 x 300 is 512 x 304, nothing of it black; images of other sizes go through the network beside it, in order."""
    class Photos:
        def __len__(self):
            return 5

        def load(self, i):
            return torch.full((3, (300, 500)[i % 2], (500, 300)[i % 2]), 100 + i, dtype=torch.uint8)

        def label(self, i):
            return i

    seen, task = [], TASKS["met"]
    c = task.config(data="MET", workers=0, batch=2)
    frozen = Frozen(Pixels(), task, replace(c, resolution=task.sides[0]))
    frozen.model.register_forward_pre_hook(lambda *_: 1 / 0)
    thumbnail = frozen.model.thumbnail
    frozen.model.thumbnail = lambda x: (seen.append((tuple(x.shape), x.std((2, 3)).max().item())), thumbnail(x))[1]
    cls = frozen.tokens("database", Photos()).cls
    assert [shape for shape, _ in seen] == [(2, 3, 304, 512), (2, 3, 512, 304), (1, 3, 304, 512)]
    assert max(spread for _, spread in seen) < 1e-3
    exact = [((100 + i) / 255 - 0.485) / 0.229 for i in range(5)]
    assert cls[:, 0].tolist() == pytest.approx(exact, abs=1e-5)
