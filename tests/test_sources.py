"""Sources: folders and their remembered scans, generated shapes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import shapes
from data import loader
from engine.sources import Folder, open_source

WHITE, RED = (255, 255, 255), (255, 0, 0)

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
    folder = open_source(photos)
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
        open_source(tmp_path / path)


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
    source = open_source("shapes", 4, seed=3)
    images, makers = zip(*loader(Loaded(source), [0, 2], 1), strict=True)
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
