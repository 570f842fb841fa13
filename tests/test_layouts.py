"""
layouts.py: every name of every released file has its counterpart; the same weights are the same function in
transformers and timm; what goes through all layouts comes back bit for bit; what has no counterpart is named.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from convnext import CONVNEXT_SIZES, ConvNeXt, ConvNeXtConfig
from engine import layouts
from model import SIZES, ViT, ViTConfig
from weights import Stored, empty, load_backbone, save_backbone

RELEASED = {"s": "small", "s+": "small_plus", "b": "base", "l": "large", "l+": "", "h+": "huge_plus", "7b": "7b"}
CONVNEXTS = {"convnext_t": "tiny", "convnext_s": "small", "convnext_b": "base", "convnext_l": "large"}
LIKE_7B = ViTConfig(2, 256, 2, 192, "swiglu", qkv_bias=False, local_norm=True)
SATELLITE = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))


@torch.no_grad()
def shaken(config):
    """A network whose every parameter matters; what a layout cannot keep (keys' bias, mask token) is zero."""
    net, generator = empty(config).to_empty(device="cpu"), torch.Generator().manual_seed(0)
    for name, x in net.state_dict().items():
        norm_or_gamma = x.ndim == 1 and name.endswith(("weight", "gamma"))
        x.copy_(torch.randn(x.shape, generator=generator) * max(16, x[0].numel()) ** -0.5 + norm_or_gamma)
        if name.endswith(("periods", "bias_mask", "mask_token")):
            x.copy_(layouts.initial(net, name, torch.float32))
        if name.endswith("qkv.bias"):
            x.chunk(3)[1].zero_()
    return net.eval()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(features):
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)  # B N D


def error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def same(a, b, but=()):
    a, b = ({key: x for key, x in state.items() if not key.startswith(but)} for state in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

# --------------------------------------------------------------------------------
# Names and shapes of every released file, without a file


def read_as(shapes, beside):
    """What the loader makes of these names and shapes: layout, config, what it lacks."""
    stored = {plain: Stored(tuple(shapes[name]), "F32", None) for plain, name in layouts.unwrap("x", shapes).items()}
    layout, config = layouts.recognise("x", {key: x.shape for key, x in stored.items()}, beside)
    notes = []
    lacking = layouts.account("x", layout, config, stored, notes, empty(config))
    assert not any("left out" in note for note in notes)
    return layout, config, lacking


def written_as(net, layout):
    return {name: tuple(part.shape) for key, x in net.state_dict().items()
            for name, part in layouts.to_theirs(key, x, net.config, layout).items() if name}


def shapes_of(net, drop="\n"):
    return {name.removeprefix(drop): tuple(x.shape) for name, x in net.state_dict().items()}


def metas_names(config):
    """Spelled out, so that a slip in model.py would show."""
    D, F = config.width, config.hidden
    linears = dict(fc1=(F, D), fc2=(D, F)) if config.ffn == "mlp" else dict(w1=(F, D), w2=(F, D), w3=(D, F))
    shapes = {"cls_token": (1, 1, D), "storage_tokens": (1, 4, D), "mask_token": (1, D), "norm.weight": (D,),
              "norm.bias": (D,), "patch_embed.proj.weight": (D, 3, 16, 16), "patch_embed.proj.bias": (D,),
              "rope_embed.periods": (D // config.heads // 4,)}
    if config.local_norm:
        shapes |= {"local_cls_norm.weight": (D,), "local_cls_norm.bias": (D,)}
    for i in range(config.depth):
        block = {"ls1.gamma": (D,), "ls2.gamma": (D,), "attn.qkv.weight": (3 * D, D)}
        block |= {f"{norm}.{p}": (D,) for norm in ("norm1", "norm2") for p in ("weight", "bias")}
        block |= {"attn.qkv.bias": (3 * D,), "attn.qkv.bias_mask": (3 * D,)} if config.qkv_bias else {}
        for name, shape in {"attn.proj": (D, D), **{f"mlp.{name}": shape for name, shape in linears.items()}}.items():
            block |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


@pytest.mark.parametrize("size", RELEASED)
def test_every_name_of_the_vits(size):
    config = SIZES[size]
    net, kept = empty(config), replace(config, local_norm=False)  # which Hugging Face and timm do not keep
    assert shapes_of(net) == metas_names(config) == written_as(net, "meta")
    assert read_as(metas_names(config), {}) == ("meta", config, set())
    computed = {key for key in net.state_dict() if key.endswith(("periods", "bias_mask"))}

    json_config = layouts.hf_config(config)
    with torch.device("meta"):
        hf = DINOv3ViTModel(DINOv3ViTConfig(**json_config))
    assert shapes_of(hf, "model.") == written_as(net, "hf")
    for drop in ("", "model."):  # newer names, and older ones
        assert read_as(shapes_of(hf, drop), json_config) == ("hf", kept, computed)
        assert read_as(shapes_of(hf, drop), {}) == ("hf", kept, computed)

    if not RELEASED[size]:
        return  # timm has none of it
    name = f"vit_{RELEASED[size]}_patch16_dinov3"
    with torch.device("meta"):
        bare, biased = timm.create_model(name, num_classes=0), timm.create_model(name, num_classes=0, qkv_bias=True)
    biases = {key for key in net.state_dict() if key.endswith("qkv.bias")}
    assert read_as(shapes_of(bare), {}) == ("timm", kept, computed | biases | {"mask_token"})
    if size != "7b":
        assert shapes_of(biased) == written_as(net, "timm")
        assert read_as(shapes_of(biased), {}) == ("timm", kept, computed | {"mask_token"})


@pytest.mark.parametrize("size", CONVNEXTS)
def test_every_name_of_the_convnexts(size):
    config = CONVNEXT_SIZES[size]
    net, json_config = empty(config), layouts.hf_config(config)
    with torch.device("meta"):
        hf = DINOv3ConvNextModel(DINOv3ConvNextConfig(**json_config))
        theirs = timm.create_model(f"convnext_{CONVNEXTS[size]}", num_classes=0)
    assert shapes_of(hf, "model.") == written_as(net, "hf") and shapes_of(theirs) == written_as(net, "timm")
    assert read_as(shapes_of(net), {}) == ("meta", config, set())
    twice = shapes_of(net) | {f"norms.3.{p}": (config.width,) for p in ("weight", "bias")}
    with pytest.raises(AssertionError):
        read_as(twice, {})  # loads, and says "left out"
    for drop in ("", "model."):
        assert read_as(shapes_of(hf, drop), json_config) == ("hf", config, set())
    assert read_as(shapes_of(theirs), {}) == ("timm", config, set())

# --------------------------------------------------------------------------------
# The same function in transformers and timm


def from_transformers(folder):
    hf, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and hf.dtype == torch.float32
    return hf.eval()


@pytest.mark.parametrize("size, images", [
    ("s", [(224, 224), (256, 320), (768, 768)]), ("s+", [(224, 224), (256, 320)]),
])
@torch.no_grad()
def test_same_function_as_transformers_and_timm(size, images, tmp_path):
    net = shaken(replace(SIZES[size], depth=2, mean=SATELLITE[0], std=SATELLITE[1]))
    save_backbone(net, tmp_path / "hf", "hf")
    save_backbone(net, tmp_path / "timm.safetensors", "timm")
    hf = from_transformers(tmp_path / "hf")
    name = f"vit_{RELEASED[size]}_patch16_dinov3_qkvb"
    theirs = timm.create_model(name, depth=2, num_classes=0, dynamic_img_size=True).eval()
    theirs.load_state_dict(load_file(tmp_path / "timm.safetensors"))
    for height, width in images:
        x = randn(1, 3, height, width)
        ours = tokens(net(x))
        assert error(ours, hf(x).last_hidden_state) < 2e-5         # measured, over all: 5.8e-7 at most
        assert error(ours, theirs.forward_features(x)) < 2e-5      # measured, over all: 4.3e-7 at most
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == SATELLITE
    assert load_backbone(tmp_path / "hf").config == load_backbone(tmp_path / "timm.safetensors").config == net.config


@torch.no_grad()
def test_convnext_is_the_same_function_in_transformers_and_timm(tmp_path):
    net, images = shaken(ConvNeXtConfig((1, 2, 1, 1), (96, 192, 384, 768))), randn(1, 3, 224, 320)
    save_backbone(net, tmp_path / "hf", "hf")
    save_backbone(net, tmp_path / "timm.safetensors", "timm")
    theirs = timm.create_model("convnext_tiny", depths=(1, 2, 1, 1), num_classes=0).eval()
    theirs.load_state_dict(load_file(tmp_path / "timm.safetensors"))
    hf = from_transformers(tmp_path / "hf")(images).last_hidden_state
    assert error(tokens(net(images)), hf) < 2e-5                   # measured: 9.6e-7
    assert error(net(images).cls, theirs(images)) < 2e-5           # measured: 1.9e-7
    AutoImageProcessor.from_pretrained(tmp_path / "hf")

# --------------------------------------------------------------------------------
# There and back


def around(net, folder):
    """meta -> hf -> timm -> meta -> nano, each read from its file."""
    for name, layout in [("a.pth", "meta"), ("hf", "hf"), ("c.safetensors", "timm"), ("d.pth", "meta"),
                         ("e.safetensors", "nano")]:
        save_backbone(net, folder / name, layout)
        net = load_backbone(folder / name, dtype=None)
    return net


@pytest.mark.parametrize("config, dtype", [
    (SIZES["s"], torch.float32), *((replace(SIZES[size], depth=2), torch.bfloat16) for size in ("s+", "b", "l", "h+")),
    (replace(CONVNEXT_SIZES["convnext_t"], depths=(1, 2, 1, 1)), torch.float32),
    (replace(SIZES["s"], depth=1), torch.float16),
], ids=["s", "s+ cut", "b cut", "l cut", "h+ cut", "convnext cut", "float16"])
def test_round_trip_is_bit_exact(config, dtype, tmp_path):
    net = shaken(config).to(dtype)
    back = around(net, tmp_path)
    assert {p.dtype for p in back.parameters()} == {dtype}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert same(back.state_dict(), net.state_dict()) and back.config == config and not back.training
    assert not list(tmp_path.glob("*.new"))


def test_round_trip_without_qkv_bias_loses_the_local_norm_alone(tmp_path, capsys):
    net = shaken(LIKE_7B)
    back = around(net, tmp_path)
    assert same(back.state_dict(), net.state_dict(), but="local_cls_norm")
    assert back.config == replace(LIKE_7B, local_norm=False)
    said = capsys.readouterr().out
    assert "hf has no place for 2 things: local_cls_norm.weight; local_cls_norm.bias" in said
    assert same(load_backbone(tmp_path / "a.pth").state_dict(), net.state_dict())


def test_bias_of_zeros_needs_no_qkvb_model(tmp_path):
    net = shaken(replace(SIZES["s"], depth=1))
    with torch.no_grad():
        net.blocks[0].attn.qkv.bias.zero_()
    save_backbone(net, tmp_path / "x.safetensors", "timm")
    theirs = timm.create_model("vit_small_patch16_dinov3", depth=1, num_classes=0)
    theirs.load_state_dict(load_file(tmp_path / "x.safetensors"))
    assert same(load_backbone(tmp_path / "x.safetensors").state_dict(), net.state_dict())


@torch.no_grad()
def test_what_a_layout_cannot_keep_is_named(tmp_path, capsys):
    net = shaken(replace(SIZES["s"], depth=1))
    net.mask_token.fill_(0.5)
    net.blocks[0].attn.qkv.bias.fill_(0.25)
    save_backbone(net, tmp_path / "hf", "hf")
    assert "no place for 1 things: the keys' third of blocks.0.attn.qkv.bias, which has no" in capsys.readouterr().out
    back = load_backbone(tmp_path / "hf")
    assert torch.equal(back.mask_token, net.mask_token)
    assert back.blocks[0].attn.qkv.bias.chunk(3)[1].eq(0).all()
    images = randn(1, 3, 64, 64)
    assert torch.equal(tokens(back(images)), tokens(net(images)))
    save_backbone(net, tmp_path / "x.safetensors", "timm")
    assert "timm has no place for 2 things: mask_token; the keys' third" in capsys.readouterr().out
    net.rope_embed.periods[3] = 5
    save_backbone(net, tmp_path / "y.safetensors", "timm")
    assert "rope_embed.periods" in capsys.readouterr().out


def test_heads_without_a_file_that_says_them(tmp_path):
    """E = 64 where no size is known, and no metadata: what a timm file of another hand shows."""
    net = shaken(ViTConfig(1, 256, 4, 192, "swiglu", qkv_bias=False))
    save_backbone(net, tmp_path / "x.safetensors", "timm")
    save_file(load_file(tmp_path / "x.safetensors"), tmp_path / "y.safetensors")
    assert load_backbone(tmp_path / "y.safetensors").config == net.config
    assert layouts.size_of(net.config) == "of no known size, depth 1, width 256"


def test_names_are_in_one_table_alone():
    """Rows of a table have no two names alike, but for the gated MLP's; our own column is the networks' names."""
    for table, net in ((layouts.VIT, ViT), (layouts.CONVNEXT, ConvNeXt)):
        for column in range(3):
            names = [name for row in table for name in layouts.thirds(row[column]) if name]
            twice = {name for name in names if names.count(name) > 1}
            assert all(".mlp." in name for name in twice), net
    assert layouts.thirds("a.{q,,v}_b") == ["a.q_b", "", "a.v_b"] and layouts.thirds(None) == []
    assert layouts.named(Path("x/dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")) == SATELLITE
