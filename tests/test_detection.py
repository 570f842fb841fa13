"""tasks/detection.py: what a step sees, a head fitted end to end, by one rank and two, and its mistakes in one line."""

import json
import os
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from fitted import goes_on_where_it_was, two_ranks_are_one
from test_detections import GOOD, coco

import evaluate
from decoders import detr, load_decoder
from decoders.fit import FILE, fit
from decoders.objects import detection_loss
from engine.coco import Objects
from engine.ranks import Ranks
from model import ViT, ViTConfig, initialise
from sets.detections import DOMAINS, open_detections
from tasks import TASKS, detection
from weights import load_backbone, save_backbone

VIT = ViTConfig(depth=4, width=32, heads=2, hidden=64)
ALONE = Ranks()


@pytest.fixture
def weights(tmp_path):
    save_backbone(initialise(ViT(VIT), 0), tmp_path / "teacher.safetensors", "nano")
    return tmp_path / "teacher.safetensors"


def run(capsys, *words):
    evaluate.main(["--task", "detection", "--device", "cpu", "--workers", "0", *map(str, words)])
    said = capsys.readouterr().out
    return json.loads(said.splitlines()[-1]), said


class Square:
    """One image in which a bright square is the object, and a crowd"""

    def __len__(self):
        return 1

    def image(self, i):
        image = torch.zeros(3, 96, 160, dtype=torch.uint8)
        image[:, 30:62, 40:88] = 255
        return image

    def truth(self, i):
        return Objects(np.array([[40.0, 30, 88, 62], [0, 0, 9, 9]]), np.array([4, 5]), np.array([False, True]),
                       np.array([1.0, 1]), (96, 160))

# --------------------------------------------------------------------------------
# What a step sees


@pytest.mark.parametrize("alike", [True, False])
def test_boxes_move_with_the_image(alike):
    sizes, seen = set(), 0
    for k in range(40):
        rng = np.random.default_rng(k)
        image, objects = detection.sample(0, rng, Square(), [0], 96, 16, alike)
        assert image.dtype == torch.uint8 and not any(n % 16 for n in image.shape[1:])
        sizes.add(image.shape[1:])
        if not len(objects["labels"]):
            continue
        seen += 1
        ((left, top, right, bottom),) = objects["boxes"].tolist()
        rows, cols = (image[0] > 127).nonzero().unbind(1)
        found = cols.min(), rows.min(), cols.max() + 1, rows.max() + 1
        assert [x.item() for x in found] == pytest.approx([left, top, right, bottom], abs=1.5)
        assert objects["labels"].tolist() == [4]
    assert seen > 30 and (sizes == {(96, 160)} if alike else len(sizes) > 3 and max(sizes) == (96, 160))
    assert alike or min(sizes)[0] == 64  # 0.6 of 96, in whole patches


def test_half_of_the_images_are_mirrored(monkeypatch):
    monkeypatch.setattr(detection, "CUT", (1.0, 1.0))
    lefts = [detection.sample(0, np.random.default_rng(k), Square(), [0], 96, 16, True)[1]["boxes"][0, 0].item()
             for k in range(80)]
    assert set(lefts) == {40, 72} and 25 < lefts.count(72) < 55


def test_without_an_rng_it_is_fitted():
    image, objects = detection.sample(0, None, Square(), [0], 48, 16, False)
    assert image.shape == (3, 48, 80) and objects["boxes"].tolist() == [[20, 15, 44, 31]]


def test_answers_are_in_the_pixels_of_the_image():
    """The view is larger than the image, and of its two sides by different factors."""
    fake = SimpleNamespace(c=SimpleNamespace(tta="", resolution=100), model=SimpleNamespace(config=VIT))
    answer = detr.Answer(torch.tensor([[[0.0, 3.0]]]), None, None, torch.tensor([[[90.0, 60, 36, 48]]]))

    class Head:
        def see(self, frozen, views):
            assert [tuple(view.shape) for view in views] == [(3, 112, 176)]
            return views

        def __call__(self, views):
            return SimpleNamespace(layers=[answer])
    boxes, scores, labels = detection.answer(Square().image(0), fake, Head(), detr.best)
    assert labels.tolist() == [1, 0] and scores[0] == pytest.approx(1 / (1 + np.exp(-3)))
    assert boxes[0].tolist() == pytest.approx([72 * 160 / 176, 36 * 96 / 112, 108 * 160 / 176, 84 * 96 / 112])


@pytest.mark.parametrize("decay", ["linear", "quadratic"])
def test_views_are_turned_back_and_merged(decay):
    fake, sides = SimpleNamespace(c=SimpleNamespace(tta=decay, resolution=96), model=SimpleNamespace(config=VIT)), []

    class Head:
        def see(self, frozen, views):
            return views[0]

        def __call__(self, view):
            rows, cols = (view[0] > 127).nonzero().unbind(1)
            sides.append(view.shape[1])
            low, high = torch.stack([cols.min(), rows.min()]), torch.stack([cols.max() + 1, rows.max() + 1])
            box = torch.cat([(low + high) / 2, (high - low).float()])
            return SimpleNamespace(layers=[detr.Answer(torch.tensor([[[2.0]]]), None, None, box[None, None])])
    boxes, scores, labels = detection.answer(Square().image(0), fake, Head(), detr.best)
    assert [2048 * scale for scale in detection.SCALES] == [1536, 1728, 1920, 2112, 2304, 2496, 2688, 2880]
    assert sides == [s for k in (1536, 1728, 1920, 2112, 2304, 2496, 2688, 2880)
                     for s in [-(-round(k / 2048 * 96) // 16) * 16] * 2]
    assert boxes[0].tolist() == pytest.approx([40, 30, 88, 62], abs=1.5)
    assert scores[0] == pytest.approx(0.8808, abs=1e-4)
    assert len(scores) == 1 or scores[1] < 0.2


def test_the_guess_is_the_mean_box_of_each_class():
    guess = detection.constant(Square())
    assert guess == {4: [0.25, 30 / 96, 0.55, 62 / 96, 1], 5: [0, 0, 9 / 160, 9 / 96, 1]}
    boxes, scores, labels = detection.guessed(json.loads(json.dumps(guess)), (192, 160))
    assert boxes[0].tolist() == [40, 60, 88, 124] and scores.tolist() == [0.5, 0.5] and labels.tolist() == [4, 5]

# --------------------------------------------------------------------------------
# End to end


def test_shapes_a_head_kept_and_read_again(weights, tmp_path, capsys, monkeypatch):
    shown = MagicMock(wraps=detection.named)
    monkeypatch.setattr(detection, "named", shown)
    words = "--weights", weights, "--limit", 3, "--resolution", 96
    found, _ = run(capsys, *words, "--iterations", 2, "--out", tmp_path / "o", "--windows", 2)
    assert 0 <= found["ap"] <= 100 and found["chance_ap"] >= 0 and found["n_classes"] == 12 and found["windows"] == 2
    assert sum(len(call.args[2]) for call in shown.mock_calls) == found["n_boxes"]  # as many, however unsure
    assert (tmp_path / "o/detection.png").is_file() and not (tmp_path / "o" / FILE).exists()
    again, said = run(capsys, *words, "--head", tmp_path / "o/head.safetensors", "--windows", 2)
    assert again["ap"] == found["ap"] and "iterations" in again
    with pytest.raises(ValueError, match="answers in 12 classes, 2 windows a side, 20 queries, shapes wants 12"):
        run(capsys, *words, "--head", tmp_path / "o/head.safetensors")
    backbone = load_backbone(weights)
    decoder = load_decoder(tmp_path / "o/head.safetensors", backbone)
    assert decoder.head.config.windows == 2 and decoder.layers == [0, 1, 2, 3]
    (answers,) = decoder([torch.randn(3, 64, 64)])
    assert len(answers["scores"]) == 20 * 12
    tta, _ = run(capsys, *words, "--head", tmp_path / "o/head.safetensors", "--windows", 2, "--tta", "linear")
    assert tta["tta"] == "linear" and tta["n_boxes"] == found["n_boxes"]


def test_coco_end_to_end_and_coco_o_with_its_head(weights, tmp_path, capsys):
    data, other = tmp_path / "data", tmp_path / "o"
    for split in "train", "val":
        coco(data, split, GOOD)
    for name in DOMAINS:
        coco(other / name, "val", GOOD)
    words = "--weights", weights, "--resolution", 64, "--windows", 0
    found, said = run(capsys, *words, "--data", data, "--iterations", 2, "--stage", "small", "--out", tmp_path / "h")
    assert found["n_boxes"] == 2 and found["n_classes"] == 2 and found["n_train"] == 2
    words += "--head", tmp_path / "h/head.safetensors"
    found, _ = run(capsys, "--task", "coco_o", *words, "--data", other)
    assert found["n_val"] == 12 and {f"ap_{name}" for name in DOMAINS} <= found.keys()
    assert found["ap"] == pytest.approx(np.mean([found[f"ap_{name}"] for name in DOMAINS]))
    with pytest.raises(ValueError, match="answers in 8 classes, .*, shapes wants 12 classes"):
        run(capsys, *words, "--data", "shapes")
    coco(data, "train", GOOD), coco(data, "val", GOOD)
    for path in data.glob("annotations/*.json"):
        path.write_text(path.read_text().replace("kind 3", "horse"))
    with pytest.raises(ValueError, match="calls class 3 kind 3, .* horse; name a head of these classes"):
        run(capsys, *words, "--data", data)
    with pytest.raises(ValueError, match="has six domains, and no images to train on; name a --head"):
        run(capsys, *words[:6], "--data", other, "--stage", "small")
    with pytest.raises(ValueError, match="--head is missing: coco_o has nothing to train on"):
        run(capsys, "--task", "coco_o", *words[:6], "--data", other)


def test_a_released_head_is_measured(weights, tmp_path, capsys):
    for split in "train", "val":
        coco(tmp_path, split, GOOD)
    torch.manual_seed(0)
    for n in 8, 9:
        torch.save({"model": detr.Head(32, n, 2).state_dict()}, tmp_path / f"{n}.pth")
    words = "--weights", weights, "--resolution", 96, "--data", tmp_path, "--windows", 2
    found, _ = run(capsys, *words, "--head", tmp_path / "8.pth")
    assert found["n_val"] == 2 and found["chance_ap"] > 0 and found["windows"] == 2
    with pytest.raises(ValueError, match="--windows 0: --head .*8.pth sees 3 a side"):
        run(capsys, *words, "--head", tmp_path / "8.pth", "--windows", 0)
    with pytest.raises(ValueError, match="9.pth is no detector of 8 classes, as"):
        run(capsys, *words, "--head", tmp_path / "9.pth")


def test_training_begins_with_a_head_of_other_classes(tmp_path, capsys):
    torch.manual_seed(0)
    old, new = detr.Head(32, 5, 0), detr.Head(32, 7, 0)
    from safetensors.torch import save_file
    save_file({name: x + 1 for name, x in old.state_dict().items()}, tmp_path / "x.safetensors")
    head = detection.begun(new, tmp_path / "x.safetensors")
    assert "has other classes: they begin anew" in capsys.readouterr().out
    own = head.state_dict()
    for name, x in old.state_dict().items():
        assert own[name].shape[0] == 7 if name.startswith("class_embed") else torch.equal(own[name], x + 1)
    again = {"transformer.decoder." * name.startswith(("class_embed", "bbox_embed")) + name: x + 1
             for name, x in old.state_dict().items()}
    torch.save({"model": again}, tmp_path / "x.pth")
    for name in "x.safetensors", "x.pth":
        head = detection.begun(detr.Head(32, 5, 0), tmp_path / name)
        assert all(torch.equal(x, old.state_dict()[name] + 1) for name, x in head.state_dict().items())
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="has input_proj.0.0.weight of another shape, or not at all"):
        detection.begun(detr.Head(32, 5, 2), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="y.safetensors does not exist; name the file of a decoder"):
        detection.begun(new, tmp_path / "y.safetensors")


@pytest.mark.parametrize("words, says", [
    (["--stage", "imagenet"], "--stage imagenet: choose one of small, objects365, objects365_large, coco"),
    (["--stage", "imagenet", "--plan"], "--stage imagenet: choose one of small"),
    (["--tta", "hard"], "--tta hard: write linear or quadratic"),
    (["--weights", "untrained:convnext_t"], "wants a backbone with patches of 16 pixels, this one has 32"),
    (["--windows", "5"], "64x64 pixels do not go into 5x5 windows"),
    (["--resolution", "48"], "images of 48x48 pixels; wanted at least 64 a side"),
    (["--start", "nowhere"], "nowhere does not exist; name the file of a decoder"),
    (["--windows", "-1"], "--windows"),
])
def test_mistakes(words, says, weights, capsys):
    with pytest.raises(ValueError, match=says):
        run(capsys, "--weights", weights, "--limit", 4, "--resolution", 64, "--iterations", 1, *words)


def test_a_plan_of_the_papers_training(capsys):
    evaluate.main(["--task", "coco", "--weights", "untrained:7b", "--plan", "--memory", "80", "--resolution", "1536",
                   "--data", "nowhere"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["parameters_of_decoder"] == 129_070_745 and 13e9 < found["total_bytes"] < 80e9


def test_epochs_become_steps():
    for iterations, steps in (0, 43_974), (7, 7):
        assert detection.steps_of(SimpleNamespace(iterations=iterations), detr.STAGES["coco"], 117_266) == steps

# --------------------------------------------------------------------------------
# Training


class Frozen:
    device, about, layers = torch.device("cpu"), dict(weights="w"), [0, 1, 2, 3]

    def __init__(self):
        self.model = initialise(ViT(VIT), 0).eval()

    def network_input(self, images):
        return torch.stack(images).float() / 255 - 0.5

    def network(self, x, layers):
        return self.model.layers(x, layers)


def trained(c, ranks=ALONE, stop=None):
    torch.manual_seed(0)
    data = open_detections(TASKS["detection"].config(limit=3, resolution=64))
    head = detr.Head(32, data.n_classes, 0)
    views = partial(detection.sample, source=data.train, order=np.arange(3), side=64, patch=16, alike=True)
    left = [stop]

    def counted(row, rng):
        if left[0] is not None and rng is not None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGTERM)
        return views(row, rng)
    said = fit(head, counted, 3, detection_loss, detr.STAGES["small"].recipe, c, Frozen(), ranks,
               count=detection.boxes_in)
    return torch.cat([x.flatten() for x in head.state_dict().values()]), said["held_out_loss"]


def config(**changes):
    return replace(TASKS["detection"].config(workers=0, iterations=3, resolution=64), **changes)


def one(ranks=ALONE, stop=None, **changes):
    return trained(config(**changes), ranks, stop)


def test_two_ranks_are_one(tmp_path):
    two_ranks_are_one(one, tmp_path)


def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path, capsys):
    goes_on_where_it_was(one, tmp_path, capsys)
