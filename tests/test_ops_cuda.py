"""
The CUDA kernels that need no tensor cores, run without a GPU: their own checks (ALONE), compiled as C++ with the few
parts of CUDA that they use written out (cuda_on_cpu.h). Finds wrong indices and barriers; says nothing about speed.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))  # its headers know bfloat16 on the host
needs_headers = pytest.mark.skipif(not (TOOLKIT / "include/cuda_bf16.h").exists() or not shutil.which("g++"),
                                   reason="needs g++ and the CUDA toolkit's headers")


def as_cpp(source):
    """What only nvcc reads, in C++."""
    source = re.sub(r'asm\("ex2.*?;.*?;', "e = z < -126 ? 0.f : ::exp2f(z);", source, flags=re.S)
    source = source.replace("extern __shared__ uint4 memory[]", "uint4* memory = (uint4*)dynamic_memory.data()")
    source = source.replace("__shared__", "static").replace("__global__", "").replace("__device__", "")
    source = re.sub(r"(\w+(?:<[^;<>]*>)?)<<<(.*?), (\w+), ([^,]*?), stream>>>\((.*?)\);",
                    r"run_kernel(\2, \3, \4, [=] { \1(\5); });", source, flags=re.S)
    source = source.replace("dim3(", "Dim(").replace("defined(__CUDACC__)", "1")
    return re.sub(r"(?<![\w:])min\(", "std::min<int64_t>(", source)


def run_check(name, source, folder):
    """Compiles the source of csrc/<name>.cu and runs its main."""
    for file in ("common.cuh", "kernels.h"):
        (folder / file).write_text(as_cpp((ROOT / "csrc" / file).read_text()))
    (folder / f"{name}.cu").write_text(as_cpp(source))
    (folder / "main.cpp").write_text(f'#include "cuda_on_cpu.h"\n#include "{name}.cu"\n')
    subprocess.run(["g++", "-std=c++20", "-O1", "-w", "-DALONE", f"-I{TOOLKIT / 'include'}", f"-I{folder}",
                    f"-I{ROOT / 'tests'}", "main.cpp", "-o", "check"], cwd=folder, check=True)
    return subprocess.run([folder / "check"], capture_output=True, text=True)


@needs_headers
@pytest.mark.parametrize("name", ["sinkhorn", "assignment_loss"])
def test_kernel_passes_its_own_check(name, tmp_path):
    done = run_check(name, (ROOT / f"csrc/{name}.cu").read_text(), tmp_path)
    assert done.returncode == 0 and "no error" in done.stdout, done.stdout


@needs_headers
def test_a_wrong_index_would_be_noticed(tmp_path):
    source = (ROOT / "csrc/sinkhorn.cu").read_text()
    broken = source.replace("shared[0][warp][lane * 8 + j] = sum[j]", "shared[0][warp][lane + 32 * j] = sum[j]")
    assert broken != source and run_check("sinkhorn", broken, tmp_path).returncode


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("name", ["sinkhorn_cpu", "assignment_loss_cpu"])
def test_cpu_kernel_passes_its_own_check(name, tmp_path):
    """Without -march=native: with the vectors of the oldest machine, not only this one's."""
    source = str(ROOT / f"csrc/{name}.cpp")
    subprocess.run(["g++", "-std=c++20", "-O1", "-w", "-DALONE", source, "-o", str(tmp_path / "check")], check=True)
    done = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
