"""
Sets of images with one class each: len, load(i) -> C H W uint8, label(i) -> int; classes: their names.

    open_splits    train and val: folders of classes, NAME:PATH of finegrained.py, or the generated `shapes`
    Chosen         some images of such a set         Files    images by their paths
"""

from dataclasses import dataclass
from pathlib import Path

from data import open_source, read_image
from sets import finegrained
from sets.pairs import evenly

LAYOUT = "train/CLASS/, val/CLASS/; or NAME:PATH, a set as it was downloaded: see sets/finegrained.py"
SHAPES = 2000, 500      # images of shapes to train on, to measure on


@dataclass
class Chosen:
    """Some images of a source, by their rows, with labels of their own if there are any."""
    source: object
    rows: list
    labels: list = None
    border: int = 0            # pixels to cut away on every side

    def __len__(self):
        return len(self.rows)

    def load(self, i):
        image, b = self.source.load(self.rows[i]), self.border
        return image[:, b : image.shape[1] - b, b : image.shape[2] - b]

    def label(self, i):
        return self.source.label(self.rows[i]) if self.labels is None else self.labels[i]

    @property
    def classes(self):
        return self.source.classes

    @property
    def paths(self):
        return [self.source.paths[row] for row in self.rows]


class Files:
    """Images by their paths, each labelled with its row: what is in it, if anything, the task knows."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def load(self, i):
        return read_image(self.paths[i])

    def label(self, i):
        return i


def limited(source, limit):
    """All images of a source, or `limit` of them, evenly spaced."""
    return Chosen(source, evenly(range(len(source)), limit))


def open_splits(c):
    """train, val: `limit` images each of the same classes, two at least. Raises ValueError."""
    name, colon, root = c.data.partition(":")
    if c.data == "shapes":
        n_train, n_val = (c.limit, c.limit) if c.limit else SHAPES
        sources = open_source("shapes", n_train, seed=1000), open_source("shapes", n_val, seed=1001)
    elif colon and name in finegrained.NAMES:
        sources = finegrained.open_known(name, root)
    else:
        for split in ("train", "val"):
            if not Path(c.data, split).is_dir():
                raise ValueError(f"--data: {c.data} has no folder {split}; {c.task} wants train/CLASS/ and val/CLASS/")
        sources = open_source(Path(c.data, "train")), open_source(Path(c.data, "val"))
    train, val = sources
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"--data: train and val of {c.data} have different classes: {', '.join(odd[:5])}")
    if len(train.classes) < 2:
        raise ValueError(f"--data: {c.data}/train has {len(train.classes)} class folders; {c.task} wants at least 2")
    stray = next((path for source in sources for path in getattr(source, "paths", []) if "/" not in path), None)
    if stray:
        raise ValueError(f"--data: {stray} lies in no class folder; folders in train and val name the classes")
    return [limited(source, c.limit) for source in sources]
