"""engine/views.py: what the network sees of an image, against torchvision and by its corners."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from engine.views import centre_crop, fitted, letterbox, middle, mirrored, nearest, padded, squared


@pytest.mark.parametrize("height, width", [(300, 400), (401, 256), (256, 256), (1000, 320), (3, 5), (1, 1), (1, 300)])
def test_centre_crop_is_torchvisions(height, width):
    """Short side to 256, the middle 224; torchvision rounds the long side down, ours is the nearest."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))
    (ours,) = centre_crop(image, 224, 16)
    assert ours.shape == (3, 224, 224) and ours.dtype == torch.uint8
    short = min(height, width)
    size = [round(side * 256 / short) for side in (height, width)]
    exact = tv.center_crop(tv.resize(image, size, tv.InterpolationMode.BICUBIC, antialias=True), [224, 224])
    if (size[0] | size[1]) % 2 == 0:  # an odd margin: both halves are right
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("height, width, wanted", [(20, 40, (32, 64)), (40, 20, (64, 32)), (20, 41, (32, 80)),
                                                   (30, 30, (32, 32))])
def test_fitted_is_in_whole_patches(height, width, wanted):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))
    view, other = mirrored(image, 32, 16)
    assert view.shape == (3, *wanted) and torch.equal(view.flip(2), other) and torch.equal(view, *fitted(image, 32, 16))


def test_letterbox():
    (found,) = letterbox(torch.full((3, 20, 40), 200, dtype=torch.uint8), 32, 16)
    assert found.shape == (3, 32, 32) and found[:, 8:24].min() == 200 and found[:, :8].max() == found[:, 24:].max() == 0


def test_squared_pads_with_white():
    (found,) = squared(torch.zeros(3, 20, 40, dtype=torch.uint8), 32, 16)
    assert found.shape == (3, 32, 32) and found[:, :14].max() < 5 and found[:, 18:].min() > 250


def test_nearest_picks_values():
    truth = np.random.default_rng(0).integers(0, 9, (13, 17))
    exact = F.interpolate(torch.tensor(truth)[None, None].float(), (7, 40), mode="nearest-exact")[0, 0].numpy()
    np.testing.assert_array_equal(nearest(truth, (7, 40)), exact)


@pytest.mark.parametrize("height, width", [(224, 224), (300, 400), (500, 375)])
def test_middle_has_no_margin(height, width):
    """A stored crop of 224 stays what it is; of a photo nothing of the short side is lost."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))
    (found,) = middle(image, 224, 16)
    short = min(height, width)
    size = [round(side * 224 / short) for side in (height, width)]
    exact = tv.resize(image, size, tv.InterpolationMode.BICUBIC, antialias=True)
    top, left = ((side - 224) // 2 for side in size)
    assert torch.equal(found, exact[:, top : top + 224, left : left + 224])
    assert height != 224 or torch.equal(found, image)


def test_side_0_is_near_native():
    assert [tuple(fitted(torch.zeros(3, *size, dtype=torch.uint8), 0, 16)[0].shape[1:]) for size in (
        (300, 500), (500, 333), (16, 32))] == [(304, 512), (512, 336), (16, 32)]


def test_padded_is_the_image_and_grey_below_and_right():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 20, 50), dtype=np.uint8))
    (found,) = padded(image, 0, 16)
    assert found.shape == (3, 32, 64) and torch.equal(found[:, :20, :50], image)
    assert found[:, 20:].flatten(1).unique(dim=1)[:, 0].tolist() == [124, 116, 104] == found[:, 3, 60].tolist()
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    assert ((found[:, 25, 5] / 255 - mean) / std).abs().max() < 1 / 120
    assert padded(image, 40, 16)[0].shape == (3, 48, 112) and padded(image[:, :16, :32], 0, 16)[0].shape == (3, 16, 32)
