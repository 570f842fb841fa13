"""
Numbers of the protocols, as literals: a test that imports the constant that it checks would follow it anywhere. Those
of one task stand in its own test; mutants_tasks.py plants others.
"""

import math

import numpy as np
import pytest
import torch

from engine import metrics
from engine.ranks import Ranks
from sets import depths
from tasks import TASKS, tracking

CPU = Ranks().device

@pytest.mark.parametrize("task, counts", [("knn", (2000, 500)), ("segmentation", (400, 100)), ("depth", (400, 100)),
                                          ("tracking", 20)])
def test_how_many_shapes_there_are(task, counts):
    data = TASKS[task].open(TASKS[task].config(resolution=32))
    assert (len(data) if task == "tracking" else tuple(map(len, data[:2]))) == counts


def test_scenes_are_at_most_14_metres_deep():
    *_, form = TASKS["depth"].open(TASKS["depth"].config(limit=2))
    assert form.top == 14


def test_kitti_is_cut_to_its_middle_below():
    """352 rows from below, 1216 columns about the middle of 375 x 1242; scored within the shares of Garg et al."""
    array = np.arange(375 * 1242).reshape(1, 375, 1242)
    cut = depths.lower_middle(array, depths.SETS["kitti"].crop)
    assert cut.shape == (1, 352, 1216) and cut[0, 0, 0] == 23 * 1242 + 13
    assert TASKS["kitti"].sides[0] == 352


ERRORS = dict(  # Hendrycks and Dietterich 2019: AlexNet's, percent: summed over severities, and times 0, 1, 2, 3, 4
    gaussian_noise=(443.214, 961.872), shot_noise=(447.234, 963.386), impulse_noise=(461.320, 973.900),
    defocus_blur=(409.940, 896.222), glass_blur=(413.134, 900.908), motion_blur=(392.974, 874.066),
    zoom_blur=(399.180, 839.946), snow=(433.408, 916.746), frost=(413.286, 900.860), fog=(409.662, 884.586),
    brightness=(282.296, 632.856), contrast=(426.602, 944.258), elastic_transform=(323.028, 695.932),
    pixelate=(358.920, 828.400), jpeg_compression=(303.250, 664.792))


def test_alexnets_errors():
    found = {name: (sum(each), sum(k * x for k, x in enumerate(each))) for name, each in metrics.ALEXNET.items()}
    assert found == {name: pytest.approx(pair, abs=1e-3) for name, pair in ERRORS.items()}
    once = {name: [10] * 5 for name in ERRORS}
    exact = 100 * np.mean([50 / total for total, _ in ERRORS.values()])
    assert metrics.corruption_error(once) == pytest.approx(exact, abs=1e-3)


def test_an_object_fades_by_the_temperature():
    """Two patches as similar as 1 and 0.8: softmax(5, 4), and not another."""
    maps = [np.array([[[1, 0]], [[0.8, 0.6]]], np.float16), np.array([[[1, 0]], [[1, 0]]], np.float16)]
    first = torch.tensor([[[1.0], [0]], [[0], [1]]])
    (found,) = tracking.propagate(maps, first, CPU)
    assert found[0, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-3)        # 2e-4 of float16 measured
