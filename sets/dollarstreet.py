"""
Dollar Street: photos of things at home, all over the world, each with the income of the household and its region.

    images_v2.csv, or any one list    columns imageRelPath, income (USD a month), region.id and topics, as published;
                                      the images beside it

    open_street    the photos whose topics a map of labels knows:  len, load(i) -> C H W uint8, and rows of Photo
    bucket         income -> low, medium or high                Goyal et al. 2022
"""

import ast
import csv
import json
import math
from pathlib import Path
from typing import NamedTuple

from engine.images import read_image
from engine.task import skip
from sets.pairs import evenly

LIST = "images_v2.csv"  # parts of it, for a split of ImageNet's classes, are published beside it
COLUMNS = "imageRelPath", "income", "region.id", "topics"
REGIONS = {"af": "africa", "as": "asia", "am": "americas", "eu": "europe"}
INCOMES = "low", "medium", "high"


class Photo(NamedTuple):
    path: Path
    income: str                # low, medium, high
    region: str
    labels: frozenset          # of a classifier: those that say what is in it


class Street:
    def __init__(self, photos):
        self.photos = photos

    def __len__(self):
        return len(self.photos)

    def load(self, i):
        return read_image(self.photos[i].path)

    def label(self, i):
        """Its row: what is in it is not one class"""
        return i

    def name(self, i):
        return str(self.photos[i].path)


def bucket(income):
    """USD a month -> low, below 90, medium, below 1,808, or high: a third of the logarithm, rounded, is 1, 2, 3"""
    return INCOMES[min(max(round(math.log(income) / 3), 1), 3) - 1]


def read_map(path):
    """A file of {topic: [labels]} -> {topic: frozenset of int}. Raises ValueError."""
    try:
        found = {str(topic).strip().lower(): frozenset(map(int, labels))
                 for topic, labels in json.loads(Path(path).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--topics {path} cannot be read ({error}); wanted JSON, {{topic: [numbers of the "
                         "classifier's labels]}") from error
    if not found or not all(found.values()):
        raise ValueError(f"--topics {path} has a topic without labels, or none; wanted {{topic: [numbers]}}")
    return found


def topics_of(text):
    """"Toothbrushes", or "['toothbrushes', 'bathrooms']" -> lower case, in a list"""
    try:
        found = ast.literal_eval(text) if text.startswith("[") else [text]
    except (ValueError, SyntaxError):
        found = [text]
    return [str(topic).strip().lower() for topic in found]


def open_street(c):
    """Street. Raises ValueError."""
    root, known = Path(c.data), read_map(c.topics)
    found = sorted(root.glob("*.csv"))
    if root / LIST not in found and len(found) != 1:
        raise ValueError(f"--data: {root} has {len(found)} csv files; wanted {LIST}, or one that lists the photos")
    listed = root / LIST if root / LIST in found else found[0]
    with listed.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lacking = [name for name in COLUMNS if not rows or name not in rows[0]]
    if lacking:
        raise ValueError(f"--data: {listed} has no column {lacking[0]}, or no row; wanted {', '.join(COLUMNS)}")
    photos, strange = [], 0
    for row in rows:
        labels = frozenset().union(*(known.get(topic, ()) for topic in topics_of(row["topics"])))
        try:
            income, region = bucket(float(row["income"])), REGIONS[row["region.id"].strip().lower()]
        except (ValueError, KeyError, OverflowError) as error:
            raise ValueError(f"--data: {listed} has income {row['income']!r} and region {row['region.id']!r} of "
                             f"{row['imageRelPath']}; wanted USD a month, and af, as, am or eu") from error
        strange += not labels
        if labels:
            photos.append(Photo(root / row["imageRelPath"], income, region, labels))
    if strange:
        skip(f"{strange} photos of topics that {c.topics} does not have", strange)
    photos = evenly(photos, c.limit)
    missing = next((photo.path for photo in photos if not photo.path.is_file()), None)
    if missing or not photos:
        raise ValueError(f"--data: {missing or 'no photo of a topic of --topics'} is not there; wanted all that "
                         f"{listed} lists")
    return Street(photos)
