"""
An image of a file, as every command sees it.

    read_image  a photo, as Pillow opens it -> C H W uint8, RGB, upright
    resize      bicubic with antialiasing
"""

import os
import stat
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

UPRIGHT = {i + 2: turn for i, turn in enumerate(Image.Transpose[name] for name in (  # EXIF orientations 2 to 8
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"))}
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
FORMATS = "JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"  # by content: for PostScript Pillow starts a program
OBLONG = 100              # times the short side; a longer one makes views that no memory holds, of 20000x1 3.9 GB
MAX_PIXELS = 100_000_000  # 0.3 GB of RGB, and twice that while it is decoded
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which would warn of what was allowed here


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
        with opened(file) as stream, Image.open(stream, formats=FORMATS) as image:
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


def opened(file):
    """A path as an open file, for `with`; an open file as it is. Raises ValueError if nothing that ends lies there."""
    if hasattr(file, "read"):
        return nullcontext(file)
    if not stat.S_ISREG(os.stat(file).st_mode):  # asked first: to open a FIFO is to wait for who writes to it
        raise ValueError("it is no regular file")
    return open(file, "rb")


def check_size(width, height, max_pixels):
    """Raises ValueError for an image that would take more memory than it is worth."""
    if max_pixels and width * height > max_pixels:
        raise ValueError(f"{width}x{height} pixels are more than --max_pixels {max_pixels:,}; 0 = no limit")
    if max(width, height) > OBLONG * min(width, height):
        raise ValueError(f"{width}x{height} pixels: the long side is more than {OBLONG} times the short one")


def finite(x):
    """x, if all of it are numbers; else a ValueError: one that is none would make others so, and is trained on."""
    wrong = x.size - np.count_nonzero(np.isfinite(x))
    if wrong:
        raise ValueError(f"{wrong:,} of {x.size:,} values are nan or infinite")
    return x


def resize(image, height, width):
    """Bicubic with antialiasing, uint8 in and out; of the same size, the image.    image  C H W"""
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
