"""tasks/linear.py: agrees with scikit-learn, picks its rate on val, is a function of its seed; its test sets."""

from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from test_classify import problem, shuffled

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


def test_linear_is_a_function_of_its_seed():
    train, val = shuffled(problem(100, 6, 4, 1)), problem(100, 6, 4, 1, seed=1)
    results = [linear.sweep(train, val, None, 4, replace(SHORT, seed=seed), CPU)[0] for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]
