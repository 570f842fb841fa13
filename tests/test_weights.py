"""weights.py: what is saved comes back bit for bit, whole or not at all, and what does not fit says why."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import weights
from model import SIZES, ViT, ViTConfig, initialise
from weights import load_backbone, save_backbone

CONFIG = ViTConfig(2, 16, 2, 24, "swiglu", patch_size=4, n_registers=2, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


@pytest.fixture
def vit():
    """Random in every entry: a swap of two equal parameters would show."""
    vit = initialise(ViT(CONFIG), 0)
    for p in vit.parameters():
        torch.nn.init.normal_(p)
    return vit


@pytest.fixture
def path(vit, tmp_path):
    save_backbone(vit, tmp_path / "teacher.safetensors", dict(step=7, size="tiny"))
    return tmp_path / "teacher.safetensors"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def rewrite(path, change):
    """The file again, after change(state)."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    change(state)
    save_file(state, path, metadata)

# --------------------------------------------------------------------------------
# There and back


def test_round_trip_is_exact(vit, path):
    back = load_backbone(path)
    assert same(vit.state_dict(), back.state_dict())
    assert back.config == CONFIG and isinstance(back.config.mean, tuple)
    assert not back.training and {p.dtype for p in back.parameters()} == {torch.float32}
    x = torch.randn(1, 3, 8, 12)
    assert torch.equal(vit.eval()(x).patches, back(x).patches)


def test_metadata_says_what_the_file_is(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["step"], metadata["commit"], metadata["format"]) == ("7", weights.commit(), "pt")
    assert json.loads(metadata["config"])["mean"] == [0.1, 0.2, 0.3]


def test_run_folder_stands_for_its_teacher(vit, path):
    assert same(load_backbone(path.parent).state_dict(), vit.state_dict())
    assert same(load_backbone(str(path.parent)).state_dict(), vit.state_dict())


def test_a_given_state_is_written_instead(vit, tmp_path):
    """As one rank gathers it; a transposed view is no obstacle."""
    state = {key: value + 1 for key, value in vit.state_dict().items()}
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].T.contiguous().T
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    save_backbone(vit, tmp_path / "x.safetensors", state=state)
    assert same(load_backbone(tmp_path / "x.safetensors").state_dict(), state)
    assert same(vit.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pth_with_its_size(vit, tmp_path, monkeypatch, dtype):
    monkeypatch.setitem(SIZES, "small", replace(CONFIG, mean=SIZES["s"].mean))
    state = {key: value.to(dtype) for key, value in vit.state_dict().items()}
    torch.save(state, tmp_path / "released.pth")
    back = load_backbone(tmp_path / "released.pth", "small")
    assert same(back.state_dict(), {key: value.to(vit.state_dict()[key].dtype) for key, value in state.items()})
    assert back.config.mean == SIZES["s"].mean and not back.training


def test_a_failing_save_leaves_the_old_file(vit, path, monkeypatch):
    def full_disk(state, new, metadata):
        new.write_bytes(b"half a fi")
        raise OSError("no space left on device")
    old = path.read_bytes()
    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_backbone(vit, path)
    assert path.read_bytes() == old


def test_saving_again_replaces_the_file_and_leaves_no_other(vit, path):
    inode = os.stat(path).st_ino
    with torch.no_grad():
        vit.cls_token.add_(1)
    save_backbone(vit, path)
    assert same(load_backbone(path).state_dict(), vit.state_dict())
    assert os.stat(path).st_ino != inode  # renamed over it, never written into it
    assert [file.name for file in path.parent.iterdir()] == ["teacher.safetensors"]

# --------------------------------------------------------------------------------
# What does not fit


def fails(path, says, size=None):
    with pytest.raises(ValueError, match=says) as error:
        load_backbone(path, size)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path):
    fails(tmp_path / "nowhere.safetensors", "nowhere.safetensors does not exist; name a run's folder")
    fails(tmp_path, "teacher.safetensors does not exist")  # a folder without a run


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_truncated_safetensors(path, left):
    path.write_bytes(path.read_bytes()[:left])
    fails(path, "cannot be read .*is it cut short")


def test_foreign_safetensors(path):
    save_file({"encoder.weight": torch.zeros(3)}, path)
    fails(path, "says nothing of its configuration")


def test_keys_and_shapes_that_do_not_fit_are_named(path):
    rewrite(path, lambda state: state.pop("blocks.1.ls2.gamma"))
    fails(path, r"1 missing \['blocks.1.ls2.gamma'\], 0 unexpected")
    rewrite(path, lambda state: state.update({"blocks.1.ls3.gamma": torch.zeros(16)}))
    fails(path, r"1 missing \['blocks.1.ls2.gamma'\], 1 unexpected \['blocks.1.ls3.gamma'\]")


def test_wrong_shape_is_named(path):
    rewrite(path, lambda state: state.update(cls_token=torch.zeros(1, 1, 17)))
    fails(path, r"0 missing .*0 unexpected .*1 of another shape \['cls_token is \(1, 1, 17\), not \(1, 1, 16\)'\]")


def test_pth_of_another_size(vit, tmp_path):
    torch.save(vit.state_dict(), tmp_path / "x.pth")
    fails(tmp_path / "x.pth", r"does not fit: \d+ missing", "tiny")


def test_pth_that_holds_its_weights_deeper(vit, tmp_path):
    torch.save({"teacher": vit.state_dict()}, tmp_path / "x.pth")
    fails(tmp_path / "x.pth", "holds no dict of tensors", "tiny")


def test_pth_must_say_its_size(vit, tmp_path):
    torch.save(vit.state_dict(), tmp_path / "x.pth")
    fails(tmp_path / "x.pth", "x.pth does not say its size; add --size, one of tiny, s,")
    with pytest.raises(ValueError, match="unknown size 'xl'; choose one of tiny, s"):
        load_backbone(tmp_path / "x.pth", "xl")


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_runs_no_code(tmp_path):
    torch.save({"cls_token": Trap(str(tmp_path / "sprung"))}, tmp_path / "x.pth")
    fails(tmp_path / "x.pth", "is no plain checkpoint", "tiny")
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap works


@pytest.mark.parametrize("content", [b"", b"\x80", b"<html>404</html>", b"PK\x03\x04 and then nothing"])
def test_a_pth_of_foreign_bytes(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    fails(tmp_path / "x.pth", "is no plain checkpoint", "tiny")
