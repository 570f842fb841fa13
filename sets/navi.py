"""
NAVI: photos of objects, each with its camera and depths:  OBJECT/wild_set/annotations.json

    annotations    one object's photos and their cameras            Jampani et al. 2023
    draw_pairs     which photo's points are looked for in which     DINOv3 App. D.3, after Probe3D
    Objects        photos cut to the object, and its points in metres

Dimension letters: see the top of model.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.cameras import rotation, unproject
from engine.images import read_image, resize
from engine.task import skip
from engine.views import nearest
from sets.pairs import evenly

EVERY = 4               # one photo in so many is a source
TURN = 120              # degrees between the cameras of a pair, at most
INVERSE = 655.35        # metres: depth is this over the value in the PNG, whose 65535 is a centimetre; 0 = not known


@dataclass(frozen=True)
class Photo:
    """A photo of an object; a point's place in the camera's metres, right, down, ahead, is R(q) times its own, + t."""
    folder: Path        # has images/, depth/, masks/
    name: str           # of the photo; the others are PNGs of the same stem
    q: np.ndarray       # 4, unit quaternion, real part first
    t: np.ndarray       # 3, metres
    focal: float        # in short sides of the photo

    def path(self, kind):
        return self.folder / kind / (self.name if kind == "images" else f"{Path(self.name).stem}.png")


def annotations(path):
    """OBJECT/wild_set/annotations.json -> its Photos;  raises ValueError if what it takes is not there."""
    try:
        notes = sorted((note["filename"], note["camera"], note["image_size"]) for note in json.loads(path.read_text()))
        return [Photo(path.parent, name, np.array(camera["q"]) / np.linalg.norm(camera["q"]),
                     np.array(camera["t"]) / 1000, camera["focal_length"] / min(size)) for name, camera, size in notes]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--data: {path} is no list of photos with filename, image_size and camera, which has q, t "
                         f"and focal_length: {type(error).__name__} {error}") from error


def draw_pairs(views, seed):
    """
    Every fourth photo, and beside it one of the same object from a camera turned by at most 120 degrees, drawn evenly.

    returns  (source, other) of the photos that have such another
    """
    rng, folders, pairs = np.random.default_rng(seed), np.array([str(view.folder) for view in views]), []
    q = np.array([view.q for view in views])
    for i in range(0, len(views), EVERY):
        turn = 2 * np.degrees(np.arccos(np.abs(q @ q[i]).clip(max=1)))  # q and -q are one rotation
        others = np.flatnonzero((folders == folders[i]) & (turn <= TURN) & (np.arange(len(views)) != i))
        if len(others):
            pairs.append((views[i], views[rng.choice(others)]))
    return pairs


def grey(path, size=None):
    """H W, the PNG's own values. Raises OSError if it cannot be read, ValueError if its shape is not that of `size`."""
    try:
        with Image.open(path) as file:
            return alike(np.asarray(file if file.mode.startswith("I") else file.convert("L")), size, path)
    except (OSError, SyntaxError) as error:  # Pillow's word for a broken PNG
        raise OSError(f"{path}: {error}") from error


def alike(array, size, path):
    """The array itself, ... H W, if it is as much wider than high as its mask, of `size`."""
    (H, W), (h, w) = array.shape[-2:], size or array.shape[-2:]
    if abs(H * w / (W * h) - 1) > 0.02:
        raise ValueError(f"{path} is {W}x{H} pixels, but the mask's shape is that of {w}x{h}; unpack NAVI as it came")
    return array


class Objects:
    """Pairs of photos, side by side: len, image(i) -> C n n uint8, points(i, grid); pairs of indices."""

    def __init__(self, c):
        files = sorted(Path(c.data).glob("*/wild_set/annotations.json"))
        scenes = [path for path in files if any(path.parents[1].glob("multiview*"))]
        if 0 < len(scenes) < len(files):  # as Probe3D has it; a download may be of wild sets alone
            n, files = len(files) - len(scenes), scenes
            skip(f"{n} objects of {c.data} that have no multiview_* scene", n)
        pairs = draw_pairs([view for path in files for view in annotations(path)], c.seed)
        if not pairs:
            raise ValueError(f"--data: {c.data} has {len(files)} files OBJECT/wild_set/annotations.json, and no two "
                             f"photos of an object within {TURN} degrees; {c.task} wants NAVI's folder navi_v1")
        self.name, self.side = f"pairs {c.seed}", c.resolution
        self.views = [view for pair in evenly(pairs, c.limit) for view in pair]
        self.pairs = [(i, i + 1) for i in range(0, len(self.views), 2)]

    def __len__(self):
        return len(self.views)

    def square(self, view):
        """The photo's size once its short side is the resolution; there top, left and side of the square to cut out."""
        mask, side = grey(view.path("masks")) > 0, self.side
        size = [max(side, round(x * side / min(mask.shape))) for x in mask.shape]
        above, before = ((x - side) // 2 for x in size)  # what the centre crop leaves out
        y, x = np.nonzero(nearest(mask, size)[above : above + side, before : before + side])
        y, x = (v if len(v) else np.array([0, side - 1]) for v in (y, x))  # no object: all of the crop
        n = max(np.ptp(y), np.ptp(x)) + 1
        top, left = (int(np.clip((v.min() + v.max() + 1 - n) // 2, 0, side - n)) for v in (y, x))
        return size, above + top, before + left, n

    def image(self, i):
        path = self.views[i].path("images")
        size, top, left, n = self.square(self.views[i])
        return resize(alike(read_image(path), size, path), *size)[:, top : top + n, left : left + n]

    def points(self, i, grid):
        """Which point of the object the middle of each cell of the grid shows:  h w 3, metres; NaN: none"""
        view, (h, w) = self.views[i], grid
        size, top, left, n = self.square(view)
        depth = grey(view.path("depth"), size)
        H, W = depth.shape
        y, x = np.meshgrid((top + (np.arange(h) + 0.5) * n / h) * H / size[0],
                           (left + (np.arange(w) + 0.5) * n / w) * W / size[1], indexing="ij")  # pixels of the depths
        png, focal = depth[y.astype(int), x.astype(int)].astype(float), view.focal * min(H, W)
        z = INVERSE / np.where(png > 0, png, np.nan)
        seen = unproject(z, y, x, np.array([[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]]))
        return torch.from_numpy((seen - view.t) @ rotation(view.q)).float()                    # its inverse, of rows
