"""engine/comparisons.py and the modes of visualize.py that it serves: gram, resolutions, training."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_train import MICRO

import train
import visualize
from engine import comparisons
from engine.explore import HEAT
from model import ViT, ViTConfig, build
from weights import save_backbone


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two networks of other patches and widths, and two images."""
    folder = tmp_path_factory.mktemp("networks")
    for name, patch, width in (("a", 8, 16), ("b", 4, 32)):
        config = ViTConfig(2, width, 2, 32, patch_size=patch, layerscale=0.3, init_std=0.3)
        save_backbone(build(lambda config=config: ViT(config)), folder / f"{name}.safetensors", "nano")
    for i, (W, H) in enumerate([(40, 24), (32, 56)]):
        pixels = np.random.default_rng(i).integers(0, 255, (H, W, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder

# --------------------------------------------------------------------------------
# The arithmetic


def test_most_different_patches_are_found():
    """of the definition, and apart"""
    a, b = noise(10, 10, 4), noise(10, 10, 4)
    b[2, 7], b[8, 1] = noise(4, seed=1), noise(4, seed=2)
    x, y = (F.normalize(m.flatten(0, 1), dim=-1) for m in (a, b))
    differ = (x @ x.T - y @ y.T).square().mean(1).view(10, 10)
    first, second = comparisons.most_different(a, b, 2)
    places = [(int(v * 10), int(u * 10)) for u, v in (first, second)]
    assert set(places) == {(2, 7), (8, 1)} and differ[places[0]] == differ.max()
    assert len(comparisons.most_different(a[:1, :1], b[:1, :1])) == 1


def test_signed_colours():
    blue, white, red = comparisons.signed_colours(np.array([[-1.0, 0, 1]]))[0]
    assert (white == 1).all() and blue.argmax() == 2 and red.argmax() == 0
    assert np.allclose(blue, [0.13, 0.4, 0.67]) and np.allclose(red, [0.7, 0.09, 0.17])


def test_consistency_is_1_with_itself_and_0_with_what_is_apart():
    map = noise(6, 4, 5)
    assert comparisons.consistency(map, map) == pytest.approx(1)
    assert comparisons.consistency(map, -map) == pytest.approx(-1)
    coarse = torch.ones(3, 2, 5)
    assert comparisons.consistency(coarse, torch.ones(6, 4, 5)) == pytest.approx(1)


def test_a_rotation_of_the_scores_is_undone():
    scores, turn = noise(50, 3).double(), torch.linalg.qr(noise(3, 3).double()).Q
    assert torch.allclose(comparisons.turned_like(scores @ turn, scores), scores)

# --------------------------------------------------------------------------------
# The pictures


def test_gram_shows_both_networks_on_one_scale_and_what_differs(folder, capsys):
    words = f"gram {folder}/0.png --weights {folder}/a.safetensors --weights={folder}/b.safetensors --point 0.3,0.4"
    visualize.main([*words.split(), "--out", str(folder / "gram.png")])
    assert "Gram loss 0." in capsys.readouterr().out
    found = np.array(Image.open(folder / "gram.png"))
    assert found.shape == (24, 4 * 40 + 3 * visualize.GUTTER, 3)
    maps = noise(3, 5, 8), noise(3, 5, 8, seed=1)
    rows, line = visualize.gram_picture(maps, torch.zeros(3, 24, 40, dtype=torch.uint8), [(0.5, 0.5)])
    a, b = (comparisons.cosines(m, (1, 2)) for m in maps)
    low, unit = min(a.min(), b.min()), [F.normalize(m.flatten(0, 1), dim=-1) for m in maps]
    for tile, cosine in zip(rows[0][1:3], (a, b), strict=True):
        level = np.interp((cosine[0, 0] - low) / (1 - low), np.linspace(0, 1, len(HEAT)),
                          np.array(HEAT)[:, 0])
        assert abs(int(tile[3, 3, 0]) - level) <= 1                       # far from the ring
    sign = np.sign(b - a)[0, 0]
    assert np.sign(int(rows[0][3][3, 3, 0]) - int(rows[0][3][3, 3, 2])) == sign
    loss = (unit[0] @ unit[0].T - unit[1] @ unit[1].T).square().mean()
    mean = (unit[0] @ unit[0].T).mean()
    assert line.startswith(f"Gram loss {loss:.4g}; mean cosine of two patches {mean:.3f}, ")


def test_the_same_network_twice_differs_nowhere(folder, capsys):
    words = f"gram {folder} --weights {folder}/a.safetensors --weights {folder}/a.safetensors --out {folder}/same.png"
    visualize.main(words.split())
    assert capsys.readouterr().out.count("Gram loss 0;") >= 2


def test_resolutions_have_one_basis_and_a_curve(folder, capsys):
    words = f"resolutions {folder}/0.png {folder}/1.png --weights {folder}/a.safetensors --sizes 24,48 --out"
    visualize.main([*words.split(), f"{folder}/x.png"])
    said = capsys.readouterr().out
    assert said.count("48 px 1.000") == 2 and f"wrote {folder}/x.png" in said
    assert np.array(Image.open(folder / "x.png"))[..., :3].std() > 10


def test_training_has_a_frame_for_each_kept_step(tmp_path, capsys):
    out = tmp_path / "run"
    train.main([*MICRO, "--out", str(out), "--save_every", "2"])
    visualize.main(["training", str(out), "--out", str(tmp_path / "x.gif")])
    found = Image.open(tmp_path / "x.gif")
    assert found.n_frames == 3 and "3 steps" in capsys.readouterr().out
    frames = []
    for i in range(3):
        found.seek(i)
        frames.append(np.array(found.convert("RGB")))
    assert not np.array_equal(frames[0], frames[1]) and found.info["duration"] > 1000
    assert frames[0].shape[:2] == (4 * 64 + 3 * 4 + 22, 3 * 64 + 2 * 4)


@pytest.mark.parametrize("words, says", [
    ("gram 0.png --weights a.safetensors --out x.png", "a.safetensors: gram compares two; write --weights A --we"),
    ("gram 0.png --out x.png", r"--weights \(none\): gram compares two"),
    ("resolutions 0.png --weights a.safetensors --sizes 48,24 --out x.png", "--sizes 48,24: write pixels, rising"),
    ("resolutions 0.png --weights a.safetensors --sizes 48,x --out x.png", "--sizes 48,x: write pixels, rising"),
    ("resolutions 0.png --weights a.safetensors --sizes 4,48 --out x.png", "is less than one patch"),
    ("training --out x.gif", r"RUN \(none\): training shows one run"),
    ("training a b --out x.gif", "RUN a b: training shows one run"),
    ("training nowhere --out x.gif", "nowhere: no run to go on with"),
    ("training nowhere --out x.png", "OUT a .gif"),
])
def test_mistakes_end_in_one_line(words, says, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=says) as error:
        visualize.main(words.split())
    assert "\n" not in str(error.value)


def test_a_run_that_kept_one_step_shows_no_training(tmp_path):
    train.main([*MICRO, "--out", str(tmp_path / "run"), "--stop_after", "1"])
    with pytest.raises(ValueError, match="has kept 1 steps; two or more are wanted: train with --keep_every N"):
        visualize.main(["training", str(tmp_path / "run"), "--out", str(tmp_path / "x.gif")])
