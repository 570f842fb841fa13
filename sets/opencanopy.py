"""
Open-Canopy, version 1, as it was published: SPOT 6/7 images of France, and what aerial lidar saw of the trees.

    canopy_height/geometries.geojson     squares of 1 km, each of a split, train, val, test or buffer, and a lidar_year
    canopy_height/YEAR/spot.vrt          R, G, B, infrared of 16 bits, at 1.5 m
    canopy_height/YEAR/lidar.vrt         decimetres;  lidar_classification.vrt: class 5 is high vegetation

Windows of 205 pixels, 512 once they are as fine as SAT-493M's 0.6 m, are cut out while one goes: by --limit evenly from
all of a split. Needs rasterio.

paper:   DINOv3 §8.2, App. D.13: heights below 60 m; scored where the lidar saw high vegetation, at 1.5 m
differs: train's schedule is not stated there, so no number of Tab. 17 stands beside ours; the published score's second
         mask, of forests, is left out
"""

import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine.channels import Channels
from engine.features import reads
from engine.raster import extent, library, named, opened
from engine.sliding import places
from sets.pairs import evenly

LIST = "geometries.geojson"
WINDOW = 205           # pixels of 1.5 m: 512 of 0.6 m
DECIMETRES, HIGHEST, VEGETATION = 10, 60, 5
KINDS = "spot", "lidar", "lidar_classification"


def listed(c):
    """The folder that has the list of squares, or None."""
    return next((root for root in (Path(c.data, "canopy_height"), Path(c.data)) if (root / LIST).is_file()), None)


class Windows:
    """
    read     Channels: of 4 bands and 16 bits, what a network sees    windows  [(folder of a year, (top, left))]
    scored   heights count where the lidar saw high vegetation alone
    """

    def __init__(self, read, windows, scored):
        self.read, self.windows, self.scored = read, windows, scored

    def __len__(self):
        return len(self.windows)

    def part(self, i, kind):
        """C H W of one of KINDS"""
        folder, start = self.windows[i]
        return handle(folder / f"{kind}.vrt", os.getpid()).read(window=extent(start, (WINDOW, WINDOW)))

    def image(self, i):
        return self.read.image(self.part(i, "spot").transpose(1, 2, 0))

    def truth(self, i):
        """H W metres, float32; nan where nothing counts"""
        metres = self.part(i, "lidar")[0].astype(np.float32) / DECIMETRES
        counts = (metres >= 0) & (metres < HIGHEST)
        if self.scored:
            counts &= self.part(i, "lidar_classification")[0] == VEGETATION
        return np.where(counts, metres, np.nan).astype(np.float32)


@lru_cache(maxsize=16)
def handle(path, pid):
    """An open raster, of this process: one that another has opened is not to be read"""
    with named(path):
        return library().open(path)


def open_canopy(c, root):
    """train (None under --head), test: Windows. Raises ValueError."""
    read = reads(c)
    if not isinstance(read, Channels):
        raise ValueError("--data: Open-Canopy has four bands of 16 bits; say which, and what becomes 1, as in --bands "
                         "1,2,3 --scale 3000, or name a network of --in_chans 4")
    try:
        squares = [(each["properties"]["split"], str(int(each["properties"]["lidar_year"])),
                    np.array(each["geometry"]["coordinates"][0], float)[:, :2])
                   for each in json.loads((root / LIST).read_text())["features"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"--data: {root / LIST} is not Open-Canopy's: {type(error).__name__} {error}; wanted features "
                         "with split, lidar_year and a polygon") from error
    found = {split: [] for split in ("train", "test")}
    for split, year, corners in squares:
        if split in found:
            found[split] += windows_in(root / year, corners)
    if not all(found.values()):
        counts = " and ".join(f"{len(windows)} windows of {split}" for split, windows in found.items())
        raise ValueError(f"--data: {root / LIST} has {counts}; wanted some of each")
    train, test = (Windows(read, evenly(found[split], c.limit), split == "test") for split in found)
    return None if c.head else train, test


def windows_in(folder, corners):
    """Those of a square, by the corners of its polygon, n 2: [(folder, (top, left))]"""
    with opened(folder / "spot.vrt") as file:
        at = file.transform
        left, right = sorted(round((x - at.c) / at.a) for x in (corners[:, 0].min(), corners[:, 0].max()))
        top, down = sorted(round((y - at.f) / at.e) for y in (corners[:, 1].min(), corners[:, 1].max()))
        if top < 0 or left < 0 or down > file.height or right > file.width or min(down - top, right - left) < WINDOW:
            raise ValueError(f"--data: {folder / 'spot.vrt'} has {file.width}x{file.height} pixels; a square of {LIST} "
                             f"is at {left}, {top} to {right}, {down}")
    return [(folder, (top + y, left + x)) for y, x in places((down - top, right - left), WINDOW, WINDOW)]
