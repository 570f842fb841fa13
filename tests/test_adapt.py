"""What is kept and gained, which step is the best, and that nothing is handed back that has gained nothing."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import recipes
from data import Shapes, read_image
from engine import adapt


def look(step, kept, *hits):
    return dict(step=step, kept=kept, retrieval=100 * sum(hits) / len(hits), hits=hits)


C = replace(recipes.RECIPES["tiny"], stage="adapt", global_size=32, patch_size=16)
FIRST = look(0, 100, 0.2, 0.4, 0.6, 0.8)
MORE = 0.3, 0.5, 0.7, 0.8             # by .075, with a standard error of .025: 3 of them


@pytest.mark.parametrize("looks, step", [
    ([], 0),
    ([look(10, 99, *MORE)], 10),
    ([look(10, 99, *MORE), look(20, 99, 0.3, 0.4, 0.7, 0.8)], 10),             # not the last one but the best
    ([look(10, 99, *MORE), look(20, 99, 0.4, 0.5, 0.7, 0.8)], 20),
    ([look(10, 99, 0.3, 0.4, 0.7, 0.8)], 0),                                   # by .05, with .029: 1.7 of them
    ([look(10, 99, 1.0, 0.4, 0.6, 0.8)], 0),                                   # one photo alone
    ([look(10, 94.9, 0.9, 0.9, 0.9, 0.9)], 0),                                 # ruined what it had
    ([look(10, 94.9, 0.9, 0.9, 0.9, 0.9), look(20, 95, *MORE)], 20),
    ([look(10, 100, 0.1, 0.3, 0.5, 0.7)], 0),
    ([look(10, 100, 0.2, 0.4, 0.6, 0.8)], 0),
])
def test_the_best_step_gained_for_sure_and_kept_enough(looks, step):
    assert adapt.best([FIRST, *looks])["step"] == step


def test_photos_are_held_out_once_for_all():
    source = Shapes(45)
    train, held = adapt.apart(source, C)
    assert len(held) == 4 and sorted(train.rows + held.rows) == list(range(45))
    assert adapt.apart(source, C)[1].rows == held.rows != adapt.apart(source, replace(C, seed=1))[1].rows
    assert train.digest() != held.digest() and held.name(0) == f"shapes {held.rows[0]}"
    assert len(adapt.apart(Shapes(5000), C)[1]) == adapt.HELD
    with pytest.raises(ValueError, match="holds 19 images; .* at least 20"):
        adapt.apart(Shapes(19), C)


def test_similarities_beside_float64():
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    found = adapt.similarities(x)
    for b in range(3):
        p = x[b].double() / x[b].double().norm(dim=1, keepdim=True)
        pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
        cosines = torch.tensor([float(p[i] @ p[j]) for i, j in pairs], dtype=torch.float64)
        cosines = (cosines - cosines.mean()) / (cosines - cosines.mean()).norm()
        wanted = torch.zeros(5, 5, dtype=torch.float64)
        for (i, j), value in zip(pairs, cosines, strict=True):
            wanted[i, j] = value
        assert (found[b].double() - wanted.flatten()).abs().max() < 1e-6   # measured: 9e-8
    turned = x @ torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1))).Q
    assert (adapt.similarities(turned) * found).sum(-1).min() > 1 - 1e-6   # a rotation loses nothing


def test_retrieval_is_of_each_photo_over_all_pairs_of_its_crops():
    a = torch.eye(3)
    b = F.normalize(torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 1]]), dim=-1)   # of photo 1 nearer to photo 0
    assert adapt.found(torch.stack([a, a], 1)).tolist() == [1, 1, 1]
    # a -> b: all right (photo 1 has .6 with its own, 0 with the others); b -> a: photo 1 says photo 0
    assert adapt.found(torch.stack([a, b], 1)).tolist() == [1, 0.5, 1]
    assert adapt.found(torch.stack([a, a[[1, 0, 2]]], 1)).tolist() == [0, 0, 1]
    assert adapt.found(torch.stack([a, a, a[[1, 0, 2]]], 1)).tolist() == pytest.approx([1 / 3, 1 / 3, 1])


def test_views_are_the_same_in_every_look_and_crops_are_coloured():
    held = adapt.apart(Shapes(45), C)[1]
    once, again = (list(adapt.held_views(C, held, 3)) for _ in range(2))
    assert [len(labels) for *_, labels in once] == [3, 1]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(once, again, strict=True) for k in (0, 1))
    views, crops, labels = once[0]
    assert views.shape == (3, 3, 32, 32) and crops.shape == (3, 4, 3, 32, 32)
    assert labels == [held.label(i) for i in range(3)]
    off = dict.fromkeys(("jitter", "grey", "solarize", "blur_global_1", "blur_global_2"), 0.0)
    plain = next(adapt.held_views(replace(C, **off), held))
    assert torch.equal(plain[0][:3], views) and not torch.equal(plain[1][:3], crops)


def test_what_cannot_be_read_is_left_out(monkeypatch):
    held = adapt.apart(Shapes(45), C)[1]
    load = held.load
    monkeypatch.setattr(held, "load", lambda i: load(i) if i != 1 else read_image("nothing.png"))
    views, crops, labels = next(adapt.held_views(C, held))
    assert len(views) == len(crops) == len(labels) == 3


def test_neighbours_leave_the_photo_itself_out():
    x = torch.tensor([[1, 0.1], [1, 0.0], [1, -0.1], [0.1, 1], [0.0, 1], [-0.1, 1]])
    assert adapt.neighbours(x, [0, 0, 0, 1, 1, 1]) == 0            # of 5 neighbours 3 are the others
    many = torch.cat([x[:1].repeat(8, 1), x[3:4].repeat(8, 1)]) + torch.randn(
        16, 2, generator=torch.Generator().manual_seed(0)) / 100
    assert adapt.neighbours(many, [0] * 8 + [1] * 8) == 100
    assert math.isclose(adapt.neighbours(many, [0] * 7 + [1] + [1] * 8), 100 * 15 / 16)
