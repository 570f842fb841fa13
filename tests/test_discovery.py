"""tasks/discovery.py: an oracle's box is found, noise's is not; the cut against scipy, the object by its component."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import eigh
from scipy.ndimage import label
from test_segmentation import Oracle, Source

from tasks import TASKS, discovery


def test_oracle_discovers():
    rng, boxes = np.random.default_rng(0), []
    for _ in range(6):
        top, left = rng.integers(0, 9, 2)
        boxes.append(np.array([[left, top, left + 5, top + 7]], float))

    def filled(box):
        (left, top, right, bottom), out = box[0].astype(int), np.zeros((16, 16, 2))
        out[..., 0], out[top:bottom, left:right] = 1, (0, 1)
        return out

    c = TASKS["discovery"].config(resolution=16)
    assert discovery.run(Source(boxes), Oracle(filled), c)["corloc"] == 100
    assert discovery.run(Source(boxes), Oracle(filled, noise=True), c)["corloc"] < 40


def test_cut_is_scipys_generalised_eigenvector():
    x = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(x.flatten(0, 1).double(), dim=1)
    for threshold, ours in zip(discovery.THRESHOLDS, discovery.cut_graph(x), strict=True):
        weight = np.where((unit @ unit.T).numpy() > threshold, 1.0, discovery.FAINT)
        degree = np.diag(weight.sum(1))
        exact = eigh(degree - weight, degree, subset_by_index=[1, 1])[1][:, 0]
        assert abs(np.corrcoef(ours.numpy(), exact)[0, 1]) > 1 - 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_main_object_is_the_seeds_component(seed):
    x = np.random.default_rng(seed).normal(size=(7, 9))
    at = np.unravel_index(np.abs(x).argmax(), x.shape)
    inside = x > x.mean()
    parts = label(inside if inside[at] else ~inside)[0]
    np.testing.assert_array_equal(discovery.main_object(torch.tensor(x.ravel()), (7, 9)), parts == parts[at])


def test_boxes_are_in_pixels_of_an_image_that_is_not_square():
    """An object of 2 by 3 patches, from row 1 and column 2, in 4 by 6: of 10 pixels' height, 15 pixels' width each."""
    m, image = np.zeros((4, 6, 2)), torch.zeros(3, 40, 90)
    m[..., 0], m[1:3, 2:5] = 1, (0, 1)
    source = Source([None])
    source.image = lambda i: image
    (found,) = discovery.boxes_at(0, SimpleNamespace(device=torch.device("cpu")), [[m]], source)
    assert found.tolist() == [[30, 10, 75, 30]] * len(discovery.THRESHOLDS)
