"""
An image of a file, as every command sees it.

    ImageConfig  what is taken of a file; images that are no RGB photos: channels.py
    read_image   a photo, as Pillow opens it -> C H W uint8, RGB, upright
    resize       bicubic with antialiasing
    unit, shown  an image -> the values that networks are given, before mean and std; what people are shown

An image is C H W: uint8, levels of 0 to 255, if it is an RGB photo; else float32 from 0 to 1.
"""

import os
import stat
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

UPRIGHT = {i + 2: turn for i, turn in enumerate(Image.Transpose[name] for name in (  # EXIF orientations 2 to 8
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"))}
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
FORMATS = "JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"  # by content: for PostScript Pillow starts a program
OBLONG = 100              # times the short side; a longer one makes views that no memory holds, of 20000x1 3.9 GB
MAX_PIXELS = 100_000_000  # 0.3 GB of RGB, and twice that while it is decoded
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which would warn of what was allowed here


@dataclass(frozen=True)
class ImageConfig:
    bands: str = ""            # channels of each file to take, in this order, from 1, as in 4,3,2; empty = RGB, or all
    scale: float = 0.0         # [0, 1e30]: value of the files that becomes 1; 0 = of 8 and 16 bits the largest there is
    percentiles: tuple = (0, 0)  # [0, 100] rising: those of each image's channels become 0 and 1; equal = off
    nodata: str = ""           # value of pixels that nothing was measured in, or nan: they become the mean
    max_pixels: int = MAX_PIXELS  # [0, 1e15]: of an image of 3 channels; one that has more is not read; 0 = no limit


def read_image(file, name=None, max_pixels=MAX_PIXELS):
    """
    C H W uint8 RGB of a photo: upright by its EXIF tag; the first frame of an animation; transparency, of a palette
    too, on white; CMYK by Pillow's arithmetic, without profiles. Of 16 bits 65535 is white; of a float image, grey, its
    brightest value.

    file        a path, or an open binary file
    name        what errors call it, if that is no path
    max_pixels  by its header, before anything is decoded; 0 = no limit
    raises      OSError: broken, cut short, of no format of FORMATS, no regular file, too large, more than OBLONG times
                as long as it is wide, or with a value that is nan or infinite
    """
    try:
        with opened(file) as stream, open_rgb(stream) as image:
            check_size(*image.size, max_pixels)
            image.load()
            turn = UPRIGHT.get(image.getexif().get(0x0112))  # the EXIF tag Orientation
            image = image.transpose(turn) if turn else image
            if image.mode.startswith(("I", "F")):  # greys of 16 bits, or floats
                grey = finite(np.asarray(image, dtype=np.float32))
                top = 65535 if image.mode.startswith("I") else max(float(grey.max()), 1e-8)
                image = Image.fromarray((grey / top * 255).clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:  # Pillow's decoders fail in many ways on foreign bytes; all mean: unreadable
        raise OSError(f"{name or file}: {error}") from error


def open_rgb(stream):
    """Pillow's image, not yet decoded. Raises ValueError for channels that are no colours: it takes one for opacity."""
    tags = tiff_tags(stream)
    n, seen = tags.get(277, 1), {2: 3, 5: 4, 6: 3, 8: 3}.get(tags.get(262), 1)     # samples; those that are colours
    if n > seen and [extra for extra in tags.get(338, (0,)) if extra not in (1, 2)]:  # kinds of the others: opacity
        raise ValueError(misfit(n, 3))
    return Image.open(stream, formats=FORMATS)


def tiff_tags(stream):
    """{number: value} of an open TIFF's first image; of another file {}."""
    head = stream.read(16)
    stream.seek(0)
    if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0"):
        return {}
    tags = ImageFileDirectory_v2(head if head[2] == 43 else head[:8])
    stream.seek(tags.next)
    tags.load(stream)
    stream.seek(0)
    return tags


def misfit(n, wanted):
    """What is wrong with an image of n channels."""
    return f"image has {n} channel{'s' * (n > 1)}, model {wanted}: --in_chans {n} or --bands"


def opened(file):
    """A path as an open file, for `with`; an open file as it is. Raises ValueError if nothing that ends lies there."""
    if hasattr(file, "read"):
        return nullcontext(file)
    if not stat.S_ISREG(os.stat(file).st_mode):  # asked first: to open a FIFO is to wait for who writes to it
        raise ValueError("it is no regular file")
    return open(file, "rb")


def check_size(width, height, max_pixels, channels=3):
    """Raises ValueError for an image that would take more memory than it is worth: than max_pixels of 3 channels."""
    if max_pixels and width * height * channels > 3 * max_pixels:
        of = f" of {channels} channels" * (channels != 3)
        raise ValueError(f"{width}x{height} pixels{of} are more than --max_pixels {max_pixels:,}; 0 = no limit")
    if max(width, height) > OBLONG * min(width, height):
        raise ValueError(f"{width}x{height} pixels: the long side is more than {OBLONG} times the short one")


def finite(x):
    """x, if all of it are numbers; else a ValueError: one that is none would make others so, and is trained on."""
    wrong = x.size - np.count_nonzero(np.isfinite(x))
    if wrong:
        raise ValueError(f"{wrong:,} of {x.size:,} values are nan or infinite")
    return x


def resize(image, height, width):
    """Bicubic with antialiasing; uint8 in and out, or float32 from 0 to 1; of the same size, the image."""
    if image.shape[1:] == (height, width):
        return image
    image = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
    return image if image.dtype == torch.uint8 else image.clamp(0, 1)  # beyond an edge it overshoots


def unit(x):
    """Images, uint8 or float32 -> float32 from 0 to 1"""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def shown(x):
    """Images, ... C H W -> ... 3 H W uint8: of N channels the first three, or the only one, as red, green, blue."""
    if x.dtype == torch.uint8:
        return x
    x = x[..., :3, :, :] if x.shape[-3] > 2 else x[..., :1, :, :].expand(*x.shape[:-3], 3, *x.shape[-2:])
    return x.mul(255).round().clamp(0, 255).byte()
