"""engine/sliding.py: where windows lie, and their answers put together by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import sliding


@pytest.mark.parametrize("length, side, wanted", [(512, 512, [0]), (683, 512, [0, 171]), (1024, 512, [0, 341, 512]),
                                                  (853, 512, [0, 341]), (854, 512, [0, 341, 342])])
def test_windows_are_341_apart_and_end_with_the_image(length, side, wanted):
    assert sliding.starts(length, side, 341) == wanted


@pytest.mark.parametrize("H, W", [(48, 80), (80, 48), (32, 32)])
@pytest.mark.parametrize("stride", [21, 10])
def test_slide_averages_windows(H, W, stride):
    """By hand: each window enlarged and added where it lies."""
    views = sliding.windows(torch.zeros(3, H, W, dtype=torch.uint8), 32, stride)
    maps = [torch.tensor(np.random.default_rng(i).normal(size=(3, 2, 2))).float() for i in range(len(views))]
    ours, scale = sliding.slide(maps, (H, W), 32, stride), 32 / min(H, W)
    h, w = round(H * scale), round(W * scale)
    assert sliding.enlarged((H, W), 32) == (h, w)
    total, count, k = np.zeros((3, h, w)), np.zeros((h, w)), 0
    for y in sliding.starts(h, 32, stride):
        for x in sliding.starts(w, 32, stride):
            view = F.interpolate(maps[k][None], (32, 32), mode="bilinear")[0]
            total[:, y : y + 32, x : x + 32] += view.numpy()
            count[y : y + 32, x : x + 32] += 1
            k += 1
    exact = F.interpolate(torch.tensor(total / count)[None], (H, W), mode="bilinear")[0]
    assert k == len(maps)
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)


def test_windows_smaller_than_the_short_side():
    """dino.txt's: a short side of 512, windows of 384, 192 apart"""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 512, 700), dtype=np.uint8))
    views, places = sliding.windows(image, 384, 192, 512), [(y, x) for y in (0, 128) for x in (0, 192, 316)]
    assert len(views) == 6
    for view, (y, x) in zip(views, places, strict=True):
        assert torch.equal(view, image[:, y : y + 384, x : x + 384])
    found = sliding.slide([view.float() for view in views], (512, 700), 384, 192, 512)
    torch.testing.assert_close(found, image.float())


def test_windows_are_the_image_where_they_lie():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 32, 70), dtype=np.uint8))
    views = sliding.windows(image, 32, 21)
    assert [x for _, x in sliding.places((32, 70), 32, 21)] == [0, 21, 38]
    assert all(torch.equal(view, image[..., x : x + 32]) for view, x in zip(views, (0, 21, 38), strict=True))
