"""tasks/segmentation.py: an oracle scores 100, noise scores chance; the loss against a loop."""

import json
from functools import partial

import numpy as np
import pytest
import torch

import evaluate
from decoders import load_decoder, mask2former
from decoders.mask2former import Answers
from engine.features import load
from engine.views import fitted
from tasks import TASKS, segmentation

CPU = torch.device("cpu")


class Source:
    """Images that nobody looks at, with their truths."""

    def __init__(self, truths):
        self.truths = truths

    def __len__(self):
        return len(self.truths)

    def image(self, i):
        return torch.zeros(3, 16, 16, dtype=torch.uint8)

    def truth(self, i):
        return self.truths[i]


class InMemory(list):
    """What Stored is, in memory."""
    row = property(lambda self: Row(m for each in self for m in each))


class Row(list):
    shapes = property(lambda self: [m.shape for m in self])


class Oracle:
    """Frozen features: feature(truth), a patch for each pixel; or noise."""
    device = CPU

    def __init__(self, feature, noise=False):
        self.feature, self.noise = feature, noise
        self.view = self.seen(fitted)

    def seen(self, view):
        return partial(view, side=16, patch=16)

    def maps(self, name, source, views=None):
        found = []
        for i in range(len(source)):
            m = self.feature(source.truth(i)).astype(np.float16)
            m = np.random.default_rng([i, name == "val"]).normal(size=m.shape).astype(np.float16) if self.noise else m
            found.append([m, m[:, ::-1].copy()] if views and views.func.__name__ == "mirrored" else [m])
        return InMemory(found)

    def keep(self, name, function, n, **about):
        return InMemory(function(i) for i in range(n))

    def each(self, name, function, n, **about):
        return InMemory(function(i, self) for i in range(n))


def one_hot(truth, n=5):
    return np.eye(n)[np.where(truth == 255, 0, truth)]


def random_labels(n, seed):
    rng = np.random.default_rng(seed)
    truths = [np.kron(rng.choice(5, (4, 4), p=(0.4, 0.15, 0.15, 0.15, 0.15)), np.ones((4, 4))) for _ in range(n)]
    return Source([truth.astype(np.uint8) for truth in truths])


@pytest.mark.parametrize("noise, control, low, high", [(0, 0, 99, 100), (1, 0, 0, 20), (0, 1, 0, 25)])
def test_oracle_segments_and_noise_does_not(noise, control, low, high):
    data = random_labels(48, 0), random_labels(12, 1), 5
    c = TASKS["segmentation"].config(resolution=16, iterations=200, control=bool(control))
    found = segmentation.run(data, Oracle(one_hot, noise), c)
    assert low <= found["miou"] <= high and 4 < found["chance_miou"] < 12


def test_segmentation_loss_counts_ignored_pixels():
    """Mean over all pixels of the cross entropy, which is 0 where the truth is ignored."""
    rng = np.random.default_rng(0)
    out, truth = torch.tensor(rng.normal(size=(4, 6, 6))), rng.integers(0, 4, (6, 6))
    truth[0] = 255
    log = torch.log_softmax(out, 0)
    exact = -sum(log[truth[y, x], y, x] for y in range(1, 6) for x in range(6)) / 36
    assert sum(segmentation.loss([out], [torch.tensor(truth)])) == pytest.approx(exact.item(), rel=1e-6)
    twice = sum(segmentation.loss([out, 0 * out], [torch.tensor(truth)] * 2))
    assert twice == pytest.approx((exact.item() + 30 / 36 * np.log(4)) / 2, rel=1e-6)


# --------------------------------------------------------------------------------
# Live: masks


class Seer:
    """A head that reads classes off the red of an image: one query for each class"""
    device = CPU

    def see(self, frozen, images):
        assert len(images) == 1 and images[0].shape[1] % 32 == images[0].shape[2] % 32 == 0
        frozen.sides.append(tuple(images[0].shape[1:]))
        return images[0]

    def __call__(self, image):
        found = torch.nn.functional.avg_pool2d(image[:1].float(), 4)[0] / 40
        near = torch.stack([4 - 16 * (found - k).abs() for k in range(3)])[None]
        return masks_of(torch.eye(4)[None, :3] * 9, near)


def masks_of(logits, near):
    return Answers((0 * logits, logits), (0 * near, near))


@pytest.mark.parametrize("scales, wanted", [
    ("", [(64, 64)] * 2), ("1", [(64, 64)] * 4), ("0.5,1,1.5", [(32, 32)] * 4 + [(64, 64)] * 16),
    ("0.9", [(64, 64)] * 4)])
def test_windows_scales_and_mirror_images_are_put_together_where_they_belong(scales, wanted):
    """Of an image of 64 x 90 with three classes; every view but the smallest knows it as it is"""
    truth = np.zeros((64, 90), np.uint8)
    truth[:32, 50:], truth[32:, 70:] = 1, 2
    image = torch.from_numpy(40 * truth)[None].repeat(3, 1, 1)
    c = TASKS["segmentation"].config(resolution=64, decoder="mask2former", scales=scales)
    frozen = type("F", (), dict(c=c, sides=[]))
    found = segmentation.scores(image, truth.shape, Seer(), frozen)
    assert frozen.sides == wanted and found.shape == (3, 64, 90)
    assert (found.argmax(0).numpy() == truth).mean() > 0.9
    torch.testing.assert_close(found.sum(0), torch.full((64, 90), len(scales.split(",")) * (2.0 if scales else 1.0)))


def json_of(capsys, *words):
    evaluate.main(["--device", "cpu", "--workers", "0", "--task", "segmentation", *map(str, words)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_masks_from_one_end_to_the_other(tmp_path, capsys):
    """Trained, kept, measured again as kept, at another scale, and read by load_decoder"""
    words = ["--weights", "untrained:tiny", "--decoder", "mask2former", "--limit", 3, "--resolution", 64]
    found = json_of(capsys, *words, "--iterations", 2, "--out", tmp_path)
    assert found["best_step"] in (1, 2) and found["n_val"] == found["n_train"] == 3 and found["lr"] == 1e-3
    head = tmp_path / "head.safetensors"
    again = json_of(capsys, *words, "--head", head)
    assert again["miou"] == found["miou"] and (tmp_path / "segmentation.png").is_file()
    assert json_of(capsys, *words, "--head", head, "--scales", "1")["miou"] >= 0
    assert json_of(capsys, *words, "--init", head, "--iterations", 1)["iterations"] == 1
    decoder = load_decoder(head, load("untrained:tiny"))
    torch.save(decoder.head.state_dict(), tmp_path / "head.pth")  # as released ones are kept
    assert json_of(capsys, *words, "--head", tmp_path / "head.pth")["miou"] == found["miou"]
    torch.save({"conv.weight": torch.ones(13, 128, 1, 1), "conv.bias": torch.ones(13)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match="head.pth has 13 classes, wanted a Mask2Former of 13, those of segmentation"):
        json_of(capsys, *words, "--head", tmp_path / "head.pth")
    assert decoder.layers == [0, 2, 3, 5] and decoder.semantic(torch.zeros(1, 3, 64, 64)).shape == (1, 13, 64, 64)


def test_what_training_masks_needs_is_planned(capsys, monkeypatch):
    monkeypatch.setattr(mask2former, "sized", lambda width: mask2former.Mask2FormerConfig(
        width, decoder=64, hidden=64, queries=8, encoder_layers=1, layers=1))
    words = "--task ade20k --decoder mask2former --weights untrained:s --data photos --resolution 512 --plan --memory"
    evaluate.main([*words.split(), "24", "--batch", "8"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["parameters_of_decoder"] > 1e6 and 2e9 < found["activations_bytes"] < found["total_bytes"] < 24e9
    with pytest.raises(ValueError, match="2 images of 512x512 at once, .* what would fit: --batch 1 "):
        evaluate.main([*words.split(), str(found["total_bytes"] / 4.5e9), "--batch", "2"])
    with pytest.raises(ValueError, match="--plan: linear learns from features on disk"):
        evaluate.main([*words.replace("mask2former", "linear").split(), "24"])


@pytest.mark.parametrize("more, says", [
    (["--resolution", "48"], "--resolution 48: mask2former wants a multiple of 32"),
    (["--weights", "pixels"], "at least 4 blocks whose width is a multiple of 8; pixels has 1 of width 48"),
    (["--weights", "untrained:convnext_t"], "four blocks of one width and grid; a ConvNeXt has stages of several"),
    (["--layers", "each"], "--layers each: mask2former sees four blocks"),
    (["--init", "a", "--head", "b"], "--head b cannot be read"),
    (["--layers", "1,2"], "--layers 1,2: mask2former sees four blocks; name four"),
    (["--scales", "1,big"], "--scales 1,big: write multiples of --resolution, from 0.1 to 10"),
    (["--scales", "0"], "--scales 0: write multiples"),
    (["--decoder", "linear", "--scales", "1"], "--scales: the decoder linear does not read it"),
    (["--decoder", "linear", "--init", "x"], "--init: the decoder linear does not read it"),
    (["--init", "nowhere", "--limit", "1", "--iterations", "1"], "--init nowhere cannot be read"),
])
def test_mistakes_end_in_one_line(more, says):
    words = ["--task", "segmentation", "--decoder", "mask2former", "--weights", "untrained:tiny", "--device", "cpu"]
    with pytest.raises(ValueError, match=says) as error:
        evaluate.main(words + more)
    assert "\n" not in str(error.value)
