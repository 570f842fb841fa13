"""
An image of a file, as every command sees it.

    read_image  any file that Pillow opens -> C H W uint8, RGB, upright
    resize      bicubic with antialiasing
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

UPRIGHT = {i + 2: turn for i, turn in enumerate(Image.Transpose[name] for name in (  # EXIF orientations 2 to 8
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"))}
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


def read_image(file, name=None):
    """
    C H W uint8 RGB of any file that Pillow opens: upright by its EXIF tag, 16-bit scaled down, transparency on white.

    file    a path, or an open binary file
    name    what errors call it, if that is no path
    raises  OSError for a file that is broken or cut short
    """
    try:
        with Image.open(file) as image:
            image.load()
            turn = UPRIGHT.get(image.getexif().get(0x0112))  # the EXIF tag Orientation
            image = image.transpose(turn) if turn else image
            if image.mode.startswith(("I", "F")):  # 16-bit greys: 65535 is white; float ones: the brightest value is
                grey = np.asarray(image, dtype=np.float32)
                top = 65535 if image.mode.startswith("I") else max(float(grey.max()), 1e-8)
                image = Image.fromarray((grey / top * 255).clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:  # Pillow's decoders fail in many ways on foreign bytes; all mean: unreadable
        raise OSError(f"{name or file}: {error}") from error


def resize(image, height, width):
    """Bicubic with antialiasing, uint8 in and out; of the same size, the image.    image  C H W"""
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
