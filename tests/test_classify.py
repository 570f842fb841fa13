"""engine/classify.py: control and few shots; random problems for the tests of what classifies."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import run

from engine import classify
from tasks import TASKS, logreg

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


class Few:
    """60 images of 4 classes, the last of one image alone; which of them were looked at."""
    classes, looked = list("abcd"), None

    def __init__(self):
        self.labels = [0] * 20 + [1] * 20 + [2] * 19 + [3]

    def __len__(self):
        return 60

    def label(self, i):
        return self.labels[i]


class Telling:
    """Frozen features: cls is the row in the source, the mean patch its label; row 7 of train cannot be read."""
    device = torch.device("cpu")

    def __init__(self):
        self.asked = {}

    def tokens(self, name, source):
        rows = getattr(source, "rows", range(len(source)))
        self.asked[name.partition(",")[0]] = list(rows)
        kept = [k for k, row in enumerate(rows) if row != 7 or name == "val"]
        cls = torch.tensor([[float(rows[k])] for k in kept])
        labels = torch.tensor([source.label(k) for k in kept])
        columns = dict(cls=cls, patches=labels[:, None].float())
        return SimpleNamespace(rows=kept, labels=labels,
                               table=lambda *names: torch.cat([columns[name] for name in names], 1))


def test_shots_are_of_each_class_and_scores_alone_are_averaged():
    """Five draws, nothing else is looked at; settings are listed."""
    frozen, seen = Telling(), []

    def score(part, val, rest):
        seen.append((part[0][:], part[1], rest))
        return dict(size=len(seen), lr=0.1 * len(seen))

    found, val = classify.classify((Few(), Few()), frozen, TASKS["knn"].config(shots=3), score, patches=True,
                                   settings=("lr",))
    n_train = len(seen[-1][1])
    assert found.pop("lr") == [0.1 * k for k in (1, 2, 3, 4, 5)]
    assert found == dict(size=3, std_size=2**0.5, chance=25, n_train=n_train, n_val=60)
    drawn = set()
    for x, labels, rest in seen:
        assert labels.tolist() == x[:, 1].tolist() == [Few().labels[int(row)] for row in x[:, 0]] and rest is None
        assert all(2 <= n <= 3 for n in labels.bincount()[:3]) and labels.bincount()[3] == 1
        drawn |= set(x[:, 0].int().tolist())
    assert len({tuple(x[:, 0].tolist()) for x, *_ in seen}) == 5
    assert set(frozen.asked["train"]) == drawn | ({7} & set(frozen.asked["train"])) and len(drawn) < 45


def test_what_is_held_out_is_in_no_draw():
    """1 % of each class, one at least, of all of train and never a class's only image."""
    frozen, seen = Telling(), []

    def score(part, val, rest):
        seen.append((set(part[0][:][:, 0].tolist()), rest[0][:].flatten().tolist(), rest[1].tolist()))
        return {}

    classify.classify((Few(), Few()), frozen, TASKS["logreg"].config(shots=1), score, pick=True)
    assert all(labels == [0, 1, 2] and len(part) == 4 and not part & set(rows) for part, rows, labels in seen)
    assert len({tuple(rows) for _, rows, _ in seen}) == 1
    held = classify.held_out(np.repeat([0, 1], (450, 30)), 0.01, 0)
    assert (held[:450].sum(), held[450:].sum()) == (4, 1)


class Two:
    """1000 images of each of two classes."""

    def __len__(self):
        return 2000

    def label(self, i):
        return i % 2


def test_a_hundredth_of_each_class_is_held_out_of_five_draws():
    chosen, (*draws, held) = classify.drawn(Two(), TASKS["logreg"].config(shots=3), True)
    assert [len(rows) for rows in draws] == [6] * 5 and len(held) == 20 and len(chosen) <= 50
    assert sum(chosen.label(k) for k in held) == 10


def test_rows_that_fit_are_held_and_others_are_read(monkeypatch):
    x = torch.arange(12.0).view(6, 2)
    part = classify.Part(x, [4, 0, 2])
    assert part.shape == (3, 2) and part[1:].tolist() == [[0, 1], [4, 5]]
    assert torch.cat(list(part.split(2))).tolist() == [[8, 9], [0, 1], [4, 5]]
    assert torch.equal(classify.held(part, torch.device("cpu")), x[[4, 0, 2]])
    monkeypatch.setattr(classify, "ROOM", 23)
    assert classify.held(part, torch.device("cpu")) is part


def photo(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((30, 40, 3), colour, np.uint8)).save(path)


@pytest.mark.parametrize("task, metric, words", [("knn", "top1_k10", []), ("linear", "top1", ["--iterations", 100]),
                                                 ("logreg", "top1", []), ("retrieval", "map", [])])
def test_control_is_at_chance(task, metric, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(logreg, "PENALTIES", logreg.PENALTIES[::8])
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
