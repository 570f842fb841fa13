"""doctor.py: what it says of this machine, of a broken kernel, of what is missing, a line each."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import doctor
import ops
from engine import proof

ROOT = Path(__file__).parents[1]
BUILT = pytest.mark.skipif(not ops.BUILT, reason="csrc is not built")


@pytest.fixture(autouse=True)
def sound(monkeypatch):
    """a machine that has nothing wrong with it but what a test plants"""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in "DISK", "SHARED", "MEMORY":
        monkeypatch.setattr(doctor, name, 0)


def report(capsys, *words):
    doctor.main([*words])
    return capsys.readouterr().out


def test_what_is_here(capsys, tmp_path, monkeypatch):
    found = json.loads(report(capsys, "--json"))
    assert list(found) == ["packages", "machine", "kernels", "room", "wrong"]
    assert torch.__version__.startswith(found["packages"]["torch"].partition("+")[0])
    assert found["packages"]["python"] == sys.version.split()[0]
    assert found["machine"]["cores"].endswith(f"of {os.cpu_count()} may be used")
    assert re.fullmatch(r"\w+, \d+ bits", found["machine"]["vectors"])
    assert found["machine"]["memory"].endswith("GB free") and found["room"]["free in ./runs"].endswith("GB")
    monkeypatch.chdir(tmp_path)
    text = report(capsys)
    assert "\npackages\n" in text and "\nkernels\n" in text and text.count("\n  ") >= 20


@BUILT
def test_kernels_are_right_and_a_broken_one_is_named(capsys, monkeypatch):
    said = json.loads(report(capsys, "--json"))
    ours = {name: word for name, word in said["kernels"].items() if name.endswith("on cpu") and "csrc" not in name}
    assert set(ours.values()) == {"right"} and len(ours) == sum(device == "cpu" for _, device in ops.KERNELS) >= 5
    # a copy of the definitions in which attention divides by E, and not by its root
    text = Path(proof.__file__).read_text()
    assert text.count("/ E ** 0.5") == 1
    changed = {}
    exec(compile(text.replace("/ E ** 0.5", "/ E"), "proof", "exec"), changed)
    monkeypatch.setattr(proof, "CHECKS", changed["CHECKS"])
    said = json.loads(report(capsys, "--json"))
    wrong = [line for line in said["wrong"] if "kernel" in line]
    assert len(wrong) == 1 and "python setup.py build_ext --inplace" in wrong[0]
    assert wrong[0].startswith("the kernel rope_attention on cpu is not what its definition says: its error is")
    assert [name for name, word in said["kernels"].items() if "error" in word] == ["rope_attention on cpu"]


def test_an_extension_of_another_torch(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ops", None)
    found, wrong = doctor.kernels(torch)
    assert found == dict(csrc="built but broken") and len(wrong) == 1


@pytest.mark.parametrize("plant, line", [
    (lambda m: m.setenv("OMP_WAIT_POLICY", "ACTIVE"), "export OMP_WAIT_POLICY=PASSIVE"),
    (lambda m: m.delenv("OMP_WAIT_POLICY"), "export OMP_WAIT_POLICY=PASSIVE"),
    (lambda m: m.setenv("OMP_NUM_THREADS", "999"), "OMP_NUM_THREADS=999 on .* cores: .* unset OMP_NUM_THREADS"),
    (lambda m: m.setattr(doctor, "MEMORY", 1e18), "GB of memory are free: end what else runs"),
    (lambda m: m.setattr(doctor, "DISK", 1e18), "GB are free in ./runs: --out on a larger disk"),
    (lambda m: m.setattr(doctor, "SHARED", 1e18), "in /dev/shm: docker run --shm-size 8g"),
    (lambda m: m.setattr(doctor, "version", lambda name: "0.1"), "torch 0.1 is older than 2.11: pip install -U torch"),
    (lambda m: m.setattr(doctor, "TESTED", dict(numpy="9.9")), "numpy .*: tested with 9.9; pip install -U numpy"),
    (lambda m: m.setattr(ops, "BUILT", False), "csrc is not built, and there is a compiler: python setup.py"),
    (lambda m: m.setattr(ops, "describe", lambda device: "csrc, as it was built before its last change: x"),
     "csrc is older than its sources: python setup.py"),
    (lambda m: m.setattr(doctor, "said", lambda *words: "555.1"), "there is a GPU .driver 555.1. that torch")])
def test_what_is_wrong_is_a_line_with_what_to_type(monkeypatch, plant, line):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    if "555" in line and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        pytest.skip("a GPU is here, and is seen")
    monkeypatch.setattr(ops, "OPS", ())
    plant(monkeypatch)
    wrong = doctor.examine()[1]
    assert sum(bool(re.search(line, each)) for each in wrong) == 1, wrong
    assert not any("\n" in each for each in wrong)


def test_what_is_missing_is_told_without_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = json.loads(report(capsys, "--json"))
    assert list(found) == ["packages", "room", "wrong"]
    assert any(line.startswith("torch and torchvision do not load") for line in found["wrong"])
    monkeypatch.setattr(doctor, "installed", lambda name: "" if name in ("torch", "tqdm", "timm") else "9")
    assert "not installed: torch, tqdm; pip install -e ." in doctor.packages()[1]
    assert doctor.packages()[0]["timm"] == "not installed"


def test_pyproject_is_read_as_it_is_written():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert doctor.wanted() == {"": project["dependencies"]} | project["optional-dependencies"]


def test_versions_are_compared_by_number():
    assert doctor.older("2.9.1", "2.11")
    assert not doctor.older("2.14.1+cu130", "2.11") and not doctor.older("2.11", "2.11")


def test_what_a_program_says_of_itself():
    assert doctor.said("sh", "-c", "echo Copyright 2005; echo release 13.0, V13.0.48") == "release 13.0, V13.0.48"
    assert doctor.said("nowhere-to-be-found") == "" and doctor.said("true") == ""


def test_it_runs_where_nothing_is_installed():
    """-I -S: no site-packages; the folder alone is on the path"""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import doctor; doctor.main(['--json'])"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    wrong = json.loads(done.stdout)["wrong"]
    assert any("not installed: torch, torchvision, numpy" in line for line in wrong)


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match="'x' is not an option; write doctor.py or doctor.py --json"):
        doctor.main(["x"])
    with pytest.raises(ValueError, match="unknown option --jsn; did you mean --json"):
        doctor.main(["--jsn"])
