"""tasks/correspondence.py: features that name the place in the world match it. The loop: test_navi.py."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_navi import four_times
from test_scans import write_scan
from test_tracking import Oracle

from tasks import TASKS


def test_oracle_matches_views(tmp_path):
    """Features that name the place in the world."""
    waves = np.random.default_rng(0).normal(size=(3, 64)) * 3

    def place(views, i):
        phase = views.points(i, (12, 16)).nan_to_num(0).numpy() @ waves
        return np.concatenate([np.sin(phase), np.cos(phase)], -1)

    scan = replace(write_scan(tmp_path), out=str(tmp_path / "out"))
    found, lost = (TASKS["rgbd"].run(TASKS["rgbd"].open(scan), Oracle(place, noise), scan) for noise in (False, True))
    assert found["recall_10cm"] > 90 and found["recall_20cm"] > 97 and lost["recall_20cm"] < 20 < 90 < lost["ceiling"]
    with Image.open(tmp_path / "out/rgbd.png") as file:
        lines = np.asarray(file).astype(int)
    assert lines.shape == (2 * 404, 1067 + 4, 3)                                 # 4:3 twice, of 400 rows; two pairs
    red, green = ((lines[..., k] - lines[..., 1 - k] > 100).sum() for k in (0, 1))
    assert red > 500 > 5 * green                                                 # of noise, which came last
    assert found["n_pairs"] == 2
    exact = np.mean([found[f"recall_{cm}cm"] for cm in (5, 10, 20)])
    assert found["recall"] == pytest.approx(exact)


@pytest.mark.parametrize("task, metres", [("rgbd", (5, 10, 20)), ("navi", (1, 2, 5))])
def test_the_thousand_most_similar_of_1296_matches_count(task, metres):
    """Against float64, of points that the other view has a random distance away; 1296 is 4 x 9 squared."""
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, 9, 9, 3))
    maps[1] = maps[0] + 0.3 * rng.normal(size=(9, 9, 3))
    maps, places = maps.astype(np.float16), rng.normal(size=(2, 36, 36, 3)).astype(np.float32) * metres[1] / 100
    views = SimpleNamespace(name="two", pairs=[(0, 1)], points=lambda i, grid: torch.from_numpy(places[i]))
    frozen = Oracle(None)
    frozen.maps = lambda name, source: [[m] for m in maps]
    found = TASKS[task].run(views, frozen, TASKS[task].config(data="given"))
    a, b = (four_times(m.astype(np.float64)).reshape(-1, 3) for m in maps)
    cosines = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    best = np.argsort(-cosines.max(1))[:1000]
    off = np.linalg.norm(places[0].reshape(-1, 3)[best] - places[1].reshape(-1, 3)[cosines.argmax(1)[best]], axis=1)
    assert found["matches"] == 1000
    for cm in metres:
        assert found[f"recall_{cm}cm"] == pytest.approx(100 * np.mean(off <= cm / 100), abs=0.21)
