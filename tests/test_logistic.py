"""engine/logistic.py: weights and biases are scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from test_classify import problem

from engine import logistic

CPU = torch.device("cpu")


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_fit_is_scikit_learns(n_classes):
    """Weights and biases, whatever was fitted before; of two classes scikit-learn has the difference."""
    (x, y), value = problem(300, 6, n_classes, 1.2), None
    for C in 1e-4, 1e-1, 1e3:
        value = logistic.fit(x, y, n_classes, C, CPU, value)
        exact = LogisticRegression(C=C, max_iter=1000, tol=1e-12).fit(x.double().numpy(), y.numpy())
        ours = (value - value.mean(1, keepdim=True)).T.numpy() * (2 if n_classes == 2 else 1)
        theirs = np.concatenate([exact.coef_, exact.intercept_[:, None]], 1)
        assert np.abs(ours[-len(theirs):] - theirs).max() < 1e-3 * np.abs(theirs).max()        # 3e-4 measured
