"""engine/tiles.py: tiles lie where they were; docs/usage.md's way from GeoTIFFs to a canopy map, on generated ones."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from test_raster import landscape, write

import data
import evaluate
import shapes
import visualize
from engine import tiles
from model import SIZES, ViT, build
from sets.heights import heights_of, read_heights
from weights import save_backbone

ROOT = Path(__file__).parents[1]


def test_rasters_of_one_place_are_found_together(tmp_path):
    for name in "rgb_a.tif", "height_a.tif", "sub/rgb_a.vrt", "b.TIF", "height_c.tif", "note.txt":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = {str(place.relative_to(tmp_path)): sorted(path.name for path in paths)
             for place, paths in tiles.groups(tmp_path).items()}
    assert found == {"a": ["height_a.tif", "rgb_a.tif"], "b": ["b.TIF"], "c": ["height_c.tif"], "sub/a": ["rgb_a.vrt"]}


@pytest.mark.parametrize("words, says", [
    ("{0} --out {0}/out", "RASTERS .*: no .tif or .tiff or .vrt in it or below it; name a folder of GeoTIFFs"),
    ("{0}", "--out '' --side 512 --overlap 0: write a folder for the tiles"),
    ("{0} --out {0}/out --side 64 --overlap 64", "--side 64 --overlap 64: write a folder for the tiles"),
    ("{0} --out {0}/out --side 4", "--side is 4; it must be in"), ("{0} --sid 4", "did you mean --side")])
def test_mistakes(tmp_path, words, says):
    with pytest.raises(ValueError, match=says):
        data.main(["tiles", *words.format(tmp_path).split()])


def test_tiles_are_where_they_were(tmp_path, capsys):
    """Of 16 bits, at their rows and columns, with their coordinates; the last ones end with the raster"""
    rasterio = pytest.importorskip("rasterio")
    x = np.concatenate([landscape(150, 200), landscape(150, 200, 1)[:1]]).astype(np.uint16) * 12 + 1
    x[:, :70, :80] = 0
    write(tmp_path / "land/rgb_a.tif", x, nodata=0, compress="lzw", interleave="band")
    heights = np.arange(150 * 200, dtype=np.float32).reshape(1, 150, 200) / 1000
    heights[:, :, 130:] = np.nan
    write(tmp_path / "land/height_a.tif", heights)  # which does not say that nan is no height
    data.main(["tiles", str(tmp_path / "land"), "--out", str(tmp_path / "tiles"), "--side", "64", "--overlap", "16"])
    assert "wrote 8 tiles of 64x64 pixels" in capsys.readouterr().out  # of 12: one has no colours, three no heights
    names = sorted(path.name for path in (tmp_path / "tiles").iterdir())
    assert len(names) == 16 and "rgb_a_00086_00136.tif" not in names and "rgb_a_00000_00000.tif" not in names
    for top, left in (86, 0), (0, 96), (48, 48):
        with rasterio.open(tmp_path / f"tiles/rgb_a_{top:05}_{left:05}.tif") as file:
            assert np.array_equal(file.read(), x[:, top : top + 64, left : left + 64]) and file.nodata == 0
            assert file.transform[2] == pytest.approx(500000.25 + 0.6 * left)
            assert file.transform[5] == pytest.approx(5200000.75 - 0.6 * top) and str(file.crs) == "EPSG:32633"
        found = read_heights(tmp_path / f"tiles/height_a_{top:05}_{left:05}.tif")
        np.testing.assert_array_equal(found, heights[0, top : top + 64, left : left + 64])


@pytest.mark.parametrize("size, crs, side, says", [
    ((64, 80), "EPSG:32633", 32, "rgb_a.tif has 80x64 pixels at 500000.25, 5200000.75, .*height_a.tif 64x64"),
    ((64, 64), None, 32, "has 64x64 pixels at 0, 0, .* warp one to the other's grid"),
    ((64, 64), "EPSG:32633", 65, "has 64x64 pixels; --side 65 wants as many each way")])
def test_rasters_that_do_not_lie_on_one_another(tmp_path, size, crs, side, says):
    pytest.importorskip("rasterio")
    write(tmp_path / "height_a.tif", np.ones((1, 64, 64), np.float32))
    write(tmp_path / "rgb_a.tif", landscape(*size), crs=crs)
    with pytest.raises(ValueError, match=says):
        data.main(["tiles", str(tmp_path), "--out", str(tmp_path / "out"), "--side", str(side)])
    assert not list(tmp_path.glob("out/*"))


def test_rasters_in_which_nothing_was_measured(tmp_path):
    pytest.importorskip("rasterio")
    write(tmp_path / "a.tif", np.zeros((1, 64, 64), np.uint16), nodata=0)
    with pytest.raises(ValueError, match="all of 4 tiles are empty; nothing in them was measured"):
        data.main(["tiles", str(tmp_path), "--out", str(tmp_path / "out"), "--side", "32"])


def test_readme_from_a_folder_of_geotiffs_to_a_canopy_map(tmp_path, monkeypatch, capsys):
    """Its commands, word by word, but for sizes that a test has time for"""
    rasterio = pytest.importorskip("rasterio")
    block = (ROOT / "docs/usage.md").read_text().partition("From a folder of GeoTIFFs to a canopy map")[2].partition(
        "A trained teacher")[0]
    lines = re.findall(r"^    \.venv/bin/python (.+?)(?:   .*)?$", block, re.M)
    assert [line.split()[0] for line in lines] == ["data.py", "data.py", "evaluate.py", "visualize.py"]
    monkeypatch.chdir(tmp_path)
    for split, first in ("train", 0), ("test", 100), ("area", 200):
        scenes = [[shapes.scene(first + 2 * i + j, 96, 0) for j in (0, 1)] for i in (0, 1)]
        rgb = np.concatenate([np.concatenate([s.image for s in row], 1) for row in scenes]).transpose(2, 0, 1)
        metres = np.concatenate([np.concatenate([heights_of(s) for s in row], 1) for row in scenes])[None]
        Path(f"LAND/{split}").mkdir(parents=True)
        write(f"LAND/{split}/rgb_x.tif", np.ascontiguousarray(rgb))
        write(f"LAND/{split}/height_x.tif", metres, nodata=np.nan)
    Path("LAND/area/rgb_x.tif").rename("AREA.tif")
    save_backbone(build(lambda: ViT(SIZES["tiny"])), "tiny_sat493m.pth", "meta")
    small = {"data.py": "--side 96", "evaluate.py": "--resolution 96 --iterations 2 --device cpu --workers 0",
             "visualize.py": "--resolution 96"}
    for line in lines:
        script, *words = shlex.split(f"{line} {small[line.split()[0]]}".replace("SAT-L", "tiny_sat493m.pth"))
        {"data.py": data, "evaluate.py": evaluate, "visualize.py": visualize}[script].main(words)
    said = capsys.readouterr().out
    assert "wrote 4 tiles of 96x96" in said and '"n_train": 4' in said
    assert "192x192 pixels of 0.6 x 0.6, EPSG:32633" in said
    with rasterio.open("canopy.tif") as map, rasterio.open("AREA.tif") as area:
        assert (map.shape, map.crs, map.transform) == (area.shape, area.crs, area.transform)
        assert np.isfinite(map.read(1)).all()
