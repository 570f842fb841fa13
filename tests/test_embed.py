"""embed.py: vectors that are those of the network, an interrupted run that goes on, neighbours, copies, the map."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import start
from PIL import Image

import embed
import shapes
from dinotxt import TowerConfig, image_vector, load_dinotxt, new_towers, save_towers
from engine import vectors
from engine.images import unit
from engine.sources import open_source
from engine.vectors import Vectors
from engine.views import centre_crop, middle
from model import SIZES, ViT, build
from weights import load_backbone, save_backbone

ROOT = Path(__file__).parents[1]
N = 24
HERE = ["--workers", "0", "--device", "cpu", "--precision", "fp32"]
WORDS = ["--resolution", "32", *HERE]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    save_backbone(build(lambda: ViT(replace(SIZES["tiny"], depth=2)), seed=3), path, "nano")
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 scenes in three folders, one of them three times: smaller, and as JPEG; one that is no image"""
    folder = tmp_path_factory.mktemp("pile") / "photos"
    for i in range(N):
        image = Image.fromarray(shapes.scene(i, 48, 0).image)
        path = folder / "abc"[i % 3] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        image.save(path)
        if i == 5:
            image.save(folder / "jpeg.jpg", quality=80)
            image.resize((40, 40), Image.Resampling.BICUBIC).save(folder / "small.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def file(photos, weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "v.npz"
    embed.main([str(photos), "--weights", str(weights), "--out", str(path), *WORDS])
    return path


def said(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def by_hand(weights, path, view, side):
    """cls and mean patch of one image, by the network alone"""
    net = load_backbone(weights)
    mean, std = (torch.tensor(v)[:, None, None] for v in (net.config.mean, net.config.std))
    image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    with torch.no_grad():
        out = net((unit(view(image, side, 16)[0]) - mean)[None] / std)
    return out.cls[0].numpy(), out.patches[0].mean(0).numpy()

# --------------------------------------------------------------------------------
# Vectors


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_vectors_are_those_of_the_network(photos, weights, tmp_path, capsys, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"v{suffix}"
    embed.main([str(photos), "--weights", str(weights), "--out", str(out), *WORDS])
    text = capsys.readouterr().out
    line = json.loads(text.splitlines()[-1])
    assert "27 images of" in text and "seen at 32 px, centre" in text and "skipped unreadable" in text
    assert line["n"] == N + 2 and line["skipped"] == 1 and line["width"] == 128
    file = Vectors(out)
    names = [file.name(i) for i in range(len(file))]
    assert len(file) == N + 2 and not any("broken" in name for name in names)
    for i in 0, 11, 25:
        cls, mean = by_hand(weights, names[i], centre_crop, 32)
        assert np.abs(file.columns["cls"][i : i + 1] - cls).max() < 1e-5        # measured: 7e-7, others in the batch
        assert np.abs(file.columns["patches_mean"][i : i + 1] - mean).max() < 1e-5
    assert os.listdir(tmp_path) == [out.name]


def test_a_wide_view_is_the_papers(photos, weights, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(photos / "a/00.png", few)
    embed.main([str(few), "--weights", str(weights), "--out", str(tmp_path / "v.npz"), "--resolution", "512", *HERE])
    assert said(capsys)["crop"] == "middle"
    cls, _ = by_hand(weights, few / "00.png", middle, 512)
    assert np.abs(Vectors(tmp_path / "v.npz").columns["cls"][:] - cls).max() < 1e-5


def test_several_layers_side_by_side(photos, weights, tmp_path):
    for layers in "0", "1", "0,1":
        embed.main([str(photos), "--weights", str(weights), "--out", str(tmp_path / f"{layers}.npz"), "--layers",
                    layers, *WORDS])
    one, two, both = (Vectors(tmp_path / f"{layers}.npz").columns for layers in ("0", "1", "0,1"))
    for name in "cls", "patches_mean":
        assert (both[name][:] == np.concatenate([one[name][:], two[name][:]], 1)).all()


def test_maps_of_patches(photos, weights, tmp_path, capsys):
    out = tmp_path / "v.npz"
    embed.main([str(photos), "--weights", str(weights), "--out", str(out), "--patches", *WORDS])
    assert "patches: 2.76e-05 GB in" in capsys.readouterr().out         # 27 x 4 x 128 x 2 bytes
    maps, file = np.load(tmp_path / "v.patches.npy", mmap_mode="r"), Vectors(out)
    assert maps.shape == (N + 2, 2, 2, 128) and maps.dtype == np.float16
    assert np.abs(maps.astype(np.float32).mean((1, 2)) - file.columns["patches_mean"][:]).max() < 3e-3  # measured: 5e-4
    with pytest.raises(ValueError, match="v.npz exists; name another, or --overwrite"):
        embed.main([str(photos), "--weights", str(weights), "--out", str(out), "--patches", *WORDS])
    out.unlink()
    with pytest.raises(ValueError, match="v.patches.npy exists; name another"):
        embed.main([str(photos), "--weights", str(weights), "--out", str(out), "--patches", *WORDS])
    embed.main([str(photos), "--weights", str(weights), "--out", str(out), "--patches", "--overwrite", *WORDS])


def test_maps_that_no_disk_holds(photos, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 50_000, 50_000))
    with pytest.raises(ValueError, match="--patches: 5.53e-05 GB are needed in .* and 5e-05 GB are free; make room"):
        embed.main([str(photos), "--weights", str(weights), "--out", str(tmp_path / "v.npz"), "--patches", *WORDS])
    assert not os.listdir(tmp_path)


def test_two_ranks_write_what_one_writes(photos, weights, file, tmp_path):
    def main(argv):
        embed.main([str(photos), "--weights", str(weights), "--out", str(tmp_path / "two.npz"), *WORDS])
    group = start(tmp_path / "run", ranks=2, base=[], main=main)
    assert group.wait()[0] == [0, 0], group.text()[-3000:]
    one, two = Vectors(file), Vectors(tmp_path / "two.npz")
    assert all((one.columns[name][:] == two.columns[name][:]).all() for name in ("cls", "patches_mean", "rows"))


def test_what_is_cut_short_goes_on_to_the_same_rows(photos, weights, file, tmp_path, monkeypatch, capsys):
    """of four files of vectors on the way the second is cut short: the next run makes it, and not the first again"""
    monkeypatch.setattr("engine.features.ROWS", 8)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    words = [str(photos), "--weights", str(weights), "--batch", "8", *WORDS]
    embed.main([*words, "--out", str(tmp_path / "whole.npz")])
    real, made = embed.Frozen.tokens_of, []

    def stop(self, views, *maps):
        made.append(len(views))
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(self, views, *maps)
    monkeypatch.setattr(embed.Frozen, "tokens_of", stop)
    with pytest.raises(KeyboardInterrupt):
        embed.main([*words, "--out", str(tmp_path / "v.npz")])
    assert not (tmp_path / "v.npz").exists() and "goes on with them" in capsys.readouterr().err
    embed.main([*words, "--out", str(tmp_path / "v.npz")])
    assert made == [7, 8, 8, 8, 3] and os.listdir(tmp_path / "tmp") == [f"nanodino-{os.getuid()}-reading"]
    whole, found = Vectors(tmp_path / "whole.npz"), Vectors(tmp_path / "v.npz")
    assert all((whole.columns[name][:] == found.columns[name][:]).all() for name in whole.columns)


@pytest.mark.long
def test_ctrl_c_and_the_same_command(tmp_path):
    """with readers, as from a terminal: the whole process group gets it"""
    folder, env = tmp_path / "photos", os.environ | dict(TMPDIR=str(tmp_path / "tmp"))
    folder.mkdir()
    (tmp_path / "tmp").mkdir()
    for i in range(1200):
        Image.fromarray(shapes.scene(i, 48, 0).image).save(folder / f"{i:04}.png")
    words = [sys.executable, str(ROOT / "embed.py"), str(folder), "--weights", "untrained:tiny", "--resolution", "96",
             "--device", "cpu", "--workers", "1", "--out"]
    subprocess.run([*words, str(tmp_path / "whole.npz")], check=True, env=env, capture_output=True)
    run = subprocess.Popen([*words, str(tmp_path / "v.npz")], env=env, start_new_session=True, stderr=subprocess.PIPE)
    while not list((tmp_path / "tmp").rglob("*.safetensors")):
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    assert b"goes on with them" in run.communicate()[1] and run.returncode == 130
    assert not (tmp_path / "v.npz").exists()
    subprocess.run([*words, str(tmp_path / "v.npz")], check=True, env=env, capture_output=True)
    a, b = (np.load(tmp_path / f"{name}.npz") for name in ("whole", "v"))
    assert (a["cls"] == b["cls"]).all() and (a["paths"] == b["paths"]).all() and len(a["cls"]) == 1200

# --------------------------------------------------------------------------------
# Neighbours


def test_an_image_finds_itself_and_its_copies(file, photos, tmp_path, capsys):
    embed.main(["search", str(file), str(photos / "c/05.png"), "--top", "3", "--device", "cpu", "--out",
                str(tmp_path / "x.html")])
    found = said(capsys)
    assert [Path(name).name for name in found["names"]] == ["05.png", "jpeg.jpg", "small.png"] or \
        [Path(name).name for name in found["names"]] == ["05.png", "small.png", "jpeg.jpg"]
    assert found["cosines"][0] == pytest.approx(1, abs=1e-5) and found["n"] == N + 2
    assert (tmp_path / "x.html").read_text().count("data:image/jpeg") == 4
    embed.main(["search", str(file), str(photos / "c/05.png"), "--device", "cpu", "--out", str(tmp_path / "x.png")])
    assert Image.open(tmp_path / "x.png").width > 500


def test_shapes_have_no_files_and_are_shown_anyway(weights, tmp_path, capsys, monkeypatch):
    query = tmp_path / "q.png"
    Image.fromarray(shapes.scene(7, 96, 0).image).save(query)
    for module in embed, vectors:
        monkeypatch.setattr(module, "open_source", partial(open_source, n_shapes=12))
    embed.main(["shapes", "--weights", str(weights), "--out", str(tmp_path / "v.npz"), *HERE])
    assert said(capsys)["resolution"] == 80
    embed.main(["search", str(tmp_path / "v.npz"), str(query), "--top", "1", "--device", "cpu"])
    assert said(capsys)["names"] == ["shapes 7"]
    assert (tmp_path / "v.search.html").read_text().count("data:image/jpeg") == 2
    with pytest.raises(ValueError, match="shapes 0 is no file, and a list cannot name it"):
        embed.main(["duplicates", str(tmp_path / "v.npz")])


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """a run of text.py, of start values"""
    folder = tmp_path_factory.mktemp("words")
    net = build(lambda: ViT(replace(SIZES["tiny"], depth=1)), seed=5).eval()
    save_backbone(net, folder / "teacher.safetensors", "nano")
    towers = new_towers(net.config, TowerConfig(1, 64, 9, 520, 1))
    save_towers(folder / "text.safetensors", towers, [("a", "t</w>")])
    return folder


def test_words_find_what_the_towers_say(words, photos, tmp_path, capsys):
    out = tmp_path / "v.npz"
    embed.main([str(photos), "--weights", str(words), "--text", str(words), "--out", str(out), *WORDS])
    line = said(capsys)
    assert line["crop"] == "middle" and line["resolution"] == 32
    embed.main(["search", str(out), "a red square", "--top", "26", "--device", "cpu"])
    found = said(capsys)
    model = load_dinotxt(words, load_backbone(words))
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.config.mean, model.config.std))
    asked = torch.nn.functional.normalize(model.encode_words(["a red square"]))[0]
    for name, cosine in list(zip(found["names"], found["cosines"], strict=True))[::9]:
        image = torch.from_numpy(np.array(Image.open(name).convert("RGB"))).permute(2, 0, 1)
        with torch.no_grad():
            vector = image_vector(model((unit(middle(image, 32, 16)[0]) - mean)[None] / std))[0]
        assert cosine == pytest.approx(float(torch.nn.functional.normalize(vector, dim=0) @ asked), abs=2e-5)
    assert found["cosines"] == sorted(found["cosines"], reverse=True) and len(found["names"]) == 26

# --------------------------------------------------------------------------------
# Copies, the map


def test_copies_are_found_and_listed(file, photos, tmp_path, capsys):
    embed.main(["duplicates", str(file), "--threshold", "0.95", "--out", str(tmp_path / "drop.csv"), "--device",
                "cpu"])
    found = said(capsys)
    assert found["groups"] == 1 and found["drop"] == 2 and found["threshold"] == 0.95
    rows = list(csv.DictReader((tmp_path / "drop.csv").read_text().splitlines()))
    three = {str(photos / name) for name in ("c/05.png", "jpeg.jpg", "small.png")}
    assert {row["path"] for row in rows} | {rows[0]["stays"]} == three and float(rows[0]["cosine"]) > 0.95
    dropped = open_source(str(tmp_path / "drop.csv"))
    assert len(dropped) == 2 and dropped.load(0).shape[0] == 3
    assert "1 groups of copies" in (tmp_path / "drop.html").read_text()


def test_the_threshold_is_measured(file, tmp_path, capsys):
    embed.main(["duplicates", str(file), "--out", str(tmp_path / "drop.txt"), "--device", "cpu"])
    found = said(capsys)
    assert 0.5 < found["threshold"] < 1 and set(found["recall"]) == {"jpeg", "cropped", "halved", "mirrored",
                                                                    "recoloured"}
    assert found["groups"] >= 1 and "Measured: of copies" in (tmp_path / "drop.html").read_text()


def test_photos_that_are_gone_leave_the_threshold_to_the_user(file, photos, weights, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    embed.main([str(tmp_path / "photos"), "--weights", str(weights), "--out", str(tmp_path / "v.npz"), *WORDS])
    (tmp_path / "photos/a/00.png").unlink()
    with pytest.raises(ValueError, match="00.png is no longer there: the threshold is measured on the photos; give"):
        embed.main(["duplicates", str(tmp_path / "v.npz"), "--device", "cpu"])
    with pytest.raises(ValueError, match="00.png is no file, and a list cannot|--threshold"):
        embed.main(["duplicates", str(tmp_path / "v.npz"), "--device", "cpu"])


def test_the_map_is_a_page(file, tmp_path, capsys):
    embed.main(["map", str(file), "--out", str(tmp_path / "m.html"), "--points", "20", "--workers", "0"])
    found = said(capsys)
    assert found["n"] == N + 2 and found["shown"] == 20 and 0 < found["variance"] <= 1
    html = (tmp_path / "m.html").read_text()
    assert html.count("data:image/jpeg;base64,") == 20 and '"kinds": [".", "a", "b", "c"]' in html

# --------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("more, message", [
    (["--out", "x.txt"], r"--out x.txt: name a file that ends in .npz or .safetensors or .parquet"),
    (["--out", ""], r"--out \(none\): name a file that"), (["--crop", "left"], "--crop left: choose one of centre"),
    (["--resolution", "17"], "--resolution 17: write whole patches"), (["--layers", "9"], "this network has 2"),
    (["--patches", "--crop", "whole"], "--patches: maps of one size"), (["--precision", "fp8"], "write auto, bf16"),
    (["--weights", "/nowhere"], "/nowhere.* does not exist"), (["--data", "x"], "and --data x: which photos"),
    (["--text", "/nowhere"], "/nowhere.* does not exist; name the folder of a run of text.py"),
    (["--text", "/nowhere", "--layers", "0"], "--layers 0: words are of the last block alone"),
    (["--out", "/proc/x.npz"], "--out /proc/x.npz: no file can be written there"), (["more"], "'.*' is not an option"),
    (["--bands", "1,2"], "names 2 channels, the network has 3"), (["--topp", "3"], "unknown option --topp")])
def test_bad_input_is_one_line(photos, weights, tmp_path, more, message):
    with pytest.raises(ValueError, match=message) as error:
        embed.main([str(photos), "--weights", str(weights), "--out", str(tmp_path / "v.npz"), *WORDS, *more])
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)


def test_folders_without_a_photo(weights, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no image in .*none or below it"):
        embed.main([str(tmp_path / "none"), "--weights", str(weights), "--out", str(tmp_path / "v.npz")])
    (tmp_path / "none/a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of 1 images could be read; the first: .*a.png"):
        embed.main([str(tmp_path / "none"), "--weights", str(weights), "--out", str(tmp_path / "v.npz"), *WORDS])
    with pytest.raises(ValueError, match="which photos. python embed.py PHOTOS"):
        embed.main(["--weights", str(weights), "--out", str(tmp_path / "v.npz")])
    with pytest.raises(ValueError, match="/nowhere does not exist"):
        embed.main(["--data", "/nowhere", "--weights", str(weights), "--out", str(tmp_path / "v.npz")])
    assert os.listdir(tmp_path) == ["none"]


@pytest.mark.parametrize("words, message", [
    (["search", "FILE", "nowhere.jpg"], "^nowhere.jpg does not exist; name an image"),
    (["search", "FILE", "a red square"], "'a red square' is no file, and .* was made without words"),
    (["search", "FILE", "QUERY", "--text", "/x"], "--text /x: .* was made without words"),
    (["serch", "FILE", "QUERY"], "'serch' .* did you mean search.$"), (["FILE", "QUERY"], "00.png' is not an option"),
    (["search", "FILE"], "write embed.py search FILE QUERY"), (["map"], "map .none.: write embed.py map FILE"),
    (["search", "FILE", "QUERY", "--weights", "untrained:tiny"], "is of another network than untrained:tiny; name"),
    (["search", "FILE", "QUERY", "--out", "x.jpg"], "--out x.jpg: name a file that ends in .html or .png"),
    (["search", "QUERY", "QUERY"], "name a file that embed.py has left"),
    (["search", "FILE", "BROKEN"], "broken.png: cannot identify image file"),
    (["duplicates", "FILE", "--out", "x.html"], "--out x.html: name a file that ends in .csv or .parquet or .txt"),
    (["duplicates", "FILE", "--top", "3"], "unknown option --top"),
    (["map", "FILE", "--out", "x.png"], "--out x.png: name a file that ends in .html"),
    (["map", "/nowhere.npz"], "/nowhere.npz does not exist; python embed.py PHOTOS")])
def test_bad_input_of_what_one_does_with_a_file(file, photos, words, message):
    places = dict(FILE=str(file), QUERY=str(photos / "a/00.png"), BROKEN=str(photos / "broken.png"))
    with pytest.raises((ValueError, OSError), match=message) as error:
        embed.main([places.get(word, word) for word in words])
    assert "\n" not in str(error.value)


def test_a_map_of_two_is_none(photos, weights, tmp_path):
    (tmp_path / "two").mkdir()
    for name in "a/00.png", "b/01.png":
        shutil.copy(photos / name, tmp_path / "two")
    embed.main([str(tmp_path / "two"), "--weights", str(weights), "--out", str(tmp_path / "v.npz"), *WORDS])
    with pytest.raises(ValueError, match="v.npz has 2 vectors; a map shows three or more"):
        embed.main(["map", str(tmp_path / "v.npz")])


def test_a_full_disk_leaves_nothing(photos, weights, tmp_path):
    """as a program: 3 kB are all that its files may have"""
    def write(*args):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        vectors.write(*args)

    def main(argv):
        embed.write = write
        embed.main([str(photos), "--weights", str(weights), "--out", str(tmp_path / "out/v.npz"), *WORDS])
    group = start(tmp_path / "run", base=[], main=main)
    assert group.wait()[0] == [2] and "v.npz cannot be written: File too large" in group.text(), group.text()
    assert not os.listdir(tmp_path / "out")
