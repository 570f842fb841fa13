"""Sources: folders, lists and parquet files of images, generated shapes."""

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import shapes
from data import loader
from engine.images import read_image
from engine.mixture import Mixture
from engine.sources import Drawn, Unlabelled, members_of, open_source, read_named

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
    assert list(folder.paths) == ["a/3.png", "b/1.png", "b/deep/2.JPG"] and len(folder) == 3
    assert folder.classes == ["a", "b"] and [folder.label(i) for i in range(3)] == [0, 1, 1]
    assert folder.load(0).shape == (3, 6, 8) and folder.load(0)[:, 5, 7].tolist() == list(RED)
    assert folder.name(2) == str(photos / "b/deep/2.JPG")


def test_links_are_followed(photos, tmp_path):
    (tmp_path / "outside").mkdir()
    (photos / "a/3.png").rename(tmp_path / "outside/3.png")
    (photos / "c").symlink_to(tmp_path / "outside")
    assert list(open_source(photos).paths) == ["b/1.png", "b/deep/2.JPG", "c/3.png"]


def test_a_folders_digest_is_of_its_names(photos, tmp_path):
    digest = open_source(photos).digest()
    assert digest == hashlib.sha1(b"a/3.png\nb/1.png\nb/deep/2.JPG").hexdigest()
    photos.rename(tmp_path / "moved")
    assert open_source(tmp_path / "moved").digest() == digest
    (tmp_path / "moved/a/3.png").rename(tmp_path / "moved/a/4.png")
    assert open_source(tmp_path / "moved").digest() != digest


@pytest.mark.parametrize("path, says", [
    ("nowhere", "--data: .*nowhere does not exist; name a folder of images, a list of them"),
    ("photos/b/1.png", "--data: .*1.png is a file; name a folder of images, a list of them, a tar or zip, or write"),
    ("gone.txt", "--data: .*gone.txt does not exist"),
    ("list.txt", "--data: no image in .*list.txt or below it"),
    ("empty", "--data: no image in .*empty or below it; looked for .bmp .gif .jpeg .jpg"),
])
def test_no_folder_of_images(photos, tmp_path, path, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").mkdir()
    with pytest.raises(ValueError, match=says):
        open_source(tmp_path / path)


def test_images_outside_of_classes_have_no_label(photos):
    with pytest.raises(ValueError, match="1.png lies in no class folder; folders name the classes"):
        open_source(photos / "b").label(0)

# --------------------------------------------------------------------------------
# Lists


def test_a_list_is_relative_to_its_folder_and_may_leave_it(photos, tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "some.txt").write_text(f"../photos/b/1.png\n{photos}/a/3.png\n../photos/gone.jpg\n")
    source = open_source(lists / "some.txt")
    assert len(source) == 3 and source.load(0).shape == (3, 6, 8) and source.load(1).shape == (3, 6, 8)
    assert source.name(1) == f"{photos}/a/3.png"
    assert source.raw(1) == ((photos / "a/3.png").read_bytes(), source.name(1))
    with pytest.raises(OSError, match="gone.jpg"):
        source.load(2)
    with pytest.raises(OSError, match="gone.jpg"):
        source.raw(2)
    with pytest.raises(ValueError, match="1.png has no label in .*some.txt; a csv or parquet list has them"):
        source.label(0)


def test_the_same_images_as_folder_and_as_list(photos):
    folder = open_source(photos)
    (photos / "list.txt").write_text("".join(f"{name}\n" for name in folder.paths))
    listed = open_source(photos / "list.txt")
    assert listed.digest() == folder.digest()
    assert [listed.name(i) for i in range(3)] == [folder.name(i) for i in range(3)]


def test_a_list_of_members_of_archives(photos, tmp_path):
    data = (photos / "a/3.png").read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(photos, "in")
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as packed:
        packed.writestr("3.png", data)
        packed.writestr("broken.png", data[:50])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:2600])  # in the header after a/3.png
    (tmp_path / "unpacked.tar").mkdir()
    (tmp_path / "unpacked.tar/3.png").write_bytes(data)
    names = """x.tar/in/a/3.png y.zip/3.png unpacked.tar/3.png y.zip/broken.png y.zip/4.png cut.tar/in/b/1.png
               cut.tar/in/a/3.png"""
    (tmp_path / "list.txt").write_text("\n".join(names.split()))
    source = open_source(tmp_path / "list.txt")
    assert [source.raw(i)[0] for i in range(3)] == [data] * 3 and len(members_of(str(tmp_path / "x.tar"))[1]) == 4
    assert all(torch.equal(source.load(i), read_image(photos / "a/3.png")) for i in (0, 1, 2, 6))
    for i, says in (3, "y.zip/broken.png: "), (4, "y.zip/4.png: there is no such member"), (5, "cut.tar/in/b/1.png: "):
        with pytest.raises(OSError, match=says):
            source.load(i)
    members_of.cache_clear()  # which holds them open


def test_labels_of_a_csv(photos):
    (photos / "list.csv").write_text("label,path\nzebra,a/3.png\nant,b/1.png\n,b/deep/2.JPG\n")
    source = open_source(photos / "list.csv")
    assert source.classes == ["ant", "zebra"] and [source.label(i) for i in (0, 1)] == [1, 0]
    with pytest.raises(ValueError, match="2.JPG has no label in .*list.csv"):
        source.label(2)


def test_images_within_a_parquet_file(photos):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = (photos / "b/1.png").read_bytes()
    images = [dict(bytes=data, path="one.png"), dict(bytes=None, path="a/3.png"), dict(bytes=data, path=None),
              dict(bytes=b"broken", path="four.png"), None]
    table = pyarrow.table(dict(image=pyarrow.array(images), label=[5, 3, None, 5, 3]))
    parquet.write_table(table, photos / "set.parquet", row_group_size=2)
    source = open_source(photos / "set.parquet")
    assert [source.name(i) for i in range(5)] == [f"{photos}/set.parquet/{name}" for name in (
        "one.png", "a/3.png", "2", "four.png", "4")]
    assert source.raw(2)[0] == data and all(source.load(i).shape == (3, 6, 8) for i in range(3))
    assert source.classes == ["3", "5"] and [source.label(i) for i in (0, 1, 3)] == [1, 0, 1]
    for i, says in (3, "set.parquet/four.png: "), (4, "photos/4"):
        with pytest.raises(OSError, match=says):
            source.load(i)
    shapes = [image.shape for image, _ in loader(Loaded(source), [0, 2], 1)]
    assert shapes == [(3, 6, 8)] * 2


class Counting:
    def __len__(self):
        return 10

    def digest(self):
        return "counting"


def test_what_is_drawn_of_a_mixture_keeps_its_shares():
    both = Mixture([Counting(), Counting()], [(65_536, 0), (0, 500)])
    left = Drawn(both, [0, 3, 9, 10, 19])
    assert [(part.size, part.share, part.pure) for part in left.parts] == [(3, 65_536, 0), (2, 0, 500)]
    assert Drawn(Counting(), [1, 2]).parts is None
    with pytest.raises(ValueError, match="part 2 of the mixture has no image left"):
        Drawn(both, [0, 3]).parts  # noqa: B018

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


def test_an_image_by_its_name_in_an_archive_too(tmp_path):
    Image.new("RGB", (5, 4), RED).save(tmp_path / "x.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "x.png", "in/x.png")
    for name in "x.png", "x.tar/in/x.png":
        assert read_named(tmp_path / name, read_image)[:, 0, 0].tolist() == list(RED)
    with pytest.raises(OSError, match="x.tar/y.png: there is no such member"):
        read_named(tmp_path / "x.tar/y.png", read_image)


def test_images_without_labels():
    found = Unlabelled(open_source("shapes", 3))
    assert len(found) == 3 and found.label(2) == -1 and found.load(2).shape == (3, 96, 96)
