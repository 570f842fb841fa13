"""tasks/knn.py: the vote against a loop."""

import numpy as np
import pytest
import torch
from test_classify import problem, shuffled

from tasks.knn import vote

CPU = torch.device("cpu")


def knn_by_hand(train, val, n_classes, ks, temperature):
    """The facts' words: softmax over the K largest similarities, then the first k of them vote."""
    unit = [[v / np.sqrt((v * v).sum()) for v in split[0].double().numpy()] for split in (train, val)]
    K, right = max(ks), {f"top{top}_k{k}": 0 for k in ks for top in (1, 5)}
    for query, truth in zip(unit[1], val[1].tolist(), strict=True):
        near = sorted(zip((float(query @ b) for b in unit[0]), train[1].tolist(), strict=True), reverse=True)[:K]
        total = sum(np.exp(s / temperature) for s, _ in near)
        for k in ks:
            score = [0.0] * n_classes
            for s, y in near[:k]:
                score[y] += np.exp(s / temperature) / total
            ranked = sorted(range(n_classes), key=lambda y: -score[y])
            right[f"top1_k{k}"] += ranked[0] == truth
            right[f"top5_k{k}"] += truth in ranked[:5]
    return {name: 100 * count / len(val[1]) for name, count in right.items()}


@pytest.mark.parametrize("ks, temperature", [((10, 20, 100, 200), 0.07), ((1, 3, 7), 1.0)])
def test_knn_is_the_loop(ks, temperature):
    train, val = problem(230, 6, 7, 1.5), problem(300, 6, 7, 1.5, seed=1)
    copies = [t.clone() for t in (*train, *val)]
    ours = vote(train, val, None, 7, CPU, ks, temperature)
    assert ours == pytest.approx(knn_by_hand(train, val, 7, ks, temperature))
    assert len(set(ours.values())) > 1 and all(20 < value < 99.9 for value in ours.values())  # a problem that tells
    assert all(torch.equal(a, b) for a, b in zip(copies, (*train, *val), strict=True))


def test_10_20_100_and_200_vote_with_a_temperature_of_007():
    """Who says nothing else gets these; a bank whose nearest two outvote three others by 1.1, at 0.07."""
    train, val = problem(230, 6, 7, 1.5), problem(60, 6, 7, 1.5, seed=1)
    assert vote(train, val, None, 7, CPU) == pytest.approx(knn_by_hand(train, val, 7, (10, 20, 100, 200), 0.07))
    for far, wins in (0.034, True), (0.022, False):                              # 0.07 ln 1.5 = 0.0284: 2 e^x is 3
        cosines = torch.tensor([0.9] * 2 + [0.9 - far] * 3)
        bank = torch.stack([cosines, (1 - cosines**2).sqrt()], 1), torch.tensor([0, 0, 1, 1, 1])
        asked = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        assert vote(bank, asked, None, 2, CPU) == dict(top1_k5=100.0 * wins)


def test_knn_clips_k_to_the_bank_and_ignores_length():
    train, val = problem(15, 8, 3, 0.01), problem(30, 8, 3, 0.01, seed=1)
    assert vote(train, val, None, 3, CPU) == dict(top1_k10=100, top1_k15=100)
    train[0][::2] *= 1000
    assert vote(train, val, None, 3, CPU) == dict(top1_k10=100, top1_k15=100)


def test_knn_of_shuffled_labels_is_at_chance():
    train, val = problem(1000, 8, 4, 0.1), problem(1000, 8, 4, 0.1, seed=1)
    assert min(vote(train, val, None, 4, CPU).values()) == 100
    found = vote(shuffled(train), shuffled(val, 1), None, 4, CPU)
    assert all(19 < value < 31 for value in found.values())
