"""tasks/logreg.py: scikit-learn's answer at the C that it picks."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score
from test_classify import problem

from tasks import TASKS, logreg

C = TASKS["logreg"].config()


def test_logreg_is_scikit_learns_at_the_c_it_picks():
    train, val = problem(300, 6, 3, 1.2), problem(900, 6, 3, 1.2, seed=1)
    found = logreg.regress(train, val, 3, C)
    assert found["C"] in 10 ** np.linspace(-6, 5, 45)
    exact = LogisticRegression(C=found["C"], max_iter=1000, tol=1e-12).fit(train[0].double().numpy(), train[1])
    guess = exact.predict(val[0].double().numpy())
    assert found["top1"] == pytest.approx(100 * (guess == val[1].numpy()).mean())
    assert found["mean_per_class"] == pytest.approx(100 * recall_score(val[1], guess, average="macro"))
    assert 50 < found["top1"] < 95
