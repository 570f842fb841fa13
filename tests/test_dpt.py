"""decoders/dpt.py and depth.py: beside the forward passes written out again, on invented weights."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from convnext import CONVNEXT_SIZES
from decoders import dpt, load_decoder
from model import ViT, ViTConfig
from weights import load_backbone

VIT = ViTConfig(depth=8, width=32, heads=2, hidden=64)
SMALL = dict(channels=(8, 12, 16, 20), fused=12, hidden=6, n_out=9)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return ViT(VIT).eval()


def invented(module, seed=1):
    """Parameters and statistics of which none is a start value"""
    g = torch.Generator().manual_seed(seed)
    for name, x in module.state_dict().items():
        if x.is_floating_point():
            x.copy_(torch.randn(x.shape, generator=g) * 0.2 + ("var" in name) * 1.5)
            if "var" in name:
                x.abs_()
    return module.eval()


# --------------------------------------------------------------------------------
# The forward pass once more: a function of a dict of tensors


def reference(p, features, canopy, bins, least):
    """features: [(patches B P D, cls B D, (h, w))] of four layers -> depth"""
    maps = []
    for i, (patches, cls, (h, w)) in enumerate(features):
        r = "reassemble_blocks."
        if canopy:
            x = torch.cat([patches, cls[:, None].repeat(1, h * w, 1)], -1)
            x = F.gelu(x @ p[f"{r}readout_projects.{i}.0.weight"].T + p[f"{r}readout_projects.{i}.0.bias"])
            x = x.permute(0, 2, 1).reshape(len(x), -1, h, w)
        else:
            x = patches.permute(0, 2, 1).reshape(len(patches), -1, h, w)
            mean, var, scale, shift = (p[f"{r}batchnorm_layers.{i}.{k}"][:, None, None]
                                       for k in ("running_mean", "running_var", "weight", "bias"))
            x = (x - mean) / (var + 1e-5).sqrt() * scale + shift
        x = F.conv2d(x, p[f"{r}projects.{i}.conv.weight"], p[f"{r}projects.{i}.conv.bias"])
        if i != 2:
            k = p[f"{r}resize_layers.{i}.weight"], p[f"{r}resize_layers.{i}.bias"]
            x = F.conv2d(x, *k, stride=2, padding=1) if i == 3 else F.conv_transpose2d(x, *k, stride=4 if i == 0 else 2)
        maps.append(F.conv2d(x, p[f"convs.{i}.conv.weight"], padding=1))

    def unit(x, name):
        y = x
        for k in "12":
            y = F.conv2d(F.relu(y), p[f"{name}.conv{k}.conv.weight"], p.get(f"{name}.conv{k}.conv.bias"), padding=1)
        return x + y

    def twice(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    out = maps[3]
    for j in range(4):
        if j:
            finer = F.interpolate(maps[3 - j], out.shape[2:], mode="bilinear", align_corners=False)
            out = out + unit(finer, f"fusion_blocks.{j}.res_conv_unit1")
        out = twice(unit(out, f"fusion_blocks.{j}.res_conv_unit2"))
        out = F.conv2d(out, p[f"fusion_blocks.{j}.project.conv.weight"], p[f"fusion_blocks.{j}.project.conv.bias"])
    if not canopy:
        out = F.relu(F.conv2d(out, p["project.conv.weight"], p["project.conv.bias"], padding=1))
    h = "conv_depth.head."
    out = twice(F.conv2d(out, p[h + "0.weight"], p[h + "0.bias"], padding=1))
    out = F.relu(F.conv2d(out, p[h + "2.weight"], p[h + "2.bias"], padding=1))
    v = F.relu(F.conv2d(out, p[h + "4.weight"], p[h + "4.bias"])) + least
    return (v * bins[:, None, None]).sum(1) / v.sum(1)


@pytest.mark.parametrize("canopy", [False, True])
@pytest.mark.parametrize("size", [(101, 90), (64, 96)])
def test_a_file_answers_as_the_forward_pass_written_out(backbone, tmp_path, canopy, size):
    head = invented(dpt.DPT(dpt.DPTConfig(VIT.width, class_token=canopy, **SMALL)))
    torch.save({k: v.clone() for k, v in head.state_dict().items()}, tmp_path / "head.pth")
    decoder = load_decoder(tmp_path / "head.pth", backbone)
    images = torch.randn(2, 3, *size)
    found = decoder(images)
    H, W = (-(-n // 16) * 16 for n in size)
    padded = torch.zeros(2, 3, H, W)
    top, left = (H - size[0]) // 2, (W - size[1]) // 2
    padded[:, :, top : top + size[0], left : left + size[1]] = images
    layers = [1, 3, 5, 7]
    features = [(f.patches.double(), f.cls.double(), f.grid) for f in backbone.layers(padded, layers)]
    t = torch.arange(9, dtype=torch.float64) / 8
    bins = 0.001 + t * 99.999
    if canopy:
        log = torch.exp(math.log(0.001) + t * (math.log(12) - math.log(0.001)))
        bins = 8 * ((1 - t) * log + t * (0.001 + t * 11.999))
    tensors = {k: v.double() for k, v in head.state_dict().items()}
    exact = reference(tensors, features, canopy, bins, 1e-8 if canopy else 0.1)
    assert found.shape == exact.shape == (2, *(16 * (n + n % 2) for n in (H // 16, W // 16)))
    error = (found - exact).norm() / (exact - exact.mean()).norm()
    assert error < 1e-5  # measured: 3.9e-6


def test_sizes_of_the_paper():
    with torch.device("meta"):
        head = dpt.DPT(dpt.DPTConfig(4096, channels=(2048,) * 4))
    assert sum(p.numel() for p in head.parameters()) == 230_687_776
    assert dpt.blocks(24) == [4, 11, 17, 23] and dpt.blocks(40) == [9, 19, 29, 39] and dpt.blocks(12) == [2, 5, 8, 11]
    assert dpt.blocks(24, class_token=True) == [5, 11, 17, 23]
    assert dpt.blocks(6) == [0, 2, 3, 5] and dpt.blocks(2) == [0, 0, 0, 1]  # the last is always one of them


def test_a_small_backbone_has_a_small_decoder_and_small_steps():
    small, large = dpt.Head(128), dpt.DPTConfig(768, channels=(256,) * 4, fused=256, dropout=0.05)
    assert small.conv_depth.head[-1].out_channels == dpt.sized(128).n_out == 64 and dpt.sized(768) == large
    assert sum(p.numel() for p in small.parameters()) == 238_064
    for relative, full in (False, dpt.RECIPE), (True, dpt.SYNTHMIX):
        assert dpt.recipe(384, relative) is full
        assert dpt.recipe(383, relative) == replace(full, lr=3e-3, batch=4)
        assert dpt.recipe(383, relative, class_token=True) == replace(full, lr=3e-4, batch=4)


def test_backbones_and_layers_that_do_not_do():
    with pytest.raises(ValueError, match="a ConvNeXt has stages of several: name a ViT"):
        dpt.layers_of(CONVNEXT_SIZES["convnext_t"], [])
    with pytest.raises(ValueError, match="--layers 0,3: a DPT sees four blocks; name four, or none"):
        dpt.layers_of(VIT, [0, 3])
    assert dpt.layers_of(VIT, [0, 0, 1, 1]) == [0, 0, 1, 1] and len(dpt.layers_of(VIT, [])) == 4


NAMES = ((r"^head\.", ""), ("reassemble_stage", "reassemble_blocks"), ("fusion_layers", "fusion_blocks"),
         (r"s\.layers\.(\d)\.projection", r"s.projects.\1.conv"), (r"s\.layers\.(\d)\.resize", r"s.resize_layers.\1"),
         (r"^convs\.(\d)", r"convs.\1.conv"), (r"(fusion_blocks\.\d)\.projection", r"\1.project.conv"),
         (r"residual_layer(\d)\.convolution(\d)", r"res_conv_unit\1.conv\2.conv"))


def test_canopies_as_in_transformers(tmp_path):
    from transformers import CHMv2Config, CHMv2ForDepthEstimation, DINOv3ViTConfig
    vit = dict(hidden_size=32, num_hidden_layers=8, num_attention_heads=2, intermediate_size=64, layer_norm_eps=1e-5)
    theirs = CHMv2ForDepthEstimation(CHMv2Config(
        backbone_config=DINOv3ViTConfig(**vit, out_indices=[2, 4, 6, 8], reshape_hidden_states=True,
                                        return_class_token=True),
        post_process_channels=[8, 12, 16, 20], fusion_hidden_size=12, head_hidden_size=6, number_output_channels=9))
    invented(theirs)
    theirs.backbone.save_pretrained(tmp_path / "backbone")
    state = {}
    for name, x in theirs.state_dict().items():
        if name.startswith("head."):
            for pattern, ours in NAMES:
                name = re.sub(pattern, ours, name)
            state[name] = x
    torch.save(state, tmp_path / "head.pth")
    decoder = load_decoder(tmp_path / "head.pth", load_backbone(tmp_path / "backbone"))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        exact = theirs(images).predicted_depth
    error = (decoder(images) - exact).norm() / (exact - exact.mean()).norm()
    assert error < 2e-5, error

# --------------------------------------------------------------------------------
# Other files


def linear_file(tmp_path, prefix, last, n_out, width, norm=True):
    g = torch.Generator().manual_seed(3)
    state = {last + ".weight": torch.randn(n_out, width, 1, 1, generator=g),
             last + ".bias": torch.randn(n_out, generator=g)}
    if norm:
        state |= {f"batchnorm_layer.{name}": torch.rand(width, generator=g) + 0.5
                  for name in ("weight", "bias", "running_mean", "running_var")}
        state["batchnorm_layer.num_batches_tracked"] = torch.tensor(7)
    torch.save({"model": {prefix + name: x for name, x in state.items()}, "optimizer": {}}, tmp_path / "x.pth")
    return {name: x.double() for name, x in state.items()}


def logits_of(state, last, x):
    if "batchnorm_layer.weight" in state:
        mean, var, scale, shift = (state[f"batchnorm_layer.{k}"][:, None, None]
                                   for k in ("running_mean", "running_var", "weight", "bias"))
        x = (x - mean) / (var + 1e-5).sqrt() * scale + shift
    return F.conv2d(x, state[last + ".weight"], state[last + ".bias"])


@pytest.mark.parametrize("prefix, norm", [("segmentation_model.1.", True), ("", False)])
def test_linear_segmentation(backbone, tmp_path, prefix, norm):
    state = linear_file(tmp_path, prefix, "conv", 5, VIT.width, norm)
    images = torch.randn(2, 3, 32, 48)
    exact = logits_of(state, "conv", backbone(images).map().double())
    torch.testing.assert_close(load_decoder(tmp_path / "x.pth", backbone)(images), exact.float(), rtol=1e-4, atol=1e-5)


def test_linear_depth_of_two_layers_and_class_tokens(backbone, tmp_path):
    state = linear_file(tmp_path, "module.", "conv_depth", 9, 4 * VIT.width)
    images = torch.randn(1, 3, 40, 48)
    found = load_decoder(tmp_path / "x.pth", backbone, layers=[3, 7], depth_range=(1, 5))(images)
    x = [part for f in backbone.layers(F.pad(images, (0, 0, 4, 4)), [3, 7])
         for part in (f.map(), f.cls[:, :, None, None].expand_as(f.map()))]
    v = logits_of(state, "conv_depth", torch.cat(x, 1).double()).relu() + 0.1
    exact = (v * torch.linspace(1, 5, 9)[:, None, None]).sum(1) / v.sum(1)
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-5)


def test_a_classifier(backbone, tmp_path):
    torch.save({"weight": torch.randn(4, 2 * VIT.width), "bias": torch.randn(4)}, tmp_path / "x.pth")
    images, state = torch.randn(2, 3, 32, 32), torch.load(tmp_path / "x.pth")
    f = backbone(images)
    exact = torch.cat([f.cls, f.patches.mean(1)], 1) @ state["weight"].T + state["bias"]
    torch.testing.assert_close(load_decoder(tmp_path / "x.pth", backbone)(images), exact)


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("convs.1.conv.weight"), "convs.1.conv.weight is missing, wanted .12, 12, 3, 3."),
    (lambda s: s.update(odd=torch.zeros(1)), "1 tensors are not known: odd"),
    (lambda s: s.pop("conv_depth.head.4.weight"), "conv_depth.head.4.weight is missing"),
    (lambda s: s.update({"project.conv.bias": torch.full((12,), math.nan)}), "project.conv.bias holds nan"),
    (lambda s: s.update({f"reassemble_blocks.projects.{i}.conv.weight": torch.zeros(n, 40, 1, 1)
                         for i, n in enumerate(SMALL["channels"])}), "for a backbone of width 40, this one has 32"),
    (lambda s: s.clear(), "no decoder: it has no tensors"),
    (lambda s: (s.clear(), s.update({"blocks.0.norm1.weight": torch.ones(2)})), "no decoder: it has blocks.0.norm1"),
])
def test_files_that_do_not_fit(backbone, tmp_path, change, says):
    state = invented(dpt.DPT(dpt.DPTConfig(VIT.width, **SMALL))).state_dict()
    change(state)
    torch.save(dict(state), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=says):
        load_decoder(tmp_path / "x.pth", backbone)


def test_no_file_and_no_such_block(backbone, tmp_path):
    with pytest.raises(ValueError, match=r"x\.pth does not exist"):
        load_decoder(tmp_path / "x.pth", backbone)
    torch.save(dpt.DPT(dpt.DPTConfig(VIT.width, **SMALL)).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="layers 1, 8, 2, 3; this backbone has blocks 0 to 7"):
        load_decoder(tmp_path / "x.pth", backbone, layers=[1, 8, 2, 3])


def test_backbone_in_the_file_is_left_there(backbone, tmp_path):
    head = invented(dpt.DPT(dpt.DPTConfig(VIT.width, **SMALL)))
    images = torch.randn(1, 3, 32, 32)
    torch.save(head.state_dict(), tmp_path / "x.pth")
    torch.save(head.state_dict() | {"backbone.cls_token": torch.ones(3)}, tmp_path / "y.pth")
    assert torch.equal(*(load_decoder(tmp_path / name, backbone)(images) for name in ("x.pth", "y.pth")))
