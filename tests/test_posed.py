"""sets/posed.py: what is learned from and what is measured on, frames of another size, folders that are not whole."""

from pathlib import Path

import numpy as np
import pytest
from test_tracking import write

from engine.cameras import points_of
from sets import posed
from sets.posed import INTRINSICS, drawn, open_posed
from tasks import TASKS


def write_scan(root, n=8, size=(24, 32)):
    """Frames of a wall 2 metres ahead, from cameras that stand 5 cm apart and turn a little; one pixel is not known."""
    root.mkdir(parents=True, exist_ok=True)
    H, W = size
    K = np.array([[30.0, 0, W / 2], [0, 30, H / 2], [0, 0, 1]])
    np.savetxt(root / INTRINSICS, K)
    v, u = np.mgrid[:H, :W] + 0.5
    for i in range(n):
        pose, angle = np.eye(4), 0.03 * i
        pose[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        pose[:3, 3] = 0.05 * i, 0.01 * i * i, 0
        rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(K).T
        depth = 2 / (rays @ pose[:3, :3].T)[..., 2]
        depth[0, 0] = 0
        colour = np.random.default_rng(i).integers(0, 256, (H // 8, W // 8, 3)).repeat(8, 0).repeat(8, 1)
        write(root / f"f{i}.color.jpg", colour.astype(np.uint8))
        write(root / f"f{i}.depth.png", np.rint(1000 * depth).astype(np.uint16))
        np.savetxt(root / f"f{i}.pose.txt", pose)
    return root


def config(data, **more):
    return TASKS["vggt"].config(**(dict(data=str(data), frames=2, resolution=24) | more))


def names(scenes):
    return [Path(scene.scene.names[i]).name for scene in scenes for i in scene.picked]


def test_a_single_scene_is_cut_in_two(tmp_path):
    train, val = open_posed(config(write_scan(tmp_path, 10)))
    assert names(train) == [f"f{i}" for i in range(7)] and names(val) == ["f7", "f8", "f9"]
    few = open_posed(config(tmp_path, limit=6))
    assert [names(each) for each in few] == [["f0", "f1", "f3", "f5"], ["f6", "f8"]]
    for scenes in train, val:
        for i in range(len(scenes[0])):
            assert (scenes[0].depth(i)[1:] > 0).all() and scenes[0].image(i).shape == (3, 24, 32)


def test_folders_of_scenes(tmp_path):
    for name in "train/a", "train/b/c", "test/d":
        write_scan(tmp_path / name, 3)
    train, val = open_posed(config(tmp_path))
    assert [Path(scene.names[0]).parent.name for scene in train] == ["a", "c"]
    assert [Path(scene.names[0]).parent.name for scene in val] == ["d"] and len(val[0]) == 3
    assert len(open_posed(config(tmp_path, limit=1))[0]) == 1


def test_rooms_that_are_measured_are_not_learned_from():
    train, val = open_posed(config("shapes", limit=3))
    assert len(train) == len(val) == 3
    assert all((a.poses != b.poses).any() for a in train for b in val)
    assert train[0].image(0).shape == (3, 24, 32)


def test_geometry_stays_when_frames_are_resized(tmp_path):
    """All frames' points lie on the wall, whatever the size; the field of view is the camera's."""
    (scene,), _ = open_posed(config(write_scan(tmp_path)))
    for size in (24, 32), (48, 80), (12, 20):
        frames = drawn(scene, [3, 0, 2], size)
        assert frames.images.shape == (3, 3, *size) and frames.depths.shape == (3, *size)
        assert frames.fov == pytest.approx([2 * np.arctan(16 / 30), 2 * np.arctan(12 / 30)])
        for depth, pose in zip(frames.depths, frames.poses, strict=True):
            points, there = points_of(depth, frames.intrinsics, pose)
            assert there[3:, 3:].all() and there[0, 0] == (size[0] < 24)                       # halved, it is left out
            assert np.abs(points[:, 2] - 2).max() < (0.001 if size == (24, 32) else 0.05)      # millimetres; nearest
        np.testing.assert_array_equal(frames.poses, [scene.poses[i] for i in (3, 0, 2)])


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match="has 0 scenes in train and 0 in val; vggt wants folders there, or one, with"):
        open_posed(config(tmp_path))
    with pytest.raises(ValueError, match="--frames 4: a scene of .* has 2 frames to learn from, or to"):
        open_posed(config(write_scan(tmp_path), frames=4))
    pose = tmp_path / "f3.pose.txt"
    good = pose.read_text()
    for bad in (np.diag([2.0, 1, 1, 1]), np.diag([-1.0, 1, 1, 1]), np.zeros((4, 4))):
        np.savetxt(pose, bad)
        with pytest.raises(ValueError, match="f3.pose.txt is no pose: .*; wanted a rotation"):
            open_posed(config(tmp_path))
    pose.write_text(good)
    write(tmp_path / "f2.depth.png", np.full((24, 24), 900, np.uint16))
    (scene,), _ = open_posed(config(tmp_path))
    with pytest.raises(ValueError, match="f2.depth.png has 24x24 pixels, its image 32x24"):
        drawn(scene, [2], (24, 32))


def test_a_frame_is_read_once(tmp_path, monkeypatch):
    (scene,), _ = open_posed(config(write_scan(tmp_path)))
    asked = []
    monkeypatch.setattr(posed.Part, "depth", lambda self, i: asked.append(i) or np.ones((24, 32)))
    for _ in range(3):
        drawn(scene, [0, 1], (24, 32))
    assert asked == [0, 1]
