"""
The levels of the CPU kernels, all in one extension: the same bits from each that this processor has, wherever the files
lie; which one runs, and who says so.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ops

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not ops.BUILT, reason="csrc is not built")
DIGEST = """
import hashlib, torch, ops
def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
found = hashlib.sha256()
def add(*tensors):
    for x in tensors:
        found.update(x.detach().contiguous().view(torch.uint8).numpy().tobytes())
ops.use_kernels("on")
for dtype in torch.float32, torch.bfloat16:
    for n, K, spread in (37, 1003, .5), (5, 4099, 30), (130, 264, .5), (2, 33000, 1):
        x, log_u = (normal(n, K) * spread).to(dtype), None
        for _ in range(3):
            log_u = -ops.sinkhorn_pass(x, .06, log_u)
            add(log_u)
        add(ops.sinkhorn(x, .06, 1), ops.sinkhorn(x, .06, 3))
        add(ops.sinkhorn_targets(x, .06, log_u), ops.sinkhorn_targets(x, .06, log_u, torch.bfloat16))
        student = normal(3, n, K, seed=1).to(dtype).requires_grad_()
        pairs = torch.tensor([[0, 1.], [1, 0], [.5, .5]])
        losses = ops.assignment_loss(student, torch.stack([x, x.flip(0)]), log_u, normal(n).abs(), pairs, .1, .06)
        losses.sum().backward()
        add(losses, student.grad)
    for N, A, E in (14, 2, 64), (54, 1, 128), (21, 3, 12), (201, 1, 64):
        angles = normal(N, 1, 1, E // 2)
        qkv = normal(2 * N, 3 * A * E).to(dtype).requires_grad_()
        out, lse = torch.ops.nanodino.rope_attention(qkv, [angles.cos(), angles.sin()], [2], A)
        out.backward(normal(2 * N, A * E, seed=2).to(dtype))
        add(out, lse, qkv.grad)
from engine.proof import COLOURS
for H, W in (16, 64), (13, 37):
    crops = torch.randint(0, 256, (len(COLOURS), 3, H, W), generator=torch.Generator().manual_seed(3)).byte()
    add(torch.ops.nanodino.colours(crops, torch.tensor(COLOURS), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
image = torch.randint(0, 256, (90, 70, 3), generator=torch.Generator().manual_seed(4)).byte().permute(2, 0, 1)
add(*(torch.ops.nanodino.cut(image, (3, 5, 80, 61), True, size) for size in (17, 64, 100)))
print(ops.LEVEL, found.hexdigest())
"""


def python(*words, level, cwd=ROOT):
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"NANODINO_CPU": level, "PYTHONPATH": "", "ATEN_CPU_CAPABILITY": "default"})


def test_all_levels_give_the_same_bits_in_a_moved_checkout(tmp_path):
    """The C library's logarithms among them, and PyTorch's one way of adding up: its own levels stay out of it."""
    shutil.copy(ops.nanodino_C.__file__, tmp_path)
    for name in "ops.py", "engine", "csrc":
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    found = [python("-c", DIGEST, level=level, cwd=tmp_path) for level in ops.LEVELS]
    assert not any(run.returncode for run in found), [run.stderr for run in found]
    names, digests = zip(*(run.stdout.rsplit(maxsplit=1) for run in found), strict=True)
    assert list(names) == ops.LEVELS
    assert len(set(digests)) == 1


@pytest.mark.parametrize("level", ["fast", "avx1024"])
def test_a_level_that_is_not_there_is_named(level):
    run = python("train.py", "--steps", "1", level=level)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert f"NANODINO_CPU={level}: this processor has {', '.join(ops.LEVELS)}; choose one" in run.stderr


def test_the_level_is_named():
    says = dict(baseline="csrc baseline, attention by sdpa" if len(ops.LEVELS) > 1 else "csrc baseline",
                avx2="csrc avx2", avx512="csrc avx512")
    for level in ops.LEVELS:
        run = python("-c", "import ops, torch; print(ops.describe(torch.device('cpu')))", level=level)
        assert run.stdout == says[level] + "\n", run.stderr


def test_levels_share_no_symbol():
    """Else the linker would keep one level's copy, and a processor without its instructions would run it."""
    folder = next((Path(ROOT, "build").glob("temp.*")), None)
    if not shutil.which("nm") or folder is None:
        pytest.skip("needs nm and the objects of a build")
    shared = {}
    for file in sorted(folder.rglob("*_cpu_*.o")):
        listed = subprocess.run(["nm", "--defined-only", file], capture_output=True, text=True, check=True).stdout
        for name in re.findall(r" [A-Zuvw] (\S+)$", listed, re.M):
            shared.setdefault(name, set()).add(file.name)
    assert shared and {name: files for name, files in shared.items() if len(files) > 1} == {}
