"""tasks/met.py against scikit-learn and plain loops over queries; exhibits among distractors."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA
from test_evaluate import run
from test_retrieval import unit

from tasks import met


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
