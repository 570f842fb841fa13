"""
Rasters of any size, cut into images of one size that lie where they were: what is trained on, and measured.

    python data.py tiles LAND/train --out TILES/train --side 512         every .tif and .vrt below LAND/train
    python data.py tiles LAND/train --out TILES/train --overlap 128      each begins so many pixels before the last ends

A file NAME.tif becomes NAME_ROW_COLUMN.tif, of all its bands, as they are stored. Two whose names differ in their first
word alone, as rgb_NORTH.tif and height_NORTH.tif of the task canopy, are cut at the same places. A tile in which
nothing was measured, in any of them, is left out, and counted. Needs rasterio.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine import config as command_line
from engine.raster import extent, opened
from engine.sliding import places

SUFFIXES = ".tif", ".tiff", ".vrt"
KINDS = "rgb_", "height_"    # that are of one place


@dataclass(frozen=True)
class TilesConfig:
    out: str = ""              # folder for the tiles; made
    side: int = 512            # [16, 16384]: pixels
    overlap: int = 0           # [0, 16000]: pixels; the last tile of a row ends with the raster, and may overlap more


def groups(root):
    """Rasters below a folder -> {what their place is called: their paths}. Raises ValueError."""
    found = {}
    for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES):
        kind = next((kind for kind in KINDS if path.name.startswith(kind)), "")
        found.setdefault(path.with_name(path.stem.removeprefix(kind)), []).append(path)
    if not found:
        raise ValueError(f"RASTERS {root}: no {' or '.join(SUFFIXES)} in it or below it; name a folder of GeoTIFFs")
    return found


def cut(paths, root, c):
    """The tiles of rasters of one place -> how many, and how many were left out. Raises ValueError."""
    made = empty = 0
    with opened(paths[0]) as first:
        size, at = (first.height, first.width), first.transform
    if min(size) < c.side:
        raise ValueError(f"{paths[0]} has {size[1]}x{size[0]} pixels; --side {c.side} wants as many each way")
    for start in places(size, c.side, c.side - c.overlap):
        found = []
        for path in paths:
            with opened(path) as file:
                if (file.height, file.width) != size or not file.transform.almost_equals(at):
                    raise ValueError(f"{path} has {file.width}x{file.height} pixels at {file.transform[2]:.9g}, "
                                     f"{file.transform[5]:.9g}, {paths[0]} {size[1]}x{size[0]} at {at[2]:.9g}, "
                                     f"{at[5]:.9g}; warp one to the other's grid")
                window = extent(start, (c.side, c.side))
                found.append((file.read(window=window), file.dataset_mask(window=window) > 0, file.profile | dict(
                    transform=file.window_transform(window_of(file, window)))))
        if not all(known.any() and not nan_alone(x) for x, known, _ in found):
            empty += 1
            continue
        for path, (x, _, profile) in zip(paths, found, strict=True):
            write(Path(c.out, path.relative_to(root)).with_name(f"{path.stem}_{start[0]:05}_{start[1]:05}.tif"), x,
                  profile)
        made += 1
    return made, empty


def window_of(file, window):
    from rasterio.windows import Window
    return Window.from_slices(*window, height=file.height, width=file.width)


def nan_alone(x):
    return x.dtype.kind == "f" and np.isnan(x).all()


def write(path, x, like):
    """C H W as a GeoTIFF that Pillow opens, too; it is there once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new.tif")
    try:
        with opened(new, "w", driver="GTiff", dtype=x.dtype, count=len(x), height=x.shape[1], width=x.shape[2],
                    crs=like["crs"], transform=like["transform"], nodata=like["nodata"], compress="deflate") as file:
            file.write(x)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def main(argv):
    values, words = command_line.read_words(argv, command_line.types(TilesConfig()))
    if argv == ["--help"] or len(words) != 1:
        print(__doc__.strip(), command_line.describe(TilesConfig()), sep="\n\n")
        return
    c, root = command_line.apply(TilesConfig(), values), Path(words[0])
    if not c.out or c.overlap >= c.side:
        raise ValueError(f"--out {c.out!r} --side {c.side} --overlap {c.overlap}: write a folder for the tiles, which "
                         "overlap by less than their side")
    command_line.writable(c.out)
    made = empty = 0
    for paths in tqdm(groups(root).values(), "rasters", unit="img", leave=False, disable=None):
        counts = cut(paths, root, c)
        made, empty = made + counts[0], empty + counts[1]
    if not made:
        raise ValueError(f"RASTERS {root}: all of {empty} tiles are empty; nothing in them was measured")
    print(f"wrote {made} tiles of {c.side}x{c.side} pixels to {c.out}; {empty} were left out, as nothing was measured")
