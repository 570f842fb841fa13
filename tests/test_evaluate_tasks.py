"""evaluate.py's other tasks: the control, the cache, and every task on shapes."""

import json
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import run

import evaluate
from convnext import ConvNeXt, ConvNeXtConfig
from evaluate import EvaluateConfig
from model import SIZES
from weights import save_backbone

CPU = torch.device("cpu")


def photo(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((30, 40, 3), colour, np.uint8)).save(path)


RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)

# --------------------------------------------------------------------------------
# The control, the cache, and every task on shapes


@pytest.mark.parametrize("task, metric, words", [("knn", "top1_k10", []), ("linear", "top1", ["--iterations", 100]),
                                                 ("logreg", "top1", []), ("retrieval", "map", [])])
def test_control_is_at_chance(task, metric, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split in "train", "val":
        for name, colour in zip("abcd", (RED, GREEN, BLUE, (200, 200, 0)), strict=True):
            for i in range(15):
                photo(tmp_path / f"{split}/{name}/{i}.png", np.add(colour, i))
    words = ["--task", task, "--weights", "pixels", "--data", tmp_path, "--resolution", 32, *words]
    plain, found = run(capsys, *words), run(capsys, *words, "--control")
    assert plain[metric] == 100 and found["control"] and 20 < found["chance"] < 30
    assert abs(found[metric] - found["chance"]) <= 25


def test_cached_features_are_the_same_and_images_are_read_once(tmp_path, monkeypatch, capsys):
    words = ["--task", "knn", "--weights", "untrained:tiny", "--limit", 30, "--cache", tmp_path, "--batch", 8]
    monkeypatch.setattr(evaluate, "ROWS", 20)
    first = run(capsys, *words)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 4                            # of 24 and 6 images, twice
    with monkeypatch.context() as only:
        only.setattr(evaluate, "labelled", lambda *args, **more: 1 / 0)
        second = run(capsys, *words)
        assert {**first, "seconds": 0} == {**second, "seconds": 0}
        words[1] = "linear"                                                            # has no other features
        assert run(capsys, *words, "--iterations", 5)["n_train"] == 30
    words[1], words[-1] = "knn", 10                                                    # files of other images
    assert run(capsys, *words)["n_train"] == 30


@pytest.mark.parametrize("task, named", [
    ("knn", {"shots"}), ("linear", {"shots", "iterations", "linear_batch", "lr"}), ("retrieval", set()),
    ("segmentation", {"layers", "iterations", "lr", "ignore"}), ("depth", {"layers", "iterations", "lr"}),
    ("tracking", {"layers"})])
def test_settings_are_those_that_the_task_reads(task, named, capsys):
    found = run(capsys, "--task", task, "--weights", "pixels", "--limit", 6, "--resolution", 64, "--iterations", 2)
    always = {"resolution", "batch", "limit", "control", "seed", "ranks"}
    options = {field.name for field in fields(EvaluateConfig)} - {"task", "weights", "data"} | {"ranks"}
    assert found.keys() & options == always | named
    assert (found["batch"], found["ranks"], found.get("iterations", 2)) == (64, 1, 2)


def test_a_default_side_is_whole_patches(tmp_path, capsys):
    """80 pixels for a ViT, 96 for a ConvNeXt, whose patches have 32; of a run, read off its file."""
    def side(*words):
        return evaluate.configure(list(words)).resolution

    knn = "--task", "knn", "--weights"
    assert side(*knn, "pixels") == side(*knn, "untrained:s") == side("--task", "knn") == 80
    assert side(*knn, "untrained:convnext_t") == 96 and side(*knn, "untrained:convnext_t", "--resolution", "64") == 64
    save_backbone(ConvNeXt(ConvNeXtConfig((1, 1, 1, 1), (8, 8, 8, 8))), tmp_path / "teacher.safetensors", "nano")
    assert side(*knn, str(tmp_path)) == 96 and side("--task", "depth", "--weights", str(tmp_path)) == 160
    assert run(capsys, *knn, tmp_path, "--limit", 12)["resolution"] == 96
    assert run(capsys, *knn, "untrained:convnext_t", "--limit", 2)["n_val"] == 2


def test_few_shots(capsys):
    """One draw of five is not another; with as many images as there are, all draws are one."""
    words = ["--task", "knn", "--weights", "pixels", "--limit", 60]
    found, all_of_them = run(capsys, *words, "--shots", 2), run(capsys, *words, "--shots", 60)
    assert 20 <= found["n_train"] <= 24 and found["std_top1_k10"] > 0 and all_of_them["n_train"] == 60
    assert all_of_them["std_top1_k10"] == 0 and all_of_them["top1_k10"] == run(capsys, *words)["top1_k10"]


def test_the_papers_number_stands_beside():
    """Of this task, metric and size; none for shapes, for pixels, for sizes that the paper does not have."""
    def found(data, size, weights="x", **metrics):
        config = SimpleNamespace(config=SIZES[size])
        return evaluate.beside(EvaluateConfig(task="davis", data=data, weights=weights), config, metrics)

    assert found("DAVIS", "b", j_and_f=1.0, rmse=2.0) == dict(paper_j_and_f=77.2)
    assert found("shapes", "b", j_and_f=1.0) == found("DAVIS", "tiny", j_and_f=1.0) == {}
    assert found("DAVIS", "b", rmse=1.0) == {}
    assert found("DAVIS", "b", "pixels", j_and_f=1.0) == {}


WANTED = dict(segmentation="miou", ade20k="miou", depth="rmse", nyu="rmse", discovery="corloc", tracking="j_and_f",
              davis="j_and_f", keypoints="recall", spair="recall", retrieval="map", logreg="top1")


@pytest.mark.parametrize("task", WANTED)
def test_every_task_runs_on_shapes(task, tmp_path, capsys):
    words = ["--task", task, "--weights", "untrained:tiny", "--limit", 20 if task == "logreg" else 4]
    words += ["--resolution", 64, "--iterations", 3, "--out", tmp_path, "--seed", 1]
    found = run(capsys, *words)
    assert np.isfinite(found[WANTED[task]]) and (found["task"], found["seed"]) == (task, 1)
    assert (tmp_path / f"{task}.png").is_file() == (task not in ("retrieval", "logreg"))
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("words, says", [
    (["--task", "segmentation", "--weights", "pixels", "--resolution", "60"], "--resolution 60: write whole patches"),
    (["--task", "depth", "--weights", "pixels", "--layers", "9"], "--layers 9: write blocks, 0-based"),
    (["--task", "knn", "--weights", "pixels", "--limit", "-1"], "--limit is -1; it must be at least 0"),
    (["--task", "rgbd", "--weights", "pixels"], "shapes has no folder|has 0 images NAME.color.jpg"),
    (["--task", "davis", "--weights", "pixels", "--data", "nowhere"], "nowhere has no folder JPEGImages/480p")])
def test_mistakes_are_one_line(words, says):
    with pytest.raises(ValueError, match=says) as error:
        evaluate.main([*words, "--device", "cpu"])
    assert "\n" not in str(error.value)
