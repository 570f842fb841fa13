"""
The most similar of many points:  nearest_points, of keypoints and of views.
"""

import torch
import torch.nn.functional as F


def nearest_points(x, y):
    """For each row of x the row of y of the largest cosine:  n D, m D -> cosine n, index n"""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    found = [(part @ y.T).max(1) for part in x.split(1024)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])
