"""Images as the world stores them."""

import io
import os
import signal
import socket
import struct
import subprocess
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from engine.images import read_image, unit

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
    "16 bit.tiff": (Image.fromarray(np.full((3, 5), 32768, np.uint16)), {}, (127, 127, 127)),
    "32 bit.tiff": (Image.fromarray(np.full((3, 5), 65535, np.int32)), {}, WHITE),
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

# --------------------------------------------------------------------------------
# What is no photo, or none that a run should wait for or make room for


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_float_image_with_a_number_that_is_none_is_unreadable(tmp_path, value):
    """It would be trained on: one such value makes all of the brightest, and so every pixel, nan or 0."""
    pixels = np.full((3, 5), 0.25, np.float32)
    pixels[1, 2] = value
    Image.fromarray(pixels).save(tmp_path / "x.tiff")
    with pytest.raises(OSError, match=r"x\.tiff: 1 of 15 values are nan or infinite"):
        read_image(tmp_path / "x.tiff")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_only_regular_files_are_opened(tmp_path):
    """A FIFO that nobody writes to would be waited for, for ever."""
    os.mkfifo(tmp_path / "x.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket.jpg"))
    (tmp_path / "folder.jpg").mkdir()
    for name in "x.jpg", "device.jpg", "socket.jpg", "folder.jpg":
        signal.alarm(5)
        with pytest.raises(OSError, match=rf"{name}: it is no regular file"):
            read_image(tmp_path / name)
        signal.alarm(0)
    server.close()


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tiff", "x.gif", "x.bmp", "x.webp", "x.ppm"])
def test_a_photo_that_is_too_large_is_refused_by_its_header(tmp_path, name, monkeypatch):
    Image.new("L", (300, 200)).save(tmp_path / name)
    assert read_image(tmp_path / name, max_pixels=60_000).shape == (3, 200, 300)
    assert read_image(tmp_path / name, max_pixels=0).shape == (3, 200, 300)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(OSError, match=rf"{name}: 300x200 pixels are more than --max_pixels 59,999; 0 = no limit"):
        read_image(tmp_path / name, max_pixels=59_999)


def test_the_limit_is_ours_and_not_pillows(tmp_path):
    """Which warns from 89 million on, whatever was asked for, and refuses twice as many."""
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0))
    (tmp_path / "x.png").write_bytes(header + chunk(b"IDAT", zlib.compress(b"")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match="20000x20000 pixels are more than --max_pixels 100,000,000"):
            read_image(tmp_path / "x.png")
        with pytest.raises(OSError, match="truncated"):  # allowed, and decoded
            read_image(tmp_path / "x.png", max_pixels=0)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (603, 6)])
def test_a_line_is_no_photo(tmp_path, size):
    """Its short side at 256 pixels, a view of it would be as long as it is oblong: 3.9 GB of 20000x1."""
    Image.new("RGB", size).save(tmp_path / "x.png")
    with pytest.raises(OSError, match=r"x\.png: {}x{} pixels: the long side is more than 100 times the short".format(
            *size)):
        read_image(tmp_path / "x.png")
    Image.new("RGB", (600, 6)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").shape == (3, 6, 600)


def test_nothing_is_started_for_a_file(tmp_path, monkeypatch):
    """PostScript named .jpg: Pillow would start Ghostscript."""
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started Ghostscript"))
    with pytest.raises(OSError, match=r"x\.jpg: .*cannot identify image file"):
        read_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("name, mode", [("x.gif", "P"), ("x.webp", "RGB"), ("x.png", "RGB"), ("x.tiff", "RGB")])
def test_of_an_animation_the_first_frame(tmp_path, name, mode):
    frames = [Image.new("RGB", (8, 6), colour).convert(mode) for colour in (RED, (0, 0, 255))]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **dict(lossless=True) if "webp" in name
                   else {})
    ours = read_image(tmp_path / name)
    assert ours.shape == (3, 6, 8) and ours[:, 3, 3].tolist() == pytest.approx(RED, abs=2)


def test_a_phones_pair_of_pictures_is_its_first(tmp_path):
    Image.new("RGB", (16, 8), RED).save(tmp_path / "x.mpo", save_all=True, append_images=[Image.new("RGB", (16, 8))])
    (tmp_path / "x.mpo").rename(tmp_path / "x.jpg")
    assert read_image(tmp_path / "x.jpg")[:, 4, 4].tolist() == pytest.approx(RED, abs=2)


def test_an_open_file_is_read_like_a_path(tmp_path):
    Image.new("RGB", (5, 3), RED).save(tmp_path / "x.png")
    file = io.BytesIO((tmp_path / "x.png").read_bytes())
    assert torch.equal(read_image(file, "a.tar/x.png"), read_image(tmp_path / "x.png"))
    with pytest.raises(OSError, match=r"^a\.tar/x\.png: cannot identify"):
        read_image(io.BytesIO(b"no image"), "a.tar/x.png")


def test_networks_are_given_shares():
    """Of the brightest level; what has no levels is one already."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(unit(levels), torch.arange(256).view(1, 16, 16) / 255)
    shares = torch.rand(4, 5, 6)
    assert torch.equal(unit(shares), shares)
