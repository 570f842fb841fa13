"""
Images of any number of channels, of 8, 16 or 32 bits, from satellites and microscopes.

    reader    options, a network's channels and mean -> what makes an image of a file; of RGB photos it is read_image
    Channels  file -> C H W float32, from 0 to 1: channels picked, scaled, without holes
    decode    file -> H W C, in the type that it was stored in: TIFF, npy, PNG, and what else Pillow opens
    tiff      the same of a TIFF: strips or tiles, contiguous or planar, LZW, deflate, zstd and others, predictors 2, 3

Pillow opens no TIFF of 13 channels, and of 16 bits only greys; but it brings libtiff, which undoes any compression of
bytes. A file's strips are handed to it as rows of a grey picture of bytes, and what they mean is worked out here.
"""

import io
import json
import struct
from dataclasses import dataclass, fields
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.images import EXTENSIONS, FORMATS, ImageConfig, check_size, finite, misfit, opened, read_image, tiff_tags

TOPS = {"uint8": 255, "uint16": 65535}  # values that become 1, where --scale does not say
KINDS = {1: "u", 2: "i", 3: "f"}        # of TIFF's tag SampleFormat
COMPRESSIONS = 1, 5, 8, 32773, 32946, 34925, 50000  # none, LZW, deflate, PackBits, deflate, LZMA, zstd
AT_ONCE = 64                            # strips or tiles that are unpacked together

# --------------------------------------------------------------------------------
# What makes an image of a file


def reader(c, network):
    """
    What makes an image of a file: file or path, name=None -> C H W; it raises OSError for what is unreadable.

    c        an ImageConfig
    network  has in_chans and mean, in [0, 1]
    raises   ValueError: options that do not go together
    """
    bands = read_bands(c.bands)
    if network.in_chans == 3 and not bands:
        if c.scale or percentiles(c) or c.nodata:
            raise ValueError("--scale, --percentiles and --nodata are for images that are no RGB photos; say which "
                             "channels: --bands 1,2,3")
        return partial(read_image, max_pixels=c.max_pixels)
    if bands and len(bands) != network.in_chans:
        raise ValueError(f"--bands {c.bands} names {len(bands)} channels, the network has {network.in_chans}: "
                         f"--in_chans {len(bands)}, or other --bands")
    if c.scale and percentiles(c):
        raise ValueError("--scale and --percentiles both say what becomes 1; leave one of them out")
    try:
        nodata = float(c.nodata) if c.nodata else None
    except ValueError as error:
        raise ValueError(f"--nodata {c.nodata!r}: write a number, or nan") from error
    return Channels(bands, c.scale, percentiles(c), nodata, c.max_pixels, tuple(network.mean))


def read_bands(text):
    """"4,3,2" -> (4, 3, 2). Raises ValueError."""
    words = text.split(",") if text else []
    if not all(word.isdecimal() and 0 < int(word) <= 65535 for word in words):
        raise ValueError(f"--bands {text}: write numbers of channels, from 1, as in 4,3,2")
    return tuple(map(int, words))


def percentiles(c):
    """The two of them, or None."""
    return c.percentiles if c.percentiles[0] < c.percentiles[1] else None


def of_run(weights):
    """The image options of a run, {name: text}: what its network was trained on; {} of any other weights."""
    try:
        folder = Path(weights)
        saved = json.loads(((folder if folder.is_dir() else folder.parent) / "config.json").read_text())
        return {field.name: ",".join(map(str, value)) if isinstance(value, list) else str(value)
                for field in fields(ImageConfig) if (value := saved.get(field.name)) is not None}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


@dataclass(frozen=True)
class Channels:
    """
    A file -> C H W float32 from 0 to 1, as many channels as there are means: divided by `scale`, or from one percentile
    of each channel of the image to the other, and cut off there. What was not measured has the channel's mean.
    """
    bands: tuple
    scale: float
    percentiles: tuple | None
    nodata: float | None
    max_pixels: int
    mean: tuple
    extensions = EXTENSIONS | {".npy"}  # of files that a folder is searched for

    def __call__(self, file, name=None):
        try:
            with opened(file) as stream:
                return self.image(decode(stream, self.max_pixels))
        except Exception as error:  # decoders fail in many ways on foreign bytes; all mean: unreadable
            raise OSError(f"{name or file}: {error}") from error

    def image(self, x):
        """x  H W C, in the file's type"""
        n = x.shape[2]
        if self.bands and max(self.bands) > n:
            raise ValueError(f"image has {n} channel{'s' * (n > 1)}, --bands asks for number {max(self.bands)}")
        if not self.bands and n != len(self.mean):
            raise ValueError(misfit(n, len(self.mean)))
        x = x[..., [band - 1 for band in self.bands] if self.bands else slice(None)]
        return self.scaled(x, self.ends(x) if self.percentiles else None)

    def holes(self, x):
        """Where nothing was measured"""
        return np.zeros(x.shape, bool) if self.nodata is None else \
            np.isnan(x) if np.isnan(self.nodata) else x.astype(np.float32) == np.float32(self.nodata)

    def ends(self, x):
        """The two percentiles of each channel of H W C; of one that is all holes, 0 and 1"""
        return [np.percentile(channel[~hole], self.percentiles) if not hole.all() else (0, 1)
                for channel, hole in zip(np.moveaxis(x, 2, 0), np.moveaxis(self.holes(x), 2, 0), strict=True)]

    def scaled(self, x, ends=None):
        """H W C, the channels of the network -> C H W;  ends  what becomes 0 and 1, of each; None = as --scale says"""
        kind, holes = x.dtype.name, np.moveaxis(self.holes(x), 2, 0)
        if not (ends or self.scale or kind in TOPS):
            raise ValueError(f"values are {kind}: say which of them becomes 1, --scale, or --percentiles 2,98")
        x = np.array(np.moveaxis(x, 2, 0), np.float32, order="C")                              # C H W
        finite(x if self.nodata is None else x[~holes])
        ends = ends or [(0, self.scale or TOPS.get(kind))] * len(x)
        for channel, hole, mean, (low, top) in zip(x, holes, self.mean, ends, strict=True):
            channel[...] = np.where(hole, mean, ((channel - low) / max(top - low, 1e-30)).clip(0, 1))
        return torch.from_numpy(x)

# --------------------------------------------------------------------------------
# What a file holds


def decode(stream, max_pixels):
    """
    H W C in the type of the file, of a TIFF, .npy, PNG or any photo; a palette as its colours, opacity as a channel.

    A .npy is H W, H W C or C H W: channels are the shorter one of the outer axes, the last if they are equal.
    raises  ValueError, or whatever decoders raise
    """
    head = stream.read(26)
    stream.seek(0)
    tags = tiff_tags(stream)
    if head.startswith(b"\x93NUMPY"):
        return from_npy(stream, max_pixels)
    if tags and plain(tags):
        check_size(tags[256], tags[257], max_pixels, tags.get(277, 1))
        return turned(tiff(stream, tags, head[:1] == b"M", max_pixels), tags.get(274, 1))
    with Image.open(stream, formats=FORMATS) as image:
        check_size(*image.size, max_pixels)
        if image.format == "PNG" and head[24] == 16 and image.mode != "I;16":
            raise ValueError("a PNG of 16 bits a colour, of which Pillow has 8; write it as TIFF or .npy")
        turn = image.getexif().get(0x0112, 1)  # the EXIF tag Orientation
        if image.mode not in ("L", "LA", "RGB", "RGBA", "F", "I") and not image.mode.startswith("I;16"):
            image = image.convert("RGBA" if "transparency" in image.info or "A" in image.getbands() else "RGB")
        return turned(np.atleast_3d(np.asarray(image)), turn)


def turned(x, orientation):
    """H W C, upright:  orientation  of EXIF or TIFF, 1 to 8"""
    x = x.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else x
    x = x[::-1] if orientation in (3, 4, 7, 8) else x
    return x[:, ::-1] if orientation in (2, 3, 6, 7) else x


def from_npy(stream, max_pixels):
    npy = np.lib.format
    headers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(stream)
    if version not in headers:
        raise ValueError(f"a .npy of format {version}; wanted 1.0 or 2.0, as numpy writes numbers")
    shape, _, kind = headers[version](stream)
    if len(shape) not in (2, 3) or not all(shape) or kind.kind not in "uif":
        raise ValueError(f"an array {shape} of {kind}; wanted H W, H W C or C H W, of integers or floats")
    shape = shape if len(shape) == 3 else (*shape, 1)
    first = shape[0] < shape[2]
    H, W, C = (*shape[1:], shape[0]) if first else shape
    check_size(W, H, max_pixels, C)
    stream.seek(0)
    x = np.load(stream, allow_pickle=False).reshape(shape)
    return x.transpose(1, 2, 0) if first else x

# --------------------------------------------------------------------------------
# TIFF


def plain(tags):
    """Whether a TIFF is numbers of whole bytes, of one type, that no palette or colour transform stands between."""
    bits, kinds, there = tags.get(258, (1,)), tags.get(339, (1,)), tags.keys()
    whole = {256, 257} <= there and ({273, 279} <= there or {322, 323, 324, 325} <= there)
    alike = len(set(bits)) == len(set(kinds)) == 1 and bits[0] in (8, 16, 32, 64) and kinds[0] in KINDS
    return whole and alike and (tags.get(262, 1) in (1, 2) and tags.get(259, 1) in COMPRESSIONS
                                and tags.get(266, 1) == 1)


def tiff(stream, tags, big, max_pixels):
    """H W C of the first image.    big  its bytes are in big-endian order    max_pixels  of a strip or tile, too"""
    W, H, C = tags[256], tags[257], tags.get(277, 1)
    kind = np.dtype(f"{'>' if big else '<'}{KINDS[tags.get(339, (1,))[0]]}{tags[258][0] // 8}")
    planes, each = (C, 1) if tags.get(284, 1) == 2 else (1, C)         # one after the other; values side by side
    tiled = 322 in tags
    w, h = (tags[322], tags[323]) if tiled else (W, min(tags.get(278, H), H))
    if min(w, h) < 1 or max_pixels and w * h * each > 3 * max_pixels:
        raise ValueError(f"strips or tiles of {w}x{h} pixels; wanted some, and no more than --max_pixels")
    down, across = -(-H // h), -(-W // w)
    offsets, sizes = (tags[324], tags[325]) if tiled else (tags[273], tags[279])
    if not planes * down * across == len(offsets) == len(sizes) or sum(sizes) > stream.seek(0, io.SEEK_END):
        raise ValueError(f"{len(offsets)} strips or tiles of {sum(sizes):,} bytes, where {planes * down * across} "
                         "belong, or more bytes than the file has")
    out = np.zeros((planes, H, W, each), kind.newbyteorder("="))
    places = list(np.ndindex(planes, down, across))
    rows = [h if tiled else min(h, H - h * y) for _, y, _ in places]   # of a strip; the last one has fewer
    chosen = sorted(range(len(rows)), key=rows.__getitem__)            # those of one shape are unpacked together
    for height, alike in groupby(chosen, key=rows.__getitem__):
        while some := list(islice(alike, AT_ONCE)):
            packed = [(stream.seek(offsets[k]), stream.read(sizes[k]))[1] for k in some]
            found = unpacked(packed, height, w * each * kind.itemsize, tags.get(259, 1))
            values = unpredicted(found, tags.get(317, 1), kind, each)                          # n h w each
            for k, part in zip(some, values, strict=True):
                p, y, x = places[k]
                into = out[p, y * h : (y + 1) * h, x * w : (x + 1) * w]
                into[...] = part[: into.shape[0], : into.shape[1]]
    return out.transpose(1, 2, 3, 0)[..., 0] if planes == 1 else out[..., 0].transpose(1, 2, 0)


def unpacked(packed, height, width, compression):
    """Strips of `height` rows of `width` bytes, compressed -> n height width, uint8"""
    data = b"".join(x[: height * width] for x in packed) if compression == 1 else as_grey(
        packed, height, width, compression)
    if len(data) != len(packed) * height * width:
        raise ValueError(f"strips or tiles of {len(data):,} bytes, where {len(packed) * height * width:,} belong")
    return np.frombuffer(data, np.uint8).reshape(-1, height, width)


def as_grey(packed, height, width, compression):
    """The bytes of all strips, by libtiff: as if they were those of one grey picture of 8 bits."""
    n, data = len(packed), b"".join(packed)
    counts = [len(each) for each in packed]
    starts = np.cumsum([0, *counts[:-1]])
    words = {256: [width], 257: [n * height], 258: [8], 259: [compression], 262: [1], 273: starts, 277: [1],
             278: [height], 279: counts}
    room = 8 + 2 + 12 * len(words) + 4  # of header and directory; then come the long lists, then the strips
    first = room + sum(4 * len(values) for values in words.values() if len(values) > 1)
    words[273] = [int(start) + first for start in starts]
    directory, more = struct.pack("<H", len(words)), b""
    for tag, values in words.items():
        value = values[0] if len(values) == 1 else room + len(more)
        directory += struct.pack("<HHII", tag, 4, len(values), value)
        more += struct.pack(f"<{len(values)}I", *values) if len(values) > 1 else b""
    file = struct.pack("<2sHI", b"II", 42, 8) + directory + bytes(4) + more + data
    with Image.open(io.BytesIO(file), formats=["TIFF"]) as image:
        return image.tobytes()


def unpredicted(x, predictor, kind, each):
    """
    n h bytes of a row, as stored -> n h w each.

    predictor  1 none; 2 each value less the one before it; 3 of floats, the same of bytes, the first of all first
    """
    native = kind.newbyteorder("=")
    if predictor == 3:
        x = x.reshape(*x.shape[:2], -1, each).cumsum(2, dtype=np.uint8).reshape(*x.shape[:2], kind.itemsize, -1)
        x = np.ascontiguousarray(x.swapaxes(2, 3)).view(kind.newbyteorder(">"))                # bytes of one together
        return x.reshape(*x.shape[:2], -1, each).astype(native)
    x = x.view(kind).astype(native).reshape(*x.shape[:2], -1, each)
    if predictor == 2:
        whole = np.dtype(f"u{kind.itemsize}")
        return x.view(whole).cumsum(2, dtype=whole).view(native)
    return x
