"""The sources of data.py: images as the world stores them, folders and their remembered scans, generated shapes."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import shapes
from data import Folder, read_image

WHITE, RED = (255, 255, 255), (255, 0, 0)

# --------------------------------------------------------------------------------
# Images

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

# --------------------------------------------------------------------------------
# Folders


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """a/3.png b/1.png b/deep/2.JPG, and a file that is no image."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "photos"
    for name in "b/deep/2.JPG", "b/1.png", "a/3.png":
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), RED).save(root / name)
    (root / "a/notes.txt").write_text("no image")
    return root


def test_folder_finds_images_and_classes(photos):
    folder = data.open_source(photos)
    assert folder.paths == ["a/3.png", "b/1.png", "b/deep/2.JPG"] and len(folder) == 3
    assert folder.classes == ["a", "b"] and [folder.label(i) for i in range(3)] == [0, 1, 1]
    assert folder.load(0).shape == (3, 6, 8) and folder.load(0)[:, 5, 7].tolist() == list(RED)
    assert folder.name(2) == str(photos / "b/deep/2.JPG")


def test_links_are_followed(photos, tmp_path):
    (tmp_path / "outside").mkdir()
    (photos / "a/3.png").rename(tmp_path / "outside/3.png")
    (photos / "c").symlink_to(tmp_path / "outside")
    assert Folder(photos).paths == ["b/1.png", "b/deep/2.JPG", "c/3.png"]


def test_a_scan_is_remembered_until_a_folder_changes(photos, monkeypatch):
    before, walk = Folder(photos).paths, os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **kwargs: pytest.fail("scanned again"))
    assert Folder(photos).paths == before
    monkeypatch.setattr(os, "walk", walk)
    (photos / "b/deep/0.png").write_bytes((photos / "a/3.png").read_bytes())
    os.utime(photos / "b/deep", (2e9, 2e9))  # clocks of file systems are coarse
    assert Folder(photos).paths == ["a/3.png", "b/1.png", "b/deep/0.png", "b/deep/2.JPG"]


@pytest.mark.parametrize("content", ["{damaged", "{}", '{"folders": {"gone": 1}, "paths": []}'])
def test_a_damaged_memory_is_ignored(photos, content):
    Folder(photos)
    memory, = (photos.parent / "cache/nanodino").iterdir()
    memory.write_text(content)
    assert len(Folder(photos)) == 3


def test_a_memory_is_no_must(photos):
    (photos.parent / "cache").write_text("a file where a folder should be")
    assert len(Folder(photos)) == 3


@pytest.mark.parametrize("path, says", [
    ("nowhere", "--data: .*nowhere does not exist; name a folder of images, or write shapes"),
    ("photos/b/1.png", "--data: .*1.png is a file; name a folder"),
    ("empty", "--data: no image in .*empty or below it; looked for .bmp .gif .jpeg .jpg"),
])
def test_no_folder_of_images(photos, tmp_path, path, says):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=says):
        data.open_source(tmp_path / path)


def test_images_outside_of_classes_have_no_label(photos):
    with pytest.raises(ValueError, match="1.png lies in no class folder; folders name the classes"):
        Folder(photos / "b").label(0)

# --------------------------------------------------------------------------------
# Shapes


class Loaded(torch.utils.data.Dataset):
    """source[i], and who made it."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, i):
        return self.source.load(i), os.getpid()


def test_shapes_are_rendered_once_for_all_processes():
    source = data.open_source("shapes", 4, seed=3)
    images, makers = zip(*data.loader(Loaded(source), [0, 2], 1), strict=True)
    assert os.getpid() not in makers
    scenes = [shapes.scene(i, 96, 3) for i in range(4)]
    assert source.labels.tolist() == [scenes[0].label, -1, scenes[2].label, -1]        # rendered there, seen here
    for i, image in zip([0, 2], images, strict=True):
        assert torch.equal(source.images[i], torch.from_numpy(scenes[i].image))
        assert torch.equal(image, source.load(i)) and image.shape == (3, 96, 96)
    assert [source.label(i) for i in range(4)] == [scene.label for scene in scenes]
    assert len(source) == 4 and source.name(3) == "shapes 3" and len(source.classes) == len(shapes.CLASSES)


def test_a_loader_that_is_left_behind_lets_the_process_end():
    """Its workers take no signal but that of their own process: else it would wait for them for ever."""
    code = """
import builtins
from data import loader
builtins.kept = iter(loader(list(range(99)), range(99), 1))  # until the interpreter goes
print(next(kept))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0 and done.stdout == "0\n", done.stderr
