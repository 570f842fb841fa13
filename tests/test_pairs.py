"""sets/pairs.py: files whose names agree, generated scenes, and a list's evenly spaced part."""

import numpy as np
import pytest
from PIL import Image

from engine.task import SKIPPED
from sets.pairs import (
    Pairs,
    Scenes,
    alike,
    below,
    evenly,
    folders,
    images_below,
    keyed,
    lines,
    others,
    paired,
    there,
    upright,
    verified,
)
from tasks import TASKS


@pytest.mark.parametrize("n, limit, wanted", [
    (4, 0, [0, 1, 2, 3]), (4, 4, [0, 1, 2, 3]), (4, 9, [0, 1, 2, 3]), (10, 5, [0, 2, 4, 6, 8]), (10, 3, [0, 3, 6]),
    (10, 1, [0]), (7, 6, [0, 1, 2, 3, 4, 5]),
])
def test_evenly(n, limit, wanted):
    assert evenly(range(n), limit) == wanted


def test_scenes():
    scenes = Scenes(range(2), 1, 32, lambda scene: scene.semantic)
    assert scenes.image(0).shape == (3, 32, 32) and scenes.truth(1).shape == (32, 32) and len(scenes) == 2


def test_pairs_of_files(tmp_path, capsys):
    SKIPPED.clear()
    for i in range(3):
        for kind in "images", "truths"[: 6 * (i < 2)]:
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(np.full((4, 6), i, np.uint8)).save(tmp_path / kind / f"{i}.png")
    c = TASKS["depth"].config(data=str(tmp_path))
    roots = tmp_path / "images", folders(c, "none", "truths")
    paths = paired(c, *(keyed(images_below(root), below(root)) for root in roots))
    assert capsys.readouterr().out == f"skipped 1 images without a truth; the first: {tmp_path}/images/2.png\n"
    assert sum(SKIPPED.values()) == 1
    pairs = Pairs(paths, lambda path: np.asarray(Image.open(path)), crop=lambda x: x[..., 1:3, :2])
    assert [pairs.truth(i).tolist() for i in range(len(pairs))] == [[[i] * 2] * 2 for i in range(2)]
    assert pairs.image(1).shape == (3, 2, 2)
    for wrong, says in ((lambda: folders(c, "x", "y"), "has no folder x or y; depth wants one"),
                        (lambda: paired(c, dict(a=1), {}), "has no image with a truth of the same")):
        with pytest.raises(ValueError, match=says):
            wrong()


def test_the_control_trains_with_anothers_truth():
    c = TASKS["depth"].config
    assert others(9, c()).tolist() == list(range(9)) != others(9, c(control=True)).tolist()
    assert sorted(others(9, c(control=True))) == list(range(9))


def test_two_files_of_one_name_are_an_error(tmp_path):
    for name in "a.jpg", "a.png", "b.png":
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="a.jpg and .*a.png have one name; leave one of them out"):
        keyed(images_below(tmp_path), below(tmp_path))


def test_lists_say_what_is_missing(tmp_path):
    (tmp_path / "a.txt").write_text("x 1\n\n y\n")
    assert lines(tmp_path / "a.txt", "names") == ["x 1", "y"] and there([tmp_path / "a.txt"], "LIST")
    (tmp_path / "b.txt").write_text("\n")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    for wrong, says in ((lambda: lines(tmp_path / "b.txt", "names"), "b.txt is empty; wanted lines of names"),
                        (lambda: lines(tmp_path / "c.txt", "names"), "c.txt cannot be read .*; wanted lines of names"),
                        (lambda: lines(tmp_path / "d.txt", "names"), "d.txt cannot be read .*No such file"),
                        (lambda: there([tmp_path / "a.txt", tmp_path / "d"], "LIST"), "LIST names 1 of 2 files .*/d$"),
                        (lambda: there([], "LIST"), "LIST names no file")):
        with pytest.raises(ValueError, match=says):
            wrong()


@pytest.mark.parametrize("workers", [0, 1])
def test_every_truth_is_looked_into(workers, tmp_path, monkeypatch):
    """Size and turn are the image's, upright by its EXIF tag; a file that cannot be read is named."""
    monkeypatch.setattr("sets.pairs.FEW", 1)
    exif = Image.Exif()
    exif[0x0112] = 6                                                             # stored turned by 90 degrees
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (6, 4)).save(tmp_path / "flat.jpg")
    assert upright(tmp_path / "turned.jpg") == (6, 4) and upright(tmp_path / "flat.jpg") == (4, 6)
    Image.new("L", (6, 4)).save(tmp_path / "truth.png")
    Image.new("L", (4, 6)).save(tmp_path / "high.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    c = TASKS["depth"].config(workers=workers)

    def look(*names):
        return verified(c, Pairs([[tmp_path / name for name in each.split()] for each in names], read), alike)

    assert look("flat.jpg truth.png", "turned.jpg high.png") == [None, None]
    with pytest.raises(ValueError, match="truth.png has 6x4 pixels, its image 4x6; wanted the image's"):
        look("flat.jpg truth.png", "turned.jpg truth.png")
    with pytest.raises(ValueError, match="flat.jpg or .*broken.png cannot be read: "):
        look("flat.jpg truth.png", "flat.jpg broken.png")


def read(path):
    return np.asarray(Image.open(path))
