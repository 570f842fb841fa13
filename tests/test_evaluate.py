"""evaluate.py end to end: every task on shapes, folders of photos, the cache, help, and mistakes in one line."""

import json
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from convnext import ConvNeXt, ConvNeXtConfig
from engine import features
from engine.task import EvaluateConfig
from model import SIZES, ViT, initialise
from tasks import TASKS
from weights import save_backbone

CPU = torch.device("cpu")


def run(capsys, *words):
    """evaluate.py's last line as a dict."""
    evaluate.main(["--device", "cpu", "--workers", "0", *map(str, words)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Red and blue images in train and val, which anything can tell apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, n in ("train", 6), ("val", 3):
        for name, colour in ("a", (200, 0, 0)), ("b", (0, 0, 200)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = np.random.default_rng(i).integers(0, 50, (20, 30, 3)) + np.array(colour)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("task, metric, own", [("knn", "top1_k10", []), ("linear", "top1", ["--iterations", 50])])
def test_shapes_with_pixels(task, metric, own, capsys):
    result = run(capsys, "--task", task, "--weights", "pixels", "--limit", 40, *own)
    assert result["task"] == task and 0 <= result[metric] <= 100 and result["seconds"] > 0
    assert (result["n_train"], result["n_val"], result["resolution"], result["data"]) == (40, 40, 80, "shapes")


@pytest.mark.parametrize("task, metric, own", [("knn", "top1_k10", []), ("linear", "top1", ["--iterations", 50])])
@pytest.mark.parametrize("weights", ["pixels", "untrained:tiny", "RUN"])
def test_folder(task, metric, own, weights, photos, tmp_path, capsys):
    if weights == "RUN":
        vit = initialise(ViT(replace(SIZES["tiny"], depth=1)), 0)
        save_backbone(vit, tmp_path / "teacher.safetensors", "nano")
        weights = tmp_path
    (photos / "train/a/broken.png").write_text("<html>")
    result = run(capsys, "--task", task, "--weights", weights, "--data", photos, "--resolution", 32, *own)
    assert result[metric] == 100 and (result["n_train"], result["n_val"], result["skipped"]) == (12, 6, 1)
    assert result["resolution"] == 32 and result["weights"] == str(weights)


WANTED = dict(segmentation="miou", ade20k="miou", depth="rmse", nyu="rmse", discovery="corloc", tracking="j_and_f",
              davis="j_and_f", keypoints="recall", spair="recall", retrieval="map", logreg="top1")


@pytest.mark.parametrize("task", WANTED)
def test_every_task_runs_on_shapes(task, tmp_path, capsys):
    words = ["--task", task, "--weights", "untrained:tiny", "--limit", 20 if task == "logreg" else 4]
    own = {option.name for option in TASKS[task].all_options()}
    words += ["--resolution", 64, "--seed", 1] + ["--iterations", 3] * ("iterations" in own)
    words += ["--out", tmp_path] * ("out" in own)
    found = run(capsys, *words)
    assert np.isfinite(found[WANTED[task]]) and (found["task"], found["seed"], found["skipped"]) == (task, 1, 0)
    assert WANTED[task] == TASKS[task].metric and (tmp_path / f"{task}.png").is_file() == bool(TASKS[task].pictures)
    json.dumps(found, allow_nan=False)


def test_cached_features_are_the_same_and_images_are_read_once(tmp_path, monkeypatch, capsys):
    words = ["--task", "knn", "--weights", "untrained:tiny", "--limit", 30, "--cache", tmp_path, "--batch", 8]
    monkeypatch.setattr(features, "ROWS", 20)
    first = run(capsys, *words)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 4                            # of 24 and 6 images, twice
    with monkeypatch.context() as only:
        only.setattr(features, "loaded", lambda *args, **more: 1 / 0)
        second = run(capsys, *words)
        assert {**first, "seconds": 0} == {**second, "seconds": 0}
        words[1] = "linear"                                                            # has no other features
        assert run(capsys, *words, "--iterations", 5)["n_train"] == 30
    words[1], words[-1] = "knn", 10                                                    # files of other images
    assert run(capsys, *words)["n_train"] == 30


def test_photos_that_are_replaced_are_looked_at_again(photos, tmp_path, capsys):
    """Val's classes change places: all right before, all wrong after, whatever the cache holds."""
    words = "--task", "knn", "--weights", "pixels", "--data", photos, "--resolution", 32, "--cache", tmp_path / "kept"
    assert run(capsys, *words)["top1_k10"] == 100
    a, b = ([*(photos / f"val/{name}").iterdir()] for name in "ab")
    for x, y in zip(a, b, strict=True):
        old = x.read_bytes()
        x.write_bytes(y.read_bytes())
        y.write_bytes(old)
    assert run(capsys, *words)["top1_k10"] < 50


@pytest.mark.parametrize("task, named", [
    ("knn", {"shots", "layers"}), ("retrieval", set()),
    ("linear", {"shots", "iterations", "linear_batch", "tests", "lr", "head"}),
    ("segmentation", {"layers", "decoder", "iterations", "lr", "ignore", "init", "scales", "head"}),
    ("depth", {"layers", "decoder", "iterations", "lr", "head"}), ("tracking", {"layers"})])
def test_settings_are_those_that_the_task_reads(task, named, capsys):
    words = ["--task", task, "--weights", "pixels", "--limit", 6, "--resolution", 64]
    found = run(capsys, *words, *["--iterations", 2] * ("iterations" in named))
    always = {"resolution", "batch", "limit", "control", "seed", "ranks", "precision"}
    options = {field.name for field in fields(EvaluateConfig)} - {"task", "weights", "data"} | {"ranks", "lr"}
    options |= {option.name for other in TASKS.values() for option in other.all_options()}
    assert found.keys() & options == always | named
    assert (found["batch"], found["ranks"], found.get("iterations", 2)) == (64, 1, 2)


def test_a_default_side_is_whole_patches(tmp_path, capsys):
    """80 pixels for a ViT, 96 for a ConvNeXt, whose patches have 32; of a run, read off its file."""
    def side(*words):
        return evaluate.configure(list(words)).resolution

    knn = "--task", "knn", "--weights"
    assert side(*knn, "pixels") == side(*knn, "untrained:s") == 80
    assert side(*knn, "untrained:convnext_t") == 96 and side(*knn, "untrained:convnext_t", "--resolution", "64") == 64
    save_backbone(ConvNeXt(ConvNeXtConfig((1, 1, 1, 1), (8, 8, 8, 8))), tmp_path / "teacher.safetensors", "nano")
    assert side(*knn, str(tmp_path)) == 96 and side("--task", "depth", "--weights", str(tmp_path)) == 160
    assert run(capsys, *knn, tmp_path, "--limit", 12)["resolution"] == 96
    assert run(capsys, *knn, "untrained:convnext_t", "--limit", 2)["n_val"] == 2


def test_help_is_what_the_records_say(capsys):
    evaluate.main(["--help"])
    everything = capsys.readouterr().out
    assert all(f"\n{name} " in everything and task.layout in everything for name, task in TASKS.items())
    evaluate.main(["--task", "nyu", "--help"])
    one = capsys.readouterr().out
    assert all(option.note in one for option in TASKS["nyu"].all_options()) and "\nknn " not in one
    assert "--resolution native, shapes 160" in everything and "38400, shapes 300" in one
    assert "--resolution 480, shapes 160" in one and "lower is better" in one


def test_a_set_is_checked_before_weights_are_loaded(photos, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *words: 1 / 0)
    with pytest.raises(ValueError, match="has no folder JPEGImages"):
        evaluate.main(["--task", "davis", "--weights", "untrained:tiny", "--data", str(photos), "--device", "cpu"])


@pytest.mark.parametrize("task, more, says", [
    ("linear", ["--tests", "nowhere"], "--tests: nowhere is no folder and no real.json"),
    ("segmentation", ["--data", "shapes", "--out", "file/below"], "--out file/below: no folder can be written there"),
    ("voc07", ["--data", "."], "voc07: sklearn is not installed; pip install -e")])
def test_what_fails_does_so_before_weights_are_loaded(task, more, says, photos, monkeypatch):
    monkeypatch.chdir(photos)
    (photos / "file").touch()
    if task == "voc07":
        monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(evaluate, "load", lambda *words: 1 / 0)
    with pytest.raises(ValueError, match=says):
        evaluate.main(["--task", task, "--weights", "pixels", "--device", "cpu", "--data", str(photos), *more])


@pytest.mark.parametrize("words, says", [
    (["--task", "dance"], "--task dance: choose one of knn, linear"),
    (["--task=dance"], "--task dance: choose one of knn, linear"),
    ([], r"--task \(none\): choose one of knn, linear"),
    (["--task", "knn"], "--weights is missing: a run's folder"),
    (["--task", "knn", "--weights", "nowhere"], "nowhere does not exist"),
    (["--task", "knn", "--weights", "untrained:xl"], "untrained:xl: unknown size 'xl'; choose one of tiny, s"),
    (["--task", "knn", "--weights", "pixels", "--limit", "many"], "--limit wants int, got 'many'"),
    (["--task", "knn", "word"], "'word' is not an option"),
    (["--task", "knn", "--wieghts", "pixels"], "unknown option --wieghts; did you mean --weights"),
    (["--task", "knn", "--weights", "pixels", "--data", "."], ". has no folder train; knn wants train/CLASS/"),
    (["--task", "logreg", "--weights", "pixels", "--layers", "99"],
     "--layers: logreg does not read it; its own options are: --shots"),
    (["--task", "knn", "--weights", "pixels", "--precision", "fp16"], "--precision fp16: write auto, bf16 or fp32"),
    (["--task", "knn", "--weights", "pixels", "--lr=-3"], "--lr: knn does not read it"),
    (["--task", "retrieval", "--weights", "pixels", "--out", "x"],
     "--out: retrieval does not read it; its own options are: none"),
    (["--task", "depth", "--weights", "pixels", "--lr", "-3"], "--lr is -3; it must be in .0, inf."),
    (["--task", "depth", "--weights", "pixels", "--decoder", "round"], "--decoder round: depth has linear"),
    (["--task", "segmentation", "--weights", "pixels", "--resolution", "60"], "--resolution 60: write whole patches"),
    (["--task", "depth", "--weights", "pixels", "--layers", "9"], "--layers 9: write blocks, 0-based"),
    (["--task", "knn", "--weights", "pixels", "--task", "dance"], "--task dance: choose one of "),
    (["--task", "knn", "--weights", "pixels", "--limit", "-1"], "--limit is -1; it must be in .0, inf."),
    (["--task", "rgbd", "--weights", "pixels"], "rgbd does not run on shapes; name a folder with NAME"),
    (["--task", "davis", "--weights", "pixels", "--data", "nowhere"], "nowhere has no folder JPEGImages/480p")])
def test_mistakes_end_in_one_line(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says) as error:
        evaluate.main(words + ["--device", "cpu"])
    assert "\n" not in str(error.value)


def test_a_score_for_every_block(tmp_path, capsys):
    """Of the k-NN, and of patches; the last one's is that of the network, and what is printed beside it, too."""
    save_backbone(initialise(ViT(replace(SIZES["tiny"], depth=2)), 0), tmp_path / "teacher.safetensors", "nano")
    for task, own in ("knn", ["--limit", 30]), ("keypoints", ["--limit", 4, "--resolution", 64]):
        words = ["--task", task, "--weights", tmp_path, *own]
        plain, each = run(capsys, *words), run(capsys, *words, "--layers", "each")
        first, last = each.pop(f"{TASKS[task].metric}_by_block")
        assert last == plain[TASKS[task].metric] == run(capsys, *words, "--layers", 1)[TASKS[task].metric]
        assert first == run(capsys, *words, "--layers", 0)[TASKS[task].metric]
        assert {**each, "layers": "", "seconds": 0} == {**plain, "seconds": 0}


def test_blocks_of_too_few_images_to_compare(capsys):
    with pytest.raises(ValueError, match="--layers each: of so few images knn has no top1_k20 to compare"):
        run(capsys, "--task", "knn", "--weights", "untrained:tiny", "--limit", 16, "--layers", "each")


def test_precision_is_in_the_key_and_in_the_json(tmp_path, capsys):
    """bf16 says nearly what fp32 says, from parameters of half the size, and not from its files."""
    save_backbone(initialise(ViT(replace(SIZES["tiny"], depth=1)), 0), tmp_path / "teacher.safetensors", "nano")
    words = ["--task", "knn", "--weights", tmp_path, "--limit", 30, "--cache", tmp_path / "cache", "--precision"]
    found = [run(capsys, *words, kind) for kind in ("fp32", "bf16")]
    assert [each["precision"] for each in found] == ["fp32", "bf16"]
    assert len([*(tmp_path / "cache").iterdir()]) == 4
    full, half = (features.load(str(tmp_path), "", kind) for kind in ("fp32", "bf16"))
    assert {x.dtype for name, x in half.named_parameters() if "norm" not in name} == {torch.bfloat16}
    c = TASKS["knn"].config(resolution=80, workers=0)
    views = [torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 80, 80), dtype=np.uint8))] * 2
    a, b = (features.Frozen(net, TASKS["knn"], replace(c, precision=kind)).tokens_of(views)
            for net, kind in ((full, "fp32"), (half, "bf16")))
    for x, y in zip(a, b, strict=True):
        assert y.dtype == np.float32 and 0 < np.abs(x - y).max() < 0.1 * np.abs(x).max()
