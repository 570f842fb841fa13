"""
convnext.py: parity with transformers on the same random weights; called as ViT is; maps that stay where they were when
they are resized; initialisation, gradients, errors that name what is wrong.
"""

import math
import re
from copy import deepcopy
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

import ops
from convnext import CONVNEXT_SIZES, ConvNeXt, ConvNeXtConfig, resize_map
from model import Features, Noise, build

COUNTS = {"convnext_t": 27_820_128, "convnext_s": 49_454_688, "convnext_b": 87_566_464, "convnext_l": 196_230_336}
SMALL = ConvNeXtConfig((1, 1, 2, 1), (8, 12, 16, 24))
RENAMED = [  # ours, transformers; in this order
    (r"^norm\.", "layer_norm."), (r"^downsample_layers\.(\d)", r"model.stages.\1.downsample_layers"),
    (r"^stages\.(\d)\.(\d+)\.", r"model.stages.\1.layers.\2."), (r"\.norm\.", ".layer_norm."),
    (r"dwconv", "depthwise_conv"), (r"pwconv", "pointwise_conv"),
]


def shaken(config):
    """A network whose every parameter matters: no zeros, no gamma of 1e-6, no norm that is the identity."""
    net, generator = ConvNeXt(config), torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 16
        p.data = torch.randn(p.shape, generator=generator) * fan_in ** -0.5
        p.data += name.endswith("gamma") or p.ndim == 1 and name.endswith("weight")  # norms have no other weights
    return net.eval()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(features):
    """All that a network says of its images, as one tensor."""
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)  # B 1+P D


def error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()

# --------------------------------------------------------------------------------
# The same function as transformers' DINOv3ConvNextModel


def transformers_twin(net):
    c, state = net.config, {}
    hf = DINOv3ConvNextModel(DINOv3ConvNextConfig(hidden_sizes=list(c.dims), depths=list(c.depths)))
    for name, x in net.state_dict().items():
        for ours, theirs in RENAMED:
            name = re.sub(ours, theirs, name)
        state[name] = x
    hf.load_state_dict(state)
    return hf.eval()


@pytest.mark.parametrize("size", [(224, 224), (160, 224)])
@pytest.mark.parametrize("config", [
    ConvNeXtConfig((1, 2, 3, 1), (16, 24, 32, 48)), ConvNeXtConfig((3, 1, 2, 2), (24, 16, 40, 20)),
], ids=["wider", "odd"])
@torch.no_grad()
def test_same_as_transformers(config, size):
    net, images = shaken(config), randn(2, 3, *size)
    theirs = transformers_twin(net)(images, output_hidden_states=True)
    out, order = net(images), [2, 3, 0, 1]
    assert error(tokens(out), theirs.last_hidden_state) < 2e-5                 # measured, over all: 7.2e-7 at most
    assert error(out.cls, theirs.pooler_output) < 2e-5
    assert out.grid == out.map().shape[2:] == (size[0] // 32, 7) and torch.equal(out.map().flatten(2).mT, out.patches)
    for i, ours in zip(order, net.layers(images, order), strict=True):
        if i == 3:
            assert torch.equal(tokens(ours), tokens(out))
        else:                                                                  # no norm; strides 4, 8, 16
            assert ours.grid == (size[0] // 4 >> i, 56 >> i) and ours.patches.shape[2] == config.dims[i]
            assert error(ours.map(), theirs.hidden_states[i + 1]) < 2e-5
            assert error(ours.cls, theirs.hidden_states[i + 1].mean((2, 3))) < 2e-5


def test_parameter_counts():
    with torch.device("meta"):
        networks = {name: ConvNeXt(config) for name, config in CONVNEXT_SIZES.items()}
    assert {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()} == COUNTS


def test_config_reads_like_that_of_a_vit_and_comes_back_from_its_fields():
    assert [getattr(SMALL, name) for name in ("patch_size", "width", "depth", "n_registers")] == [32, 24, 4, 0]
    assert ConvNeXtConfig(**asdict(SMALL)) == SMALL


def test_norms_have_the_released_eps():
    """1e-5, the ViTs' own, would pass the parity above."""
    assert {part.eps for part in ConvNeXt(SMALL).modules() if isinstance(part, nn.LayerNorm)} == {1e-6}

# --------------------------------------------------------------------------------
# Called like a ViT


@torch.no_grad()
def test_crop_groups_equal_separate_forwards():
    net, crops = shaken(SMALL), [randn(4, 3, 96, 64), randn(6, 3, 32, 64, seed=1)]
    together, separate = net(crops, [torch.ones(4, 6) > 0, None], Noise(0, 0, 0, 2, 2, 0.5, 2.0)), map(net, crops)
    for ours, alone in zip(together, separate, strict=True):                   # and masks and noise change nothing
        assert torch.equal(tokens(ours), tokens(alone)) and ours.grid == alone.grid
    assert together[0].registers.shape == (4, 0, 24)
    assert torch.equal(tokens(net(crops[0], torch.ones(4, 6) > 0)), tokens(together[0]))


@torch.no_grad()
def test_lower_precision():
    net, images = shaken(SMALL), randn(2, 3, 64, 96)
    exact, seen = tokens(net(images)), []
    hooks = [block.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
             for stage in net.stages for block in stage]
    with torch.autocast("cpu", torch.bfloat16):
        out = net(images)
    assert seen == [(torch.float32,) * 2] * len(hooks)                         # the residual stream
    assert error(tokens(out).float(), exact) < 0.03                            # measured: 0.0078
    half = deepcopy(net).bfloat16()(images.bfloat16())
    assert half.patches.dtype == torch.bfloat16 and error(tokens(half).float(), exact) < 0.04  # measured: 0.0099


def test_every_parameter_learns_with_and_without_checkpointing():
    net, images, gradients = shaken(SMALL).train(), [randn(2, 3, 64, 64), randn(2, 3, 32, 32)], []
    before = deepcopy(images)
    for net.checkpointing in ops.RECOMPUTED:
        net.zero_grad()
        sum(tokens(out).log_softmax(-1)[..., 0].mean() for out in net(images)).backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all() and gradient.any(), name
        assert torch.equal(gradient, gradients[1][name]), name
    assert all(map(torch.equal, images, before))


def test_start_values():
    state, other = (build(lambda: ConvNeXt(SMALL), seed=seed).state_dict() for seed in (0, 1))
    for name, x in state.items():
        leaf = name.split(".")[-1]
        if x.ndim > 1:
            assert abs(x.std().item() / 0.02 - 1) < 5 / math.sqrt(2 * x.numel()), name     # 5 standard errors
            assert not torch.equal(x, other[name])
        else:
            assert (x == {"gamma": 1e-6, "weight": 1, "bias": 0}[leaf]).all(), name
    assert all(torch.equal(x, state[name]) for name, x in ConvNeXt(SMALL).state_dict().items())

# --------------------------------------------------------------------------------
# Other grids


def weights_by_hand(n, m):
    """Of n old places in each of m new ones, m n float64: a tent around the new place, wider if there are fewer."""
    matrix = np.zeros((m, n))
    for a, i in np.ndindex(m, n):
        matrix[a, i] = max(0, 1 - abs((i + 0.5) - (a + 0.5) * n / m) / max(n / m, 1))
    return matrix / matrix.sum(1, keepdims=True)


def of_map(x):
    """Features with the map x  B D h w."""
    return Features(randn(len(x), x.shape[1], seed=1), x[:, :0, 0], x.flatten(2).mT, tuple(x.shape[2:]))


@pytest.mark.parametrize("old, new", [((3, 5), (6, 10)), ((7, 4), (14, 8)), ((1, 2), (2, 4)), ((8, 12), (4, 3))])
def test_resize_map_is_bilinear(old, new):
    x = randn(2, 3, *old)
    out = resize_map(of_map(x), new)
    by_hand = weights_by_hand(old[0], new[0]) @ x.double().numpy() @ weights_by_hand(old[1], new[1]).T
    assert out.grid == new and error(out.map().double(), torch.tensor(by_hand)) < 1e-6     # measured: 5.9e-8
    assert torch.equal(out.cls, of_map(x).cls)
    assert torch.equal(resize_map(of_map(x), old).patches, of_map(x).patches)


@pytest.mark.parametrize("i, j", [(1, 1), (2, 4), (4, 7)])
def test_a_bump_stays_where_it_is(i, j):
    """Its centre of mass, in units of the image's sides; bumps at the border would be cut off."""
    x = torch.zeros(1, 1, 6, 9)
    x[0, 0, i, j] = 1
    wide = resize_map(of_map(x), (12, 18)).map()[0, 0].double()
    rows, columns = ((torch.arange(n) + 0.5) / n for n in wide.shape)
    centre = [(wide.sum(1) * rows).sum() / wide.sum(), (wide.sum(0) * columns).sum() / wide.sum()]
    assert [c.item() for c in centre] == pytest.approx([(i + 0.5) / 6, (j + 0.5) / 9], abs=1e-6)


def test_resize_map_keeps_dtype_and_passes_gradients():
    x = randn(1, 4, 2, 3).bfloat16().requires_grad_()
    out = resize_map(of_map(x), (4, 6))
    out.patches.sum().backward()
    assert out.patches.dtype == torch.bfloat16 and x.grad.float().sum().item() == pytest.approx(4 * 4 * 6, rel=1e-2)


@pytest.mark.parametrize("call, says", [
    (lambda: ConvNeXt(SMALL)(torch.zeros(1, 4, 32, 32)), r"ConvNeXt.*\(1, 4, 32, 32\).*\(batch, 3, height, width\)"),
    (lambda: ConvNeXt(SMALL)(torch.zeros(3, 32, 32)), r"ConvNeXt.*\(3, 32, 32\).*\(batch, 3, height, width\)"),
    (lambda: ConvNeXt(SMALL)(torch.zeros(1, 3, 64, 16)), "ConvNeXt.*64x16.*one patch is 32x32"),
    (lambda: ConvNeXt(SMALL)([torch.zeros(1, 3, 112, 80)]), "ConvNeXt.*112x80.*multiples of 32.*to 96x64"),
    (lambda: ConvNeXt(SMALL).layers(torch.zeros(1, 3, 32, 32), [0, -1]), "layers: no stage -1.*0 to 3"),
    (lambda: ConvNeXtConfig((3, 3, 9), (96, 192, 384, 768)), r"ConvNeXtConfig: depths \(3, 3, 9\).*four of each"),
])
def test_mistakes_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
