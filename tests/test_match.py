"""engine/match.py: the most similar of many points, by a loop."""

import numpy as np
import torch

from engine.match import nearest_points


def test_nearest_points_are_the_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1500, 4)), rng.normal(size=(30, 4))
    cosine, index = nearest_points(torch.tensor(x), torch.tensor(y))
    for i in range(0, 1500, 97):
        each = [a @ x[i] / np.linalg.norm(a) / np.linalg.norm(x[i]) for a in y]
        assert index[i] == np.argmax(each) and abs(cosine[i] - max(each)) < 1e-12
