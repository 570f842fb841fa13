"""tasks/zeroshot.py: a network that knows its words is always right; layouts, control, mistakes."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from speaking import Colours, photo
from test_evaluate import run

import evaluate
from dinotxt import TowerConfig, new_towers, save_towers
from engine.bpe import learn_merges
from model import SIZES, ViT, build
from tasks import TASKS, zeroshot
from weights import save_backbone

WORDS = "--task", "zeroshot", "--weights", "pixels", "--resolution", 32, "--templates", "plain"


@pytest.fixture
def speaking(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(TASKS, "zeroshot", replace(zeroshot.TASK, network=lambda backbone, c: Colours()))


def colours(root, *names):
    for name in names or ("red", "green", "blue"):
        for k in range(3):
            photo(root / name / f"{k}.png", name)
    return root


@pytest.mark.parametrize("below", ["", "val"])
def test_who_knows_the_words_is_right(below, speaking, tmp_path, capsys):
    found = run(capsys, *WORDS, "--data", colours(tmp_path / "photos" / below) if not below else
                colours(tmp_path / "photos" / below).parent)
    assert (found["top1"], found["n_val"], found["n_classes"], found["n_sentences"]) == (100, 9, 3, 4)
    assert found["chance"] == pytest.approx(100 / 3) and "top5" not in found
    assert run(capsys, *WORDS, "--data", tmp_path / "photos", "--control")["top1"] < 100


def test_names_of_files_and_several_for_a_class(speaking, tmp_path, capsys):
    root, names = tmp_path / "photos", tmp_path / "names.json"
    for folder, colour in (("n01", "red"), ("n02", "blue")):
        photo(root / folder / "1.png", colour)
    names.write_text(json.dumps(dict(n01="green; red", n02="blue")))
    assert run(capsys, *WORDS, "--data", root, "--names", names)["top1"] == 100
    (tmp_path / "lines.txt").write_text("blue\nred\n")               # in the order of the folders: both wrong
    assert run(capsys, *WORDS, "--data", root, "--names", tmp_path / "lines.txt")["top1"] == 0


def test_other_sets_choose_among_their_own_classes(speaking, tmp_path, capsys):
    """imagenet-r's folders are of two classes: red is not to be chosen, and what is purple is blue"""
    for split in "train", "val":
        colours(tmp_path / "photos" / split)
    colours(tmp_path / "variant", "blue", "green")
    photo(tmp_path / "variant/blue/purple.png", "red", "red", "blue")
    found = run(capsys, *WORDS, "--data", tmp_path / "photos", "--tests", tmp_path / "variant")
    assert found["top1"] == 100 and found["top1_variant"] == 100


def test_ranking_is_the_best_name_of_each_class():
    class Tokens:
        def table(self, *names):
            return torch.tensor([[1.0, 0.1, 0.0], [0.0, 1.0, 0.4]])
    vectors = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]), dim=1)
    found = zeroshot.ranking(Tokens(), vectors, torch.tensor([0, 1, 2, 2]), range(3))
    assert found.tolist() == [[0, 2, 1], [1, 2, 0]]
    assert zeroshot.ranking(Tokens(), vectors, torch.tensor([0, 1, 2, 2]), [1, 2]).tolist() == [[2, 1], [1, 2]]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder as text.py leaves it, of start values"""
    root, vit = tmp_path_factory.mktemp("runs") / "words", replace(SIZES["tiny"], depth=1)
    save_backbone(build(lambda: ViT(vit)), root / "teacher.safetensors", "nano")
    merges = learn_merges(["a dotted star on paved ground before a cloudy wall"] * 2, 20)
    save_towers(root / "text.safetensors", new_towers(vit, TowerConfig(1, 64, 30, 514 + len(merges))), merges)
    return root


@pytest.mark.parametrize("task, metric", [("zeroshot", "top1"), ("captions", "image_to_text_1"), ("openvocab", "miou")])
def test_shapes_end_to_end(task, metric, words, tmp_path, capsys):
    """Twice with one cache: the same numbers"""
    found, again = (run(capsys, "--task", task, "--weights", words, "--limit", 6, "--cache", tmp_path)
                    for _ in range(2))
    assert 0 <= found[metric] <= 100 and {k: v for k, v in found.items() if k != "seconds"} == {
        k: v for k, v in again.items() if k != "seconds"}


def test_the_towers_may_lie_elsewhere(words, tmp_path, capsys):
    more = "--task", "captions", "--limit", 4, "--weights"
    one = run(capsys, *more, words)
    two = run(capsys, *more, words / "teacher.safetensors", "--text", words / "text.safetensors")
    assert one["image_to_text_5"] == two["image_to_text_5"]


@pytest.mark.parametrize("weights, more, says", [
    ("untrained:tiny", [], "untrained:tiny does not exist; name the folder of a run of text.py, or the released file"),
    ("untrained:s", ["--text", "WORDS"], "text.safetensors is for a ViT of width 128, the weights are 384 wide; name"),
    ("WORDS", ["--names", "x"], "--tests, --names: zeroshot on shapes has no use for them"),
    ("WORDS", ["--templates", "x"], "--templates x is no file; write imagenet, plain, shapes, or name one"),
    ("WORDS", ["--layers", "0"], "--layers: zeroshot does not read it")])
def test_mistakes(weights, more, says, words):
    told = [str(words) if word == "WORDS" else word for word in (weights, *more)]
    with pytest.raises(ValueError, match=says):
        evaluate.main(["--task", "zeroshot", "--device", "cpu", "--workers", "0", "--limit", "2", "--weights", *told])


@pytest.mark.parametrize("paths, says", [
    (["red/1.png"], "has 1 folders of classes; zeroshot wants"),
    (["red/1.png", "blue/2.png", "3.png"], "has 2 folders of classes, and 3.png in none; zeroshot wants")])
def test_folders_name_the_classes(paths, says, speaking, tmp_path):
    for path in paths:
        photo(tmp_path / "photos" / path, "red")
    with pytest.raises(ValueError, match=says):
        evaluate.main([*map(str, WORDS), "--device", "cpu", "--data", str(tmp_path / "photos")])
