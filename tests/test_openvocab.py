"""tasks/openvocab.py: a network that knows its words finds every stripe; sets, control, mistakes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from speaking import Twice, photo
from test_evaluate import run

import evaluate
from sets.labels import open_val
from tasks import TASKS, openvocab

WORDS = "--task", "openvocab", "--weights", "pixels", "--resolution", 32, "--templates", "plain"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Stripes as wide as two patches; truth: red 0, green 1, blue 2, void 255 in one corner"""
    monkeypatch.setitem(TASKS, "openvocab", replace(openvocab.TASK, network=lambda backbone, c: Twice()))
    stripes = np.repeat(np.arange(3, dtype=np.uint8), 16)[None].repeat(32, 0)
    truth = stripes.copy()
    truth[:3, :3] = 255
    photo(tmp_path / "set/images/validation/1.png", "red", "green", "blue")
    photo(tmp_path / "set/images/validation/2.png", "blue", "green", "red")
    for name, each in (("1", truth), ("2", 2 - stripes)):
        path = tmp_path / f"set/annotations/validation/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(path)
    (tmp_path / "names.txt").write_text("red\ngreen\nviolet; blue\n")
    return tmp_path


def test_who_knows_the_words_finds_the_stripes(folder, capsys):
    found = run(capsys, *WORDS, "--data", folder / "set", "--names", folder / "names.txt", "--out", folder / "out")
    assert found["accuracy"] == pytest.approx(100, abs=4) and found["miou"] > 92       # edges between patches blur
    assert found["accuracy_backbone"] < 10 and found["miou_backbone"] < 10             # its channels are turned
    assert (found["n_val"], found["n_classes"], found["n_sentences"]) == (2, 3, 4)
    with Image.open(folder / "out/openvocab.png") as sheet:
        assert sheet.size == (4 * 52, 2 * 36)
    control = run(capsys, *WORDS, "--data", folder / "set", "--names", folder / "names.txt", "--control")
    assert control["accuracy"] < 60


def test_windows_lie_half_their_side_apart(folder, monkeypatch):
    """512: windows of 384, 192 apart; 32 and 80 in patches of 8: 24, 12 and 64, 32, as half a patch is rounded up"""
    seen = []
    monkeypatch.setattr(openvocab, "windows", lambda image, *how: seen.append(how) or 1 / 0)
    for side in 512, 32, 80:
        with pytest.raises(ZeroDivisionError):
            evaluate.main([*map(str, WORDS[:5]), str(side), "--templates", "plain", "--device", "cpu", "--workers", "0",
                           "--data", str(folder / "set"), "--names", str(folder / "names.txt")])
    assert seen == [(384, 192, 512), (24, 12, 32), (64, 32, 80)]


def test_val_alone_is_read(folder):
    c = openvocab.TASK.config(data=str(folder / "set"))
    val, top = open_val(c, "segmentation")
    assert len(val) == 2 and top == 2 and torch.equal(torch.from_numpy(val.truth(1)).unique(), torch.arange(3).byte())
    val, top = open_val(c, "ade20k")                                                   # 0 is ignored there
    assert top == 1


@pytest.mark.parametrize("more, says", [
    (["--set", "coco"], "--set coco: choose one of segmentation, ade20k, cityscapes, voc, camvid"),
    ([], "--names is missing: the classes of .* have numbers alone; write --names FILE"),
    (["--set", "ade20k"], "--names is missing, and .* has no objectInfo150.txt; write --names"),
    (["--names", "short.txt"], "has label 2, but names are of 2 classes, from 0; name all"),
    (["--names", "blank.txt"], "blank.txt has names for 1 classes; wanted None, a line each"),
    (["--names", "none.txt"], "none.txt cannot be read")])
def test_mistakes(more, says, folder):
    (folder / "short.txt").write_text("red\ngreen\n")
    (folder / "blank.txt").write_text("red\n;\n")
    more = [str(folder / word) if word.endswith(".txt") else word for word in more]
    with pytest.raises(ValueError, match=says):
        evaluate.main([*map(str, WORDS), "--device", "cpu", "--workers", "0", "--data", str(folder / "set"), *more])
