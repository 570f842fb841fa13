"""
Scenes of posed frames, to learn from and to measure on. A scene: len, image(i), depth(i), names, poses,
intrinsics.

    open_posed   train, val: lists of scenes, and in words how they were parted
    Part         some frames of a scene
    drawn        a few frames of a scene as arrays, all of one size

A folder with camera-intrinsics.txt is one scene, as scans.py has it: its first frames are learned from, its last are
measured on, none is both; but they show one room, so that this says nothing of other rooms. With folders train and val,
or test, each folder below them is a scene of its own.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.cameras import fov_of
from engine.images import resize
from engine.views import nearest
from sets.pairs import alike, evenly
from sets.rooms import Room
from sets.scans import Scan

GENERATED = 400, 30   # rooms to train on, to measure on
LEARNED = 0.7         # share of the frames of a single scene
LOOSE = 1e-2          # how far a rotation may be from one
INTRINSICS = "camera-intrinsics.txt"


class Frames(NamedTuple):
    images: torch.Tensor     # F 3 H W uint8
    depths: np.ndarray       # F H W float32, metres, 0 = not known
    poses: np.ndarray        # F 4 4, camera to world
    intrinsics: np.ndarray   # 3 3, for pixels of these depths
    fov: np.ndarray          # 2, radians


class Part:
    def __init__(self, scene, picked):
        self.scene, self.picked = scene, picked
        self.poses, self.intrinsics = [scene.poses[i] for i in picked], scene.intrinsics

    names = property(lambda self: [self.scene.names[i] for i in self.picked])

    def __len__(self):
        return len(self.picked)

    def image(self, i):
        return self.scene.image(self.picked[i])

    def depth(self, i):
        return self.scene.depth(self.picked[i])


def open_posed(c):
    """train, val: lists of scenes. Raises ValueError for folders that hold none, or too few frames."""
    if c.data == "shapes":
        counts = (c.limit, c.limit) if c.limit else GENERATED
        size = c.resolution, c.resolution * 4 // 3
        both = [[Room(k, seed, size) for k in range(n)] for n, seed in zip(counts, (1000, 1001), strict=True)]
    elif ((root := Path(c.data)) / INTRINSICS).is_file():
        scan = rigid(Scan(c))
        n = round(LEARNED * len(scan))
        both = [[Part(scan, range(n))], [Part(scan, range(n, len(scan)))]]
    else:
        splits = [next((root / name for name in names if (root / name).is_dir()), root / names[0])
                  for names in (("train",), ("val", "test"))]
        folders = [sorted(path.parent for path in split.rglob(INTRINSICS)) for split in splits]
        if not all(folders):
            raise ValueError(f"--data: {c.data} has {len(folders[0])} scenes in train and {len(folders[1])} in val; "
                             f"{c.task} wants folders there, or one, with {INTRINSICS} and posed frames")
        both = [[rigid(Scan(replace(c, data=str(folder), limit=0))) for folder in evenly(each, c.limit)]
                for each in folders]
    few = min(len(scene) for scenes in both for scene in scenes)
    if few < max(c.frames * (not c.head), 2):
        raise ValueError(f"--frames {c.frames}: a scene of {c.data} has {few} frames to learn from, or to measure on; "
                         "ask for fewer, or give it more")
    return both


def rigid(scan):
    """The scan itself. Raises ValueError if a pose is more than a rotation and a place."""
    for name, pose in zip(scan.names, scan.poses, strict=True):
        R = pose[:3, :3]
        if np.abs(R @ R.T - np.eye(3)).max() > LOOSE or np.linalg.det(R) < 0 or (pose[3] != (0, 0, 0, 1)).any():
            raise ValueError(f"--data: {name}.pose.txt is no pose: its upper left 3 x 3 is {R.round(2).tolist()}; "
                             "wanted a rotation, beside it a place, below it 0 0 0 1")
    return scan


@lru_cache(maxsize=64)
def frame(scene, i, size):
    """Frame i as it is learned from, H W: image 3 H W, depth, and how large the file's depth was"""
    depth, image = scene.depth(i), scene.image(i)
    alike(depth, tuple(image.shape[1:]), f"{scene.names[i]}.depth.png")
    return resize(image, *size), nearest(depth, size).astype(np.float32), depth.shape


def drawn(scene, picked, size):
    images, depths, sizes = zip(*(frame(scene, int(i), size) for i in picked), strict=True)
    H, W = sizes[0]
    scale = np.diag([size[1] / W, size[0] / H, 1])
    return Frames(torch.stack(images), np.stack(depths), np.stack([scene.poses[i] for i in picked]),
                  scale @ scene.intrinsics, fov_of(scene.intrinsics, sizes[0]))
