"""
What a run leaves: how many, whole, atomic, damaged, on a full disk; and --init. Exact resuming is in test_train.py,
kills in test_interrupt_kills.py.
"""

import errno
import json
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_train import MICRO, rows, run, torchrun

import recipes
import train
from engine import checkpoint
from engine.checkpoint import newest, saved, start_from
from engine.ranks import Ranks
from model import SIZES, ViT, ViTConfig, build
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
    c = recipes.configure(["--init", str(file), "--depth", "2", "--patch_size", "8", "--out", str(tmp_path / "run")])
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    fresh, warm = train.build_networks(c, ranks), train.build_networks(c, ranks)
    start_from(c.init, ranks, warm)
    same = {key for key, x in fresh.state_dict().items() if torch.equal(x, warm.state_dict()[key])}
    assert all(key in same for key in fresh.state_dict() if "head." in key)
    assert not any(key.endswith("qkv.weight") for key in same)


def test_init_without_a_local_norm_takes_the_norm(tmp_path):
    config = ViTConfig(1, 64, 1, 128, local_norm=True)
    with_norm, without = build(lambda: ViT(config), seed=1), build(lambda: ViT(ViTConfig(1, 64, 1, 128)), seed=2)
    torch.nn.init.normal_(without.norm.weight)
    save_backbone(without, tmp_path / "x.safetensors", "nano")
    start_from(tmp_path / "x.safetensors", Ranks(0, 1, torch.device("cpu"), None), dict(backbone=with_norm))
    assert torch.equal(with_norm.local_cls_norm.weight, without.norm.weight)
    assert torch.equal(with_norm.blocks[0].attn.qkv.weight, without.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("words, said", [
    (["--size", "s"], "does not fit these options: "),
    (["--patch_size", "16"], "1 tensors differ, ['patch_embed.proj.weight']"),
])
def test_init_that_does_not_fit_is_an_error(file, tmp_path, words, said):
    sizes = ["--global_size", "32", "--local_size", "16"]
    c = recipes.configure(["--init", str(file), "--out", str(tmp_path / "run"), *sizes, *words])
    networks = dict(backbone=build(lambda: ViT(c.vit)))
    with pytest.raises(ValueError, match="--init") as error:
        start_from(c.init, Ranks(0, 1, torch.device("cpu"), None), networks)
    assert said in str(error.value)


def test_init_of_another_family_or_nothing_is_an_error(tmp_path):
    from convnext import ConvNeXt, ConvNeXtConfig
    small = build(lambda: ConvNeXt(ConvNeXtConfig((1, 1, 1, 1), (8, 16, 16, 16))))
    save_backbone(small, tmp_path / "c.safetensors", "nano")
    with pytest.raises(ValueError, match="must be a ViT, one of"):
        recipes.configure(["--init", str(tmp_path / "c.safetensors")])
    with pytest.raises(ValueError, match="does not exist"):
        recipes.configure(["--init", str(tmp_path / "nothing.pth")])


def test_a_run_is_a_weights_file(file, tmp_path):
    run(tmp_path / "one", "--stop_after", "1")
    run(tmp_path / "two", "--init", str(tmp_path / "one"), "--lr", "0", "--lr_end", "0", "--momentum", "1",
        "--stop_after", "1")
    one, two = (load_backbone(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)

# --------------------------------------------------------------------------------
# Which are kept


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Six steps, saved after each."""
    out = tmp_path_factory.mktemp("runs") / "kept"
    run(out, "--save_every", "1")
    return out


@pytest.fixture
def copy(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_newest_three_are_kept_and_each_has_its_teacher(kept):
    assert [step for step, _ in saved(kept)] == [6, 5, 4] and newest(kept) == (6, kept / "checkpoints/6")
    assert {path.name for path in (kept / "checkpoints/5").iterdir()} == \
        {"0.safetensors", "teacher.safetensors", "step.json"}
    assert (kept / "teacher.safetensors").samefile(kept / "checkpoints/6/teacher.safetensors")
    assert (kept / "teacher.safetensors").stat().st_mode & 0o777 == (kept / "config.json").stat().st_mode & 0o777
    assert not load_backbone(kept / "checkpoints/4").cls_token.equal(load_backbone(kept).cls_token)


def test_keep_every(tmp_path):
    run(tmp_path, "--save_every", "1", "--keep", "1", "--keep_every", "2")
    assert [step for step, _ in saved(tmp_path)] == [6, 4, 2]


def test_equal_runs_leave_equal_bytes(kept, tmp_path):
    run(tmp_path / "again")
    for name in "teacher.safetensors", "checkpoints/6/0.safetensors", "checkpoints/6/step.json":
        assert (kept / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def no(*_):
        raise OSError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(checkpoint.os, "link", no)
    run(tmp_path, "--stop_after", "1")
    assert load_backbone(tmp_path).cls_token.equal(load_backbone(tmp_path / "checkpoints/1").cls_token)

# --------------------------------------------------------------------------------
# Damage


def zero(path):
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(4096)
    path.write_bytes(data)


def write(text):
    return lambda path: path.write_text(text)


DAMAGES = {
    "cut": ("0.safetensors", lambda path: path.write_bytes(path.read_bytes()[:1000]), "is cut short: 1000 bytes of"),
    "zeroed": ("0.safetensors", zero, "its checksum is not that of step.json"),
    "gone": ("0.safetensors", lambda path: path.unlink(), "is cut short: 0 bytes of"),
    "no note": ("step.json", lambda path: path.unlink(), "step.json cannot be read"),
    "torn note": ("step.json", write('{"step": 6, "fil'), "step.json cannot be read"),
    "list": ("step.json", write("[]"), "step.json cannot be read"),
    "types": ("step.json", write('{"step": "6", "files": {"a": [1, 2]}}'), "does not say a step"),
    "sizes": ("step.json", write('{"step": 6, "files": {"a": "b"}}'), "step.json cannot be read"),
    "elsewhere": ("step.json", write('{"step": 6, "files": {"../x": [1, 2]}}'), "does not say a step"),
    "deep": ("step.json", write("[" * 100_000), "step.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_one_is_taken_and_the_damage_named(kept, copy, capsys, damage):
    name, spoil, says = DAMAGES[damage]
    spoil(copy / "checkpoints/6" / name)
    train.main(["--out", str(copy), "--resume"])
    said = [line for line in capsys.readouterr().out.splitlines() if "going on from" in line]
    assert len(said) == 1 and says in said[0] and "checkpoints/5, the newest whole one" in said[0]
    assert [row["loss"] for row in rows(copy)] == [row["loss"] for row in rows(kept)]
    for name in "0.safetensors", "teacher.safetensors":
        assert (copy / "checkpoints/6" / name).read_bytes() == (kept / "checkpoints/6" / name).read_bytes()


def test_without_a_whole_one_it_is_an_error(copy):
    for step in 4, 5, 6:
        zero(copy / f"checkpoints/{step}/0.safetensors")
    with pytest.raises(ValueError, match="no other checkpoint in .* is whole") as error:
        train.main(["--out", str(copy), "--resume"])
    assert "\n" not in str(error.value)


CONFIGS = "", "[]", "3", '{"batch": "many"}', '{"mean": [1, 2]}', '{"steps": null}', "[" * 99999


@pytest.mark.parametrize("text", CONFIGS)
def test_a_damaged_config_is_one_line(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json|no run to go on with|unknown size") as error:
        train.main(["--out", str(copy), "--resume"])
    assert "\n" not in str(error.value) and (copy / "config.json").read_text() == text


def test_another_network_is_an_error(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | dict(dino_hidden=64)))
    with pytest.raises(ValueError, match="does not hold student.dino_head.mlp.0.weight of .64, 128.: it is of another"):
        train.main(["--out", str(copy), "--resume"])


@pytest.mark.parametrize("torn", ['{"step": 5, "loss": 7.1', "\udcff", "null", '{"step": "x"}', ""])
def test_a_torn_last_line_does_not_stop_a_run(copy, kept, torn):
    with open(copy / "metrics.jsonl", "ab") as file:
        file.write(torn.encode("utf-8", "surrogateescape"))
    train.main(["--out", str(copy), "--resume", "--stop_after", "1"])
    assert rows(copy) == rows(kept)

# --------------------------------------------------------------------------------
# Full disks


def test_a_full_disk_is_told_before_the_first_step(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(0, 0, 12_000_000))
    with pytest.raises(ValueError, match="2 checkpoints of 8,.* do not fit in the 12,000,000 that are free; make room"):
        run(tmp_path / "out", "--save_every", "3")
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_a_disk_that_fills_up_leaves_the_last_good_one(tmp_path, monkeypatch):
    usage, real = namedtuple("usage", "total used free"), checkpoint.shutil.disk_usage
    monkeypatch.setattr(checkpoint.shutil, "disk_usage",
                        lambda path: usage(0, 0, 1000) if "4.new" in str(path) else real(path))
    says = "step 4 is not saved: no space left for .*checkpoints/4, .* bytes too few"
    with pytest.raises(ValueError, match=says) as error:
        run(tmp_path / "run", "--save_every", "2")
    assert "the last good checkpoint is " in str(error.value) and "\n" not in str(error.value)
    assert [step for step, _ in saved(tmp_path / "run")] == [2]
    assert not list((tmp_path / "run/checkpoints").glob("*.new"))

# --------------------------------------------------------------------------------
# What a resumed run may change


def config_of(out):
    return (out / "config.json").read_bytes(), (out / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("words, says", [
    (["--batch", "16"], "was begun with --batch 8, not with --batch 16: that would be another run"),
    (["--seed", "1", "--n_local", "3"], "begun with --seed 0, --n_local 2, not with --seed 1, --n_local 3: that"),
    (["--n_shapes", "25"], "--n_shapes 24"), (["--size", "s"], "--size tiny"), (["--n_local", "3"], "--n_local 2"),
    (["--steps", "3"], "has 6 steps already"), (["--keep", "0"], "--keep is 0"),
])
def test_another_run_is_refused_and_nothing_changed(copy, words, says):
    before = config_of(copy)
    with pytest.raises(ValueError) as error:
        train.main(["--out", str(copy), "--resume", *words])
    assert says in str(error.value) and "\n" not in str(error.value) and config_of(copy) == before


def test_the_same_words_are_no_other_run(copy):
    """also where the config says what became of them"""
    assert train.main([*MICRO, "--group", "99", "--out", str(copy), "--resume", "auto", "--precision", "auto"])


def test_other_images_are_refused(tmp_path):
    from PIL import Image
    for name in "ab":
        for i in range(8):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / name / f"{name if i == 3 else 'x'}{i}.png")
    run(tmp_path / "run", "--data", str(tmp_path / "a"), "--stop_after", "1")
    before = config_of(tmp_path / "run")
    says = "b does not hold .* of .*a: before 8 of fingerprint [0-9a-f]{12}, after 8 of [0-9a-f]{12}; .*--data_changed"
    with pytest.raises(ValueError, match=says):
        train.main(["--out", str(tmp_path / "run"), "--resume", "--data", str(tmp_path / "b")])
    assert config_of(tmp_path / "run") == before
    (tmp_path / "a").rename(tmp_path / "c")
    words = ["--out", str(tmp_path / "run"), "--resume", "--stop_after", "1", "--data"]
    assert not train.main([*words, str(tmp_path / "c")])
    assert not train.main([*words, str(tmp_path / "b"), "--data_changed"])
    assert json.loads(config_of(tmp_path / "run")[0])["data_changed"] is False     # it was accepted once
    with pytest.raises(ValueError, match="c does not hold the images"):
        train.main([*words, str(tmp_path / "c")])
    config = json.loads(config_of(tmp_path / "run")[0])
    del config["data_digest"], config["data_images"]                # of a run that had none
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert not train.main([*words, str(tmp_path / "c")])


def test_auto_begins_and_goes_on(tmp_path):
    run(tmp_path, "--resume", "auto", "--stop_after", "2")
    assert newest(tmp_path)[0] == 2
    assert [row["step"] for row in run(tmp_path, "--resume", "auto")] == list(range(6))
    shutil.rmtree(tmp_path / "checkpoints")  # as if it had been killed before the first
    with pytest.raises(ValueError, match="holds no checkpoint yet; --resume auto begins"):
        run(tmp_path, "--resume")
    assert [row["step"] for row in run(tmp_path, "--resume", "auto", "--stop_after", "1")] == [0]


def test_without_local_crops_a_local_norm_stands_still(tmp_path, monkeypatch):
    """of 7b: it would have no gradient, and once could not be resumed"""
    own = SIZES["tiny"]
    monkeypatch.setitem(SIZES, "tiny", replace(own, local_norm=True))
    run(tmp_path, "--n_local", "0", "--stop_after", "2")
    assert train.main(["--out", str(tmp_path), "--resume"])
    run(tmp_path / "other", "--stop_after", "1")
    assert any("local_cls_norm" in name for name in load_file(tmp_path / "checkpoints/6/0.safetensors"))
