"""tasks/depth.py: bins and loss against loops, an oracle against noise, images whose depth is not known."""

import json
import math
from dataclasses import replace
from operator import attrgetter

import numpy as np
import pytest
import torch
from test_segmentation import Oracle, Source

import evaluate
from sets.depths import FLAT, Depths
from sets.pairs import Scenes
from tasks import TASKS, depth


def test_decode_is_the_mean_of_the_bins():
    logits = torch.tensor(np.random.default_rng(0).normal(size=(256, 2, 3)))
    found = depth.decode(logits, 10.0)
    for y in range(2):
        for x in range(3):
            weights = [max(v, 0) + 0.1 for v in logits[:, y, x].tolist()]
            bins = [0.001 + k * (10 - 0.001) / 255 for k in range(256)]
            exact = sum(w * b for w, b in zip(weights, bins, strict=True)) / sum(weights)
            assert found[y, x].item() == pytest.approx(exact, rel=1e-6)
    assert depth.outputs(Depths(), depth.BINS) == "256 bins to 10.0 m"  # what head files say, and load_decoder reads


def test_loss_is_the_equation_on_known_pixels():
    rng = np.random.default_rng(0)
    logits, truth = torch.tensor(rng.normal(size=(256, 4, 5))), rng.uniform(-3, 14, (4, 5)).clip(0)
    metres = depth.decode(logits, 10.0).numpy()
    pairs = zip(metres.ravel(), truth.ravel(), strict=True)
    g = [math.log(d + 1e-3) - math.log(t + 1e-3) for d, t in pairs if 0 < t <= 10]
    mean = sum(g) / len(g)
    exact = math.sqrt(sum((v - mean) ** 2 for v in g) / (len(g) - 1) + 0.15 * mean**2)
    ours, = depth.depth_loss([logits], [torch.tensor(truth)], 10.0)
    assert len(g) < 20 and ours.item() == pytest.approx(exact, rel=1e-6)


def test_oracle_knows_depth_and_noise_does_not():
    """A depth for each image, one of eight; the oracle names it."""
    def rooms(n, seed):
        picked = np.random.default_rng(seed).integers(1, 9, n)
        return Source([np.full((16, 16), metres, np.float32) for metres in picked])

    def name(truth):
        return np.eye(9)[truth[::16, ::16].astype(int)]

    data = rooms(64, 0), rooms(20, 1), Depths()
    c = TASKS["depth"].config(resolution=16, iterations=100, lr=0.1)
    found = depth.run(data, Oracle(name), c)
    assert found["rmse"] < 0.4 and found["delta1"] > 0.95 and 1.5 < found["chance_rmse"] < 3
    assert depth.run(data, Oracle(name, noise=True), c)["rmse"] > 1.3
    assert depth.run(data, Oracle(name), replace(c, control=True))["rmse"] > 1.3


def test_images_without_depth_are_named():
    rooms = Source([np.full((16, 16), 3, np.float32)] * 4), Source([np.zeros((16, 16), np.float32)])
    oracle = Oracle(lambda truth: np.eye(9)[truth[::16, ::16].astype(int)])
    c = TASKS["depth"].config(resolution=16, iterations=2)
    with pytest.raises(ValueError, match="val image 0 has no known depth below 10.0 m; leave it out"):
        depth.run((*rooms, Depths()), oracle, c)
    with pytest.raises(ValueError, match="no train image has a known depth below 10.0 m"):
        depth.run((*rooms[::-1], Depths()), oracle, c)


def test_four_scenes_are_learned_by_heart(monkeypatch):
    """Mirrored and not, as they are measured; each has two rows, one of which may be held out."""
    for name, value in dict(CROP=(1, 1), TURN=0, GAMMA=0, BRIGHTNESS=0, TINT=0).items():
        monkeypatch.setattr(depth, name, value)
    data = *(Scenes([0, 1, 2, 3] * n, 1000, 64, attrgetter("depth")) for n in (2, 1)), Depths(top=FLAT)
    monkeypatch.setattr(evaluate, "TASKS", dict(depth=replace(TASKS["depth"], open=lambda c: data)))
    words = "--task depth --decoder dpt --weights untrained:tiny --resolution 64 --iterations 200 --workers 0"
    found = evaluate.evaluate(evaluate.configure(words.split()))
    assert found["delta1"] > 0.95 and found["rmse"] < 0.5 and found["chance_rmse"] > 1.5       # measured: 0.974, 0.36


def test_what_training_needs_is_planned_without_weights_or_data(monkeypatch, capsys):
    """The decoder of the 7B backbone, at 768 x 1024 pixels, of which a step sees 672 x 864."""
    monkeypatch.setattr(evaluate, "load", lambda *words: 1 / 0)
    words = "--task depth --decoder dpt --weights untrained:7b --data photos --resolution 768 --plan --memory 80"
    evaluate.main([*words.split(), "--batch", "2"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    P, D = 42 * 54, 4096
    assert said["parameters_of_decoder"] == 230_687_776 and said["backbone_bytes"] == 2 * 6_716_043_264
    assert said["features_bytes"] == 4 * 2 * 4 * (1 + 4 + P) * D and said["adam_bytes"] == 8 * 230_687_776
    assert said["outputs_bytes"] == 4 * 4 * 2 * 256 * 672 * 864 and said["total_bytes"] < 30e9
    with pytest.raises(ValueError, match="needs 110 GB on each rank, 16 images of 864x672 .* would fit: --batch 10 "):
        evaluate.main(words.split())
    with pytest.raises(ValueError, match="--plan: linear learns from features on disk"):
        evaluate.main(words.replace("dpt", "linear").split())
