"""
engine/colours.py, data.augment and the kernels of both: byte for byte what Pillow and torchvision make, one crop after
another; the kernels bit for bit the definition.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

import data
import ops
from data import draw_crops
from recipes import TrainConfig

CONFIG = TrainConfig(global_size=32, local_size=16, n_local=3, batch=8, group=8, patch_size=8, seed=0,
                     mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def crops(n, H=24, W=24):
    """n 3 H W, uint8: noise, with grey, black and white areas."""
    x = np.random.default_rng(0).integers(0, 256, (n, 3, H, W), dtype=np.uint8)
    x[..., :4, :4], x[..., 4:8, :4], x[..., 8:12, :4] = 77, 0, 255
    return torch.from_numpy(x)


def every_hue():
    """1 3 384 514, uint8: all places of the middle channel between the others, in all six sectors."""
    chroma, middle = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    levels = np.stack([0 * chroma, middle, chroma])[:, middle <= chroma]
    x = np.concatenate([255 - levels[list(order)] for order in itertools.permutations(range(3))], axis=1)
    return torch.from_numpy(x.astype(np.uint8)).view(1, 3, 384, 514)


def row(**chosen):
    """A row of the table of colours, of which all is off but what is named."""
    found, columns = np.zeros((1, 12), np.float32), dict(jitter=0, brightness=1, contrast=2, saturation=3, hue=4,
                                                         order=slice(5, 9), grey=9, sigma=10, solarize=11)
    found[:, 1:4] = 1
    for name, value in chosen.items():
        found[:, columns[name]] = value
    return torch.from_numpy(found)


ONE = (0, 0, 0), (1 / 255,) * 3  # mean and std that leave levels as they are
PILLOW = tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue


def by_pillow(crop, colours):
    """One crop through Pillow and torchvision, in the order that its row of colours says.    3 H W, uint8, both"""
    x, colours = Image.fromarray(crop.permute(1, 2, 0).numpy()), colours.tolist()
    for turn in colours[5:9] if colours[0] else ():
        x = PILLOW[int(turn)](x, colours[1 + int(turn)])
    x = tv.rgb_to_grayscale(x, 3) if colours[9] else x
    x = tv.gaussian_blur(x, [9, 9], [colours[10]] * 2) if colours[10] else x
    return tv.pil_to_tensor(tv.solarize(x, 128) if colours[11] else x)


@pytest.fixture(params=["auto", "off"])
def kernels(request):
    """By csrc where it is built, and by the definition."""
    if request.param == "off" and not ops.BUILT:
        pytest.skip("csrc is not built: auto is off")
    ops.use_kernels(request.param)
    yield
    ops.use_kernels("auto")


@pytest.mark.parametrize("name, amounts", [("brightness", [0.6, 1, 1.4]), ("contrast", [0.6, 1, 1.4]), ("grey", [1]),
                                           ("saturation", [0, 0.8, 1.2]), ("solarize", [1])])
def test_operation_is_pillows(name, amounts, kernels):
    x, jitter = crops(1, 160, 131), {} if name in ("grey", "solarize") else dict(jitter=1, order=[0, 1, 2, 3])
    for amount in amounts:
        one = row(**{name: amount}, **jitter)
        assert torch.equal(data.augment(x, one, *ONE)[0], by_pillow(x[0], one[0]).float())


@pytest.mark.parametrize("hue", [0, 0.1, -0.1, 0.37, -0.5])
def test_every_hue_is_pillows(hue, kernels):
    """Of whole saturation, and of noise."""
    one = row(jitter=1, hue=hue, order=[3, 0, 1, 2])
    for x in every_hue(), crops(1, 300, 301):
        assert torch.equal(data.augment(x, one, *ONE)[0], by_pillow(x[0], one[0]).float())


@pytest.mark.long
def test_every_colour_is_pillows():
    """All 2^24."""
    x = torch.arange(1 << 24).view(4096, 4096)
    x = torch.stack([x >> 16, x >> 8 & 255, x & 255])[None].byte()
    for hue in 0.002, 0.1, 0.397, -0.5:
        one = row(jitter=1, hue=hue, order=[3, 0, 1, 2])
        assert torch.equal(data.augment(x, one, *ONE)[0].byte(), by_pillow(x[0], one[0]))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2])
def test_blur_is_torchvisions_but_for_what_lies_between_two_levels(sigma, kernels):
    x, one = crops(1, 400, 403), row(sigma=sigma)
    apart = (data.augment(x, one, *ONE)[0] - by_pillow(x[0], one[0])).abs()
    assert apart.max() <= 1 and apart.mean() < 5e-5                     # measured: 1.2e-5 of the values


def test_augment_is_pillow_one_by_one(kernels):
    c = replace(CONFIG, n_local=48, jitter=0.7, grey=0.3, solarize=1.0, blur_global_2=1.0, blur_local=0.3)
    images, colours = crops(50, 24, 22), torch.from_numpy(draw_crops(np.random.default_rng(5), c, 40, 50)[2])
    colours[::3, 11] = 1
    before = images.clone(), colours.clone()
    ours = data.augment(images, colours, c.mean, c.std)
    exact = torch.stack([by_pillow(*each) for each in zip(images, colours, strict=True)])
    levels = (ours * torch.tensor(c.std).view(3, 1, 1) + torch.tensor(c.mean).view(3, 1, 1)) * 255
    torch.testing.assert_close(levels, exact.float(), rtol=0, atol=1e-4)  # none of the blurred lies between two levels
    assert torch.equal(images, before[0]) and torch.equal(colours, before[1])
    assert data.augment(images[:0], colours[:0], c.mean, c.std).shape == (0, 3, 24, 22)


@pytest.mark.skipif(not ops.BUILT, reason="csrc is not built")
@pytest.mark.parametrize("H, W", [(24, 24), (5, 7), (31, 16), (4, 30), (64, 100)])
def test_kernel_and_definition_are_the_same_bits(H, W):
    """Of sides that no register divides, of strides, of threads; below 5 pixels the definition runs."""
    c = replace(CONFIG, n_local=38, grey=0.3, blur_local=0.5 * (H > 4), blur_global_1=0, blur_global_2=0)
    colours, x = torch.from_numpy(draw_crops(np.random.default_rng(7), c, 40, 50)[2]), crops(40, H, W)
    x = torch.cat([x, x], dim=3)[..., :W]                               # not in one piece
    found = []
    for choice, threads in ("off", 1), ("on", 1), ("on", 3):
        ops.use_kernels(choice)
        torch.set_num_threads(threads)
        found.append(data.augment(x, colours, c.mean, c.std))
    torch.set_num_threads(1)
    ops.use_kernels("auto")
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
