"""weights.py: what is saved comes back bit for bit, whole or not at all; files as they are found; the command."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import weights
from convnext import ConvNeXt, ConvNeXtConfig
from model import SIZES, ViT, ViTConfig, initialise
from weights import fingerprint, inflate, load_backbone, main, rearranged, save_backbone

ROOT = Path(__file__).parents[1]
CONFIG = ViTConfig(2, 16, 2, 24, "swiglu", patch_size=4, n_registers=2, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
WEB = replace(CONFIG, mean=SIZES["s"].mean, std=SIZES["s"].std)  # what a file without normalisation is taken for
CONVNEXT = ConvNeXtConfig((1, 1, 2, 1), (4, 6, 8, 10))
SATELLITE = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
FILES = {"meta": "x.pth", "hf": "x", "timm": "x.safetensors", "nano": "x.safetensors"}


def random(config):
    """Random in every entry: a swap of two equal parameters would show. The keys' bias and the mask token are zero."""
    net = initialise((ConvNeXt if isinstance(config, ConvNeXtConfig) else ViT)(config), 0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_()
            if name.endswith("qkv.bias"):
                p.chunk(3)[1].zero_()
            if name == "mask_token":
                p.zero_()
    return net.eval()


@pytest.fixture
def vit():
    return random(CONFIG)


@pytest.fixture
def path(vit, tmp_path):
    save_backbone(vit, tmp_path / "teacher.safetensors", "nano", dict(step=7, size="tiny"))
    return tmp_path / "teacher.safetensors"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))

# --------------------------------------------------------------------------------
# There and back; see test_layouts.py for all layouts and sizes


@pytest.mark.parametrize("config", [CONFIG, CONVNEXT])
def test_round_trip_is_exact(config, tmp_path, capsys):
    net = random(config)
    save_backbone(net, tmp_path / "teacher.safetensors", "nano")
    back = load_backbone(tmp_path / "teacher.safetensors")
    assert same(net.state_dict(), back.state_dict()) and type(back) is type(net)
    assert back.config == config and isinstance(back.config.mean, tuple)
    assert not back.training and {p.dtype for p in back.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in back.parameters()) and capsys.readouterr().out == ""
    assert torch.equal(net(images(1, 3, 32, 64)).patches, back(images(1, 3, 32, 64)).patches)
    assert same(load_backbone(str(tmp_path)).state_dict(), net.state_dict())  # a run's folder stands for its teacher


def test_metadata_says_what_the_file_is(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["step"], metadata["commit"], metadata["format"]) == ("7", weights.commit(), "pt")
    assert json.loads(metadata["config"])["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("layout", FILES)
def test_a_given_state_is_written_instead(vit, tmp_path, layout):
    """As one rank gathers it; a transposed view is no obstacle."""
    state = {key: value.clone() for key, value in vit.state_dict().items()}
    state["norm.weight"] += 1
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].T.contiguous().T
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    save_backbone(vit, tmp_path / FILES[layout], layout, state=state)
    rest = load_backbone(tmp_path / FILES[layout]).state_dict()
    assert same(rest, state) and same(vit.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", FILES)
def test_dtypes(layout, dtype, tmp_path):
    """All of a file in one dtype, as `state.to(dtype)` leaves it: rounded periods are computed afresh."""
    vit, file = random(CONFIG), tmp_path / FILES[layout]
    save_backbone(vit, file, layout, state={key: x.to(dtype) for key, x in vit.state_dict().items()})
    back, as_stored = load_backbone(file), load_backbone(file, dtype=None)
    for key, x in vit.state_dict().items():
        rounded = x if key == "rope_embed.periods" else x.to(dtype).float()
        assert torch.equal(back.state_dict()[key], rounded) and back.state_dict()[key].dtype == torch.float32
    assert {p.dtype for p in as_stored.parameters()} == {dtype}
    assert as_stored.rope_embed.periods.dtype == torch.float32
    assert as_stored(images(1, 3, 8, 8).to(dtype)).cls.isfinite().all()


@pytest.mark.parametrize("layout", FILES)
def test_equal_networks_make_equal_files_that_others_may_read(vit, tmp_path, layout):
    """Mode 0644, or what the umask leaves, as all else that is written."""
    (tmp_path / "plain").touch()
    for folder in "a", "b":
        (tmp_path / folder).mkdir()
        save_backbone(vit, tmp_path / folder / FILES[layout], layout)
    a, b = ([path for path in sorted((tmp_path / folder).rglob("*")) if path.is_file()] for folder in ("a", "b"))
    assert a and [path.read_bytes() for path in a] == [path.read_bytes() for path in b]
    assert {path.stat().st_mode for path in a} == {(tmp_path / "plain").stat().st_mode}


def test_a_failing_save_leaves_the_old_file(vit, path, monkeypatch):
    def full_disk(new, entries, metadata):
        new.write_bytes(b"half a fi")
        raise OSError("no space left on device")
    old = path.read_bytes()
    monkeypatch.setattr(weights, "write_tensors", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_backbone(vit, path, "nano")
    assert path.read_bytes() == old
    with pytest.raises(OSError, match="no space left"):
        save_backbone(vit, path.parent / "hf", "hf")
    assert not (path.parent / "hf").exists()


def test_saving_again_replaces_the_file_and_leaves_no_other(vit, path):
    inode = os.stat(path).st_ino
    with torch.no_grad():
        vit.cls_token.add_(1)
    save_backbone(vit, path, "nano")
    assert same(load_backbone(path).state_dict(), vit.state_dict())
    assert os.stat(path).st_ino != inode  # renamed over it, never written into it
    assert [file.name for file in path.parent.iterdir()] == ["teacher.safetensors"]


@pytest.mark.parametrize("name, layout, says", [
    ("x.safetensors", "meta", r"in layout 'meta'; choose one of meta \(.pth .pt .bin\), hf \(a folder\)"),
    ("x.pth", "timm", "in layout 'timm'"), ("x.pth", "ours", "in layout 'ours'; choose one of"),
    ("full", "hf", "full is there already; name a new folder"),
])
def test_names_that_do_not_fit_a_layout(vit, tmp_path, name, layout, says):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(ValueError, match=says):
        save_backbone(vit, tmp_path / name, layout)

# --------------------------------------------------------------------------------
# What files look like in the wild


@pytest.mark.parametrize("wrap", [
    lambda state: {"teacher": state, "iteration": 3},
    lambda state: {"model": {f"module._orig_mod.{key}": x for key, x in state.items()}, "optimizer": {}},
    lambda state: {"teacher": {f"backbone.{key}": x for key, x in state.items()}
                   | {"dino_head.mlp.0.weight": torch.ones(2), "ibot_head.last_layer.weight": torch.ones(2)}},
    lambda state: {f"{who}.backbone.{key}": x + i for i, who in enumerate(["teacher", "student"])
                   for key, x in state.items()},
    lambda state: {key.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): x for key, x in state.items()},
    lambda state: {"state_dict": {f"backbone.{key}": x for key, x in state.items() if "periods" not in key}},
])
def test_wrappers_and_prefixes(vit, tmp_path, wrap, capsys):
    torch.save(wrap(vit.state_dict()), tmp_path / "x.pth")
    back = load_backbone(tmp_path / "x.pth")
    vit.rope_embed = back.rope_embed if "computed" in (said := capsys.readouterr().out) else vit.rope_embed
    assert "dino_head" not in str(wrap(vit.state_dict()).get("teacher")) or "dino_head.* left out: a head of" in said
    assert same(back.state_dict(), vit.state_dict())


def test_old_pickles_that_cannot_be_mapped(vit, tmp_path):
    torch.save(vit.state_dict(), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert same(load_backbone(tmp_path / "x.pth").state_dict(), vit.state_dict())


def test_two_networks_in_one_file(vit, tmp_path):
    state = vit.state_dict()
    torch.save(state | {f"backbone.{key}": x for key, x in state.items()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x.pth holds \d+ tensors under two prefixes, \['cls_token'"):
        load_backbone(tmp_path / "x.pth")


@pytest.mark.parametrize("config, stem", [(CONFIG, "layer."), (CONVNEXT, "stages.")])
def test_shards_and_newer_names(config, stem, tmp_path):
    net, folder = random(config), tmp_path / "hf"
    save_backbone(net, folder, "hf")
    state = {f"model.{key}" if key.startswith(stem) else key: x
             for key, x in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert same(load_backbone(folder).state_dict(), net.state_dict())
    shard = {key: f"model-{i % 3}.safetensors" for i, key in enumerate(state)}
    for name in set(shard.values()):
        save_file({key: x for key, x in state.items() if shard[key] == name}, folder / name)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert same(load_backbone(folder).state_dict(), net.state_dict())  # the .bin
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=shard)))
    assert same(load_backbone(folder).state_dict(), net.state_dict())
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match="model-1.safetensors does not exist"):
        load_backbone(folder)


@pytest.mark.parametrize("mask, hides", [(float("nan"), False), (0.0, True), (1.0, False)])
def test_a_bias_mask_of_another_kind(vit, tmp_path, mask, hides, capsys):
    """NaN (never set) leaves the bias as it is; 0 hides it."""
    state = {key: torch.full_like(x, mask) if key.endswith("bias_mask") else x for key, x in vit.state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    back = load_backbone(tmp_path / "x.pth")
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.bias.mul_(not hides)
    assert same(back.state_dict(), vit.state_dict()) and "bias_mask was not 1, 0, 1" in capsys.readouterr().out


def test_normalisation_travels(vit, tmp_path, capsys):
    for layout in ("hf", "timm", "nano"):
        save_backbone(vit, tmp_path / layout / FILES[layout], layout)
        assert load_backbone(tmp_path / layout / FILES[layout]).config == CONFIG
    save_backbone(vit, tmp_path / "x.pth")
    assert "meta has no place for 1 things: normalisation, mean (0.1, 0.2, 0.3)" in capsys.readouterr().out
    assert load_backbone(tmp_path / "x.pth").config == WEB
    assert "it says no normalisation, so the web's (LVD-1689M) is taken" in capsys.readouterr().out
    satellite = random(replace(CONFIG, mean=SATELLITE[0], std=SATELLITE[1]))
    save_backbone(satellite, tmp_path / "dinov3_vits16_sat493m-1.pth")
    satellite = load_backbone(tmp_path / "dinov3_vits16_sat493m-1.pth").config
    assert (satellite.mean, satellite.std) == SATELLITE and capsys.readouterr().out == ""
    save_file(load_file(tmp_path / "timm" / "x.safetensors"), tmp_path / "sat493m.safetensors", {"heads": "2"})
    (tmp_path / "config.json").write_text(json.dumps(dict(pretrained_cfg=dict(mean=CONFIG.mean, std=CONFIG.std))))
    assert load_backbone(tmp_path / "sat493m.safetensors").config == CONFIG
    assert "its name says other statistics than the mean and std ((0.1, 0.2, 0.3)" in capsys.readouterr().out

# --------------------------------------------------------------------------------
# More channels, and the command


@pytest.mark.parametrize("config", [CONFIG, CONVNEXT])
@torch.no_grad()
def test_inflate(config, tmp_path):
    """A fifth of the channels at their mean, 0, are as not there; weights and statistics are the mean of RGB's."""
    net = random(config)
    wide, x = inflate(net, 5), images(2, 3, 32, 32)
    padded = torch.cat([x, torch.zeros(2, 2, 32, 32)], 1)
    assert torch.allclose(wide(padded).cls, net(x).cls, atol=1e-4)  # measured: 0
    key = next(key for key, p in wide.state_dict().items() if p.ndim == 4)
    assert torch.equal(wide.state_dict()[key][:, 4], net.state_dict()[key].mean(1))
    assert wide.config.mean[4] == pytest.approx(sum(config.mean) / 3)
    assert len(wide.config.std) == wide.config.in_chans == 5
    for layout in FILES:
        save_backbone(wide, tmp_path / layout / FILES[layout], layout)
        back = load_backbone(tmp_path / layout / FILES[layout])
        assert same(back.state_dict(), wide.state_dict()) and back.config.in_chans == len(back.config.mean) == 5
    with pytest.raises(ValueError, match="from 5 to 6 channels; it goes from 3 to more"):
        inflate(wide, 6)


@pytest.mark.parametrize("config", [replace(CONFIG, in_chans=4, mean=(0.1, 0.2, 0.3, 0.4), std=(0.4, 0.5, 0.6, 0.7)),
                                    replace(CONVNEXT, in_chans=4, mean=(0.1,) * 4, std=(0.2,) * 4)])
@torch.no_grad()
def test_channels_in_another_order(config):
    """The same answers to images whose channels stand so; mean and std go with them; nothing is changed in place"""
    net, x, order = random(config), images(2, 4, 32, 32), [3, 0, 2, 1]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    other = rearranged(net, order)
    assert other.config == replace(config, mean=tuple(config.mean[k] for k in order),
                                   std=tuple(config.std[k] for k in order)) and not other.training
    ours, theirs, strangers = net(x), other(x[:, order]), other(x)
    assert (ours.cls - theirs.cls).abs().max() < 1e-4 < (ours.cls - strangers.cls).abs().max()  # measured: 1e-6, 0.23
    assert (ours.patches - theirs.patches).abs().max() < 1e-4  # measured: 2e-5
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_command(vit, tmp_path, capsys):
    """Says what a file is, and converts it; the fingerprint is of the network, not of the layout."""
    save_backbone(vit, tmp_path / "nano" / "x.safetensors", "nano")
    main([str(tmp_path / "nano" / "x.safetensors")])
    first = capsys.readouterr().out
    assert "layout         nano" in first and "normalisation  its own: mean (0.1, 0.2, 0.3)" in first and "F32" in first
    assert f"parameters     {sum(p.numel() for p in vit.parameters()):,}" in first
    for layout in ("hf", "timm"):
        target = str(tmp_path / layout / FILES[layout])
        main([str(tmp_path / "nano" / "x.safetensors"), target, "--to", layout])
        said = capsys.readouterr().out
        assert f"{len(vit.state_dict())} tensors are the same bit for bit, 0 are not" in said
        main([target])
        assert {*first.splitlines()} - {*capsys.readouterr().out.splitlines()} == {"layout         nano"}
    main([target, str(tmp_path / "x.pth"), "--to", "meta", "--in_chans", "4"])
    assert load_backbone(tmp_path / "x.pth").config.in_chans == 4
    main(["--help"])
    assert "--in_chans" in capsys.readouterr().out


def test_fingerprint_is_the_same_everywhere():
    cls, patches = fingerprint(initialise(ViT(CONFIG), 0).eval())
    assert cls.tolist() == pytest.approx([
        -0.94474, -1.04603, -0.51504, 1.33245, -1.95031, 0.58023, 0.43663, -0.25224], abs=1e-4)
    assert patches.tolist() == pytest.approx([
        0.67034, -1.77572, -0.67887, 1.64303, 2.24426, -1.8422, -0.14817, 0.09063], abs=1e-4)


def test_mistakes_end_in_one_line(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "weights.py", "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"],
                         capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "does not exist; released DINOv3 weights are licence-gated: request them at ai.meta.com/" in run.stderr
    with pytest.raises(ValueError, match="2 names and --to ''; write IN alone, or IN OUT --to meta|hf|timm|nano"):
        main(["a", "b"])
    with pytest.raises(ValueError, match="2 names and --to 'gguf'; write IN alone"):
        main(["a", "b", "--to", "gguf"])
