"""engine/export.py: what is written says what the network says, at other sizes than it was traced at; or is gone."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ops
import weights
from convnext import CONVNEXT_SIZES, ConvNeXt, ConvNeXtConfig
from engine import export
from engine.layouts import STATISTICS
from model import SIZES, ViT, ViTConfig, build

ROOT = Path(__file__).parents[1]
NETS = dict(
    mlp=ViTConfig(2, 32, 2, 48, layerscale=1.0, init_std=0.2),
    swiglu=ViTConfig(2, 32, 2, 48, "swiglu", qkv_bias=False, local_norm=True, layerscale=1.0, in_chans=4,
                     mean=(0.5,) * 4, std=(0.2,) * 4, init_std=0.2),
    convnext=ConvNeXtConfig((1, 1, 2, 1), (8, 16, 24, 32), layerscale=1.0, init_std=0.2))


def network(config, seed=1):
    return build(lambda: (ConvNeXt if isinstance(config, ConvNeXtConfig) else ViT)(config), seed=seed).eval()


def saved(config, folder, name="net.safetensors"):
    weights.save_backbone(network(config), folder / name, "nano")
    return str(folder / name)


def onnx():
    for name in "onnx", "onnxruntime", "onnxscript":
        pytest.importorskip(name)


def test_a_program_of_torch_is_the_network(tmp_path, capsys):
    """loaded and run without a line of ours, at a size and a batch that it was not traced at"""
    path, out = saved(NETS["mlp"], tmp_path), tmp_path / "net.pt2"
    before = ops.mode
    weights.main([path, str(out), "--to", "torch"])
    assert "net.pt2: " in capsys.readouterr().out and ops.mode == before
    images = torch.randn(5, 3, 48, 80)
    cls, patches = torch.export.load(out).module()(images)
    with torch.no_grad():
        exact = network(NETS["mlp"])(images)
    assert (cls - exact.cls).abs().max() < 1e-5 and (patches - exact.patches).abs().max() < 1e-5  # measured: 1e-6
    assert sorted(os.listdir(tmp_path)) == ["net.pt2", "net.safetensors"]


@pytest.mark.parametrize("kind", NETS)
def test_a_graph_is_the_network(tmp_path, capsys, kind):
    onnx()
    path, out, config = saved(NETS[kind], tmp_path), tmp_path / "net.onnx", NETS[kind]
    weights.main([path, str(out), "--to", "onnx"])
    assert "differs from the network by" in capsys.readouterr().out
    p = config.patch_size
    images = torch.randn(2, config.in_chans, p, 3 * p)
    cls, patches = map(torch.from_numpy, export.session(out)(images))
    with torch.no_grad():
        exact = network(config)(images)
    assert (cls - exact.cls).abs().max() < 1e-4 and (patches - exact.patches).abs().max() < 1e-4  # measured: 5e-6
    import onnx_ir
    model = onnx_ir.load(out)
    assert [value.shape.numpy() if value.shape.is_static() else str(value.shape) for value in model.graph.inputs] == [
        f"[batch,{config.in_chans},height,width]"]
    assert json.loads(model.metadata_props["config"])["in_chans"] == config.in_chans
    operations = {node.op_type for node in model.graph}
    assert not any("Sequence" in name for name in operations) and {node.domain for node in model.graph} == {""}
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.safetensors"]
    assert str(ROOT).encode() not in out.read_bytes()


def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    onnx()
    traced = export.traced

    def without_storage(model, dtype):
        assert all(x.is_meta for x in model.state_dict().values())
        return traced(model, dtype)
    monkeypatch.setattr(export, "traced", without_storage)
    monkeypatch.setattr(export, "ALONE", 0)
    path, out = saved(NETS["mlp"], tmp_path), tmp_path / "net.onnx"
    weights.main([path, str(out), "--to", "onnx"])
    size = sum(x.numel() for x in network(NETS["mlp"]).state_dict().values()) * 4
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data", "net.safetensors"]
    assert (tmp_path / "net.onnx.data").stat().st_size > 0.9 * size and out.stat().st_size < 120_000
    assert export.compare(export.session(out), network(NETS["mlp"])) < 1e-4
    import onnx_ir
    places = [x.const_value for x in onnx_ir.load(out).graph.initializers.values()]
    places = [x.offset for x in places if isinstance(x, onnx_ir.ExternalTensor)]
    assert len(places) > 10 and not any(at % 4096 for at in places)


def test_half_has_its_own_bound(tmp_path, capsys):
    onnx()
    path = saved(NETS["mlp"], tmp_path)
    weights.main([path, str(tmp_path / "net.onnx"), "--to", "onnx", "--half"])
    worst = float(capsys.readouterr().out.split("network by ")[1].split()[0])
    assert 1e-4 < worst < export.BOUNDS[torch.float16]


def test_what_says_something_else_is_not_kept(tmp_path):
    with pytest.raises(ValueError, match="x.onnx: it says something else than the network, by 0.0011 where 0.001 are"):
        export.judged("x.onnx", 1.1e-3, torch.float32)
    assert export.judged("x.onnx", 9e-4, torch.float32) == 9e-4
    model = network(NETS["mlp"])

    def nowhere(images):  # not a number, of the right shapes
        with torch.no_grad():
            found = model(images)
        return found.cls * float("nan"), found.patches
    with pytest.raises(ValueError, match="by inf where"):
        export.judged("x.onnx", export.compare(nowhere, model), torch.float32)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match="something else"), export.gathered(out / "x.onnx") as folder:
        (folder / "x.onnx").write_bytes(b"half")
        export.judged("x.onnx", 1, torch.float32)
    with pytest.raises(ValueError, match="x.onnx cannot be written: No space left on device"):
        with export.gathered(out / "x.onnx"):
            raise OSError(28, "No space left on device")
    assert not os.listdir(out)


def test_the_difference_is_the_largest_of_all_sizes_and_outputs():
    model = network(NETS["mlp"])

    def off(images):
        with torch.no_grad():
            found = model(images)
        cls, patches = found.cls.clone(), found.patches.clone()
        cls[0, 0] += 0.25 * (len(images) == 3 and images.shape[2] == 32)
        patches[-1, -1, -1] += 0.5 * (len(images) == 1 and images.shape[2] == 80)
        return cls, patches
    assert export.compare(off, model) == pytest.approx(0.5, abs=1e-5)
    assert export.compare(lambda images: (model(images).cls.detach(),) * 2, model) == float("inf")


@pytest.mark.parametrize("words, message", [
    (["OUT.onnx", "--to", "torch"], "OUT.onnx: name a file that ends in .pt2"),
    (["OUT", "--to", "onnx"], "OUT: name a file that ends in .onnx"),
    (["OUT.x", "--to", "onx"], "--to 'onx'; write IN"),
    (["OUT.pth", "--to", "meta", "--half"], "--half: of a program; write --to onnx or torch"),
    (["OUT.onnx", "--to", "onnx", "--size", "b"], "not 'b'; leave --size out")])
def test_bad_input_is_one_line(tmp_path, words, message):
    path = saved(NETS["mlp"], tmp_path)
    with pytest.raises(ValueError, match=message):
        weights.main([path, str(tmp_path / words[0]), *words[1:]])
    assert os.listdir(tmp_path) == ["net.safetensors"]


def test_an_extra_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx_ir", type(sys)("onnx_ir"))
    with pytest.raises(ValueError, match="--to onnx: onnxruntime is not installed; pip install -e ..export."):
        weights.main([saved(NETS["mlp"], tmp_path), str(tmp_path / "net.onnx"), "--to", "onnx"])
    assert os.listdir(tmp_path) == ["net.safetensors"]


def test_what_no_memory_holds_is_written_and_not_compared(tmp_path, monkeypatch, capsys):
    onnx()
    monkeypatch.setattr(weights, "free_memory", lambda: 1e5)
    weights.main([saved(NETS["mlp"], tmp_path), str(tmp_path / "net.onnx"), "--to", "onnx"])
    assert "not compared: that takes 0.000482 GB of memory, and 0.0001 are free" in capsys.readouterr().out


SAT = dict(zip(("mean", "std"), STATISTICS["sat493m"], strict=True))
CUT = {name: replace(config, depth=2) if isinstance(config, ViTConfig) and name in ("h+", "7b") else config
       for name, config in (SIZES | CONVNEXT_SIZES).items()}
CUT |= {f"sat-{name}": replace(SIZES[name], depth=2, **SAT) for name in ("l", "7b")}


@pytest.mark.long
@pytest.mark.parametrize("half", [[], ["--half"]], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize("name", CUT)
def test_every_size(tmp_path, capsys, name, kind, half):
    """h+ and 7b cut to two blocks; every layer as strong as a trained one's; -s: the table's rows"""
    if kind == "onnx":
        onnx()
    config = replace(CUT[name], layerscale=1.0)
    words = [saved(config, tmp_path), str(tmp_path / f"net{weights.PROGRAMS[kind]}"), "--to", kind, *half]
    weights.main(words)
    with capsys.disabled():
        print(f"\n{name} {' '.join(words[2:])}: {capsys.readouterr().out.split('differs ')[1]}", end="")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_of_a_7b_is_that_of_a_block(tmp_path):
    """three blocks of 7B's width, 2.1 GB, compared with nothing: one block, 0.67 GB, and 2 GB are what it may take"""
    onnx()
    path = saved(replace(SIZES["7b"], depth=3), tmp_path)
    code = "import sys, weights\nweights.free_memory = lambda: 0\nweights.main(sys.argv[1:])\n"
    running = subprocess.Popen([sys.executable, "-c", code, path, str(tmp_path / "net.onnx"), "--to", "onnx"], cwd=ROOT)
    peak = 0
    while running.poll() is None:  # without the pages of files, which the system takes back when it wants them
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{running.pid}/status").read_text())
        peak = max(peak, 1024 * int(found[1]) if found else 0)
        time.sleep(0.005)
    print(f"peak {peak / 1e9:.2f} GB")
    assert running.returncode == 0 and 0.1e9 < peak < 1.5e9  # measured: 0.96; with the network in memory 2.75
