"""attention.py: the recomputed rows are those the network used; a row costs a row; what has no attention says so."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convnext import ConvNeXt, ConvNeXtConfig
from engine.attention import attention_row
from model import ViT, ViTConfig, build

CONFIG = ViTConfig(3, 16, 2, 32, patch_size=8, layerscale=0.1, init_std=0.2)


def make(**changes):
    return build(lambda: ViT(dataclasses.replace(CONFIG, **changes))).eval()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("changes", [{}, dict(qkv_bias=False, ffn="swiglu", heads=4)])
def test_rows_times_values_are_the_blocks_own_attention(layer, changes):
    vit, images, seen = make(**changes), normal(2, 3, 24, 40), {}
    attn = vit.blocks[layer].attn
    hooks = [attn.qkv.register_forward_hook(lambda _, args, out: seen.update(qkv=out)),
             attn.register_forward_hook(lambda _, args, out: seen.update(out=out))]
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    with torch.no_grad():
        plain = vit(images).patches
    for hook in hooks:
        hook.remove()
    N, A = 1 + 4 + 3 * 5, vit.config.heads
    rows = torch.stack([attention_row(vit, images, layer, token) for token in range(N)], 2)          # B A N N
    assert rows.shape == (2, A, N, N) and rows.dtype == torch.float32 and rows.min() >= 0
    assert abs(rows.sum(-1) - 1).max() < 1e-5                                                        # measured: 2e-7
    v = seen["qkv"].view(2, N, 3, A, -1)[:, :, 2].transpose(1, 2)                                    # B A N E
    with torch.no_grad():
        out = attn.proj((rows @ v).transpose(1, 2).flatten(2)).flatten(0, 1)                         # (B N) D
    assert (out - seen["out"]).abs().max() < 1e-5                                                    # measured: 2e-7
    assert rows.std() > 1e-3  # not uniform: the test can fail
    with torch.no_grad():
        assert torch.equal(vit(images).patches, plain)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_a_row_of_1024_pixels_costs_a_row():
    vit = make(patch_size=16, depth=2)
    N = 1 + 4 + 64 * 48
    with Largest() as largest:
        row = attention_row(vit, normal(1, 3, 1024, 768), 1, N - 1)
    assert row.shape == (1, 2, N) and math.isclose(row.sum().item(), 2, rel_tol=1e-5)
    assert largest.numel < N * N / 3  # measured: N N / 4, the image; qkv are 48 N


@pytest.mark.parametrize("layer, token, message", [
    (3, 0, "no block 3; this network has blocks 0 to 2"), (-1, 0, "no block -1"), (0, 9, "no token 9; .* 0 to 8")])
def test_what_is_not_there_is_named(layer, token, message):
    with pytest.raises(ValueError, match=message):
        attention_row(make(), normal(1, 3, 16, 16), layer, token)


def test_a_convnext_has_none():
    convnext = build(lambda: ConvNeXt(ConvNeXtConfig((1, 1, 1, 1), (4, 4, 8, 8))))
    with pytest.raises(ValueError, match="these weights are a ConvNeXt, which has none; use pca or similarity"):
        attention_row(convnext, normal(1, 3, 32, 32), 0)
