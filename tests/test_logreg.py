"""tasks/logreg.py: scikit-learn's answer at the C that it picks."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score
from test_classify import problem
from test_evaluate import run

from tasks import TASKS, logreg

C, CPU = TASKS["logreg"].config(), torch.device("cpu")


def test_logreg_is_scikit_learns_at_the_c_it_picks(monkeypatch):
    monkeypatch.setattr(logreg, "PENALTIES", logreg.PENALTIES[::4])
    train, val = problem(300, 6, 3, 1.2), problem(900, 6, 3, 1.2, seed=1)
    found = logreg.regress(train, val, None, 3, C, CPU)
    assert found["C"] in 10 ** np.linspace(-6, 5, 45)
    exact = LogisticRegression(C=found["C"], max_iter=1000, tol=1e-12).fit(train[0].double().numpy(), train[1])
    guess = exact.predict(val[0].double().numpy())
    # 0 measured at a C of 1e-5 and more; at 1e-6, where logits differ by 1e-4, three images of 900
    assert found["top1"] == pytest.approx(100 * (guess == val[1].numpy()).mean(), abs=0.5)
    assert found["mean_per_class"] == pytest.approx(100 * recall_score(val[1], guess, average="macro"), abs=0.5)
    assert 50 < found["top1"] < 95


def test_45_penalties_are_tried_on_nine_tenths(monkeypatch):
    """C from 1e-6 to 1e5, evenly in the exponent; of 50 images a class 5 are held out; of equals the first is taken."""
    tried = []
    monkeypatch.setattr(logreg, "fit", lambda x, y, n, C, device, value: tried.append((C, len(x))))
    monkeypatch.setattr(logreg, "answers", lambda x, value, device: torch.zeros(len(x), dtype=torch.long))
    found = logreg.regress(problem(150, 6, 3, 1.2), problem(9, 6, 3, 1.2), None, 3, C, CPU)
    exact = [10 ** (-6 + 0.25 * k) for k in range(45)]
    assert [size for _, size in tried] == [135] * 45 + [150] and found["C"] == pytest.approx(1e-6)
    assert [each for each, _ in tried] == pytest.approx([*exact, 1e-6])


def test_shots_pick_c_by_what_is_held_out_and_are_not_fitted_again(capsys, monkeypatch):
    monkeypatch.setattr(logreg, "PENALTIES", logreg.PENALTIES[::11])
    """One image a class to train on; C by another that no draw has; scores are averaged, C is not."""
    found = run(capsys, "--task", "logreg", "--weights", "pixels", "--limit", 60, "--shots", 1)
    assert found["n_train"] == 12 and found["std_top1"] > 0 and "std_C" not in found
    assert len(found["C"]) == 5 and set(found["C"]) <= set((10 ** np.linspace(-6, 5, 45)).tolist())
