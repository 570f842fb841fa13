"""retrieval.py against scikit-learn and plain loops over queries; the sets' layouts; a pickle that runs nothing."""

import builtins
import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score
from test_evaluate import run

import evaluate
import retrieval


def photo(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((30, 40, 3), colour, np.uint8)).save(path)


RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def unit(n, D, seed):
    return F.normalize(torch.tensor(np.random.default_rng(seed).normal(size=(n, D))), dim=1)


def test_same_class_is_scikit_learns_average_precision():
    images, labels = unit(60, 5, 0), [i % 7 for i in range(59)] + [9]                 # nobody else is of class 9
    exact = []
    for i in range(59):
        others = [j for j in range(60) if j != i]
        exact.append(average_precision_score([labels[j] == labels[i] for j in others], (images[others] @ images[i])))
    assert retrieval.same_class(images, images, labels, labels, oneself=True) == pytest.approx(100 * np.mean(exact))


def test_revisited_is_the_loop_over_queries():
    """Junk is deleted from the ranking, levels differ in what is positive; a query without positives is left out."""
    rng, queries, images = np.random.default_rng(0), unit(4, 5, 1), unit(40, 5, 2)
    parts = [np.split(rng.permutation(40)[:18], (6, 12)) for _ in range(3)]
    truths = [dict(zip(("easy", "hard", "junk"), each, strict=True)) for each in parts]
    truths.append(dict(easy=[], hard=[3], junk=[]))
    found = retrieval.revisited(queries, images, truths)
    for level, positive, ignored in (("easy", ["easy"], ["junk", "hard"]), ("medium", ["easy", "hard"], ["junk"]),
                                     ("hard", ["hard"], ["junk", "easy"])):
        exact = []
        for query, truth in zip(queries, truths, strict=True):
            good, bad = ({int(i) for name in names for i in truth[name]} for names in (positive, ignored))
            order = (images @ query).argsort(descending=True, stable=True).tolist()
            ranks = [i for i in order if i not in bad]
            area, hits, before = 0, 0, 1.0
            for n, i in enumerate(ranks, 1):
                hits += i in good
                area += (i in good) * (before + hits / n) / 2 / max(len(good), 1)
                before = hits / n
            exact += [area] if good else []
        assert len(exact) == (3 if level == "easy" else 4)
        assert found[f"map_{level}"] == pytest.approx(100 * np.mean(exact))


def test_revisited_folder(tmp_path, capsys):
    for name, colour in zip("qabc", (RED, RED, GREEN, RED), strict=True):
        photo(tmp_path / f"jpg/{name}.jpg", colour)
    groups = dict(bbx=[0, 0, 9, 9], easy=[0], hard=[], junk=np.array([2]))
    truth = dict(qimlist=["q"], imlist=["a", "b", "c"], gnd=[groups])
    with (tmp_path / "gnd_roxford5k.pkl").open("wb") as file:
        pickle.dump(truth, file, protocol=2)
    found = run(capsys, "--task", "retrieval", "--weights", "pixels", "--data", tmp_path, "--resolution", 32)
    assert (found["map_easy"], found["map_medium"], found["map_hard"]) == (100, 100, 0)
    assert (found["n_queries"], found["n_images"]) == (1, 3)


def test_a_pickle_runs_nothing(tmp_path):
    with (tmp_path / "gnd_roxford5k.pkl").open("wb") as file:
        pickle.dump(dict(gnd=builtins.print), file)
    with pytest.raises(ValueError, match="gnd_.*pkl wants to run builtins.print"):
        evaluate.main(["--task", "retrieval", "--weights", "pixels", "--data", str(tmp_path), "--device", "cpu"])


def test_amstertime_folder(tmp_path, capsys):
    for name, colour in zip("abc", (RED, GREEN, BLUE), strict=True):
        photo(tmp_path / f"new/{name}.png", colour)
        photo(tmp_path / f"old/{name}.jpg", colour)
    found = run(capsys, "--task", "retrieval", "--weights", "pixels", "--data", tmp_path, "--resolution", 32)
    assert found["map"] == found["map_new_to_old"] == found["map_old_to_new"] == 100 and found["n_queries"] == 3


def test_letterbox():
    found = retrieval.letterbox(torch.full((3, 20, 40), 200, dtype=torch.uint8), 32)
    assert found.shape == (3, 32, 32) and found[:, 8:24].min() == 200 and found[:, :8].max() == found[:, 24:].max() == 0

# --------------------------------------------------------------------------------
# Met


def test_answers_are_the_formula():
    images, queries, ids = unit(30, 4, 0), unit(8, 4, 1), [i % 11 for i in range(30)]
    found, sure = retrieval.answers(queries, images, ids, 7, 5.0)
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
    ours = retrieval.whitened([x, y])[1]
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
    words = ["--task", "retrieval", "--weights", "pixels", "--data", tmp_path, "--resolution", 32]
    found, lost = run(capsys, *words), run(capsys, *words, "--control")
    assert found["accuracy"] == found["gap_minus"] == 100 and 80 < found["gap"] <= 100
    assert (found["n_images"], found["n_queries"]) == (8, 9) and lost["accuracy"] < 50
