"""evaluate.py: k-NN against a loop, linear against scikit-learn, features in order, and the program end to end."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torchvision.transforms.v2 import functional as tv

import evaluate
from data import open_source
from engine.features import evenly
from evaluate import RATES, EvaluateConfig, centre_crop, extract, knn, linear
from model import SIZES, ViT, initialise
from weights import save_backbone

CPU = torch.device("cpu")
SHORT = EvaluateConfig(iterations=200, linear_batch=128)

# --------------------------------------------------------------------------------
# Features of random classes


def problem(n, D, n_classes, spread, seed=0):
    """n points around n_classes centres: cls n D, patches n 2, labels n; other seeds, same centres."""
    centres = np.random.default_rng(99).normal(size=(n_classes, D))
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    cls = centres[labels] + spread * rng.normal(size=(n, D))
    return torch.tensor(cls).float(), torch.tensor(rng.normal(size=(n, 2))).float(), torch.tensor(labels)


def shuffled(features, seed=0):
    cls, patches, labels = features
    return cls, patches, labels[torch.tensor(np.random.default_rng(seed).permutation(len(labels)))]

# --------------------------------------------------------------------------------
# k-NN


def knn_by_hand(train, val, n_classes, ks, temperature):
    """The facts' words: softmax over the K largest similarities, then the first k of them vote."""
    unit = [[v / np.sqrt((v * v).sum()) for v in split[0].double().numpy()] for split in (train, val)]
    K, right = max(ks), {f"top{top}_k{k}": 0 for k in ks for top in (1, 5)}
    for query, truth in zip(unit[1], val[2].tolist(), strict=True):
        near = sorted(zip((float(query @ b) for b in unit[0]), train[2].tolist(), strict=True), reverse=True)[:K]
        total = sum(np.exp(s / temperature) for s, _ in near)
        for k in ks:
            score = [0.0] * n_classes
            for s, y in near[:k]:
                score[y] += np.exp(s / temperature) / total
            ranked = sorted(range(n_classes), key=lambda y: -score[y])
            right[f"top1_k{k}"] += ranked[0] == truth
            right[f"top5_k{k}"] += truth in ranked[:5]
    return {name: 100 * count / len(val[2]) for name, count in right.items()}


@pytest.mark.parametrize("ks, temperature", [((10, 20, 100, 200), 0.07), ((1, 3, 7), 1.0)])
def test_knn_is_the_loop(ks, temperature):
    train, val = problem(230, 6, 7, 1.5), problem(300, 6, 7, 1.5, seed=1)
    copies = [t.clone() for t in (*train, *val)]
    ours = knn(train, val, 7, None, CPU, ks, temperature)
    assert ours == pytest.approx(knn_by_hand(train, val, 7, ks, temperature))
    assert len(set(ours.values())) > 1 and all(20 < value < 99.9 for value in ours.values())  # a problem that tells
    assert all(torch.equal(a, b) for a, b in zip(copies, (*train, *val), strict=True))


def test_knn_clips_k_to_the_bank_and_ignores_length():
    train, val = problem(15, 8, 3, 0.01), problem(30, 8, 3, 0.01, seed=1)
    assert knn(train, val, 3, None, CPU) == dict(top1_k10=100, top1_k15=100)
    train[0][::2] *= 1000
    assert knn(train, val, 3, None, CPU) == dict(top1_k10=100, top1_k15=100)


def test_knn_of_shuffled_labels_is_at_chance():
    train, val = problem(1000, 8, 4, 0.1), problem(1000, 8, 4, 0.1, seed=1)
    assert min(knn(train, val, 4, None, CPU).values()) == 100
    found = knn(shuffled(train), shuffled(val, 1), 4, None, CPU)
    assert all(19 < value < 31 for value in found.values())

# --------------------------------------------------------------------------------
# Linear


def test_rates_are_the_papers():
    assert pytest.approx([1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]) == RATES


def test_linear_on_separable_and_on_shuffled():
    train, val = problem(600, 8, 4, 0.1), problem(600, 8, 4, 0.1, seed=1)
    assert linear(train, val, 4, SHORT, CPU)["top1"] == 100
    found = linear(shuffled(train), shuffled(val, 1), 4, SHORT, CPU)
    assert 19 < found["top1"] < 34 and found["lr"] in RATES                            # the best of 13 on 600


def test_linear_agrees_with_scikit_learn():
    train, val = problem(600, 6, 4, 1.2), problem(2000, 6, 4, 1.2, seed=1)
    x, y = (torch.cat(split[:2], 1).numpy() for split in (train, val))
    exact = 100 * LogisticRegression(C=1e4, max_iter=1000).fit(x, train[2]).score(y, val[2])
    ours = linear(train, val, 4, replace(SHORT, iterations=1500), CPU)["top1"]
    assert 50 < exact < 95 and abs(ours - exact) < 2


def test_linear_sees_the_mean_patch():
    cls, patches, labels = problem(400, 8, 4, 0.1)
    swapped = torch.zeros(400, 3), cls, labels
    assert linear(swapped, swapped, 4, SHORT, CPU)["top1"] == 100


def test_val_picks_the_rate(monkeypatch):
    train, val = problem(600, 6, 4, 1.2), problem(600, 6, 4, 1.2, seed=1)
    for rates in [1e-9, 0.01, 1e4], [0.01, 1e4, 1e-9]:
        monkeypatch.setattr(evaluate, "RATES", rates)
        found = linear(train, val, 4, SHORT, CPU)
        assert found["lr"] == 0.01 and found["top1"] > 60
        assert linear(train, shuffled(val), 4, SHORT, CPU)["top1"] < 40                # val is only looked at


def test_linear_is_a_function_of_its_seed():
    train, val = shuffled(problem(100, 6, 4, 1)), problem(100, 6, 4, 1, seed=1)
    results = [linear(train, val, 4, replace(SHORT, seed=seed), CPU) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]

# --------------------------------------------------------------------------------
# Images to features


class Plain:
    """Image i has the grey value i everywhere; those in `broken` cannot be read."""
    classes = ["even", "odd"]

    def __init__(self, n, broken=()):
        self.n, self.broken = n, broken

    def __len__(self):
        return self.n

    def load(self, i):
        if i in self.broken:
            raise OSError(f"photo {i}: cut short")
        return torch.full((3, 20 + i, 30), i, dtype=torch.uint8)

    def label(self, i):
        return i % 2


class Echo(torch.nn.Module):
    """cls: the grey value; patches: 0 and twice it; and how many images came at a time."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        self.batches.append(tuple(x.shape))
        value = x.mean((2, 3))[:, :1]
        return SimpleNamespace(cls=value, patches=torch.stack([0 * value, 2 * value], 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_extract_keeps_the_order_and_skips_the_unreadable(workers, capsys):
    model, chosen = Echo(), [9, 0, 1, 3, 2, 5, 4, 8, 7, 6]
    c = EvaluateConfig(batch=4, resolution=16, workers=workers)
    cls, patches, labels = extract(model, ((0.5,) * 3, (0.25,) * 3), Plain(10, {3}), chosen, c, CPU)
    chosen.remove(3)
    exact = (torch.tensor(chosen).float()[:, None] / 255 - 0.5) / 0.25
    torch.testing.assert_close(cls, exact)
    torch.testing.assert_close(patches, exact)
    assert labels.tolist() == [i % 2 for i in chosen]
    assert model.batches == [(4, 3, 16, 16), (4, 3, 16, 16), (1, 3, 16, 16)]
    assert capsys.readouterr().out == "skipped unreadable photo 3: cut short\n"


def test_extract_of_nothing():
    c = EvaluateConfig(resolution=16, workers=0)
    with pytest.raises(ValueError, match="none of 3 images could be read; the first: photo 0: cut short"):
        extract(Echo(), ((0,) * 3, (1,) * 3), Plain(3, range(3)), range(3), c, CPU)


@pytest.mark.parametrize("n, limit, wanted", [
    (4, 0, [0, 1, 2, 3]), (4, 4, [0, 1, 2, 3]), (4, 9, [0, 1, 2, 3]), (10, 5, [0, 2, 4, 6, 8]), (10, 3, [0, 3, 6]),
    (10, 1, [0]), (7, 6, [0, 1, 2, 3, 4, 5]),
])
def test_evenly(n, limit, wanted):
    assert evenly(range(n), limit) == wanted


@pytest.mark.parametrize("height, width", [(300, 400), (401, 256), (256, 256), (1000, 320), (3, 5), (1, 1), (1, 300)])
def test_centre_crop_is_torchvisions(height, width):
    """Short side to 256, the middle 224; torchvision rounds the long side down, ours is the nearest."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))
    ours = centre_crop(image, 224)
    assert ours.shape == (3, 224, 224) and ours.dtype == torch.uint8
    short = min(height, width)
    size = [round(side * 256 / short) for side in (height, width)]
    exact = tv.center_crop(tv.resize(image, size, tv.InterpolationMode.BICUBIC, antialias=True), [224, 224])
    if (size[0] | size[1]) % 2 == 0:  # an odd margin: both halves are right
        assert torch.equal(ours, exact)


def test_pixels_are_the_image_16x16():
    x = torch.rand(2, 3, 64, 64)
    cells = x.unflatten(2, (16, 4)).unflatten(4, (16, 4)).mean((3, 5))
    found = evaluate.Pixels()(x)
    assert found.shape == (2, 768) and (found - cells.flatten(1)).abs().mean() < 0.1

# --------------------------------------------------------------------------------
# The program


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


@pytest.mark.parametrize("task, metric", [("knn", "top1_k10"), ("linear", "top1")])
def test_shapes_with_pixels(task, metric, capsys):
    result = run(capsys, "--task", task, "--weights", "pixels", "--limit", 40, "--iterations", 50)
    assert result["task"] == task and 0 <= result[metric] <= 100 and result["seconds"] > 0
    assert (result["n_train"], result["n_val"], result["resolution"], result["data"]) == (40, 40, 80, "shapes")


@pytest.mark.parametrize("task, metric", [("knn", "top1_k10"), ("linear", "top1")])
@pytest.mark.parametrize("weights", ["pixels", "untrained:tiny", "RUN"])
def test_folder(task, metric, weights, photos, tmp_path, capsys):
    if weights == "RUN":
        vit = initialise(ViT(replace(SIZES["tiny"], depth=1)), 0)
        save_backbone(vit, tmp_path / "teacher.safetensors", "nano")
        weights = tmp_path
    (photos / "train/a/broken.png").write_text("<html>")
    result = run(capsys, "--task", task, "--weights", weights, "--data", photos, "--resolution", 32, "--iterations", 50)
    assert result[metric] == 100 and (result["n_train"], result["n_val"]) == (12, 6)
    assert result["resolution"] == 32 and result["weights"] == str(weights)


def test_train_and_val_shapes_differ():
    """No image of one is in the other."""
    splits = evaluate.open_splits(EvaluateConfig(task="knn", limit=30))
    (train, chosen), (val, _) = splits
    assert list(chosen) == list(range(30)) and len(train) == len(val) == 30
    images = torch.stack([source.load(i) for source in (train, val) for i in range(30)])
    assert len(images.flatten(1).unique(dim=0)) == 60
    assert not torch.equal(train.load(0), open_source("shapes", 1, seed=0).load(0))    # nor what train.py sees


@pytest.mark.parametrize("words, says", [
    (["--task", "dance"], "--task dance: choose one of knn, linear"),
    ([], r"--task \(none\): choose one of knn, linear"),
    (["--task", "knn"], "--weights is missing: a run's folder"),
    (["--task", "knn", "--weights", "nowhere"], "nowhere does not exist"),
    (["--task", "knn", "--weights", "untrained:xl"], "untrained:xl: unknown size 'xl'; choose one of tiny, s"),
    (["--task", "knn", "--weights", "pixels", "--limit", "many"], "--limit wants int, got 'many'"),
    (["--task", "knn", "word"], "'word' is not an option"),
    (["--task", "knn", "--weights", "pixels", "--data", "."], ". has no folder train; knn wants train/CLASS/"),
])
def test_mistakes_end_in_one_line(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says) as error:
        evaluate.main(words)
    assert "\n" not in str(error.value)


def test_odd_folders(photos):
    words = ["--task", "knn", "--weights", "pixels", "--data", str(photos)]
    (photos / "val/b").rename(photos / "val/c")
    with pytest.raises(ValueError, match="different classes: b, c"):
        evaluate.main(words)
    (photos / "val/c").rename(photos.parent / "c")
    (photos / "train/b").rename(photos.parent / "b")
    with pytest.raises(ValueError, match="train has 1 class folders; knn wants at least 2"):
        evaluate.main(words)
    (photos / "val").rename(photos.parent / "val")
    with pytest.raises(ValueError, match="has no folder val"):
        evaluate.main(words)
