"""Images as the world stores them."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from engine.images import read_image

WHITE, RED = (255, 255, 255), (255, 0, 0)
PALETTE = Image.new("P", (5, 3), 1)
PALETTE.putpalette([0, 255, 0, *RED])
IMAGES = {  # file: the image, how to save it, its pixels as RGB
    "grey.png": (Image.new("L", (5, 3), 200), {}, (200, 200, 200)),
    "bit.png": (Image.new("1", (5, 3), 1), {}, WHITE),
    "grey and alpha.png": (Image.new("LA", (5, 3), (0, 0)), {}, WHITE),
    "opaque.png": (Image.new("RGBA", (5, 3), (*RED, 255)), {}, RED),
    "transparent.png": (Image.new("RGBA", (5, 3), (*RED, 0)), {}, WHITE),
    "half.webp": (Image.new("RGBA", (5, 3), (*RED, 128)), dict(lossless=True), (255, 127, 127)),
    "palette.png": (PALETTE, {}, RED),
    "transparent palette.png": (PALETTE, dict(transparency=1), WHITE),
    "other is transparent.png": (PALETTE, dict(transparency=0), RED),
    "palette.gif": (PALETTE, {}, RED),
    "print.jpg": (Image.new("CMYK", (5, 3), (0, 255, 255, 0)), {}, (254, 0, 0)),
    "16 bit.png": (Image.fromarray(np.full((3, 5), 65535, np.uint16)), {}, WHITE),
    "16 bit grey.png": (Image.fromarray(np.full((3, 5), 32768, np.uint16)), {}, (127, 127, 127)),
    "16 bit black.png": (Image.fromarray(np.full((3, 5), 0, np.uint16)), {}, (0, 0, 0)),
    "float.tiff": (Image.fromarray(np.full((3, 5), 0.25, np.float32)), {}, WHITE),
    "below zero.tiff": (Image.fromarray(np.full((3, 5), -0.25, np.float32)), {}, (0, 0, 0)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_every_kind_of_image_becomes_rgb(tmp_path, name):
    image, options, pixel = IMAGES[name]
    image.save(tmp_path / name, **options)
    ours = read_image(tmp_path / name)
    assert ours.shape == (3, 3, 5) and ours.dtype == torch.uint8
    assert ours.amin((1, 2)).tolist() == ours.amax((1, 2)).tolist() == pytest.approx(pixel, abs=1)


def test_float_greys_are_scaled_to_their_brightest(tmp_path):
    Image.fromarray(np.array([[0, 0.1, 0.25, 0.5]], np.float32)).save(tmp_path / "x.tiff")
    assert read_image(tmp_path / "x.tiff")[0].tolist() == [[0, 51, 127, 255]]


def test_one_pixel_is_an_image(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").tolist() == [[[1]], [[2]], [[3]]]


def test_photos_stand_upright(tmp_path):
    """Orientation 6: the camera lay on its side, so that the right of the scene is on top of the file."""
    pixels, tag = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8), Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=tag)
    exact = np.rot90(pixels, -1).transpose(2, 0, 1)
    assert read_image(tmp_path / "x.png").tolist() == exact.tolist()


def test_a_damaged_tag_costs_no_photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "tag.jpg", exif=TAG)
    assert read_image(tmp_path / "tag.jpg").shape == (3, 5, 3)  # its orientation is 6


# Exif: orientation 6, and a horizontal resolution that is a text
TAG = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIIHHIII", 2, 0x0112, 3, 1, 6, 0x011A, 2, 4, 0x616161, 0)


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "cut.webp", "page.jpg", "empty.gif", "nowhere.jpg"])
def test_broken_images_are_named(tmp_path, name):
    path, noise = tmp_path / name, np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = {"cut": path.read_bytes()[:700], "page": b"<html>404"}
    path.write_bytes(content.get(path.stem, b""))
    if name == "nowhere.jpg":
        path.unlink()
    with pytest.raises(OSError) as error:
        read_image(path)
    assert str(path) in str(error.value)
