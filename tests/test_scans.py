"""sets/scans.py: points of a wall that three cameras see, and scans that are not whole."""

from pathlib import Path

import numpy as np
import pytest
from test_tracking import write

from sets.scans import Scan
from tasks import TASKS


def write_scan(root):
    """Three views of a wall, from cameras that are 10 cm and some degrees apart."""
    K = np.array([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]])
    np.savetxt(root / "camera-intrinsics.txt", K)
    for i in range(3):
        angle = 0.05 * i
        pose = np.eye(4)
        sine, cosine = np.sin(angle), np.cos(angle)
        pose[:3, :3] = [[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]]
        pose[:3, 3] = 0.1 * i, 0, 0
        v, u = np.mgrid[:48, :64] + 0.5
        rays = np.stack([(u - 32) / 60, (v - 24) / 60, np.ones_like(u)], -1)
        depth = (2 - pose[2, 3]) / (rays @ pose[:3, :3].T)[..., 2]               # of the plane z = 2
        depth[:2], depth[2:4] = 0, 65.535                                        # not known
        write(root / f"f{i}.color.jpg", np.zeros((48, 64, 3), np.uint8))
        write(root / f"f{i}.depth.png", np.rint(depth * 1000).astype(np.uint16))
        np.savetxt(root / f"f{i}.pose.txt", pose)
    return TASKS["rgbd"].config(data=str(root))


@pytest.fixture
def scan(tmp_path):
    return write_scan(tmp_path)


def test_points_lie_on_the_wall(scan):
    views = Scan(scan)
    for i in range(3):
        points = views.points(i, (24, 32))
        assert points[:2].isnan().all() and (points[3:, :, 2] - 2).abs().max() < 0.02


def test_one_view_is_no_pair(tmp_path):
    with pytest.raises(ValueError, match="has 0 images NAME.color.jpg; rgbd wants two or more"):
        Scan(TASKS["rgbd"].config(data=str(tmp_path)))


def test_a_view_without_its_pose_is_named(scan):
    (Path(scan.data) / "f1.pose.txt").unlink()
    with pytest.raises(ValueError, match="f1.pose.txt is not there"):
        Scan(scan)


def test_odd_files_are_named(scan):
    pose, depth = Path(scan.data) / "f1.pose.txt", Path(scan.data) / "f1.depth.png"
    good = pose.read_text()
    for text, says in ("1 2 3", "f1.pose.txt has numbers of shape .3,.; wanted 4 x 4, all finite"), (
            good.replace(good.split()[0], "nan", 1), "f1.pose.txt has numbers of shape .4, 4.; wanted"), (
            "one", "f1.pose.txt cannot be read: .*; wanted 4 x 4 numbers"):
        pose.write_text(text)
        with pytest.raises(ValueError, match=says):
            Scan(scan)
    pose.write_text(good)
    write(depth, np.zeros((48, 64), np.uint8))
    with pytest.raises(ValueError, match="f1.depth.png has mode L; wanted 16 bits, millimetres"):
        Scan(scan)
