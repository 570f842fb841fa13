"""hubconf.py: torch.hub finds every entry point, loads a file of any layout, and importing it costs nothing."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hubconf
from convnext import CONVNEXT_SIZES, ConvNeXt
from decoders.detr import DETR, DETRConfig
from decoders.dpt import DPT, DPTConfig
from decoders.mask2former import Mask2Former, Mask2FormerConfig
from model import SIZES, ViT
from weights import save_backbone

ROOT = str(Path(__file__).parents[1])
ENTRIES = dict(vits16="s", vits16plus="s+", vitb16="b", vitl16="l", vitl16plus="l+", vith16plus="h+", vit7b16="7b",
               convnext_tiny="convnext_t", convnext_small="convnext_s", convnext_base="convnext_b",
               convnext_large="convnext_l")


def hub(name, **kwargs):
    return torch.hub.load(ROOT, name, source="local", **kwargs)


def test_a_decoder_on_its_backbone(tmp_path):
    vit = ViT(replace(SIZES["s"], depth=4, width=16, heads=2, hidden=32))
    save_backbone(vit, tmp_path / "x.safetensors", "nano")
    head = DPT(DPTConfig(16, channels=(4,) * 4, fused=4, hidden=2, n_out=3))
    torch.save(head.state_dict(), tmp_path / "head.pth")
    decoder = hub("decoder", weights=tmp_path / "x.safetensors", head=tmp_path / "head.pth", depth_range=(1, 2))
    depth = decoder(torch.randn(1, 3, 32, 48))
    assert depth.shape == (1, 32, 64) and 1 <= depth.min() <= depth.max() <= 2


def test_a_detector_on_its_backbone(tmp_path):
    vit = ViT(replace(SIZES["s"], depth=4, width=16, heads=2, hidden=32))
    save_backbone(vit, tmp_path / "x.safetensors", "nano")
    head = DETR(DETRConfig(8 * 16, d=32, heads=2, hidden=8, bias=4, depths=(1, 1), queries=6, repeated=6, n_classes=3))
    torch.save({"model": head.state_dict()}, tmp_path / "head.pth")
    detector = hub("decoder", weights=tmp_path / "x.safetensors", head=tmp_path / "head.pth", n_windows=2)
    found = detector([torch.randn(3, 96, 128), torch.randn(3, 80, 80)])
    assert [len(each["scores"]) for each in found] == [18, 18] and found[1]["boxes"].max() <= 80
    assert all((each["scores"].diff() <= 0).all() for each in found) and found[0]["labels"].max() <= 2


def test_queries_on_their_backbone(tmp_path):
    vit = ViT(replace(SIZES["s"], depth=4, width=32, heads=2, hidden=32))
    save_backbone(vit, tmp_path / "x.safetensors", "nano")
    head = Mask2Former(Mask2FormerConfig(32, 3, decoder=64, hidden=8, queries=5, encoder_layers=1, layers=2, stem=4))
    torch.save(head.state_dict(), tmp_path / "head.pth")
    decoder = hub("decoder", weights=tmp_path / "x.safetensors", head=tmp_path / "head.pth")
    images = torch.randn(1, 3, 32, 64)
    assert decoder.semantic(images).shape == (1, 3, 32, 64) and decoder(images)["logits"].shape == (1, 5, 4)


@pytest.mark.parametrize("layout, name", [("meta", "x.pth"), ("hf", "hf"), ("timm", "x.safetensors")])
def test_weights_of_any_layout(layout, name, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "s", replace(SIZES["s"], depth=1))
    vit = ViT(SIZES["s"])
    save_backbone(vit, tmp_path / name, layout)
    back = hub("vits16", weights=str(tmp_path / name))
    assert back.config == vit.config and not back.training
    assert all(torch.equal(x, back.state_dict()[key]) for key, x in vit.state_dict().items())
    with pytest.raises(ValueError, match="is s, not 'b'"):
        hub("vitb16", weights=str(tmp_path / name))


def test_without_weights_it_says_so(capsys):
    assert hub("vits16").config == SIZES["s"] and "s: untrained" in capsys.readouterr().out
    assert isinstance(hub("convnext_tiny"), ConvNeXt)


def test_every_entry():
    listed = {name: entry for name, entry in vars(hubconf).items() if callable(entry) and not name.startswith("_")}
    assert listed.pop("decoder") and {name: entry.args[0] for name, entry in listed.items()} == ENTRIES
    assert set(ENTRIES.values()) == set(SIZES | CONVNEXT_SIZES) - {"tiny"}


def test_importing_it_is_light():
    code = "import sys, hubconf; print(*{'torch', 'numpy', 'model', 'weights', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "\n"
