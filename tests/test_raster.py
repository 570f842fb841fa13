"""engine/raster.py: maps of windows beside loops, what of a raster a network sees; with rasterio, files of any size."""

import re
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import visualize
from decoders import depth, dpt, linear, load_decoder
from engine import raster
from engine.images import ImageConfig
from engine.pictures import network_input
from model import SIZES, ViT, build
from weights import load_backbone, save_backbone

SIDE = 64

# --------------------------------------------------------------------------------
# Windows into a map


def cut_and_blended(array, side, overlap, answer):
    """The same by loops: every window cut from an array in memory, every pixel by itself"""
    H, W = array.shape
    places = [sorted({*range(0, max(n - side, 0), side - overlap), max(n - side, 0)}) for n in (H, W)]
    total, seen = np.zeros((2, max(H, side), max(W, side)))
    edge = overlap // 4                                                               # where it is no better than none
    tent = [min(1, max(1e-6, (1 + min(k, side - 1 - k) - edge) / (overlap - 2 * edge + 1))) for k in range(side)]
    for top in places[0]:
        for left in places[1]:
            for y, x in np.ndindex(side, side):
                total[top + y, left + x] += tent[y] * tent[x] * answer(top, left)[y, x]
                seen[top + y, left + x] += tent[y] * tent[x]
    return (total / seen)[:H, :W]


@pytest.mark.parametrize("size", [(40, 50), (16, 16), (17, 31), (5, 40), (33, 9), (4, 3), (28, 28)])
def test_windows_are_blended_as_in_a_loop(size):
    @cache
    def answer(top, left):
        return np.random.default_rng([top, left]).normal(size=(16, 16)).astype(np.float32)
    strips = list(raster.blended(size, 16, 4, answer))
    exact = cut_and_blended(np.zeros(size), 16, 4, answer)
    assert np.concatenate(strips).shape == size
    assert np.abs(np.concatenate(strips) - exact).max() < 1e-6                        # measured: 3.2e-7
    blocks = list(raster.in_blocks(iter(strips), 7))
    assert [len(block) for block in blocks] == [7] * (size[0] // 7) + [size[0] % 7] * (size[0] % 7 > 0)
    assert np.array_equal(np.concatenate(blocks), np.concatenate(strips))


def test_windows_that_agree_are_what_they_say():
    y, x = np.indices((50, 60))
    whole = (y + 100 * x).astype(np.float32)
    found = np.concatenate(list(raster.blended((50, 60), 16, 5, lambda y, x: whole[y : y + 16, x : x + 16])))
    assert np.abs(found / whole.clip(1) - whole / whole.clip(1)).max() < 1e-6


def test_what_one_window_does_not_know_another_may():
    """The mean is of what is known; nan is where none of them knows, and None is a window of nan."""
    def answer(top, left):
        found = np.full((16, 16), 1 + top + left, np.float32)
        found[:, 14:] = np.nan
        return None if top else found
    found = np.concatenate(list(raster.blended((28, 28), 16, 4, answer)))
    assert np.isnan(found[16:]).all() and np.isnan(found[:16, 26:]).all()
    assert (found[:16, :12] == 1).all() and np.abs(found[:16, 14:26] - 13).max() < 1e-5
    assert (1 < found[:16, 12:14]).all() and (found[:16, 12:14] < 13).all()


def test_no_border_is_seen():
    """Windows that disagree as much as can be, by noise: a step where one ends is as the steps inside of them."""
    rng = np.random.default_rng(0)
    found = np.concatenate(list(raster.blended((1000, 1000), 256, 64, lambda *_: np.full((256, 256), rng.random()))))
    for x in found, found.T:
        steps = np.abs(np.diff(x.astype(np.float64), axis=0)).max(1)
        assert steps.max() < 1.5 / 33                                                 # bare borders: up to 0.98


def test_memory_is_that_of_a_row_of_windows():
    """5,000 x 5,000 pixels of a map are 100 MB; two sums of 512 rows are 20.5 MB, and what is made of them."""
    tile = np.ones((512, 512), np.float32)
    tracemalloc.start()
    rows = sum(len(strip) for strip in raster.in_blocks(raster.blended((5000, 5000), 512, 128, lambda *_: tile), 256))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 5000 and peak < 70e6                                               # measured: 58 MB

# --------------------------------------------------------------------------------
# What of a raster a network sees


def array_file(x, nodata=None, mask=None):
    """C H W as an open file of rasterio's"""
    def part(a, window):
        (top, down), (left, right) = window
        return a[..., top:down, left:right]

    def read(bands, window, out_shape):
        found = part(x[[band - 1 for band in bands]], window)
        step = [1] if out_shape is None else [n // m for n, m in zip(found.shape[1:], out_shape[1:], strict=True)]
        return found[:, :: step[0], :: step[-1]]
    mask = np.full(x.shape[1:], 255, np.uint8) if mask is None else mask
    return SimpleNamespace(count=len(x), height=x.shape[1], width=x.shape[2], nodata=nodata, read=read,
                           dtypes=[str(x.dtype)] * len(x), dataset_mask=lambda window: part(mask, window))


RGB = SimpleNamespace(in_chans=3, mean=(0.1, 0.2, 0.3))


def field(C=4, H=20, W=30, kind="uint16"):
    return np.random.default_rng(0).integers(1, 200, (C, H, W)).astype(kind)


def test_a_window_has_the_bands_that_are_asked_for():
    x = field()
    image, known = raster.Raster(array_file(x), "x.tif", ImageConfig(bands="4,1,2", scale=400.0), RGB).window(3, 5, 9)
    assert np.abs(image.numpy() - x[[3, 0, 1], 3:12, 5:14] / 400).max() < 1e-7 and known.all() and known.shape == (9, 9)
    image, known = raster.Raster(array_file(x[:3].astype(np.uint8)), "x.tif", ImageConfig(), RGB).window(0, 0, 8)
    assert np.abs(image.numpy() - x[:3, :8, :8] / 255).max() < 1e-7


def test_beyond_the_edge_it_is_mirrored_and_not_known():
    x = field()
    image, known = raster.Raster(array_file(x), "x.tif", ImageConfig(bands="1,2,3", scale=200.0), RGB).window(0, 0, 32)
    assert known[:20, :30].all() and known.sum() == 600 and image.shape == (3, 32, 32)
    assert torch.equal(image[:, 20:, :30], image[:, 8:20, :30].flip(1))
    assert torch.equal(image[:, :, 30:], image[:, :, 28:30].flip(2))


@pytest.mark.parametrize("own, option", [(7, ""), (None, "7"), (3, "7")])
def test_what_was_not_measured_is_the_mean_and_is_not_known(own, option):
    """By the raster's own word, or by --nodata, which stands above it; a pixel is known if one band is."""
    x = field() * 10
    x[:, 2, 3], x[1, 5, 5] = 7, 7
    c = ImageConfig(bands="1,2,3", scale=2000.0, nodata=option)
    image, known = raster.Raster(array_file(x, own), "x.tif", c, RGB).window(0, 0, 16)
    assert not known[2, 3] and known.sum() == 255
    assert image[:, 2, 3].tolist() == pytest.approx(RGB.mean) and image[1, 5, 5] == pytest.approx(0.2)


def test_what_is_transparent_was_not_measured():
    mask = np.full((20, 30), 255, np.uint8)
    mask[4] = 0
    c = ImageConfig(bands="1,2,3", scale=200.0)
    image, known = raster.Raster(array_file(field(), mask=mask), "x.tif", c, RGB).window(0, 0, 16)
    assert not known[4].any() and known.sum() == 240 and image[:, 4, 9].tolist() == pytest.approx(RGB.mean)


def test_percentiles_are_those_of_the_whole_raster():
    """Two windows of one place are alike; those of its bright half alone would be darker."""
    x = np.arange(40 * 60, dtype=np.float32).reshape(1, 40, 60).repeat(3, 0)
    seen = raster.Raster(array_file(x), "x.tif", ImageConfig(percentiles=(10, 90)), RGB)
    image, _ = seen.window(20, 0, 16)
    exact = ((x[:, 20:36, :16] - 239.9) / (2159.1 - 239.9)).clip(0, 1)
    assert np.abs(image.numpy() - exact).max() < 1e-6
    assert torch.equal(seen.window(22, 2, 16)[0][:, :14, :14], image[:, 2:, 2:])


@pytest.mark.parametrize("x, options, says", [
    (field(), {}, "x.tif has 4 bands, the network sees 3: say which, --bands 1,2,3"),
    (field(), dict(bands="1,2,5"), "x.tif has 4 bands, --bands asks for number 5"),
    (field(3, kind="float32"), {}, "x.tif: values are float32: say which of them becomes 1, --scale"),
    (field(3, kind="float32") * np.float32(np.nan), dict(scale=1.0), "x.tif: 192 of 192 values are nan or infinite")])
def test_rasters_that_do_not_fit(x, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        raster.Raster(array_file(x), "x.tif", ImageConfig(**options), RGB).window(0, 0, 8)


def test_bands_of_two_kinds():
    file = array_file(field())
    file.dtypes[3] = "float32"
    raster.Raster(file, "x.tif", ImageConfig(bands="1,2,3"), RGB)
    with pytest.raises(ValueError, match="x.tif has bands of float32 and uint16; name bands of one kind"):
        raster.Raster(file, "x.tif", ImageConfig(bands="1,2,4"), RGB)

# --------------------------------------------------------------------------------
# Files: with rasterio


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A backbone, and a head of canopies, of the released layout: random, but so that answers differ by place"""
    folder = tmp_path_factory.mktemp("canopy")
    save_backbone(build(lambda: ViT(SIZES["tiny"])), folder / "tiny_sat493m.pth", "meta")
    torch.manual_seed(0)
    torch.save(dpt.DPT(dpt.DPTConfig(128, (8,) * 4, 8, hidden=8, class_token=True)).state_dict(), folder / "head.pth")
    return folder


def write(path, x, crs="EPSG:32633", **more):
    rasterio = pytest.importorskip("rasterio")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    transform = rasterio.transform.from_origin(500000.25, 5200000.75, 0.6, 0.6) if crs else None
    with rasterio.open(path, "w", driver="GTiff", dtype=x.dtype, count=len(x), height=x.shape[1], width=x.shape[2],
                       crs=crs, transform=transform, **more) as file:
        file.write(x)
    return path


def landscape(H, W, seed=0):
    """3 H W uint8: blobs of every size"""
    rng = torch.Generator().manual_seed(seed)
    layers = [F.interpolate(torch.rand(1, 3, H // n + 2, W // n + 2, generator=rng), (H, W), mode="bilinear")[0]
              for n in (4, 16, 64)]
    return (255 * sum(layers) / len(layers)).byte().numpy()


def mapped(network, path, out, *words):
    visualize.main(["canopy", str(path), "--weights", str(network / "tiny_sat493m.pth"), "--head",
                    str(network / "head.pth"), "--out", str(out), "--resolution", str(SIDE), *words])


def read(path):
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(path) as file:
        return file.read(1), file.profile


def by_tiles(network, x, bands=(0, 1, 2), top=255):
    """Each tile cut from the array in memory, answered, and blended: without a word of engine/raster.py"""
    decoder = load_decoder(network / "head.pth", load_backbone(network / "tiny_sat493m.pth"))

    def answer(top_row, left):
        tile = torch.from_numpy(x[list(bands), top_row : top_row + SIDE, left : left + SIDE].astype(np.float32) / top)
        metres = decoder(network_input(decoder.backbone, tile))
        return F.interpolate(metres[None], (SIDE, SIDE), mode="bilinear")[0, 0].numpy()
    return cut_and_blended(x[0], SIDE, SIDE // 4, cache(answer))


def test_a_raster_becomes_a_map_in_its_own_place(network, tmp_path, capsys):
    x = landscape(150, 200)
    mapped(network, write(tmp_path / "in.tif", x), tmp_path / "out/map.tif")
    found, profile = read(tmp_path / "out/map.tif")
    assert load_backbone(network / "tiny_sat493m.pth").config.mean == (0.430, 0.411, 0.296)  # by its name
    exact = by_tiles(network, x)
    assert np.abs(found - exact).max() < 2e-5 and found.std() > 0.01                  # metres
    assert str(profile["crs"]) == "EPSG:32633" and profile["tiled"] and np.isnan(profile["nodata"])
    assert tuple(profile["transform"])[:6] == (0.6, 0, 500000.25, 0, -0.6, 5200000.75)
    assert (profile["dtype"], profile["height"], profile["width"]) == ("float32", 150, 200)
    assert "200x150 pixels of 0.6 x 0.6, EPSG:32633;" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["map.tif"]


def test_windows_leave_no_borders(network, tmp_path):
    """
    Steps across rows where a window begins or ends, beside those across other rows of patches, where one window alone
    has a say; down and across.
    """
    side, stride, patch, found = 128, 96, 16, [[], []]
    size = 7 * stride + side
    path = write(tmp_path / "in.tif", landscape(size, size, seed=1))
    mapped(network, path, tmp_path / "map.tif", "--resolution", "128")
    map = read(tmp_path / "map.tif")[0].astype(np.float64)
    for steps in (np.abs(np.diff(x, axis=0)).mean(1) for x in (map, map.T)):
        for row in range(patch, size, patch):
            within = row % stride
            if within in (0, side - stride) and 0 < row < size or within > side - stride:
                found[within > side - stride].append(steps[row - 1])
    assert np.mean(found[0]) / np.mean(found[1]) <= 1.1                               # measured: 1.046


def test_four_bands_of_16_bits(network, tmp_path):
    """LZW, planar, in tiles: three of them, by number, scaled"""
    x = np.concatenate([landscape(100, 90), landscape(100, 90, 1)[:1]]).astype(np.uint16) * 12
    path = write(tmp_path / "in.tif", x, compress="lzw", interleave="band", tiled=True, blockxsize=64, blockysize=64)
    mapped(network, path, tmp_path / "map.tif", "--bands", "4,3,2", "--scale", "3060")
    assert np.abs(read(tmp_path / "map.tif")[0] - by_tiles(network, x, (3, 2, 1), 3060)).max() < 2e-5
    with pytest.raises(ValueError, match="in.tif has 4 bands, the network sees 3: say which, --bands 1,2,3"):
        mapped(network, path, tmp_path / "map.tif")


def test_a_network_of_four_bands(tmp_path):
    four = replace(SIZES["tiny"], in_chans=4, mean=(0.4,) * 4, std=(0.2,) * 4)
    save_backbone(build(lambda: ViT(four)), tmp_path / "tiny_sat493m.pth", "meta")
    torch.save(dpt.DPT(dpt.DPTConfig(128, (8,) * 4, 8, hidden=8, class_token=True)).state_dict(), tmp_path / "head.pth")
    x = np.concatenate([landscape(70, 80), landscape(70, 80, 1)[:1]])
    mapped(tmp_path, write(tmp_path / "in.tif", x), tmp_path / "map.tif")
    assert np.abs(read(tmp_path / "map.tif")[0] - by_tiles(tmp_path, x, range(4))).max() < 2e-5


def test_a_linear_head_maps_heights_too(network, tmp_path):
    """As --task canopy --decoder linear leaves it: the same bins, of the last block's patches"""
    torch.manual_seed(0)
    head, x = linear.Head(128, 256).eval(), landscape(64, 64)
    torch.nn.init.normal_(head.linear.weight)
    save_file(head.state_dict(), tmp_path / "head.safetensors", dict(outputs="256 bins of heights to 96.0 m"))
    visualize.main(["canopy", str(write(tmp_path / "in.tif", x)), "--weights", str(network / "tiny_sat493m.pth"),
                    "--head", str(tmp_path / "head.safetensors"), "--out", str(tmp_path / "map.tif"), "--resolution",
                    "64"])
    vit = load_backbone(network / "tiny_sat493m.pth")
    with torch.no_grad():
        (logits,) = head(list(vit(network_input(vit, torch.from_numpy(x))).patches.view(1, 4, 4, 128)))
    shares, bins = logits.relu() + 1e-8, depth.mixed(0.001, 96, 256)[:, None, None]
    metres = ((shares * bins).sum(0) / shares.sum(0))[None, None]
    exact = F.interpolate(metres, (64, 64), mode="bilinear")[0, 0].numpy()
    assert np.abs(read(tmp_path / "map.tif")[0] - exact).max() < 1e-3 and exact.std() > 0.1  # measured: 2e-5


def test_windows_in_which_nothing_was_measured(network, tmp_path, capsys):
    """They cost nothing, are counted, and are nan, as is each hole"""
    x = landscape(150, 220) // 2 + 1
    x[:, :, 90:], x[:, 7, 9] = 0, 0
    mapped(network, write(tmp_path / "in.tif", x, nodata=0), tmp_path / "map.tif")
    found, _ = read(tmp_path / "map.tif")
    assert np.array_equal(np.isnan(found), (x == 0).all(0)) and "15 windows, 9 of them empty" in capsys.readouterr().out
    with pytest.raises(ValueError, match="all.tif: nothing in it was measured, all is nodata"):
        mapped(network, write(tmp_path / "all.tif", x * 0, nodata=0), tmp_path / "none.tif")
    assert not list(tmp_path.glob("none*"))


def test_a_raster_of_no_place(network, tmp_path, capsys, recwarn):
    mapped(network, write(tmp_path / "in.tif", landscape(64, 80), crs=None), tmp_path / "map.tif")
    assert f"{tmp_path}/in.tif says no coordinate system; {tmp_path}/map.tif will say none either" in \
        capsys.readouterr().out
    assert read(tmp_path / "map.tif")[1]["crs"] is None


@pytest.mark.parametrize("words, says", [
    ("gone.tif --out map.tif", "IN gone.tif does not exist; name a GeoTIFF"),
    ("in.tif --out in.tif", "--out in.tif is IN itself; name another file"),
    ("text.tif --out map.tif", "text.tif: .* not recognized .*; wanted a GeoTIFF"),
    ("cut.tif --out map.tif", "cut.tif: .*; wanted a GeoTIFF"),
    ("in.tif --out map.png", "OUT a .tif"), ("in.tif in.tif --out map.tif", "canopy shows one raster; name a GeoTIFF"),
    ("--out map.tif", r"IN \(none\): canopy shows one raster")])
def test_mistakes_are_one_line_and_leave_nothing(network, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    write("in.tif", landscape(70, 80))
    Path("text.tif").write_text("no raster")
    Path("cut.tif").write_bytes(Path("in.tif").read_bytes()[:9000])
    before = Path("in.tif").read_bytes()
    words = words.split()
    with pytest.raises(ValueError, match=says) as error:
        visualize.main(["canopy", *words, "--weights", str(network / "tiny_sat493m.pth"), "--head",
                        str(network / "head.pth"), "--resolution", str(SIDE)])
    assert "\n" not in str(error.value) and sorted(path.name for path in tmp_path.iterdir()) == [
        "cut.tif", "in.tif", "text.tif"]
    assert Path("in.tif").read_bytes() == before


def test_a_head_of_depth_is_refused(network, tmp_path):
    path = write(tmp_path / "in.tif", landscape(64, 64))
    torch.save(dpt.DPT(dpt.DPTConfig(128, (8,) * 4, 8, hidden=8)).state_dict(), tmp_path / "depth.pth")
    with pytest.raises(ValueError, match="depth.pth answers with no heights; name a head of canopies"):
        visualize.main(["canopy", str(path), "--weights", str(network / "tiny_sat493m.pth"), "--head",
                        str(tmp_path / "depth.pth"), "--out", str(tmp_path / "map.tif")])


def test_without_rasterio_it_is_named(network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    (tmp_path / "in.tif").write_bytes(b"II*\0")
    with pytest.raises(ValueError, match=r"rasters: rasterio is not installed; pip install -e .\[geo\]"):
        mapped(network, tmp_path / "in.tif", tmp_path / "map.tif")


def test_virtual_rasters(network, tmp_path):
    """A VRT, such as gdalbuildvrt makes of many files, is one raster"""
    x = landscape(70, 80)
    write(tmp_path / "in.tif", x)
    bands = "".join(f'<VRTRasterBand dataType="Byte" band="{k}"><SimpleSource><SourceFilename relativeToVRT="1">in.tif'
                    f'</SourceFilename><SourceBand>{k}</SourceBand></SimpleSource></VRTRasterBand>' for k in (1, 2, 3))
    (tmp_path / "in.vrt").write_text(f'<VRTDataset rasterXSize="80" rasterYSize="70">{bands}</VRTDataset>')
    mapped(network, tmp_path / "in.vrt", tmp_path / "a.tif")
    mapped(network, tmp_path / "in.tif", tmp_path / "b.tif")
    assert np.array_equal(read(tmp_path / "a.tif")[0], read(tmp_path / "b.tif")[0])


# --------------------------------------------------------------------------------
# As released


def released_vit(depth, D, F, n_registers=4):
    """What the satellite ViT-L's file has, by name and shape, but for its sizes: random, calm enough to be added up"""
    rng = torch.Generator().manual_seed(0)

    def noise(*shape, mean=0.0, std=0.02):
        return mean + std * torch.randn(shape, generator=rng)
    shapes = {"attn.qkv.weight": (3 * D, D), "attn.proj.weight": (D, D), "attn.proj.bias": (D,),
              "mlp.fc1.weight": (F, D), "mlp.fc1.bias": (F,), "mlp.fc2.weight": (D, F), "mlp.fc2.bias": (D,)}
    periods = 100 ** (2 * torch.arange(16) / 32)  # of 64 numbers a head
    file = {"cls_token": noise(1, 1, D), "storage_tokens": noise(1, n_registers, D), "mask_token": noise(1, D),
            "patch_embed.proj.weight": noise(D, 3, 16, 16), "patch_embed.proj.bias": noise(D),
            "rope_embed.periods": periods}
    for i in range(depth):
        block = {name: noise(*shape) for name, shape in shapes.items()}
        block |= {f"norm{k}.{name}": noise(D, mean=name == "weight") for k in (1, 2) for name in ("weight", "bias")}
        block |= {f"ls{k}.gamma": noise(D, mean=0.2) for k in (1, 2)}
        bias = noise(3 * D)
        bias[D : 2 * D] = 0
        block |= {"attn.qkv.bias": bias, "attn.qkv.bias_mask": torch.tensor([1.0, 0, 1]).repeat_interleave(D)}
        file |= {f"blocks.{i}.{name}": x for name, x in block.items()}
    return file | {f"{norm}.{name}": noise(D, mean=name == "weight") for norm in ("norm", "local_cls_norm")
                   for name in ("weight", "bias")}


def released(folder, depth=24, D=128, F=512, small=16):
    """The files of the satellite ViT-L and of CHMv2, by their names: random, the decoder's widths `small` times less"""
    torch.save(released_vit(depth, D, F), folder / "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")
    torch.manual_seed(0)
    maps = tuple(n // small for n in (128, 256, 512, 1024))
    head = dpt.DPT(dpt.DPTConfig(D, maps, 256 // small, hidden=128 // small, class_token=True))
    torch.save(head.state_dict(), folder / "dinov3_vitl16_chmv2_dpt_head-3703d643.pth")
    return ["--weights", str(next(folder.glob("*sat493m*"))), "--head", str(next(folder.glob("*chmv2*")))]


def mapped_in_place(folder, size):
    found, profile = read(folder / "map.tif")
    assert found.shape == size and not np.isnan(found).any() and 0 < found.min() < found.max() < 96 and found.std() > 0
    assert str(profile["crs"]) == "EPSG:32633"
    assert tuple(profile["transform"])[:6] == (0.6, 0, 500000.25, 0, -0.6, 5200000.75)
    return found


def test_the_satellite_layouts_make_a_map(tmp_path):
    """ViT-L's layout and depth, CHMv2's, at an eighth and a sixteenth of their widths; by hand: blocks 5, 11, 17, 23"""
    words, x = released(tmp_path), landscape(64, 64)
    visualize.main(["canopy", str(write(tmp_path / "in.tif", x)), *words, "--out", str(tmp_path / "map.tif"),
                    "--resolution", "64"])
    vit = load_backbone(words[1])
    c = vit.config
    assert (c.depth, c.width, c.heads, c.local_norm, c.n_registers) == (24, 128, 2, True, 4)
    assert (c.mean, c.std) == ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
    decoder, mean, std = load_decoder(words[3], vit), *(torch.tensor(v)[:, None, None] for v in (c.mean, c.std))
    with torch.no_grad():
        logits = decoder.head(vit.layers((torch.from_numpy(x) / 255 - mean)[None] / std, [5, 11, 17, 23]))
    shares = logits.relu() + 1e-8
    metres = (shares * decoder.bins[:, None, None]).sum(1) / shares.sum(1)
    metres = F.interpolate(metres[None], (64, 64), mode="bilinear")[0, 0]
    assert np.abs(mapped_in_place(tmp_path, (64, 64)) - metres.numpy()).max() < 1e-4


SCRIPT = """
import sys
import visualize
visualize.main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.long
def test_a_large_raster_is_mapped_in_the_memory_of_a_small_one(network, tmp_path):
    """5,000 x 5,000 pixels beside 512 x 512: the image has 75 MB, its map 100 MB"""
    peaks = []
    for side in 512, 5000:
        write(tmp_path / f"{side}.tif", landscape(side, side), tiled=True, blockxsize=256, blockysize=256)
        words = ["canopy", f"{tmp_path}/{side}.tif", "--weights", network / "tiny_sat493m.pth", "--head",
                 network / "head.pth", "--out", f"{tmp_path}/{side}-map.tif"]
        done = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, words)], capture_output=True, text=True,
                              cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout.splitlines()[-1]) * 1024)
    found, profile = read(tmp_path / "5000-map.tif")
    assert found.shape == (5000, 5000) and not np.isnan(found).any() and str(profile["crs"]) == "EPSG:32633"
    print(f"peak {peaks[0] / 1e6:.0f} and {peaks[1] / 1e6:.0f} MB")
    assert peaks[1] - peaks[0] < 300e6                                                # measured: 206 of 1573 MB


@pytest.mark.long
def test_the_satellite_vit_l_makes_a_map(tmp_path):
    """Both files in full size, of random numbers: 303 and 34 million parameters"""
    words = released(tmp_path, D=1024, F=4096, small=1)
    path = write(tmp_path / "in.tif", landscape(300, 280))
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", SCRIPT, "canopy", str(path), *words, "--out", f"{tmp_path}/map.tif",
                           "--resolution", "256"], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    mapped_in_place(tmp_path, (300, 280))
    print(f"{time.perf_counter() - start:.0f} s, peak {int(done.stdout.splitlines()[-1]) * 1024 / 1e6:.0f} MB")
