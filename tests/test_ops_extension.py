"""The extension as an extension: what it registers, what it refuses, how it is switched; torch.library's own checks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ops

ROOT = Path(__file__).parents[1]
needs_build = pytest.mark.skipif(not ops.BUILT, reason="csrc is not built")


def arguments(B=3, K=40, dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, B, K, generator=generator).to(dtype).requires_grad_(grad)
    teacher, log_u = torch.randn(1, B, K, generator=generator).to(dtype), torch.randn(K, generator=generator)
    return student, teacher, log_u, torch.rand(B, generator=generator), torch.ones(2, 1), 0.1, 0.05


@needs_build
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_accepts_the_registrations(grad, dtype):
    """Schema, autograd, fake tensors and ahead-of-time compilation agree with what the kernels do."""
    student, teacher, log_u, *rest = arguments(dtype=dtype, grad=grad)
    torch.library.opcheck(torch.ops.nanodino.assignment_loss, (student, teacher, log_u, *rest))
    if not grad:
        torch.library.opcheck(torch.ops.nanodino.assignment_loss_, (student, teacher, log_u, *rest))
        torch.library.opcheck(torch.ops.nanodino.sinkhorn_pass, (teacher[0], None, 0.1))
        torch.library.opcheck(torch.ops.nanodino.sinkhorn_pass, (teacher[0], log_u, 0.1))
        torch.library.opcheck(torch.ops.nanodino.sinkhorn, (teacher[0], 0.1, 2))
        torch.library.opcheck(torch.ops.nanodino.sinkhorn_targets, (teacher[0], log_u, 0.1, torch.bfloat16))


x, u = torch.zeros(4, 8), torch.zeros(8)
loss = [torch.zeros(2, 3, 8), torch.zeros(1, 3, 8), u, torch.zeros(3), torch.zeros(2, 1), 0.1, 0.1]


def but(i, value):
    return "assignment_loss", [*loss[:i], value, *loss[i + 1:]]


@needs_build
@pytest.mark.parametrize("name, given, says", [
    ("sinkhorn_pass", [x[:, ::2], None, 0.1], r"sinkhorn_pass: logits has strides \[8, 2\]; wanted it contiguous"),
    ("sinkhorn_pass", [x.T, None, 0.1], "logits has strides"),
    ("sinkhorn_pass", [x[0], None, 0.1], r"sinkhorn_pass: logits is \[8\]; wanted \[-1, -1\] .*; reshape it"),
    ("sinkhorn_pass", [x, u[:7], 0.1], r"sinkhorn_pass: log_u is \[7\]; wanted \[8\]"),
    ("sinkhorn_pass", [x, u.double(), 0.1], "sinkhorn_pass: log_u is Double; wanted Float; cast it"),
    ("sinkhorn_pass", [x.half(), None, 0.1], "sinkhorn_pass: got Half on cpu; wanted float32, bfloat16"),
    ("sinkhorn", [x[:, ::2], 0.1, 3], r"sinkhorn: logits has strides \[8, 2\]; wanted it contiguous"),
    ("sinkhorn", [x, 0.1, 0], "sinkhorn: got 0 iterations; wanted 1 or more"),
    ("sinkhorn_targets", [x, u, 0.1, torch.int32], "sinkhorn_targets: got Int on cpu"),
    (*but(0, loss[0].transpose(0, 1)), r"assignment_loss: student has strides"),
    (*but(1, torch.zeros(1, 4, 8)), r"assignment_loss: teacher is \[1, 4, 8\]; wanted \[-1, 3, 8\]"),
    (*but(1, loss[1].bfloat16()), "assignment_loss: teacher is BFloat16; wanted Float"),
    (*but(2, u[::2]), r"assignment_loss: log_u is \[4\]; wanted \[8\]"),
    (*but(3, torch.zeros(2)), r"assignment_loss: weights is \[2\]; wanted \[3\]"),
    (*but(4, torch.zeros(1, 2)), r"assignment_loss: pairs is \[1, 2\]; wanted \[2, 1\]"),
])
def test_what_does_not_fit_is_refused_in_a_sentence(name, given, says):
    with pytest.raises(RuntimeError, match=says):
        getattr(torch.ops.nanodino, name)(*given)


def test_the_switch():
    cpu = torch.device("cpu")
    try:
        for choice, words in dict(auto="csrc", off="PyTorch").items():
            ops.use_kernels(choice)
            assert ops.describe(cpu).startswith(words if ops.BUILT else "PyTorch")
            assert ops.have("sinkhorn_pass", cpu) == (ops.BUILT and choice == "auto")
        assert ops.describe(torch.device("meta")).startswith("PyTorch")
        with pytest.raises(ValueError, match="--kernels fast is not known; choose auto, off or on"):
            ops.use_kernels("fast")
        if ops.BUILT:
            ops.use_kernels("on")
        else:
            with pytest.raises(ValueError, match="--kernels on: csrc is not built here; run python setup.py build_ext"):
                ops.use_kernels("on")
    finally:
        ops.use_kernels("auto")


@needs_build
def test_a_build_of_other_sources_says_so(tmp_path, monkeypatch):
    """By what they hold: a moved or copied checkout has other times, and the same kernels."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "ops.py"))
    assert ops.describe(torch.device("cpu")) == f"csrc {ops.LEVEL}"
    with open(tmp_path / "csrc/common.cuh", "a") as file:
        file.write("\n")
    assert "run python setup.py build_ext --inplace" in ops.describe(torch.device("cpu"))


def test_built_but_broken_fails_at_import(tmp_path):
    (tmp_path / "nanodino_C.py").write_text("raise ImportError('undefined symbol')")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "undefined symbol" in done.stderr and "python setup.py build_ext" in done.stderr


@pytest.mark.parametrize("missing, says", [
    (dict(CXX="no-such-compiler"), "nothing built: no C++ compiler"),
    (dict(CUDA_HOME="/no/such/toolkit"), "the CPU kernels"),
])
def test_setup_says_what_it_builds(missing, says):
    """--version runs the file, and builds nothing."""
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, env=os.environ | missing,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout or "no C++ compiler" in done.stdout
