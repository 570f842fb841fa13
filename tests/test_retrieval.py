"""tasks/retrieval.py against scikit-learn and plain loops over queries; the sets' layouts."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score
from test_evaluate import run

import evaluate
from tasks import retrieval


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
    found = retrieval.levels(queries, images, truths)
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


def test_amstertime_folder(tmp_path, capsys):
    for name, colour in zip("abc", (RED, GREEN, BLUE), strict=True):
        photo(tmp_path / f"new/{name}.png", colour)
        photo(tmp_path / f"old/{name}.jpg", colour)
    found = run(capsys, "--task", "retrieval", "--weights", "pixels", "--data", tmp_path, "--resolution", 32)
    assert found["map"] == found["map_new_to_old"] == found["map_old_to_new"] == 100 and found["n_queries"] == 3


@pytest.mark.parametrize("paths, says", [
    (["cat/1.jpg", "cat/2.jpg"], "has 1 folders of images, .*; retrieval wants at least 2 classes"),
    (["1.jpg", "2.jpg"], "has 0 folders of images"),
    (["cat/1.jpg", "dog/2.jpg", "3.jpg"], "has 2 folders of images, in which there should be all"),
    (["cat/1.jpg", "dog/2.jpg"], "no image of .* has another one of its class")])
def test_one_class_is_no_retrieval(paths, says, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluate, "load", lambda *words: 1 / 0)
    for path in paths:
        photo(tmp_path / "photos" / path, RED)
    with pytest.raises(ValueError, match=says):
        evaluate.main(["--task", "retrieval", "--weights", "pixels", "--data", f"{tmp_path}/photos", "--device", "cpu"])


@pytest.mark.parametrize("lists", ["", "ground_truth/"])
def test_met_is_a_task_of_its_own(lists, tmp_path):
    (tmp_path / lists).mkdir(exist_ok=True)
    (tmp_path / f"{lists}MET_database.json").write_text("[]")
    with pytest.raises(ValueError, match="is Met, which has a task of its own; write --task met"):
        evaluate.main(["--task", "retrieval", "--weights", "pixels", "--data", str(tmp_path), "--device", "cpu"])
