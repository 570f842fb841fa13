"""sets/heights.py: units, what is not known, what is refused; heights of generated scenes."""

import numpy as np
import pytest
from PIL import Image
from test_labels import photo, write

from engine.task import SKIPPED
from sets import heights
from tasks import TASKS


def opened(folder, **more):
    SKIPPED.clear()
    return heights.open_heights(TASKS["canopy"].config(data=str(folder), **more))


@pytest.fixture
def land(tmp_path):
    for split, n in ("train", 2), ("test", 1):
        for i in range(n):
            write(tmp_path / f"{split}/north/rgb_{i}.png", photo(i, (60, 64)))
            write(tmp_path / f"{split}/north/height_{i}.tif", np.full((60, 64), 2.5 + i, np.float32))
    return tmp_path


def test_metres_and_decimetres_and_what_is_not_known(tmp_path):
    write(tmp_path / "a.tif", np.array([[1.5, np.nan], [-9999, np.inf]], np.float32))
    write(tmp_path / "b.png", np.array([[15, 65535], [0, 1200]], np.uint16))
    nan = np.nan
    for name, exact in ("a.tif", [[1.5, nan], [nan, nan]]), ("b.png", [[1.5, nan], [0, 120]]):
        np.testing.assert_array_equal(heights.read_heights(tmp_path / name), np.array(exact, np.float32))


def test_pairs_by_name(land):
    train, val = opened(land)
    assert [train.truth(i).max() for i in (0, 1)] == [2.5, 3.5] and len(val) == 1 and val.image(0).shape == (3, 60, 64)
    assert opened(land, head="x")[0] is None


def test_images_of_which_nothing_is_known(land, capsys):
    write(land / "train/north/height_1.tif", np.full((60, 64), -1, np.float32))
    train, _ = opened(land)
    assert len(train) == 1 and [*SKIPPED.values()] == [1] and "no height is known" in capsys.readouterr().out
    write(land / "train/north/height_0.tif", np.full((60, 64), np.nan, np.float32))
    with pytest.raises(ValueError, match="no height of train of .* is known"):
        opened(land)


@pytest.mark.parametrize("truth, says", [
    (np.full((60, 64), 250, np.float32), "height_0.tif is up to 250 m high; wanted at most 120 m: float32 are metres"),
    (np.full((60, 64), np.nan, np.float32), "height_0.tif has no known height to score; leave it out"),
    (np.full((60, 63), 2, np.float32), "height_0.tif has 63x60 pixels, its image 64x60"),
    (np.full((60, 64), 2, np.uint8), "height_0.tif has mode L, 1 x 8 bits; wanted metres, float32")])
def test_heights_that_are_refused(land, truth, says):
    write(land / "test/north/height_0.tif", truth)
    with pytest.raises(ValueError, match=says):
        opened(land)


def test_images_too_small_for_a_block(land):
    Image.new("RGB", (52, 60)).save(land / "test/north/rgb_0.png")
    write(land / "test/north/height_0.tif", np.full((60, 52), 2, np.float32))
    with pytest.raises(ValueError, match="has 52x60 pixels; wanted 53 or more each way"):
        opened(land)


def test_no_heights(land):
    with pytest.raises(ValueError, match="--data: .*nowhere has no folder train"):
        opened(land / "nowhere")


def test_scenes_are_high_where_they_are_near():
    train, val = heights.open_heights(TASKS["canopy"].config(limit=2, resolution=96))
    truth = val.truth(0)
    gaps = np.isnan(truth)
    assert len(train) == len(val) == 2 and 0.05 < gaps.mean() < 0.15 and gaps.any(0).all() and gaps.any(1).all()
    assert 0 <= np.nanmin(truth) < np.nanmax(truth) <= 14
