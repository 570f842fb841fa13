"""--init: student and teacher start from a weights file, on any number of ranks; exact resuming is in test_train.py."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_train import run, torchrun

import train
from engine.ranks import Ranks
from model import ViT, ViTConfig, build
from weights import load_backbone, save_backbone


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A backbone of the size of MICRO's, drawn from another seed, for images of other statistics."""
    config = ViTConfig(2, 128, 2, 512, patch_size=8, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    path = tmp_path_factory.mktemp("init") / "init.safetensors"
    save_backbone(build(lambda: ViT(config), seed=7), path, "nano")
    return path


@pytest.mark.parametrize("start", [run, torchrun])
def test_student_and_teacher_start_from_the_file(file, tmp_path, start):
    """without a learning rate, and with a teacher that stands still, what comes out is what went in"""
    start(tmp_path / "run", "--init", str(file), "--lr", "0", "--lr_end", "0", "--momentum", "1", "--stop_after", "2")
    before, after = load_file(file), load_file(tmp_path / "run/teacher.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["size"] == "tiny" and config["mean"] == [0.1, 0.2, 0.3] and config["init"] == str(file)


def test_init_changes_the_run_but_not_the_heads(file, tmp_path):
    c = train.configure(["--init", str(file), "--depth", "2", "--patch_size", "8", "--out", str(tmp_path / "run")])
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    fresh, warm = train.build_networks(c, ranks), train.build_networks(c, ranks)
    train.start_from(c.init, ranks, warm)
    same = {key for key, x in fresh.state_dict().items() if torch.equal(x, warm.state_dict()[key])}
    assert all(key in same for key in fresh.state_dict() if "head." in key)
    assert not any(key.endswith("qkv.weight") for key in same)


def test_init_without_a_local_norm_takes_the_norm(tmp_path):
    config = ViTConfig(1, 64, 1, 128, local_norm=True)
    with_norm, without = build(lambda: ViT(config), seed=1), build(lambda: ViT(ViTConfig(1, 64, 1, 128)), seed=2)
    torch.nn.init.normal_(without.norm.weight)
    save_backbone(without, tmp_path / "x.safetensors", "nano")
    train.start_from(tmp_path / "x.safetensors", Ranks(0, 1, torch.device("cpu"), None), dict(backbone=with_norm))
    assert torch.equal(with_norm.local_cls_norm.weight, without.norm.weight)
    assert torch.equal(with_norm.blocks[0].attn.qkv.weight, without.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("words, said", [
    (["--size", "s"], "does not fit these options: "),
    (["--patch_size", "16"], "1 tensors differ, ['patch_embed.proj.weight']"),
])
def test_init_that_does_not_fit_is_an_error(file, tmp_path, words, said):
    sizes = ["--global_size", "32", "--local_size", "16"]
    c = train.configure(["--init", str(file), "--out", str(tmp_path / "run"), *sizes, *words])
    networks = dict(backbone=build(lambda: ViT(c.vit)))
    with pytest.raises(ValueError, match="--init") as error:
        train.start_from(c.init, Ranks(0, 1, torch.device("cpu"), None), networks)
    assert said in str(error.value)


def test_init_of_another_family_or_nothing_is_an_error(tmp_path):
    from convnext import ConvNeXt, ConvNeXtConfig
    small = build(lambda: ConvNeXt(ConvNeXtConfig((1, 1, 1, 1), (8, 16, 16, 16))))
    save_backbone(small, tmp_path / "c.safetensors", "nano")
    with pytest.raises(ValueError, match="must be a ViT for RGB"):
        train.configure(["--init", str(tmp_path / "c.safetensors")])
    with pytest.raises(ValueError, match="does not exist"):
        train.configure(["--init", str(tmp_path / "nothing.pth")])


def test_a_run_is_a_weights_file(file, tmp_path):
    run(tmp_path / "one", "--stop_after", "1")
    run(tmp_path / "two", "--init", str(tmp_path / "one"), "--lr", "0", "--lr_end", "0", "--momentum", "1",
        "--stop_after", "1")
    one, two = (load_backbone(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
