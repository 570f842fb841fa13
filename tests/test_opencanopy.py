"""sets/opencanopy.py: a miniature as it was published; windows, what counts, what is refused."""

import json

import numpy as np
import pytest
from test_raster import landscape, write

import evaluate
from sets import heights, opencanopy
from tasks import TASKS

LEFT, TOP, PIXEL = 500000.25, 5200000.75, 0.6  # where, and how fine, test_raster writes


def square(row, column, side=300):
    """Corners of a square of so many pixels"""
    x, y = LEFT + PIXEL * column, TOP - PIXEL * row
    return [[[x, y], [x + PIXEL * side, y], [x + PIXEL * side, y - PIXEL * side], [x, y - PIXEL * side], [x, y]]]


@pytest.fixture
def france(tmp_path):
    root = tmp_path / "canopy_height"
    spot = np.concatenate([landscape(300, 900), landscape(300, 900, 1)[:1]]).astype(np.uint16) * 12
    lidar = (np.arange(300 * 900).reshape(1, 300, 900) % 700).astype(np.uint16)
    kinds = np.tile(np.array([2, 5, 5], np.uint8), 300)[None, None].repeat(300, 1)
    for name, x in ("spot", spot), ("lidar", lidar), ("lidar_classification", kinds):
        write(root / f"2021/{name}.vrt", np.ascontiguousarray(x))  # any raster may have that name
    splits = ("train", 0), ("test", 300), ("buffer", 600), ("val", 600)
    (root / "geometries.geojson").write_text(json.dumps(dict(type="FeatureCollection", features=[
        dict(type="Feature", properties=dict(split=split, lidar_year=2021), geometry=dict(
            type="Polygon", coordinates=square(0, column))) for split, column in splits])))
    return tmp_path, spot, lidar[0], kinds[0]


def config(root, **more):
    return TASKS["canopy"].config(data=str(root), weights="untrained:tiny", **dict(bands="4,2,1", scale=3060.0) | more)


def test_windows_of_the_squares(france):
    root, spot, lidar, kinds = france
    train, test = heights.open_heights(config(root))
    assert len(train) == len(test) == 4 and heights.open_heights(config(root, head="x"))[0] is None
    for source, left, scored in (train, 0, False), (test, 300, True):
        for i, (y, x) in enumerate([(0, 0), (0, 95), (95, 0), (95, 95)]):
            there = np.s_[y : y + 205, left + x : left + x + 205]
            image, truth = source.image(i), source.truth(i)
            assert np.abs(image.numpy() - spot[[3, 1, 0]][(slice(None), *there)] / 3060).max() < 1e-6
            metres = lidar[there] / 10
            counts = (metres < 60) & ((kinds[there] == 5) | (not scored))
            np.testing.assert_allclose(truth, np.where(counts, metres, np.nan), rtol=1e-6)
    assert len(heights.open_heights(config(root, limit=2))[1]) == 2


def test_it_is_measured(france, capsys):
    root, *_ = france
    evaluate.main(f"--task canopy --weights untrained:tiny --data {root} --bands 1,2,3 --scale 3060 --iterations 1 "
                  "--resolution 64 --limit 2 --device cpu --workers 0".split())
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["n_val"] == 2 and 0 < found["mae"] < 100 and found["n_blocks"] > 0


@pytest.mark.parametrize("change, says", [
    (lambda text: text.replace("lidar_year", "year"), "geometries.geojson is not Open-Canopy's: KeyError 'lidar_year'"),
    (lambda text: "{", "geometries.geojson is not Open-Canopy's: JSONDecodeError"),
    (lambda text: text.replace("train", "buffer"), "has 0 windows of train and 4 windows of test; wanted some of each"),
    (lambda text: text.replace(str(LEFT), "400000"), "has 900x300 pixels; a square of geometries.geojson is at -1"),
    (lambda text: text.replace("2021", "2022"), "2022/spot.vrt: No such file|2022/spot.vrt: .*2022")])
def test_what_is_refused(france, change, says):
    root, *_ = france
    path = root / "canopy_height/geometries.geojson"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=says) as error:
        heights.open_heights(config(root))
    assert "\n" not in str(error.value)


def test_bands_are_wanted(tmp_path):
    (tmp_path / "geometries.geojson").write_text("{}")
    c = config(tmp_path, bands="", scale=0.0)
    assert opencanopy.listed(c) == tmp_path
    with pytest.raises(ValueError, match="Open-Canopy has four bands of 16 bits; say which, .* --bands 1,2,3"):
        heights.open_heights(c)
