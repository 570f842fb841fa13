"""weights.py: a file that does not fit ends in one line, with its layout and the names; no code in it runs."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import SIZES, ViT, ViTConfig
from weights import File, Stored, load_backbone, main, save_backbone, sound

CONFIG = ViTConfig(3, 16, 2, 24, patch_size=4, n_registers=2)
FILES = {"meta": "x.pth", "hf": "x", "timm": "x.safetensors", "nano": "x.safetensors"}
GAMMA = {"meta": "blocks.1.ls2.gamma", "nano": "blocks.1.ls2.gamma", "timm": "blocks.1.gamma_2",
         "hf": "layer.1.layer_scale2.lambda1"}
BIAS = {"meta": "blocks.1.attn.qkv.bias", "nano": "blocks.1.attn.qkv.bias", "timm": "blocks.1.attn.v_bias",
        "hf": "layer.1.attention.v_proj.bias"}


@pytest.fixture
def vit():
    vit = ViT(CONFIG)
    torch.nn.init.ones_(vit.blocks[0].attn.qkv.bias)  # else timm's layout keeps no bias
    return vit


@pytest.fixture(params=FILES)
def layout(request):
    return request.param


@pytest.fixture
def path(vit, layout, tmp_path):
    save_backbone(vit, tmp_path / FILES[layout], layout)
    return tmp_path / FILES[layout]


def rewrite(path, change, layout):
    """The file again, after change(state)."""
    if layout == "meta":
        state = torch.load(path)
        change(state)
        return torch.save(state, path)
    path = path / "model.safetensors" if layout == "hf" else path
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    change(state)
    save_file(state, path, metadata)


def fails(path, says, size=None):
    with pytest.raises(ValueError, match=says) as error:
        load_backbone(path, size)
    assert str(path) in str(error.value) and "\n" not in str(error.value)

# --------------------------------------------------------------------------------
# Names and shapes


def test_a_missing_name(path, layout):
    rewrite(path, lambda state: state.pop(GAMMA[layout]), layout)
    fails(path, rf"read as {layout}, .*does not fit: of \d+ tensors, 1 missing \['{GAMMA[layout]}'\], 0 unexpected")


def test_a_bias_missing_from_one_block(path, layout):
    """From all of them it may; see LACKING."""
    rewrite(path, lambda state: state.pop(BIAS[layout]), layout)
    fails(path, rf"1 missing \['{BIAS[layout]}'\], 0 unexpected")


def test_a_renamed_one(path, layout):
    rewrite(path, lambda state: state.update({"blocks.1.ls3.gamma": state.pop(GAMMA[layout])}), layout)
    fails(path, rf"1 missing \['{GAMMA[layout]}'\], 1 unexpected \['blocks.1.ls3.gamma'\], 0 of another")


@pytest.mark.parametrize("i", [0, 1])
def test_another_shape(path, layout, i):
    """Wherever it is: the width is what most tensors say."""
    key = [GAMMA[layout], {"hf": "embeddings.cls_token"}.get(layout, "cls_token")][i]
    rewrite(path, lambda state: state.update({key: torch.zeros(1, 1, 17)}), layout)
    fails(path, rf"0 missing .*0 unexpected .*1 of another shape \[.{key} is \(1, 1, 17\), not \(.*16,?\)'\]")


def test_a_missing_block(path, layout):
    def pop(state):
        for key in [key for key in state if key.startswith(("blocks.1.", "layer.1."))]:
            del state[key]
    rewrite(path, pop, layout)
    fails(path, r"1[0-9] missing \['(blocks|layer)\.1\..*', '.*', '.*', '.*', '[^']*'\], 0 unexpected")


def test_only_five_are_named(path, layout):
    rewrite(path, lambda state: state.update({f"extra.{i}": torch.zeros(1) for i in range(7)}), layout)
    fails(path, r"7 unexpected \['extra.0', 'extra.1', 'extra.2', 'extra.3', 'extra.4'\]")


def test_another_size(path):
    fails(path, "is of no known size, depth 3, width 16, not 's'; leave --size out", "s")


def test_a_cut_of_a_size(tmp_path, capsys):
    save_backbone(ViT(replace(SIZES["s"], depth=1)), tmp_path / "x.pth")
    assert load_backbone(tmp_path / "x.pth").config == replace(SIZES["s"], depth=1)
    assert "read as meta, s, 1 of 12 layers" in capsys.readouterr().out
    fails(tmp_path / "x.pth", "is s, 1 of 12 layers, not 's'", "s")
    save_backbone(ViT(SIZES["tiny"]), tmp_path / "x.pth")
    assert load_backbone(tmp_path / "x.pth", "tiny").config == replace(SIZES["tiny"])


def test_no_known_layout(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({key: torch.zeros(3) for key in ("encoder.weight", "norm.weight", "x")}, path)
    fails(path, r"of no known layout: of its 3 tensors, 1 have names of meta; it begins with \['encoder")
    torch.save({}, tmp_path / "x.pth")
    fails(tmp_path / "x.pth", "of no known layout: of its 0 tensors")


@pytest.mark.parametrize("field, value", [("num_hidden_layers", 4), ("num_attention_heads", 4), ("rope_theta", 1e4)])
def test_config_json_of_another_network(vit, tmp_path, field, value):
    save_backbone(vit, tmp_path / "hf", "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    if field == "num_attention_heads":  # nothing else says it: believed
        assert load_backbone(tmp_path / "hf").config.heads == 4
    else:
        fails(tmp_path / "hf", f"config.json and the tensors differ, .*'{field}': .{value}, ")
    file.write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON object"):
        load_backbone(tmp_path / "hf")

# --------------------------------------------------------------------------------
# Bytes


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_truncated(path, layout, left):
    file = path / "model.safetensors" if layout == "hf" else path
    file.write_bytes(file.read_bytes()[:left])
    fails(file, "is no plain checkpoint: ." if layout == "meta" else "cannot be read .*is it cut short")


def test_a_configuration_of_another_version(vit, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(vit.state_dict(), path, {"config": json.dumps(dict(depth=3, colour="red"))})
    fails(path, "has a configuration that this version cannot read: .*colour")


INDEX = [{}, [], {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"cls_token": 3}}, {"weight_map": None},
         {"weight_map": {"cls_token": "../x.safetensors"}}]


@pytest.mark.parametrize("index", INDEX)
def test_an_index_of_no_files(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json has no weight_map, tensor to file beside it"):
        load_backbone(tmp_path)


def test_json_deeper_than_any_network(vit, tmp_path):
    save_backbone(vit, tmp_path / "hf", "hf")
    for name in "config.json", "preprocessor_config.json":
        text = (tmp_path / "hf" / name).read_text()
        (tmp_path / "hf" / name).write_text("[" * 100_000)
        with pytest.raises(ValueError, match=f"{name} is no JSON object"):
            load_backbone(tmp_path / "hf")
        (tmp_path / "hf" / name).write_text(text)

# --------------------------------------------------------------------------------
# What a file says of a network that cannot be


@pytest.mark.parametrize("field, value", [
    ("heads", 0), ("heads", -2), ("width", -16), ("width", 0), ("depth", 0), ("depth", 10**9), ("depth", True),
    ("hidden", 1e3), ("patch_size", 0), ("n_registers", -1), ("in_chans", 0), ("qkv_bias", 1), ("ffn", "moe"),
    ("std", [0, 1, 1]), ("std", [float("nan")] * 3), ("mean", ["a", "b", "c"]), ("mean", [0.5]), ("mean", 0.5)])
def test_the_configuration_that_a_file_carries(vit, tmp_path, field, value):
    path = tmp_path / "x.safetensors"
    save_file(vit.state_dict(), path, {"config": json.dumps(vars(CONFIG) | {field: value})})
    fails(path, rf"has a configuration that this version cannot read: .*{field}")


@pytest.mark.parametrize("file, field, value", [
    ("config.json", "num_attention_heads", [2]), ("config.json", "num_attention_heads", "many"),
    ("config.json", "num_attention_heads", -2), ("config.json", "num_attention_heads", 3),
    ("preprocessor_config.json", "image_std", [0, 0, 0]), ("preprocessor_config.json", "image_std", 0.5),
    ("preprocessor_config.json", "image_mean", []), ("preprocessor_config.json", "image_mean", ["red"]),
    ("preprocessor_config.json", "image_mean", None), ("preprocessor_config.json", "image_std", [1e400] * 3)])
def test_what_lies_beside_the_tensors(vit, tmp_path, file, field, value):
    save_backbone(vit, tmp_path / "hf", "hf")
    path = tmp_path / "hf" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    fails(tmp_path / "hf", "heads|mean and std are no lists of numbers|std is .*; it must be in")


def test_a_block_whose_number_is_a_billion(path, layout):
    key = GAMMA[layout]
    rewrite(path, lambda state: state.update({key.replace("1", "1000000000", 1): torch.zeros(16)}), layout)
    fails(path, "depth is 1000000001; it must|the tensors differ, .*1000000001|1 unexpected .*1000000000")

# --------------------------------------------------------------------------------
# What a network cannot compute with


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_looking_for_nan_makes_nothing_as_large_as_the_tensor(tmp_path, dtype):
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            made.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out
    x = torch.ones(64, 64, dtype=dtype)
    file = File(tmp_path, "nano", CONFIG, dict(x=Stored((64, 64), "", lambda: x)), [])
    with Watch():
        assert sound(file, "x") is x
    assert made and max(made) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(path, layout, value):
    rewrite(path, lambda state: state[GAMMA[layout]].__setitem__(3, value), layout)
    fails(path, rf"{GAMMA[layout]} holds nan or inf")
    with pytest.raises(ValueError, match=GAMMA[layout]):
        main([str(path)])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_numbers_of_another_kind(path, layout, dtype):
    rewrite(path, lambda state: state.update({GAMMA[layout]: state[GAMMA[layout]].to(dtype)}), layout)
    fails(path, rf"{GAMMA[layout]} is {str(dtype).partition('.')[2]}, ")


def quantised(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pack", [torch.Tensor.to_sparse, quantised, lambda x: x.to("meta")])
def test_tensors_that_are_packed(vit, tmp_path, pack):
    state = vit.state_dict()
    torch.save(state | {GAMMA["meta"]: pack(state[GAMMA["meta"]])}, tmp_path / "x.pth")
    fails(tmp_path / "x.pth", rf"{GAMMA['meta']} is (float32, sparse_coo|qint8, strided|without numbers)|is no plain")


def test_a_dict_that_lies_in_itself_and_names_that_are_numbers(vit, tmp_path):
    state = {"cls_token": torch.zeros(3)}
    state["model"] = {"teacher": state}
    torch.save(state, tmp_path / "x.pth")
    fails(tmp_path / "x.pth", "holds no dict of tensors")
    torch.save(dict(enumerate(vit.state_dict().values())), tmp_path / "x.pth")
    fails(tmp_path / "x.pth", "holds no dict of tensors, name to parameter")

# --------------------------------------------------------------------------------
# Code


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_runs_no_code(tmp_path):
    torch.save({"cls_token": Trap(str(tmp_path / "sprung"))}, tmp_path / "x.pth")
    fails(tmp_path / "x.pth", "is no plain checkpoint")
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap works


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04 and then nothing"])
def test_a_pth_of_foreign_bytes(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    fails(tmp_path / "x.pth", "is no plain checkpoint")


def test_only_what_names_code_is_said_to_hold_some(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"\x80\x02\xff\xfe")
    with pytest.raises(ValueError) as error:
        load_backbone(tmp_path / "x.pth")
    assert "Python objects" not in str(error.value)
    torch.save({"cls_token": Trap(str(tmp_path / "sprung"))}, tmp_path / "x.pth")
    fails(tmp_path / "x.pth", "Python objects, which may run code")


PAGE, POINTER = b"\n<!DOCTYPE html><title>403</title>", b"version https://git-lfs.github.com/spec/v1"


@pytest.mark.parametrize("content", [PAGE, POINTER, b"import torch\n\nprint(1)\n", b"loss,lr\n1,2\n"])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_page_in_place_of_a_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    fails(tmp_path / name, "holds no weights but a text that begins b'(<!DOC|version|import|loss).*download it again")


@pytest.mark.parametrize("thing", [torch.zeros(3), {"cls_token": 3}, {"model": {"cls_token": "a"}}])
def test_a_pth_without_tensors(tmp_path, thing):
    torch.save(thing, tmp_path / "x.pth")
    fails(tmp_path / "x.pth", "holds no dict of tensors, name to parameter, nor one under teacher, ")


def test_missing_file(tmp_path):
    fails(tmp_path / "nowhere.safetensors", "nowhere.safetensors does not exist; name a run's folder")
    fails(tmp_path, "teacher.safetensors does not exist")  # a folder without weights
    for name in ("dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth", "dinov3_convnext_tiny_pretrain.pth",
                 "facebook/dinov3-vits16-pretrain-lvd1689m"):
        fails(tmp_path / name, "does not exist; released DINOv3 weights are licence-gated: .*ai.meta.com.*facebook$")
