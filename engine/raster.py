"""
Rasters that no memory holds, read and written in windows: a map of a whole one, in its own coordinates. Needs rasterio.

    blended    what windows that overlap say, as one map, rows from top to bottom
    Raster     a file of any number of bands: its windows, as a network reads images
    heights    a raster -> a GeoTIFF of metres, of the same size and place

A window says most in its middle. Along its sides is what convolutions made of the zeros around it: that counts only
where no other window has a say, and next to it the weight rises over the overlap, so that no border is seen.
"""

import math
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.channels import reader
from engine.pictures import network_input
from engine.sliding import resized, starts

OVERLAP = 4          # of a window's side one part in so many lies under the next one, chosen by eye
EDGES = 4            # of an overlap one part in so many, at either end, is left to the other window
FAINT = 1e-6         # weight that stands for none, where there is no other
BLOCK = 256          # pixels of a GeoTIFF's tiles: rows are written when one row of tiles is whole
LOOK = 1024          # pixels of the long side of what percentiles are taken of

# --------------------------------------------------------------------------------
# Windows into a map


def ramp(side, overlap):
    """Weights of a window along one axis: next to none at the border, up to 1 within the overlap, and down again"""
    edge = overlap // EDGES
    up = (np.arange(1, side + 1) - edge) / (overlap - 2 * edge + 1)
    return np.minimum(up, up[::-1]).clip(FAINT, 1).astype(np.float32)


def blended(size, side, overlap, answer):
    """
    The mean of what windows say, weighted by `ramp`, down and across. Memory is that of one row of windows.

    size     H W of the map      side, overlap  of windows, in pixels; a smaller map is the corner of one
    answer   (top, left) -> side side, nan where nothing is known; or None, of a window of which all is not
    returns  yields h W float32, from top to bottom, of H rows in all; nan where no window knows anything
    """
    H, W = (max(n, side) for n in size)
    weights = np.outer(*[ramp(side, overlap)] * 2)
    total, seen = np.zeros((2, side, W), np.float32)
    tops = starts(H, side, side - overlap)
    for top, after in zip(tops, [*tops[1:], H], strict=True):
        for left in starts(W, side, side - overlap):
            if (found := answer(top, left)) is not None:
                known, there = ~np.isnan(found), np.s_[:, left : left + side]
                total[there] += weights * np.where(known, found, 0)
                seen[there] += weights * known
        done = after - top
        rows = np.where(seen[:done] > 0, total[:done] / np.maximum(seen[:done], 1e-30), np.nan)
        yield rows[: size[0] - top, : size[1]]
        for held in total, seen:
            held[: side - done], held[side - done :] = held[done:].copy(), 0


def in_blocks(strips, rows):
    """Strips of any height -> strips of so many rows, and a last one of what is left"""
    held = None
    for strip in strips:
        held = strip if held is None else np.concatenate([held, strip])
        while len(held) >= rows:
            yield held[:rows]
            held = held[rows:]
    if len(held):
        yield held

# --------------------------------------------------------------------------------
# Files


def library():
    try:
        import rasterio
    except ImportError as error:
        raise ValueError("rasters: rasterio is not installed; pip install -e .[geo]") from error
    return rasterio


@contextmanager
def opened(path, *args, **more):
    """A raster, for `with`; what cannot be written to it is a ValueError."""
    rasterio = library()
    with named(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)  # it is said in one line
        file = rasterio.open(path, *args, **more)
    with named(path), file:
        yield file


@contextmanager
def named(path):
    """What rasterio cannot read or write is a ValueError that names it."""
    try:
        yield
    except library().errors.RasterioError as error:
        said = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{path}: {said}; wanted a GeoTIFF, or another raster, that is whole") from error


class Raster:
    """
    An open raster as images for a network.

    c        an ImageConfig: its bands, its scale, or its percentiles, which are those of the whole raster; its nodata,
             or, if it names none, the raster's own
    network  has in_chans and mean
    raises   ValueError: bands that are not there, or do not fit, values that do not say which of them becomes 1
    """

    def __init__(self, file, path, c, network):
        self.file, self.path, self.size = file, path, (file.height, file.width)
        own = file.nodata if not c.nodata else None
        chosen = c.bands or ",".join(str(1 + k) for k in range(network.in_chans))
        if not c.bands and file.count != network.in_chans:
            raise ValueError(f"{path} has {file.count} bands, the network sees {network.in_chans}: say which, --bands "
                             f"{chosen}")
        c = replace(c, bands=chosen, nodata=str(own) if own is not None else c.nodata)
        self.channels = reader(c, network)
        highest, kinds = max(self.channels.bands), {file.dtypes[k - 1] for k in self.channels.bands if k <= file.count}
        if highest > file.count:
            raise ValueError(f"{path} has {file.count} bands, --bands asks for number {highest}")
        if len(kinds) > 1:
            raise ValueError(f"{path} has bands of {' and '.join(sorted(kinds))}; name bands of one kind, --bands")
        shrink = max(1, max(self.size) / LOOK)
        self.ends = None if not c.percentiles[0] < c.percentiles[1] else self.channels.ends(
            self.values((0, 0), self.size, [max(1, round(n / shrink)) for n in self.size]))

    def values(self, start, size, out=None):
        """H W C of a window, in the file's type"""
        bands = list(self.channels.bands)
        with named(self.path):
            x = self.file.read(bands, window=extent(start, size), out_shape=out and (len(bands), *out))
        return x.transpose(1, 2, 0)

    def window(self, top, left, side):
        """
        C side side from 0 to 1, mirrored beyond the raster's edges;  side side bool: where a band was measured, by its
        value and by what else the file says, such as opacity;  raises ValueError for values that are none
        """
        size = [min(side, n - at) for n, at in zip(self.size, (top, left), strict=True)]
        x, more = self.values((top, left), size), [(0, side - n) for n in size]
        known = ~self.channels.holes(x).all(2) & (self.file.dataset_mask(window=extent((top, left), size)) > 0)
        try:
            image = self.channels.scaled(x, self.ends).numpy()
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        image = np.where(known, image, np.float32(self.channels.mean)[:, None, None])
        return torch.from_numpy(np.pad(image, [(0, 0), *more], mode="symmetric")), np.pad(known, more)


def extent(start, size):
    """A window as rasterio takes it"""
    return tuple((at, at + n) for at, n in zip(start, size, strict=True))

# --------------------------------------------------------------------------------
# Heights


class Map:
    """What has been written of a map: how many metres are known, their mean, the least and the most of them."""
    n, total, least, most = 0, 0.0, np.inf, -np.inf

    def add(self, rows):
        known = rows[~np.isnan(rows)]
        self.n, self.total = self.n + known.size, self.total + known.sum(dtype=np.float64)
        self.least, self.most = known.min(initial=self.least), known.max(initial=self.most)


def heights(path, out, decoder, c, side):
    """
    Writes OUT, a GeoTIFF of float32 metres, nan where nothing was measured, of the size and the place of a raster.

    decoder  decoders.depth.Depth, of heights, on its backbone    c  an ImageConfig    side  pixels of a window
    returns  a line;  raises ValueError: no rasterio, no raster, one that does not fit, or in which nothing is measured
    """
    out, overlap = Path(out), side // OVERLAP
    if not Path(path).is_file():
        raise ValueError(f"IN {path} does not exist; name a GeoTIFF")
    if out.exists() and out.samefile(path):
        raise ValueError(f"--out {out} is IN itself; name another file")
    with opened(path) as file:
        raster, counts = Raster(file, path, c, decoder.backbone.config), [0, 0]
        if file.crs is None:
            print(f"{path} says no coordinate system; {out} will say none either")
        bar = tqdm(desc="windows", unit="img", leave=False, disable=None, total=math.prod(
            len(starts(max(n, side), side, side - overlap)) for n in raster.size))

        def answer(top, left):
            image, known = raster.window(top, left, side)
            counts[int(known.any())] += 1
            bar.update()
            if known.any():
                metres = resized(decoder(network_input(decoder.backbone, image)), known.shape)[0].cpu().numpy()
                return np.where(known, metres, np.nan)
        with bar:
            map = write(out, file, in_blocks(blended(raster.size, side, overlap, answer), BLOCK))
        place = f"{abs(file.transform.a):g} x {abs(file.transform.e):g}, {file.crs or 'no coordinate system'}"
        return (f"wrote {out}: {file.width}x{file.height} pixels of {place}; {map.least:.2f} to {map.most:.2f} m, mean "
                f"{map.total / map.n:.2f}; {sum(counts)} windows, {counts[0]} of them empty")


def write(out, like, strips):
    """Strips of rows as a GeoTIFF in the place of the raster `like` -> a Map; it is there once it is whole."""
    map, top, new = Map(), 0, out.with_suffix(".new.tif")
    try:
        with opened(new, "w", driver="GTiff", dtype="float32", count=1, height=like.height, width=like.width,
                    crs=like.crs, transform=like.transform, nodata=np.nan, tiled=True, blockxsize=BLOCK,
                    blockysize=BLOCK, compress="deflate", predictor=3, BIGTIFF="IF_SAFER") as file:
            for rows in strips:
                file.write(rows, 1, window=extent((top, 0), rows.shape))
                map.add(rows)
                top += len(rows)
        if not map.n:
            raise ValueError(f"{like.name}: nothing in it was measured, all is nodata; name another raster")
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)
    return map
