"""
Videos with the masks of their objects: len, image(i) -> C H W uint8, truth(i) -> H W or None, name.

    DAVIS, YouTube-VOS, MOSE    JPEGImages/[480p/]NAME/*.jpg, Annotations/[480p/]NAME/*.png
    shapes                      generated scenes that move
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import shapes
from engine.images import read_image
from engine.metrics import IGNORE
from sets.pairs import evenly, folders, images_below, upright

VIDEOS = 20          # of shapes, 8 frames each
VAL_LIST = "ImageSets/2017/val.txt"


class Video:
    """Frames, and the objects of those that have a truth: len, image(i) -> C H W uint8, truth(i) -> H W or None"""

    def __init__(self, name, frames, masks):
        self.name, self.frames, self.masks = name, frames, masks

    def __len__(self):
        return len(self.frames)

    def image(self, i):
        return read_image(self.frames[i])

    def truth(self, i):
        if self.masks[i] is None:
            return None
        with Image.open(self.masks[i]) as file:
            mask = np.asarray(file)
        return np.where(mask == IGNORE, 0, mask)


class ShapesVideo:
    def __init__(self, index, side):
        self.name, self.index, self.side = f"shapes {index}", index, side

    def __len__(self):
        return 8

    def image(self, i):
        return torch.from_numpy(moving(self.index, self.side)[i].image).permute(2, 0, 1)

    def truth(self, i):
        return moving(self.index, self.side)[i].instances


@lru_cache(maxsize=2)
def moving(index, side, n_frames=8):
    return shapes.video(index, n_frames, side, seed=1001)


def open_videos(c):
    """
    DAVIS, YouTube-VOS and MOSE: JPEGImages/[480p/]NAME/*.jpg, Annotations/[480p/]NAME/*.png, also below train/.

    The videos of ImageSets/2017/val.txt if there is such a list, as DAVIS has; of the others' train a fifth is drawn,
    since the truth of their val is not public. Which ones the paper drew is not known.
    """
    if c.data == "shapes":
        return [ShapesVideo(i, c.resolution) for i in range(c.limit or VIDEOS)]
    images = folders(c, *[f"{top}JPEGImages{end}" for top in ("", "train/") for end in ("/480p", "")])
    masks = Path(str(images).replace("JPEGImages", "Annotations"))
    names, listed = sorted(path.name for path in images.iterdir() if path.is_dir()), Path(c.data, VAL_LIST)
    if listed.is_file():
        names = listed.read_text().split()
    elif c.task in ("youtube-vos", "mose"):
        names = sorted(np.random.default_rng(c.seed).permutation(names)[: round(len(names) / 5)].tolist())
    videos = []
    for name in evenly(names, c.limit):
        frames = sorted(images_below(images / name))
        there = [masks / name / f"{frame.stem}.png" for frame in frames]
        there = [path if path.is_file() else None for path in there]
        first = next((i for i, path in enumerate(there) if path), None)  # what comes before the first truth is not seen
        if first is None:
            raise ValueError(f"--data: {masks / name} has no mask of the frames in {images / name}")
        videos.append(Video(name, frames[first:], there[first:]))
        for frame, mask in zip(frames, there, strict=True):
            checked(frame, mask)
    if not videos:
        raise ValueError(f"--data: {images} has no folder of frames; {c.task} wants one for each video")
    return videos


def checked(frame, mask):
    """Raises ValueError if a frame's mask, where there is one, has no numbers of objects, or is not as large as it."""
    if mask:
        try:
            size = upright(frame)
            with Image.open(mask) as file:
                mode, (W, H) = file.mode, file.size
        except OSError as error:
            raise ValueError(f"--data: {frame} or {mask} cannot be read: {error}") from error
        if mode not in ("P", "L") or (H, W) != size:
            raise ValueError(f"--data: {mask} has mode {mode} and {W}x{H} pixels; wanted numbers of objects, grey or a "
                             f"palette's, and its frame's {size[1]}x{size[0]} pixels")
