"""What is kept and gained, which step is the best, and that nothing is handed back that has gained nothing."""

import math

import pytest
import torch

from data import Shapes
from engine import adapt


def rows(*looks):
    return [dict(step=step, kept=kept, retrieval=retrieval) for step, kept, retrieval in looks]


@pytest.mark.parametrize("looks, step", [
    ([(0, 100, 50)], 0),
    ([(0, 100, 50), (10, 99, 60)], 10),
    ([(0, 100, 50), (10, 99, 60), (20, 99, 58)], 10),              # not the last one but the best
    ([(0, 100, 50), (10, 99, 58.7)], 0),                           # 2 standard errors of two shares of 256 are 8.8
    ([(0, 100, 50), (10, 99, 59)], 10),
    ([(0, 100, 50), (10, 97.9, 90)], 0),                           # ruined what it had
    ([(0, 100, 50), (10, 97.9, 90), (20, 98, 70)], 20),
    ([(0, 100, 50), (10, 100, 10)], 0),
    ([(0, 100, 100), (10, 100, 100)], 0),                          # nothing left to gain
])
def test_the_best_step_gained_for_sure_and_kept_enough(looks, step):
    assert adapt.best(rows(*looks), 256)["step"] == step


def test_fewer_photos_are_less_sure():
    looks = rows((0, 100, 50), (10, 99, 60))
    assert adapt.best(looks, 256) is looks[1] and adapt.best(looks, 100) is looks[0]


def test_photos_are_held_out_once_for_all():
    source = Shapes(45)
    train, held = adapt.apart(source, 0)
    assert len(held) == 4 and sorted(train.rows + held.rows) == list(range(45))
    assert adapt.apart(source, 0)[1].rows == held.rows != adapt.apart(source, 1)[1].rows
    assert train.digest() != held.digest() and held.name(0) == f"shapes {held.rows[0]}"
    assert len(adapt.apart(Shapes(5000), 0)[1]) == adapt.HELD
    with pytest.raises(ValueError, match="holds 19 images; .* at least 20"):
        adapt.apart(Shapes(19), 0)


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


def test_retrieval_counts_both_ways():
    a = torch.eye(4)
    assert adapt.retrieval(a, a) == 100
    assert adapt.retrieval(a, a[[1, 0, 2, 3]]) == 50
    b = torch.tensor([[1.0, 0, 0, 0], [0.8, 0.6, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert adapt.retrieval(a, b) == 50 * (1 + 0.75)                # the crop at 0.8, 0.6 is nearer to photo 0


def test_neighbours_leave_the_photo_itself_out():
    x = torch.tensor([[1, 0.1], [1, 0.0], [1, -0.1], [0.1, 1], [0.0, 1], [-0.1, 1]])
    assert adapt.neighbours(x, [0, 0, 0, 1, 1, 1]) == 0            # of 5 neighbours 3 are the others
    many = torch.cat([x[:1].repeat(8, 1), x[3:4].repeat(8, 1)]) + torch.randn(
        16, 2, generator=torch.Generator().manual_seed(0)) / 100
    assert adapt.neighbours(many, [0] * 8 + [1] * 8) == 100
    assert math.isclose(adapt.neighbours(many, [0] * 7 + [1] + [1] * 8), 100 * 15 / 16)
