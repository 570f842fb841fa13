"""engine/cameras.py: poses there and back, angles worked out by hand, points that a camera sees, an area."""

import math

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from engine import cameras


def pose(x, y, z, degrees=0.0, axis="y"):
    """Camera to world: turned about an axis, then moved"""
    out = np.eye(4)
    out[:3, :3] = Rotation.from_euler(axis, degrees, degrees=True).as_matrix()
    out[:3, 3] = x, y, z
    return out


def test_quaternions_are_scipys():
    for q in np.random.default_rng(0).normal(size=(50, 4)):
        R = Rotation.from_quat(q, scalar_first=True).as_matrix()
        np.testing.assert_allclose(cameras.rotation(q / np.linalg.norm(q)), R, atol=1e-12)
        found = cameras.quaternion(R)
        assert found[0] >= 0 and abs(found @ q) / np.linalg.norm(q) == pytest.approx(1)  # q and -q are one rotation
    for axis in range(3):  # half a turn, where formulas that divide by w fail
        half = -np.eye(3)
        half[axis, axis] = 1
        np.testing.assert_allclose(np.abs(cameras.quaternion(half)), np.eye(4)[axis + 1], atol=1e-12)


def test_codes_by_hand():
    """The second camera stands a metre to the right of the first, turned by 90 degrees to the right."""
    poses = np.stack([pose(5, 0, 0), pose(6, 0, 0, 90)])
    codes = cameras.encode(poses, np.array([1.0, 0.5]), scale=2)
    np.testing.assert_allclose(codes[0], [0, 0, 0, 1, 0, 0, 0, 1, 0.5], atol=1e-12)
    # for the second camera, which looks to the right, the first one is a metre behind it
    h = math.sqrt(0.5)
    np.testing.assert_allclose(codes[1], [0, 0, -0.5, h, 0, -h, 0, 1, 0.5], atol=1e-12)
    found, fov = cameras.decode(codes * ([1] * 3 + [3] * 4 + [1] * 2))  # quaternions of any length
    np.testing.assert_allclose(found[1], pose(0.5, 0, 0, 90), atol=1e-12)
    assert fov.tolist() == [[1, 0.5]] * 2


def test_there_and_back():
    rng = np.random.default_rng(0)
    poses = np.stack([pose(*rng.normal(size=3), angle, axis) for angle, axis in ((10, "x"), (170, "y"), (-95, "z"))])
    found, _ = cameras.decode(cameras.encode(poses, np.ones(2), 3.0))
    found[:, :3, 3] *= 3
    np.testing.assert_allclose(poses[0] @ found, poses, atol=1e-12)


def test_a_point_that_is_seen():
    """A camera with 90 degrees across 4 pixels has a focal length of 2; its middle is between the pixels."""
    K = cameras.matrix_of_fov((math.pi / 2, math.pi / 3), (2, 4))
    assert K == pytest.approx(np.array([[2, 0, 2], [0, math.sqrt(3), 1], [0, 0, 1]]))
    assert cameras.fov_of(K, (2, 4)) == pytest.approx([math.pi / 2, math.pi / 3])
    depth = np.array([[0, 0, 0, 6], [0, np.nan, 0, 0.0]])
    points, there = cameras.points_of(depth, K, pose(1, 0, 0, 90))
    # at the middle of pixel (0, 3): right 6 * 1.5 / 2, down 6 * -0.5 / sqrt 3, ahead 6; the camera looks along x
    assert there.tolist() == [[False] * 3 + [True], [False] * 4]
    np.testing.assert_allclose(points, [[1 + 6, -6 * 0.5 / math.sqrt(3), -4.5]], atol=1e-12)


def test_where_the_first_frame_sees_patches_by_hand():
    """A wall 2 m ahead, 4 x 6 pixels in patches of 2; the second camera is 2/3 m to the right: one patch further."""
    K = np.array([[6.0, 0, 3], [0, 6, 2], [0, 0, 1]])
    depths, poses = np.full((3, 4, 6), 2.0), np.tile(np.eye(4), (3, 1, 1))
    poses[1, 0, 3] = 2 / 3
    poses[2, :3, :3] = np.diag([-1.0, 1, -1])  # looks back
    found = cameras.seen_in_first(depths, K, poses, (2, 3))
    own = np.stack(np.meshgrid([-0.5, 0.5], [-2 / 3, 0, 2 / 3], indexing="ij"), -1)
    assert found.dtype == np.float32 and found.shape == (3, 2, 3, 2)
    np.testing.assert_allclose(found[0], own, atol=1e-6)
    np.testing.assert_allclose(found[1, :, :2], own[:, 1:], atol=1e-6)
    assert np.isnan(found[1, :, 2]).all() and np.isnan(found[2]).all()
    depths[1, 1, 1] = 0           # the middle of the first patch is not known
    depths[0, 2:, 4:] = 1.8       # something stands before what the fifth one sees
    depths[0, :2, 2:4] = 1.92
    found = cameras.seen_in_first(depths, K, poses, (2, 3))
    assert np.isnan(found[1, 0, 0]).all() and np.isnan(found[1, 1, 1]).all() and not np.isnan(found[1, 1, 0]).any()
    depths[1, 1, 1], depths[0, :2, 2:4] = 2, 0
    assert np.isnan(cameras.seen_in_first(depths, K, poses, (2, 3))[1, 0, 0]).all()  # not known there
    depths[0, :2, 2:4] = 1.92
    assert not np.isnan(cameras.seen_in_first(depths, K, poses, (2, 3))[1, 0, 0]).any()


def test_scale_is_the_mean_distance_from_the_first_camera():
    K, one, two = np.eye(3), np.zeros((1, 1)), np.full((1, 1), 2.0)
    K[:2, 2] = 0.5
    assert cameras.scale_of([two, two], K, [pose(1, 1, 0), pose(1, 1, 4)]) == pytest.approx((2 + 6) / 2)
    with pytest.raises(ValueError, match="no depth of 1 frames of a scene is known"):
        cameras.scale_of([one], K, [pose(0, 0, 0)])


def test_angles_of_pairs_by_hand():
    truth = np.stack([pose(0, 0, 0), pose(1, 0, 0), pose(1, 0, 0, 40)])
    found = np.stack([pose(0, 0, 0), pose(0, 0, 3, 0), pose(2, 0, 0, 30)])
    rotation, way = cameras.pair_angles(found, truth)
    np.testing.assert_allclose(rotation, [0, 10, 10], atol=1e-6)
    # pair 0 1: right instead of ahead. 0 2: seen from camera 2 both are turned by their own 40 or 30 degrees
    assert way[:2] == pytest.approx([90, 10]) and np.isnan(way[2])                             # 1 2: in one place
    assert cameras.pair_angles(truth, truth)[1][:2] == pytest.approx([0, 0], abs=1e-6)
    still = cameras.pair_angles(np.stack([np.eye(4)] * 3), truth)
    np.testing.assert_allclose(still[0], [0, 40, 40], atol=1e-9)
    assert still[1][:2].tolist() == [90, 90]
    assert np.isnan(cameras.pair_angles(found, truth, scale=1001)[1][0])                       # as good as in one place


def test_angles_are_exact_where_they_are_small_and_large():
    """arccos of the trace loses half of the digits at both ends."""
    for degrees in (1e-6, 0.01, 60, 89.9, 90.1, 120, 179.9):
        turned = cameras.pair_angles(np.stack([pose(0, 0, 0), pose(0, 0, 1, degrees)]),
                                     np.stack([pose(0, 0, 0), pose(0, 0, 1)]))[0]
        assert turned[0] == pytest.approx(degrees, rel=1e-6)                                   # measured: 4e-8


def test_opposite_directions_differ():
    """The sign counts: an essential matrix would not tell it."""
    truth, found = (np.stack([pose(0, 0, 0), pose(x, 0, 0)]) for x in (1, -1))
    assert cameras.pair_angles(found, truth)[1] == pytest.approx([180])


def test_area_by_hand():
    errors = np.array([0.5, 1.5, 10, 40])
    # below 1: one of four; below 2: two; and so on
    assert cameras.auc(errors, 1) == 25 and cameras.auc(errors, 2) == 37.5
    assert cameras.auc(errors, 30) == pytest.approx(100 * (1 / 4 + 9 * 2 / 4 + 20 * 3 / 4) / 30)
    assert cameras.auc(np.zeros(3), 30) == 100
