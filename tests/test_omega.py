"""decoders/omega.py: vggt-omega's backbone, in files as it is thought to be stored."""

import math

import pytest
import torch
from safetensors.torch import save_file

from decoders import omega
from model import ViT, ViTConfig, initialise

VIT = ViTConfig(depth=4, width=32, heads=2, hidden=64, n_registers=16, layerscale=1.0, init_std=0.3)


def stored(path, prefix="aggregator.patch_embed.", **more):
    net = initialise(ViT(VIT), 5)
    tensors = {prefix + name: x.clone() for name, x in net.state_dict().items()}
    tensors |= {"aggregator.camera_token": torch.zeros(1, 2, 1, 8), "depth_head.norm.weight": torch.ones(4)} | more
    (torch.save if path.suffix == ".pt" else save_file)(tensors, path)
    return net.eval()


@pytest.mark.parametrize("name, prefix", [("x.pt", "aggregator.patch_embed."), ("x.safetensors", "model.")])
def test_the_backbone_of_omega_loads(tmp_path, name, prefix):
    net = stored(tmp_path / name, prefix)
    found = omega.load_embedding(tmp_path / name)
    assert found.config.n_registers == 16 and found.config.heads == 2 and not found.training
    assert all(torch.equal(x, y) for x, y in zip(net.state_dict().values(), found.state_dict().values(), strict=True))
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(found(images).patches, net(images).patches)  # of a square both are the same
        wide = torch.randn(1, 3, 32, 64)
        assert not torch.allclose(found(wide).patches, net(wide).patches, atol=1e-2)
        assert torch.equal(found.layers(wide, [3])[0].patches, found(wide).patches)


@pytest.mark.parametrize("h, w", [(2, 4), (5, 3), (3, 3)])
def test_coordinates_are_shares_of_the_longer_side(h, w):
    net = omega.LongestSide(VIT)
    packing = net.embed([torch.zeros(1, 3, 16 * h, 16 * w)], [None], None)[1]
    assert len(packing.rope) == 4
    for ((cos, sin),) in packing.rope:
        assert cos.shape == sin.shape == (17 + h * w, 1, 1, 8) and (cos[:17] == 1).all() and (sin[:17] == 0).all()
        for n in range(h * w):
            place = [((k + 0.5) / max(h, w) * 2 - 1) for k in divmod(n, w)]
            angles = torch.tensor([2 * math.pi * x / 100 ** (j / 4) for x in place for j in range(4)])
            torch.testing.assert_close(cos[17 + n, 0, 0], angles.cos(), rtol=0, atol=1e-5)     # measured: 1e-6
            torch.testing.assert_close(sin[17 + n, 0, 0], angles.sin(), rtol=0, atol=1e-5)


def test_files_without_such_a_backbone(tmp_path):
    save_file({"a.weight": torch.ones(2)}, tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match="no.safetensors holds 0 backbones, by their storage_tokens; wanted one"):
        omega.load_embedding(tmp_path / "no.safetensors")
    stored(tmp_path / "two.pt", **{"student.storage_tokens": torch.zeros(1, 4, 32)})
    with pytest.raises(ValueError, match="two.pt holds 2 backbones"):
        omega.load_embedding(tmp_path / "two.pt")
    stored(tmp_path / "odd.pt", **{"aggregator.patch_embed.strange": torch.zeros(3)})
    with pytest.raises(ValueError, match="1 unexpected .'strange'."):
        omega.load_embedding(tmp_path / "odd.pt")
    stored(tmp_path / "nan.pt", **{"aggregator.patch_embed.norm.weight": torch.full((32,), math.nan)})
    with pytest.raises(ValueError, match="norm.weight holds nan or inf"):
        omega.load_embedding(tmp_path / "nan.pt")
    with pytest.raises(ValueError, match="gone.pt"):
        omega.load_embedding(tmp_path / "gone.pt")


def test_the_trap_of_masks_that_are_nan(tmp_path):
    """Files exist in which the masks of the keys' biases were never filled."""
    masks = {f"aggregator.patch_embed.blocks.{k}.attn.qkv.bias_mask": torch.full((96,), math.nan) for k in range(4)}
    net = stored(tmp_path / "x.pt", **masks)
    found = omega.load_embedding(tmp_path / "x.pt")
    torch.testing.assert_close(found(torch.ones(1, 3, 32, 32)).patches, net(torch.ones(1, 3, 32, 32)).patches)
