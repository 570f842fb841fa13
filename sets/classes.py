"""
Sets of images with one class each: len, load(i) -> C H W uint8, label(i) -> int; classes: their names.

    open_splits    train and val: folders of classes, lists with labels, tars, NAME:PATH of finegrained.py, or `shapes`
    Chosen         some images of such a set         Files    images by their paths
    Flat           images in one folder, labelled by a list: ImageNet's val as it is downloaded
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.archives import Archives
from engine.features import reads
from engine.images import read_image
from engine.sources import Folder, open_source
from sets import finegrained
from sets.pairs import evenly, lines

LAYOUT = ("train/CLASS/, val/CLASS/; a .csv or .parquet each, with columns path and label, or a .tar or .zip; or "
          "NAME:PATH, a set as it was downloaded: see sets/finegrained.py")
ONE_FILE = ".csv", ".parquet", ".tar", ".zip"   # that a split may be
KAGGLE = "ILSVRC/Data/CLS-LOC"   # where Kaggle's zip of ImageNet has train/ and val/
SOLUTION, DEVKIT = "LOC_val_solution.csv", "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
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


class Flat:
    """Images of one folder, of classes that a list names."""

    def __init__(self, source, labels, classes):
        self.source, self.labels, self.classes, self.paths = source, labels, classes, source.paths

    def __len__(self):
        return len(self.source)

    def load(self, i):
        return self.source.load(i)

    def label(self, i):
        return self.labels[i]


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


def stray(source):
    """An image of a source that has no class, by its name, or None."""
    if isinstance(source, Archives):  # whose index has counted them
        rows = range(len(source)) if source.index.unlabelled else ()
        return next((source.name(i) for i in rows if source.index.row(i)[2] is None), None)
    return next((path for path in source.paths if "/" not in path), None) if isinstance(source, Folder) else None


def limited(source, limit):
    """All images of a source, or `limit` of them, evenly spaced."""
    return Chosen(source, evenly(range(len(source)), limit))


def labelled_val(root, train, val):
    """
    ImageNet's val in one folder -> Flat, by LOC_val_solution.csv (Kaggle) or by the devkit's list of numbers and its
    meta.mat, which says which class a number is. Raises ValueError.
    """
    solution, devkit = root / SOLUTION, root / DEVKIT
    if solution.is_file():
        rows = (line.partition(",") for line in lines(solution, "ImageId,PredictionString"))
        wnids = {name: boxes.split()[0] for name, _, boxes in rows if boxes}
    elif devkit.is_file():
        numbers = classes_of_numbers(devkit.with_name("meta.mat"))
        listed = enumerate(lines(devkit, "numbers of classes"), 1)
        wnids = {f"ILSVRC2012_val_{i:08}": numbers.get(k) for i, k in listed}
    else:
        raise ValueError(f"--data: {val.root} has no folders of classes; wanted val/CLASS/, or ImageNet's {SOLUTION} "
                         f"or {DEVKIT} in {root}")
    found = [wnids.get(Path(path).stem) for path in val.paths]
    place = {name: k for k, name in enumerate(train.classes)}
    odd = next((path for path, wnid in zip(val.paths, found, strict=True) if wnid not in place), None)
    if odd:
        raise ValueError(f"--data: {solution if solution.is_file() else devkit} calls {odd} "
                         f"{wnids.get(Path(odd).stem)}; wanted a folder of train")
    return Flat(val, [place[wnid] for wnid in found], train.classes)


def classes_of_numbers(path):
    """meta.mat of ImageNet's devkit -> {number, as text: class, as in n01440764}"""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError(f"--data: scipy is not installed, to read {path}; pip install -e .[eval]") from error
    try:
        synsets = np.atleast_1d(loadmat(path, squeeze_me=True)["synsets"])
        return {str(int(each["ILSVRC2012_ID"])): str(each["WNID"]) for each in synsets}
    except Exception as error:  # foreign bytes fail in many ways; all mean: unreadable
        raise ValueError(f"--data: {path} cannot be read: {error}; wanted ImageNet's meta.mat") from error


def split_of(folder, split, task):
    """FOLDER/SPLIT, or a file of that name. Raises ValueError if there is none."""
    found = [path for path in (folder / split, *(folder / f"{split}{suffix}" for suffix in ONE_FILE)) if path.exists()]
    if not found or found[0] == folder / split and not found[0].is_dir():
        raise ValueError(f"--data: {folder} has no folder {split}; {task} wants train/CLASS/ and val/CLASS/, or a file "
                         f"each, {split}{f', {split}'.join(ONE_FILE)}")
    return found[0]


def open_splits(c):
    """train, val: `limit` images each of the same classes, two at least. Raises ValueError."""
    (name, colon, root), read = c.data.partition(":"), reads(c)
    if c.data == "shapes":
        n_train, n_val = (c.limit, c.limit) if c.limit else SHAPES
        sources = open_source("shapes", n_train, seed=1000), open_source("shapes", n_val, seed=1001)
    elif colon and name in finegrained.NAMES:
        sources = finegrained.open_known(name, root)
    else:
        folder = Path(c.data, KAGGLE) if Path(c.data, KAGGLE).is_dir() else Path(c.data)
        paths = [split_of(folder, split, c.task) for split in ("train", "val")]
        sources = [open_source(path, read=read) for path in paths]
        bare = [path for path, source in zip(paths, sources, strict=True) if path.is_file() and not source.classes]
        if bare:
            raise ValueError(f"--data: {bare[0]} has no labels; {c.task} wants the class of each image")
        if not sources[1].classes and not isinstance(sources[1], Archives):
            sources[1] = labelled_val(Path(c.data), *sources)
    train, val = sources
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"--data: train and val of {c.data} have different classes: {', '.join(odd[:5])}")
    if len(train.classes) < 2:
        raise ValueError(f"--data: {c.data}/train has {len(train.classes)} class folders; {c.task} wants at least 2")
    alone = next(filter(None, (stray(source) for source in sources)), None)
    if alone:
        raise ValueError(f"--data: {alone} lies in no class folder; folders in train and val name the classes")
    return [limited(source, c.limit) for source in sources]
