"""engine/heads.py: a head that --out kept says the same when --head reads it, and one of something else is refused."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import evaluate
from decoders import linear
from engine import features, heads
from tasks import TASKS

SMALL = {"segmentation": "--limit 12 --resolution 64 --iterations 5 --layers 0,1",
         "depth": "--limit 6 --resolution 64 --iterations 3", "linear": "--limit 40 --iterations 3"}


def run(*words):
    return evaluate.evaluate(evaluate.configure([*" ".join(map(str, words)).split(), "--device", "cpu"]))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """{task: (its words, file, what the run said)}"""
    found = {}
    for name, words in SMALL.items():
        out = tmp_path_factory.mktemp(name)
        words = f"--task {name} --weights untrained:tiny --workers 0 {words}"
        found[name] = words, out / "head.safetensors", run(words, "--out", out)
    return found


@pytest.mark.parametrize("name", SMALL)
def test_a_head_from_a_file_says_the_same_and_nothing_is_trained(name, kept, monkeypatch):
    words, file, before = kept[name]
    for module in TASKS[name].run.__globals__.get("DECODERS", {}).values():
        monkeypatch.setattr(module, "fit", None, raising=False)
    asked, tokens, maps = [], features.Frozen.tokens, features.Frozen.maps
    for kind, function in ("tokens", tokens), ("maps", maps):
        monkeypatch.setattr(features.Frozen, kind, lambda self, name, *args, f=function, **more: asked.append(name) or
                            f(self, name, *args, **more))
    after = run(words, "--head", file)
    assert asked == ["val"]
    other = "head", "seconds"
    assert {k: v for k, v in after.items() if k not in other} == {k: v for k, v in before.items() if k not in other}
    assert file.stat().st_mode & 0o777 == 0o644 and not list(file.parent.glob("*.new"))


def test_what_the_file_says_of_itself(kept):
    with safe_open(kept["segmentation"][1], "pt") as file:
        about, n = file.metadata(), sum(file.get_tensor(name).numel() for name in file.keys())
    assert (about["metric"], about["decoder"], about["backbone"]) == ("miou", "linear", "tiny")
    assert (about["layers"], about["width"], about["outputs"]) == ("0,1", "256", "13 classes")
    assert n == 256 * 13 + 13 + 4 * 256 + 1 and json.loads(about["said"])["n_train"] == 12


@pytest.mark.parametrize("name, words, says", [
    ("segmentation", "--layers 1", "has layers '0,1', this command '1'; name a head that was trained for it"),
    ("segmentation", "--weights untrained:s", "backbone 'tiny', .* 's'"),
    ("depth", "--task segmentation --layers 0,1", "metric 'rmse', this command 'miou'"),
    ("segmentation", "--control", "--control and --shots mean nothing"),
    ("linear", "--shots 2", "--control and --shots mean nothing"),
    ("segmentation", "--layers each", "certain blocks")])
def test_heads_of_something_else_are_refused_before_anything_is_loaded(name, words, says, kept, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    with pytest.raises(ValueError, match=says):
        run(kept[name][0], "--head", kept[name][1], words)


def test_files_that_are_no_heads(tmp_path, kept):
    (tmp_path / "text.safetensors").write_text("no head")
    for path in tmp_path / "text.safetensors", tmp_path / "nothing", tmp_path:
        with pytest.raises(ValueError, match="cannot be read .*; wanted head.safetensors of an earlier --out"):
            run(kept["depth"][0], "--head", path)
    with pytest.raises(ValueError, match="--shots 2 trains several; leave out one of them"):
        run(kept["linear"][0], "--shots 2 --out", tmp_path / "out")


def test_other_outputs_and_other_weights(tmp_path, kept, capsys):
    words, file, _ = kept["segmentation"]
    for kind, shape in ("images", (80, 80, 3)), ("annotations", (80, 80)):
        for split in "training", "validation":
            for i in range(2):
                path = tmp_path / f"data/{kind}/{split}/{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.random.default_rng(i).integers(0, 5, shape, dtype=np.uint8)).save(path)
    with pytest.raises(ValueError, match="answers in 13 classes, .*data wants 5 classes"):
        run(words, "--head", file, "--data", tmp_path / "data")
    capsys.readouterr()
    task = TASKS["segmentation"]
    c = evaluate.configure([*words.split(), "--head", str(file), "--device", "cpu"])
    frozen = features.Frozen(evaluate.load(c.weights), task, c)
    frozen.model.norm.weight.data += 1
    head, _ = heads.load(partial(linear.Head, n_out=13), "13 classes", frozen, c)
    assert "was trained on features of other weights than untrained:tiny" in capsys.readouterr().out
    assert not head.training and isinstance(head.linear.weight, torch.nn.Parameter)
