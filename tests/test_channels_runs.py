"""Runs on images that are no RGB photos: from the first crop to k-NN, a curation and students."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_channels import PACK, decoded, pixels, write_tiff
from test_train import MICRO, rows, run

import curate
import data
import distill
import evaluate
import recipes
import shapes
import train
import visualize
import weights
from engine import export
from engine.channels import of_run, reader
from engine.images import ImageConfig, shown
from engine.pictures import network_input
from model import SIZES, ViT, build
from weights import load_backbone, save_backbone

SCALE = 3060                                                       # of value 12 x level


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """`shapes` with their nearness as a fourth channel, uint16: train/CLASS/, val/CLASS/, TIFF of each kind and npy"""
    root, kinds = tmp_path_factory.mktemp("scenes"), itertools.cycle(itertools.product([False, True], PACK))
    for split, n, first in ("train", 24, 0), ("val", 8, 1000):
        for i in range(n):
            scene = shapes.scene(first + i, 40, 0)
            near = scene.depth.min() / scene.depth * 255
            x = np.concatenate([scene.image.transpose(2, 0, 1), near[None]]).astype(np.uint16) * 12
            folder = root / split / str(i % 2)
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{i}.npy", x) if i % 7 == 6 else write_tiff(folder / f"{i}.tif", x, *next(kinds))
    return root


FOUR = f"--in_chans 4 --scale {SCALE} --mean 0.4,0.4,0.4,0.5 --std 0.2,0.2,0.2,0.25".split()


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    """Ten steps on four channels of 16 bits."""
    out = tmp_path_factory.mktemp("runs") / "four"
    run(out, "--data", str(scenes / "train"), *FOUR, "--steps", "10", "--save_every", "5")
    return out


def test_a_run_on_four_channels_of_16_bits(scenes, trained):
    losses = [row["loss"] for row in rows(trained)]
    assert len(losses) == 10 and np.isfinite(losses).all() and not any(row["unreadable"] for row in rows(trained))
    config = load_backbone(trained).config
    assert (config.in_chans, config.mean, config.std) == (4, (0.4, 0.4, 0.4, 0.5), (0.2, 0.2, 0.2, 0.25))
    saved = json.loads((trained / "config.json").read_text())
    assert (saved["in_chans"], saved["scale"], saved["mean"]) == (4, SCALE, [0.4, 0.4, 0.4, 0.5])
    assert of_run(trained)["scale"] == of_run(trained / "teacher.safetensors")["scale"] == "3060.0"
    assert not of_run("pixels") and not of_run("untrained:s")


def test_it_goes_on_as_if_it_had_not_stopped(scenes, trained, tmp_path):
    out = tmp_path / "run"
    run(out, "--data", str(scenes / "train"), *FOUR, "--steps", "10", "--save_every", "5", "--stop_after", "5")
    train.main(["--out", str(out), "--resume"])
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in rows(trained)]
    ours, theirs = (load_file(folder / "teacher.safetensors") for folder in (out, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_it_is_evaluated_on_what_it_was_trained_on(scenes, trained, tmp_path, capsys):
    """The run says how its images were scaled; the command line may say otherwise, and has features of its own then."""
    words = ["--task", "knn", "--weights", str(trained), "--data", str(scenes), "--device", "cpu", "--workers", "0",
             "--resolution", "40"]
    found, kept = [], []
    for more in [], ["--scale", "99"], ["--scale", str(SCALE)]:
        evaluate.main([*words, *more, "--cache", str(tmp_path)])
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        kept.append(len([path for path in tmp_path.rglob("*") if path.is_file()]))
    assert kept[0] < kept[1] == kept[2]
    assert found[0]["skipped"] == 0 and 0 <= found[0]["top1_k20"] <= 100 and found[0]["n_train"] == 24
    assert [each["scale"] for each in found] == [SCALE, 99, SCALE]
    assert found[0] | dict(seconds=0) == found[2] | dict(seconds=0)
    with pytest.raises(ValueError, match=r"image has 4 channels, model 3: --in_chans 4 or --bands"):
        evaluate.main([*words[:3], "untrained:tiny", *words[4:], "--resolution", "48"])
    evaluate.main([*words[:3], "untrained:tiny", *words[4:], "--resolution", "48", "--bands", "4,2,1"])  # three of them
    with pytest.raises(ValueError, match="--data shapes are RGB pictures"):
        evaluate.main([*words[:4], "--task", "knn", "--data", "shapes", "--limit", "4"])


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """Scenes of the same classes in all colours; infrared alone says which: its level is the class's, and noise"""
    root, rng = tmp_path_factory.mktemp("fields"), np.random.default_rng(0)
    for split, n in ("train", 96), ("val", 48):
        for i in range(n):
            scene, label = shapes.scene(i + 1000 * (split == "val"), 40, 0), i % 6
            near = (40 + 30 * label + rng.normal(0, 6, (40, 40))).clip(0, 255)
            x = np.concatenate([scene.image.transpose(2, 0, 1), near[None]]).astype(np.uint16) * 12
            (root / split / str(label)).mkdir(parents=True, exist_ok=True)
            write_tiff(root / split / str(label) / f"{i}.tif", x, planar=i % 2 == 1, compression=(1, 5, 8)[i % 3])
    return root


def test_infrared_is_of_use_where_it_tells_classes_apart(fields, tmp_path, capsys):
    """Two runs of as many steps, with it and without it; chance is 17"""
    words, found = ["--data", str(fields / "train"), "--steps", "30", "--jitter", "0", "--grey", "0"], []
    for name, more in (("with", FOUR), ("without", ["--bands", "1,2,3", *FOUR[2:4]])):
        run(tmp_path / name, *words, *more)
        evaluate.main(["--task", "knn", "--weights", str(tmp_path / name), "--data", str(fields), "--device", "cpu",
                       "--workers", "0", "--resolution", "40"])
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["top1_k10"])
    assert found[0] > 45 and found[1] < 30, found                                    # measured: 58.3, 14.6


def test_heights_and_classes_of_every_pixel_by_four_channels(trained, tmp_path, capsys):
    """Dense tasks read the bands of a run, of 16 bits; a head is trained, kept, and reads a raster of them"""
    for split in "train", "test", "training", "validation":
        for i in range(2):
            scene = shapes.scene(i, 64, 0)
            near = scene.depth.min() / scene.depth * 255
            x = np.concatenate([scene.image.transpose(2, 0, 1), near[None]]).astype(np.uint16) * 12
            for folder in (f"{split}", f"images/{split}", f"annotations/{split}"):
                (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            if split.startswith("t") and len(split) < 6:
                write_tiff(tmp_path / f"{split}/rgb_{i}.tif", x, planar=i == 1, compression=5)
                Image.fromarray((14 - scene.depth).astype(np.float32)).save(tmp_path / f"{split}/height_{i}.tif")
            else:
                write_tiff(tmp_path / f"images/{split}/{i}.tif", x, planar=i == 1, compression=8)
                Image.fromarray(scene.semantic).save(tmp_path / f"annotations/{split}/{i}.png")
    words = ["--weights", str(trained), "--data", str(tmp_path), "--device", "cpu", "--workers", "0", "--iterations",
             "2", "--resolution", "64", "--out", str(tmp_path / "out")]
    for task, metric in ("canopy", "mae"), ("segmentation", "miou"):
        evaluate.main(["--task", task, *words])
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert np.isfinite(found[metric]) and found["scale"] == SCALE and found["n_val"] == 2
        with Image.open(tmp_path / f"out/{task}.png") as picture:
            assert np.abs(np.asarray(picture)[:64, :64].astype(int) - shapes.scene(0, 64, 0).image).max() <= 1
    with pytest.raises(ValueError, match="--decoder mask2former recolours photos; for --bands and other channels"):
        evaluate.main(["--task", "segmentation", *words, "--decoder", "mask2former"])
    with pytest.raises(OSError, match="rgb_0.tif: image has 4 channels, model 3: --in_chans 4 or --bands"):
        evaluate.main(["--task", "canopy", "--weights", "untrained:tiny", *words[2:]])


def test_it_is_looked_at(scenes, trained, tmp_path):
    image = next(str(path) for path in sorted((scenes / "val/0").iterdir()))
    words = [image, "--weights", str(trained), "--sizes", "32,40"]
    for mode in "pca", "similarity", "attention", "outliers", "resolutions":
        visualize.main([mode, *words, "--out", str(tmp_path / f"{mode}.png")])
    photo = np.asarray(Image.open(tmp_path / "pca.png"))[:40, :40]
    scene = (decoded(image)[..., :3] / 12).astype(np.uint8)
    assert np.abs(photo.astype(int) - scene).max() <= 1                              # red, green and blue as they were
    with pytest.raises(ValueError, match="image has 4 channels, --bands asks for number 5"):
        visualize.main(["pca", *words, "--out", str(tmp_path / "x.png"), "--bands", "5,1,1,1"])


def test_three_bands_are_chosen_to_be_shown(scenes, trained, tmp_path):
    """A network of four sees all of them as before; the picture of the photo is of the three"""
    image, found = next(str(path) for path in sorted((scenes / "val/0").iterdir())), []
    for more in [], ["--bands", "4,1,2"]:
        visualize.main(["pca", image, "--weights", str(trained), "--out", str(tmp_path / "pca.png"), *more])
        found.append(np.asarray(Image.open(tmp_path / "pca.png")).astype(int))
    levels = np.rint(decoded(image) / 12)
    for picture, bands in zip(found, ([0, 1, 2], [3, 0, 1]), strict=True):
        assert np.abs(picture[:40, :40] - levels[..., bands]).max() <= 1
    assert np.abs(found[0][:, 44:] - found[1][:, 44:]).max() <= 2 and found[0][:, 44:].std() > 20
    text = (trained / "config.json").read_text()
    own = tmp_path / "own"  # a run that has seen four of more channels
    own.mkdir()
    (own / "teacher.safetensors").symlink_to(trained / "teacher.safetensors")
    (own / "config.json").write_text(json.dumps(json.loads(text) | dict(bands="4,3,2,1")))
    visualize.main(["pca", image, "--weights", str(own), "--out", str(tmp_path / "pca.png"), "--bands", "1,4,2"])
    picture = np.asarray(Image.open(tmp_path / "pca.png")).astype(int)
    assert np.abs(picture[:40, :40] - levels[..., [0, 3, 1]]).max() <= 1
    turned = tmp_path / "turned"  # the same network, for channels in the file's order
    turned.mkdir()
    (turned / "config.json").write_text(text)
    save_backbone(weights.rearranged(load_backbone(trained), [3, 2, 1, 0]), turned / "teacher.safetensors", "nano")
    visualize.main(["pca", image, "--weights", str(turned), "--out", str(tmp_path / "pca.png"), "--bands", "1,4,2"])
    same = np.asarray(Image.open(tmp_path / "pca.png")).astype(int)
    assert np.abs(same - picture).max() <= 2 and np.abs(same - found[0])[:, 44:].max() > 20
    for more, says in (("--bands 4,4,2", "--bands 4,4,2: to show, name three of 1,2,3,4, which the network sees"),
                       ("--bands 5,1,2", "--bands 5,1,2: to show, name three of 1,2,3,4"),
                       ("--bands 1,2", "--bands 1,2 names 2 channels, the network has 4"),
                       ("--bands red,2,1", "--bands red,2,1: write numbers of channels, from 1, as in 4,3,2")):
        with pytest.raises(ValueError, match=says):
            visualize.main(["pca", image, "--weights", str(trained), "--out", str(tmp_path / "x.png"), *more.split()])
    with pytest.raises(ValueError, match="--bands 4,3,2: training shows a run's own images"):
        visualize.main(["training", str(trained), "--out", str(tmp_path / "x.gif"), "--bands", "4,3,2"])
    save_backbone(build(lambda: ViT(SIZES["tiny"])), tmp_path / "rgb.safetensors", "nano")
    with pytest.raises(ValueError, match="--weights: networks of 4 and 3 channels see no image alike"):
        visualize.main(["gram", image, "--weights", str(trained), "--weights", str(tmp_path / "rgb.safetensors"),
                        "--out", str(tmp_path / "x.png")])
    assert not (tmp_path / "x.png").exists()


def test_it_is_exported(scenes, trained, tmp_path, capsys):
    """An image of four bands and 16 bits, as the run reads it, says in another library what the network says of it"""
    for name in "onnx", "onnxruntime", "onnxscript":
        pytest.importorskip(name)
    weights.main([str(trained), str(tmp_path / "four.onnx"), "--to", "onnx"])
    assert "differs from the network by" in capsys.readouterr().out
    vit, found = load_backbone(trained), []
    read = reader(ImageConfig(scale=SCALE), vit.config)
    for path in sorted((scenes / "val/0").iterdir())[:2]:
        x = network_input(vit, read(path))                                                     # 1 4 40 40
        with torch.no_grad():
            ours = vit(x)
        cls, patches = map(torch.from_numpy, export.session(tmp_path / "four.onnx")(x))
        found.append(max((cls - ours.cls).abs().max().item(), (patches - ours.patches).abs().max().item()))
    assert x.shape[1] == 4 and max(found) < 1e-4                                     # measured: 2e-6
    x[:, 3] = 0
    assert (torch.from_numpy(export.session(tmp_path / "four.onnx")(x)[0]) - ours.cls).abs().max() > 1e-3


def test_weights_for_rgb_start_a_run_on_more(scenes, tmp_path):
    """Of the new channel's kernel the mean of the three; a channel that is 0 once normalised changes nothing."""
    rgb = build(lambda: ViT(replace(SIZES["tiny"], depth=2, patch_size=8)))
    save_backbone(rgb, tmp_path / "rgb.safetensors", "nano")
    words = ["--init", str(tmp_path / "rgb.safetensors"), "--data", str(scenes / "train")]
    out, micro = tmp_path / "run", MICRO[4:]
    train.main([*micro, *words, *FOUR[:4], "--steps", "1", "--lr", "0", "--momentum", "1", "--momentum_end", "1",
                "--out", str(out)])
    found = load_backbone(out)
    assert found.config == replace(rgb.config, in_chans=4, mean=(*rgb.config.mean, sum(rgb.config.mean) / 3),
                                   std=(*rgb.config.std, sum(rgb.config.std) / 3))
    kernels = found.patch_embed.proj.weight.detach()
    assert torch.equal(kernels[:, 3], kernels[:, :3].mean(1))
    assert torch.equal(kernels[:, :3], rgb.patch_embed.proj.weight)
    x = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        wide, exact = found(torch.cat([x, x[:, :1] * 0], 1)).patches, rgb.eval()(x).patches
        assert torch.equal(wide, exact)
        assert not torch.equal(found(torch.cat([x, x[:, :1]], 1)).patches, exact)
    for more, says in ((["--in_chans", "2"], "--in_chans 2: --init .* is for images of 3 channels"),
                       (["--in_chans", "3", "--init", str(out)], "--in_chans 3: --init .* is for images of 4 ")):
        with pytest.raises(ValueError, match=says):
            recipes.configure([*words, *more, "--out", str(tmp_path / "other")])
    c = recipes.configure([*words[2:], "--init", str(out), "--out", str(tmp_path / "next")])
    assert (c.in_chans, c.scale, c.mean) == (4, SCALE, found.config.mean)            # what it was trained on


@pytest.mark.parametrize("words, in_chans", [
    ("--in_chans 4 --scale 3060", 4), ("--bands 4,3,2 --scale 3060 --mean 0.5,0.3,0.3 --std 0.3,0.3,0.3", 3),
    ("--in_chans 4 --percentiles 2,98 --mean 0.5,0.5,0.5,0.5 --std 0.3,0.3,0.3,0.3 --global_size 48", 4),
])
def test_released_weights_are_adapted_to_other_images(scenes, tmp_path, words, in_chans):
    """Other channels, other statistics, another resolution; what is handed back first is them, for these images."""
    rgb = build(lambda: ViT(replace(SIZES["tiny"], depth=2, patch_size=8)))
    save_backbone(rgb, tmp_path / "rgb.safetensors", "nano")
    out = tmp_path / "run"
    train.main([*MICRO[4:], "--stage", "adapt", "--init", str(tmp_path / "rgb.safetensors"), "--data",
                str(scenes / "train"), "--steps", "2", "--save_every", "1", *words.split(), "--out", str(out)])
    looks = [json.loads(line) for line in (out / "adapt.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [0, 1, 2]
    assert (looks[0]["kept"] == pytest.approx(100)) == ("--mean" not in words)       # it sees other values than before
    assert all(np.isfinite(row["gram"]) for row in rows(out))
    assert load_backbone(out / "best.safetensors").config.in_chans == load_backbone(out).config.in_chans == in_chans


def test_a_pile_of_four_channels_is_curated(scenes, trained, tmp_path):
    """As the run says they are read; copies of JPEG are not made of them"""
    words = f"{scenes}/train --weights {trained} --device cpu --workers 0 --resolution 40".split()
    curate.main([*words, "--keep", "6", "--out", str(tmp_path / "kept.txt")])
    assert len((tmp_path / "kept.txt").read_text().split()) == 6
    assert (tmp_path / "kept.html").read_text().count("data:image/jpeg") >= 6
    curate.main([*words, "--dedup", "--threshold", "0.9999", "--out", str(tmp_path / "one.txt")])
    with pytest.raises(ValueError, match="--threshold is measured on JPEGs made of photos"):
        curate.main([*words, "--dedup", "--out", str(tmp_path / "none.txt")])


def test_a_teacher_of_four_channels_has_students_of_four(scenes, trained, tmp_path):
    words = "--batch 8 --steps 2 --cooldown 0 --workers 0 --device cpu --precision fp32 --log_every 1".split()
    distill.main(["--teacher", str(trained), "--students", "tiny_half,convnext_micro", *words, "--data",
                  str(scenes / "train"), "--out", str(tmp_path / "run")])
    for name in "tiny_half", "convnext_micro":
        config = load_backbone(tmp_path / "run" / name).config
        assert (config.in_chans, config.mean) == (4, (0.4, 0.4, 0.4, 0.5))
        assert np.isfinite([row["loss"] for row in rows(tmp_path / "run" / name)]).all()


def test_more_layouts_keep_the_channels(trained, tmp_path):
    weights.main([str(trained), str(tmp_path / "x.pth"), "--to", "meta"])
    assert load_backbone(tmp_path / "x.pth").config.in_chans == 4
    assert Path(tmp_path / "x.pth").stat().st_size > 0


def test_its_statistics_are_those_of_what_was_measured(scenes, tmp_path, capsys):
    """Of each channel, an image as much as another; a hole counts for nothing, nor a channel that is all holes."""
    images = [decoded(path).astype(np.float64) / SCALE for path in sorted((scenes / "val").rglob("*.*"))]
    data.main(["stats", str(scenes / "val"), *FOUR[:4], "--workers", "0"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    mean = np.mean([x.mean((0, 1)) for x in images], 0)
    std = np.sqrt(np.mean([np.square(x).mean((0, 1)) for x in images], 0) - mean**2)
    assert found["images"] == 8 and found["mean"] == pytest.approx(mean, abs=1e-6)   # measured: 1e-8
    assert found["std"] == pytest.approx(std, abs=1e-6)
    x = pixels("uint16", 2) + np.uint16(1)
    x[0, :3], x[1] = 0, 0
    write_tiff(tmp_path / "a.tif", x)
    write_tiff(tmp_path / "b.tif", pixels("uint16", 2) + np.uint16(1))
    data.main(["stats", str(tmp_path), "--in_chans", "2", "--scale", "4000", "--nodata", "0", "--workers", "0"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    whole = (pixels("uint16", 2) + 1.0) / 4000
    assert found["mean"] == pytest.approx([(whole[0, 3:].mean() + whole[0].mean()) / 2, whole[1].mean()], abs=1e-6)


def test_its_crops_are_looked_at(scenes, tmp_path):
    words = [*FOUR, "--images", "2", "--workers", "0", "--out", str(tmp_path / "look.png")]
    data.main(["look", str(scenes / "val"), *words])
    with Image.open(tmp_path / "look.png") as picture:
        assert picture.mode == "RGB" and min(picture.size) > 200
    one = torch.rand(5, 1, 4, 6)
    assert torch.equal(shown(one), (one * 255).round().byte().expand(5, 3, 4, 6))
    five = torch.rand(5, 4, 6)
    assert torch.equal(shown(five), (five[:3] * 255).round().byte())
