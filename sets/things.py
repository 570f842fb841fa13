"""
Pairs of images of things of a kind, and the keypoints that both show.

    a pair       a, b: names of images    at, bt: keypoints, n 2, x and y in pixels    kind    box: longer side, pixels
                 sides: of each image the longer one
    SPair-71k    JPEGImages/CLASS/*.jpg, PairAnnotation/test/*.json
    shapes       one thing at two times
"""

import json
from functools import partial

import numpy as np
import torch

from engine.images import read_image
from sets.pairs import evenly, folders, there
from sets.videos import moving

PAIRS = 60           # videos of shapes whose objects are looked for
OF_CLASS = 200       # pairs of a class of SPair
KEYS = {"category", "src_imname", "trg_imname", "src_imsize", "trg_imsize", "src_kps", "trg_kps", "trg_bndbox"}


class Things:
    """The images that pairs of things lie in."""

    def __init__(self, pairs, load):
        self.names, self.load = sorted({name for pair in pairs for name in (pair["a"], pair["b"])}), load

    def __len__(self):
        return len(self.names)

    def image(self, i):
        return self.load(self.names[i])


def shapes_pairs(c):
    """Every object that two frames of a video show, 1/4 of its course apart; keypoints that both show."""
    pairs = []
    for i in range(c.limit or PAIRS):
        first, _, later = moving(i, c.resolution, 3)
        for k, (at, bt) in enumerate(zip(first.keypoints, later.keypoints, strict=True), 1):
            rows, cols = np.nonzero(later.instances == k)
            both = (at[:, 2] > 0) & (bt[:, 2] > 0)
            if both.any():
                pairs.append(dict(a=(i, 0), b=(i, 2), at=at[both, :2], bt=bt[both, :2], kind="object",
                                  box=max(np.ptp(rows), np.ptp(cols)) + 1, sides=(c.resolution, c.resolution)))
    return pairs, partial(frame_image, side=c.resolution)


def frame_image(name, side):
    return torch.from_numpy(moving(name[0], side, 3)[name[1]].image).permute(2, 0, 1)


def spair_pairs(c):
    """SPair-71k: JPEGImages/CLASS/*.jpg, PairAnnotation/test/*.json; up to 200 pairs of each class, drawn."""
    notes, pairs, rng = {}, [], np.random.default_rng(c.seed)
    for path in sorted(folders(c, "PairAnnotation/test").glob("*.json")):
        try:
            note = json.loads(path.read_text())
            odd = KEYS - note.keys()
        except (ValueError, AttributeError) as error:
            raise ValueError(f"--data: {path} is no object of JSON: {error}; wanted SPair's") from error
        if odd:
            raise ValueError(f"--data: {path} has no {min(odd)}; wanted SPair's {', '.join(sorted(KEYS))}")
        notes.setdefault(note["category"], []).append(note)
    drawn = [each[k] for each in notes.values() for k in sorted(rng.permutation(len(each))[:OF_CLASS])]
    for x in evenly(drawn, c.limit):
        left, top, right, bottom = x["trg_bndbox"]
        kind, sides = x["category"], [max(x[f"{which}_imsize"][:2]) for which in ("src", "trg")]
        at, bt = (np.array(x[f"{which}_kps"], float) for which in ("src", "trg"))  # what both images show
        pairs.append(dict(a=f"{kind}/{x['src_imname']}", b=f"{kind}/{x['trg_imname']}", at=at, bt=bt, kind=kind,
                          box=max(right - left, bottom - top), sides=sides))
    folder = folders(c, "JPEGImages")
    if pairs:
        there([folder / name for name in sorted({pair[key] for pair in pairs for key in "ab"})], "PairAnnotation/test")
    return pairs, partial(image_in, folder=folder)


def image_in(name, folder):
    return read_image(folder / name)


def open_pairs(c):
    """pairs; Things, the images that they lie in"""
    pairs, load = shapes_pairs(c) if c.data == "shapes" else spair_pairs(c)
    if not pairs:
        raise ValueError(f"--data: {c.data} has no pair of images with keypoints; see sets/things.py")
    return pairs, Things(pairs, load)
