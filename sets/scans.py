"""
Views of a scene whose cameras are known: len, image(i), depth(i) -> H W metres, points(i, grid) -> h w 3 metres, pairs
of indices, name, poses, intrinsics.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.cameras import unproject
from engine.images import read_image
from sets.pairs import evenly


class Scan:
    """
    Views of a scene whose cameras are known: NAME.color.jpg, NAME.depth.png in millimetres (0, 65535 = not known),
    NAME.pose.txt 4x4 from camera to world in metres, and one camera-intrinsics.txt, 3x3, for pixels of the depths.
    """
    def __init__(self, c):
        root, self.name = Path(c.data), "views"
        self.names = evenly(sorted(str(path)[:-10] for path in root.rglob("*.color.*")), c.limit)
        if len(self.names) < 2 or not (root / "camera-intrinsics.txt").is_file():
            raise ValueError(f"--data: {c.data} has {len(self.names)} images NAME.color.jpg; {c.task} wants two or "
                             "more, each with NAME.depth.png and NAME.pose.txt, and camera-intrinsics.txt")
        missing = [name + end for name in self.names for end in (".depth.png", ".pose.txt")
                   if not Path(name + end).is_file()]
        if missing:
            raise ValueError(f"--data: {missing[0]} is not there; every NAME.color.jpg wants one beside it")
        self.intrinsics = matrix(root / "camera-intrinsics.txt", 3)
        self.poses = [matrix(Path(name + ".pose.txt"), 4) for name in self.names]
        for name in self.names:
            with Image.open(name + ".depth.png") as file:
                if not file.mode.startswith("I"):
                    raise ValueError(f"--data: {name}.depth.png has mode {file.mode}; wanted 16 bits, millimetres")
        self.pairs = [(i, i + 1) for i in range(len(self.names) - 1)]

    def __len__(self):
        return len(self.names)

    def image(self, i):
        return read_image(next(Path(self.names[i]).parent.glob(Path(self.names[i]).name + ".color.*")))

    def depth(self, i):
        """H W float64, 0 = not known"""
        with Image.open(self.names[i] + ".depth.png") as file:
            depth = np.asarray(file).astype(np.float64)
        return np.where(depth == 65535, 0, depth / 1000)

    def points(self, i, grid):
        """Which point of the world the middle of each cell of the grid sees:  h w 3, metres; NaN: depth not known"""
        depth = self.depth(i)
        (H, W), (h, w) = depth.shape, grid
        v, u = np.meshgrid((np.arange(h) + 0.5) * H / h, (np.arange(w) + 0.5) * W / w, indexing="ij")
        z = depth[v.astype(int), u.astype(int)]
        z[z == 0] = np.nan
        pose = self.poses[i]
        return torch.from_numpy(unproject(z, v, u, self.intrinsics) @ pose[:3, :3].T + pose[:3, 3]).float()


def matrix(path, n):
    """A text file of n n numbers; raises ValueError if it holds something else."""
    try:
        found = np.loadtxt(path)
    except ValueError as error:
        raise ValueError(f"--data: {path} cannot be read: {error}; wanted {n} x {n} numbers") from error
    if found.shape != (n, n) or not np.isfinite(found).all():
        raise ValueError(f"--data: {path} has numbers of shape {found.shape}; wanted {n} x {n}, all finite")
    return found

