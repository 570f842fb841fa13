"""engine/supervised.py: labels are learned, the backbone is one that every command takes, a missing label is said."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import MICRO

from engine import supervised
from recipes import configure
from weights import load_backbone

WORDS = [*MICRO, "--lr", "5e-3", "--lr_warmup", "2", "--flip", "0", "--solarize", "0", "--drop_path", "0"]


@pytest.fixture
def photos(tmp_path):
    """Two classes, told by their brightness"""
    for i in range(16):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), 30 + 190 * (i % 2) + i, np.uint8)).save(path)
    return tmp_path / "photos"


def test_labels_are_learned_and_the_backbone_is_loaded(photos, tmp_path):
    c = configure([*WORDS, "--data", str(photos), "--steps", "25", "--out", str(tmp_path / "run")])
    assert supervised.train(c) < 0.1  # measured: 0.0002
    net = load_backbone(tmp_path / "run")
    assert net.config.depth == 2 and len(net(torch.zeros(1, 3, 32, 32)).cls) == 1


def test_labels_that_no_image_shows_are_not_learned(photos, tmp_path):
    for path in photos.glob("*/*.png"):
        Image.new("RGB", (40, 40), (90, 90, 90)).save(path)
    c = configure([*WORDS, "--data", str(photos), "--steps", "10", "--out", str(tmp_path / "run")])
    assert supervised.train(c) > 0.5  # ln 2 at best


def test_an_image_without_a_label_is_named(photos, tmp_path):
    for path in photos.glob("*/*.png"):
        path.rename(photos / path.name)
    c = configure([*WORDS, "--data", str(photos), "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="lies in no class folder"):
        supervised.train(c)
    assert not (tmp_path / "run/teacher.safetensors").exists()


def test_help_says_what_it_is(capsys):
    supervised.main(["--help"])
    assert "engine.supervised --data PHOTOS/train" in capsys.readouterr().out
