"""engine/crops.py: image and truth stay on one another; sizes, padding, what a crop may hold, colours."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import crops
from engine.views import GREY, nearest
from sets.pairs import Pairs


def scene(size=(60, 80)):
    """A truth of nine squares, and an image whose red is 20 x the truth"""
    truth = (np.arange(size[0])[:, None] * 3 // size[0] * 3 + np.arange(size[1]) * 3 // size[1]).astype(np.uint8)
    return torch.from_numpy(20 * truth + 10)[None].repeat(3, 1, 1), truth


@pytest.mark.parametrize("seed", range(12))
def test_image_and_truth_stay_on_one_another(seed, monkeypatch):
    monkeypatch.setattr(crops, "recoloured", lambda image, rng: image)
    image, truth = scene()
    image, truth = crops.augmented(image, truth, np.random.default_rng(seed), 64, 255)
    assert image.shape == (3, 64, 64) and truth.shape == (64, 64) and image.dtype == truth.dtype == torch.uint8
    known = truth != 255
    off = (image[0].int() - 20 * truth.int() - 10).abs()[known]
    assert (off > 4).float().mean() < 0.15  # at borders, where the image is between two values
    assert (image[:, ~known] == torch.tensor(GREY)[:, None]).all()


def test_scales_and_mirrors_are_drawn():
    image, truth = scene()
    drawn = [crops.augmented(image, truth, np.random.default_rng(seed), 64, 255)[1] for seed in range(60)]
    rows = np.array([(each != 255).any(1).sum().item() for each in drawn])
    assert 32 <= rows.min() < 36 and (rows == 64).mean() > 0.5
    mirrored = [bool((each[0][each[0] != 255].int().diff() < 0).any()) for each in drawn]
    assert 15 < sum(mirrored) < 45
    again = crops.augmented(image, truth, np.random.default_rng(5), 64, 255)[1]
    assert torch.equal(again, drawn[5])


def test_a_crop_has_more_than_one_class_where_it_can(monkeypatch):
    """The other class is at an edge: of 40 crops, with one try each 32 see it, with ten 39"""
    truth, image = np.zeros((256, 256), np.uint8), torch.zeros(3, 256, 256, dtype=torch.uint8)
    truth[:, 200:] = 1

    def mixed():
        crop = (crops.augmented(image, truth, np.random.default_rng(seed), 64, 255)[1] for seed in range(40))
        return sum((each[each != 255] == 1).any().item() and (each == 0).any().item() for each in crop)
    assert mixed() > 36
    monkeypatch.setattr(crops, "TRIES", 1)
    assert mixed() < 35
    assert crops.balanced(np.array([0, 0, 0, 1, 1, 255]), 255, 1)
    assert not crops.balanced(np.array([0, 0, 0, 1]), 255, 1) and not crops.balanced(np.array([3, 255]), 255, 1)
    assert not crops.balanced(np.array([1000, 1001, 1002]), 255000, 1000)  # three segments of one class


def test_colours():
    image = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, same, shifted = image.clone(), 0, []
    for seed in range(200):
        out = crops.recoloured(image, np.random.default_rng(seed))
        assert out.dtype == torch.uint8 and out.shape == image.shape
        same += torch.equal(out, image)
        shifted.append(out.float().mean() - image.float().mean())
    assert 5 < same < 22  # 1 in 16
    assert torch.equal(image, before) and min(shifted) < -30 < 30 < max(shifted)


def test_held_is_the_middle():
    image, truth = scene((40, 80))
    image, truth = crops.held(image, truth, 80, 255)
    assert image.shape == (3, 80, 80) and truth[0].unique().tolist() == [0, 1, 2] and (truth[0] == 1).sum() > 50
    off = (image[0].int() - 20 * truth.int() - 10).abs()
    assert (off > 4).float().mean() < 0.1


def test_numbers_of_many_digits():
    image, truth = scene()
    _, truth = crops.augmented(image, truth.astype(np.int32) * 1000 + 7, np.random.default_rng(0), 32, 255000, 1000)
    assert truth.dtype == torch.int32 and set(truth.unique().tolist()) <= {1000 * k + 7 for k in range(9)} | {255000}


def test_truths_turn_with_their_images():
    class Land:
        def image(self, i):
            return torch.arange(48 * 48, dtype=torch.float32).view(1, 48, 48).expand(3, -1, -1) / 10

        def truth(self, i):
            return self.image(i)[0].numpy()
    seen = [crops.turned(0, np.random.default_rng(k), Land(), [0], (48, 48)) for k in range(40)]
    for image, truth in seen:
        assert (image[0] - truth).abs().max() <= 0.51
    assert len({tuple(truth[0, :2].tolist()) for _, truth in seen}) == 8
    image, truth = crops.turned(0, None, Land(), [0], (48, 48))
    assert torch.equal(truth, Land().image(0)[0])


def test_truths_of_stored_maps_have_sixteen_pixels_a_patch():
    truths = [np.random.default_rng(i).random((50 + i, 40)) for i in range(2)]
    source, maps = Pairs([("", 0), ("", 1)], truths.__getitem__), SimpleNamespace(shapes=[(2, 3, 8), (1, 4, 8)])
    frozen = SimpleNamespace(keep=lambda name, function, n: SimpleNamespace(row=[function(i) for i in range(n)]))
    found = crops.truths_on(maps, source, [1, 0], frozen)
    assert [x.shape for (x,) in found] == [(32, 48), (16, 64)]
    assert all(np.array_equal(x, nearest(truths[1 - i], x.shape)) for i, (x,) in enumerate(found))
