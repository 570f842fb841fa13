"""tasks/correspondence.py: features that name the place in the world match it. The loop: test_navi.py."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
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
