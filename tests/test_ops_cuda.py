"""
The CUDA kernels without a GPU: csrc/*.cu on emulated threads (emulated.py) beside the equations in float64, in each
dtype, at sizes that are multiples of nothing; memory ends at protected pages and is NaN at first; two orders of blocks,
warps and lanes must give the same bits. What the emulator cannot execute, the assembly, is looked for in the machine
code, where there is an nvcc. Says nothing about speed. mutants.py plants faults and runs the same checks.
"""

import importlib.util
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest
import torch
from test_colours import crops as noise
from test_ops import exact_loss, exact_pass, loss_arguments, normal
from test_ops_attention import by_hand, error, make

import ops
from data import augment
from engine.proof import COLOURS
from ops import rotate

ROOT = Path(__file__).parents[1]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 3e-6, BF16: 2 ** -8, F16: 2 ** -11}
NVCC = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc"
needs_compiler = pytest.mark.skipif(not emulated.AVAILABLE, reason="needs Linux and g++")


def same_in_both_orders(run):
    """The tensors that run() returns, after it gave the same bits with all threads in order and backwards."""
    found = []
    for which in 1, 0:
        emulated.order(which)
        found.append(run())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "the order of threads changes the result"
    return found[0]


def off_by_one(x):
    """The same values, one element off a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

# --------------------------------------------------------------------------------
# The checks: each raises where the kernels are wrong


def check_sinkhorn(n, K, dtype, size=0.5, shift=lambda x: x, by_clusters=False):
    x, log_u, exact_u = shift(normal(n, K).mul(size).to(dtype)), None, None
    for _ in range(3):
        log_r, = same_in_both_orders(lambda u=log_u: [emulated.sinkhorn_pass(x, u, 0.06, by_clusters)])
        exact_u, log_u = -exact_pass(x, 0.06, exact_u), -log_r
        assert (log_u - exact_u).abs().max() < 4e-6 * max(8, exact_u.abs().max())
    return x, log_u, exact_u


def check_targets(n, K, dtype, targets, size=0.5, shift=lambda x: x):
    x, log_u = shift(normal(n, K).mul(size).to(dtype)), shift(normal(K, seed=1))
    exact = (x.double() / 0.06 + log_u).softmax(-1)
    q, = same_in_both_orders(lambda: [emulated.sinkhorn_targets(x, log_u, 0.06, targets)])
    assert q.dtype == targets and error(q, exact) < (1e-5 if targets == F32 else ROUNDING[targets])
    assert torch.allclose(q.double(), exact, rtol=ROUNDING[targets] + 1e-5, atol=6e-8 if targets == F16 else 1e-30)


def check_loss(S, T, B, K, dtype, overwrite=False, shift=lambda x: x, by_clusters=False):
    student, *rest = loss_arguments(S, T, B, K, dtype, "cpu")
    student, rest[3] = shift(student), rest[3] * 0.7                                # pairs
    x = student.double().requires_grad_()
    exact = exact_loss(x, *rest)
    exact.sum().backward()

    def run():
        if overwrite:
            grad = student.clone() if student.data_ptr() % 16 == 0 else off_by_one(student)
            return emulated.assignment_loss_(grad, *rest, by_clusters=by_clusters), grad
        return emulated.assignment_loss(student, *rest, by_clusters=by_clusters)
    losses, grad = same_in_both_orders(run)
    assert torch.allclose(losses.double(), exact.detach(), rtol=3e-6, atol=1e-6)
    largest = x.grad.abs().amax(-1, keepdim=True)
    over = (grad - x.grad).abs() - ROUNDING[dtype] * x.grad.abs() - 3e-6 * largest
    assert over.max() < 1e-7


def rounded(qkv, n_images, rope, A):
    """Attention and lse in float64, of queries and keys that are rounded once they are turned."""
    E, outs, sums = qkv.shape[1] // (3 * A), [], []
    for x, n, (cos, sin) in zip(qkv.split([n * len(cos) for n, (cos, _) in zip(n_images, rope, strict=True)]), n_images,
                                rope, strict=True):
        x = x.view(n, len(cos), 3, A, E)
        q, k = rotate(x[:, :, :2], cos, sin).double().permute(2, 0, 3, 1, 4)          # B A N E
        scores = q @ k.mT / E ** 0.5
        outs.append((scores.softmax(-1) @ x[:, :, 2].double().transpose(1, 2)).transpose(1, 2).flatten(0, 1).flatten(1))
        sums.append(scores.logsumexp(-1).transpose(0, 1).flatten(1) / math.log(2))     # A (B N)
    return torch.cat(outs), torch.cat(sums, 1)


def check_attention(n_images, grids, A, E, dtype, size=1, n_prefix=5, orders=2):
    """Beside float64, if scores are not too large for 16 bits; beside float64 of what is rounded where it rounds."""
    qkv, _, n_images, rope, A = make(n_images, grids, A, E, dtype, n_prefix)
    tables = [table for pair in rope for table in pair]
    qkv, found = qkv * size, []
    for which in range(orders):
        emulated.order(which)
        found.append(emulated.rope_attention(qkv, tables, n_images, A))
    emulated.order(0)
    (out, lse), *others = found
    assert all(torch.equal(a, b) for other in others for a, b in zip(found[0], other, strict=True))
    most, near = {BF16: 6e-3, F16: 8e-4}[dtype], rounded(qkv, n_images, rope, A)
    assert size > 1 or error(out, by_hand(qkv, n_images, rope, A)) < most     # measured: 3.5e-3, 4.2e-4
    assert error(out, near[0]) < most
    assert torch.allclose(lse.double(), near[1], rtol=1e-6, atol=1e-5)


def check_attention_nan(E):
    """One in a key of an image's second head: that head is lost, and nothing else changes a bit."""
    qkv, _, n_images, rope, A = make([2], [(4, 4)], 2, E, BF16)
    rest = [table for pair in rope for table in pair], n_images, A
    clean, _ = emulated.rope_attention(qkv, *rest)
    qkv[7, 3 * E + 20] = torch.nan
    out, _ = emulated.rope_attention(qkv, *rest)
    assert out[:21, E:].isnan().all()
    assert torch.equal(out[:21, :E], clean[:21, :E]) and torch.equal(out[21:], clean[21:])


def check_attention_nobody(E):
    """A group without images, and no group at all."""
    with_nobody, without = ([table for pair in x[3] for table in pair]
                            for x in (make([0, 2], [(4, 4), (2, 3)], 2, E, BF16), make([2], [(2, 3)], 2, E, BF16)))
    qkv = make([2], [(2, 3)], 2, E, BF16)[0]
    out, lse = emulated.rope_attention(qkv, with_nobody, [0, 2], 2)
    alone = emulated.rope_attention(qkv, without, [2], 2)
    assert torch.equal(out, alone[0]) and torch.equal(lse, alone[1])
    assert emulated.rope_attention(qkv[:0], [], [], 2)[0].shape == (0, 2 * E)


def check_not_by_clusters():
    """Other dtypes than bfloat16 go on by panels: the same bits."""
    for dtype in F16, F32:
        x, log_u = normal(3, 64).to(dtype), torch.zeros(64)
        assert torch.equal(*(emulated.sinkhorn_pass(x, log_u, 0.1, asked) for asked in (False, True)))


def check_clusters_nan():
    """One in a row: of Sinkhorn's sums nothing is left, of the losses all other rows, to the bit."""
    student, teacher, *rest = loss_arguments(1, 1, 6, 520, BF16, "cpu")
    clean = emulated.assignment_loss(student, teacher, *rest, by_clusters=True)
    student = student.clone()
    student[0, 3, 77] = torch.nan
    found = emulated.assignment_loss(student, teacher, *rest, by_clusters=True)
    others = torch.tensor([0, 1, 2, 4, 5])
    assert found[0].isnan().all() and found[1][0, 3].isnan().all()
    assert torch.equal(found[1][0, others], clean[1][0, others])
    assert emulated.sinkhorn_pass(student[0], rest[0], 0.1, True).isnan().all()


def check_refusal(off):
    """Attention reads by 16 bytes: what starts elsewhere is refused, not read."""
    qkv, _, n_images, rope, A = make([1], [(2, 2)], 1, 64, BF16)
    given = dict(qkv=qkv, cos=rope[0][0])
    given[off] = off_by_one(given[off])
    with pytest.raises(RuntimeError, match="rope_attention: misaligned address"):
        emulated.rope_attention(given["qkv"], [given["cos"], rope[0][1]], n_images, A)


def check_colours(H, W, shift=lambda x: x):
    """Byte for byte: the definition, normalised."""
    ops.use_kernels("off")
    crops, table, normal = shift(noise(len(COLOURS), H, W)), torch.tensor(COLOURS), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    exact = augment(crops, table, *normal)
    ops.use_kernels("auto")
    ours, = same_in_both_orders(lambda: [emulated.colours(crops, table, *normal)])
    assert torch.equal(ours, exact)


CHECKS = {  # name: check and its arguments; the smallest that reach each branch
    "sinkhorn, scalar, f32": (check_sinkhorn, 37, 1003, F32),
    "sinkhorn, scalar, bf16": (check_sinkhorn, 5, 271, BF16),
    "sinkhorn, two panels, bf16": (check_sinkhorn, 260, 264, BF16),
    "sinkhorn, two chunks, f16": (check_sinkhorn, 9, 8200, F16),
    "sinkhorn, vectors, f32": (check_sinkhorn, 6, 520, F32),
    "sinkhorn, off by one, bf16": (check_sinkhorn, 9, 64, BF16, 0.5, off_by_one),
    "sinkhorn, one row": (check_sinkhorn, 1, 8, F16),
    "sinkhorn, extreme": (check_sinkhorn, 20, 257, F32, 20),
    "sinkhorn, clusters, bf16": (check_sinkhorn, 11, 520, BF16, 0.5, lambda x: x, True),
    "sinkhorn, clusters, extreme": (check_sinkhorn, 5, 4104, BF16, 20, lambda x: x, True),
    "sinkhorn, clusters, one row": (check_sinkhorn, 1, 33_000, BF16, 0.5, lambda x: x, True),   # two groups of columns
    "sinkhorn, clusters, three groups": (check_sinkhorn, 3, 70_000, BF16, 0.5, lambda x: x, True),
    "sinkhorn, clusters, f16 and f32": (check_not_by_clusters,),
    "sinkhorn, clusters, off by one": (check_sinkhorn, 4, 64, BF16, 0.5, off_by_one, True),
    "targets, f32 to bf16": (check_targets, 2, 1003, F32, BF16),
    "targets, bf16 to f16": (check_targets, 2, 4104, BF16, F16),
    "targets, f16 to f32": (check_targets, 2, 264, F16, F32),
    "targets, off by one": (check_targets, 2, 64, BF16, BF16, 0.5, off_by_one),
    "loss, scalar, f32": (check_loss, 1, 1, 3, 1003, F32),
    "loss, scalar, bf16": (check_loss, 2, 1, 2, 271, BF16),
    "loss, crops, bf16": (check_loss, 5, 2, 3, 1000, BF16, True),
    "loss, crops, f16": (check_loss, 3, 2, 2, 5000, F16),
    "loss, too long to keep": (check_loss, 1, 1, 2, 60000, F32),
    "loss, clusters, bf16": (check_loss, 1, 1, 11, 520, BF16, True, lambda x: x, True),
    "loss, clusters, two groups": (check_loss, 1, 1, 3, 33_000, BF16, False, lambda x: x / 64, True),
    "loss, clusters, three groups": (check_loss, 1, 1, 2, 70_000, BF16, True, lambda x: x, True),
    "loss, clusters, off by one": (check_loss, 1, 1, 2, 64, BF16, True, off_by_one, True),
    "loss, clusters, one NaN": (check_clusters_nan,),
    "loss, off by one": (check_loss, 2, 2, 2, 64, BF16, True, off_by_one),
    "attention, two groups, 64, f16": (check_attention, [2, 3], [(7, 7), (2, 3)], 2, 64, F16),
    "attention, two groups, 128, bf16": (check_attention, [1, 2], [(3, 5), (1, 1)], 2, 128, BF16),
    "attention, three turns of a block": (check_attention, [5], [(4, 4)], 2, 64, BF16),
    "attention, two parts, 128": (check_attention, [2], [(16, 16)], 2, 128, BF16),
    "attention, the top rises": (check_attention, [2], [(7, 7)], 1, 64, BF16, 4),
    "attention, a key that is all": (check_attention, [1], [(5, 7)], 1, 128, F16, 4),
    **{f"attention, one NaN, {E}": (check_attention_nan, E) for E in (64, 128)},
    **{f"attention, nobody, {E}": (check_attention_nobody, E) for E in (64, 128)},
    **{f"attention, misaligned {name}": (check_refusal, name) for name in ("qkv", "cos")},
    "colours, by four": (check_colours, 44, 36),                        # two bands of the blur
    "colours, by one": (check_colours, 23, 37),
    "colours, off by one": (check_colours, 12, 16, off_by_one),
    "colours, narrower than the blur": (check_colours, 5, 6),
    "colours, too large to share": (check_colours, 280, 276),
}


@needs_compiler
@pytest.mark.parametrize("name", CHECKS)
def test_emulated_kernels_are_the_equations(name):
    check, *arguments = CHECKS[name]
    check(*arguments)


@needs_compiler
@pytest.mark.parametrize("n, K, first, next_", [(32, 600, 1, 2), (260, 264, 2, 4)])
def test_kernels_started_in_a_pass(n, K, first, next_):
    """Of a few rows the first pass is one kernel, the others two; a panel more is two more."""
    x, found = normal(n, K), []
    for log_u in None, torch.zeros(K):
        before = emulated.launches()
        emulated.sinkhorn_pass(x, log_u, 0.1)
        found.append(emulated.launches() - before)
    assert found == [first, next_]


@needs_compiler
@pytest.mark.parametrize("K, groups", [(520, 1), (33_000, 2), (98_304, 3)])
def test_clusters_read_a_row_once(K, groups):
    """Two kernels however many rows there are, sums and what adds them up. Ten orders give the same bits."""
    x, log_u = normal(5, K).bfloat16(), torch.zeros(K)
    found = []
    for which in range(10 if K == 520 else 1):
        emulated.order(which)
        before = emulated.launches()
        found.append(emulated.sinkhorn_pass(x, log_u, 0.1, True))
        assert emulated.launches() == before + 2
    emulated.order(0)
    assert all(torch.equal(x, found[0]) for x in found)
    teacher, rest = x[None], (log_u, torch.ones(5), torch.ones(1, 1), 0.1, 0.1)
    before = emulated.launches()
    emulated.assignment_loss(teacher, teacher, *rest, by_clusters=True)
    assert emulated.launches() == before + 1
    # two mailboxes, three sums of 128 warps of two rows; two rings of four rows, 16 bytes for each thread and group
    assert emulated.shared() == 2 * 8 + 2 * 3 * 128 * 8 + 2 * 4 * groups * 512 * 16 <= 232448


@needs_compiler
@pytest.mark.parametrize("E, dtype", [(64, BF16), (128, F16)], ids=str)
@pytest.mark.parametrize("grid", [(0, 0), (7, 7), (14, 14), (16, 16), (15, 21)], ids=str)
def test_attention_at_every_order_of_threads(grid, E, dtype):
    """N = 1, 54, 201, 261, 320; ten orders give the same bits."""
    check_attention([1], [grid], 1, E, dtype, n_prefix=1 if grid == (0, 0) else 5, orders=10)


@needs_compiler
@pytest.mark.parametrize("grid, E, shared", [
    ((16, 16), 64, 2 * 128 * (9 * 32 + 2 * 272)),   # N = 261: nine warps of 32 queries; all keys and values at once
    ((16, 16), 128, 2 * 256 * (9 * 16 + 2 * 144)),  # two blocks a head, keys in two parts
    ((15, 21), 64, 2 * 128 * (10 * 32 + 2 * 160)), ((15, 21), 128, 2 * 256 * (10 * 16 + 2 * 112)),
    ((2, 4), 64, 2 * 128 * (32 + 2 * 16))], ids=str)
def test_what_attention_shares(grid, E, shared):
    qkv, _, n_images, rope, A = make([1], [grid], 1, E, BF16)
    emulated.rope_attention(qkv, [table for pair in rope for table in pair], n_images, A)
    assert emulated.shared() == shared <= 232448                        # bytes; the most that a block may have


@needs_compiler
@pytest.mark.parametrize("name", ["sinkhorn", "assignment_loss", "colours", "rope_attention"])
def test_kernel_passes_its_own_check(name, tmp_path):
    """The mains that need no torch, for nvcc on a machine with a GPU."""
    source = ROOT / f"csrc/{name}.cu"
    one = emulated.compiled(source, ROOT / "csrc", ROOT / "build/emulated", ["-DALONE"])
    check = emulated.linked([one], tmp_path / "check")
    done = subprocess.run([check], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@needs_compiler
@pytest.mark.parametrize("fault", ["attention: no barrier", "loss: weight of another image",
                                   "sinkhorn: half the scratch"])
def test_a_fault_is_caught(fault):
    """A barrier, an index and a size; all the others: the next test."""
    mutants = importlib.import_module("mutants")
    assert fault in mutants.possible() and mutants.main([fault]) == 0


@needs_compiler
@pytest.mark.long
def test_every_fault_is_caught(capsys):
    assert importlib.import_module("mutants").main([]) == 0, capsys.readouterr().out

# --------------------------------------------------------------------------------
# The assembly, which no emulator executes


PROBE = """
#include "mma.cuh"
template <typename T> __global__ void product(float* c, const uint32_t* a) {
    float sum[4] = {c[0], c[1], c[2], c[3]};
    mma<T>(sum, {a[0], a[1], a[2], a[3]}, a[4], a[5]);
    for (int i = 0; i < 4; i++) c[i] = sum[i];
}
template <bool TRANSPOSED> __global__ void matrices(uint32_t* to) {
    uint32_t r[4];
    const void* row = shared_memory<char>() + threadIdx.x * 16;
    if (TRANSPOSED) load_matrices_transposed(r, row); else load_matrices(r, row);
    for (int i = 0; i < 4; i++) to[4 * threadIdx.x + i] = r[i];
}
__global__ void copy(float* x) {
    copy_async(shared_memory<float>() + threadIdx.x * 4, x, threadIdx.x < *x);
    wait_for_copies();
}
__global__ void power(float* x) { *x = exp2_fast(*x); }
__global__ void neighbours(float2* x) {
    uint64_t* box = shared_memory<uint64_t>();
    float2* place = (float2*)box + 1;
    if (threadIdx.x == 0) make_mailbox(box), expect(box, 8 * 32);
    meet_in_cluster();
    send(rank_in_cluster() ^ 1, place + threadIdx.x, x[0], box);
    wait_for(box, true);
    x[1] = place[0];
}
__global__ void groups(float* x) {
    copy_async(shared_memory<float>() + threadIdx.x * 4, x, true);
    end_group();
    wait_for_copies<2>();
}
template __global__ void product<__half>(float*, const uint32_t*);
template __global__ void product<__nv_bfloat16>(float*, const uint32_t*);
template __global__ void matrices<false>(uint32_t*);
template __global__ void matrices<true>(uint32_t*);
"""


def disassembler():
    """The toolkit's nvdisasm, or triton's."""
    triton = importlib.util.find_spec("triton")
    folders = [NVCC.parent, *([Path(triton.origin).parent / "backends/nvidia/bin"] if triton else [])]
    return shutil.which("nvdisasm", path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


def check_assembly(csrc, arch, folder):
    (folder / "probe.cu").write_text(PROBE)
    subprocess.run([NVCC, "-std=c++20", f"-arch={arch}", "-cubin", f"-I{csrc}", "probe.cu"], cwd=folder, check=True)
    code = subprocess.run([disassembler(), "-c", folder / "probe.cubin"], capture_output=True, text=True).stdout
    known = r"\b(HMMA|LDSM|MUFU|LDGSTS|LDGDEPBAR|DEPBAR|STAS|SYNCS|UCGABAR)(\.LE SB0, \w+|\S*)"
    kernels = {name: re.findall(known, body)
               for name, body in re.findall(r"\n\.text\.(\w+):\n(.*?)(?=\n\.text\.|\Z)", code, flags=re.S)}
    assert kernels == {
        "_Z7productI6__halfEvPfPKj": [("HMMA", ".16816.F32")],
        "_Z7productI13__nv_bfloat16EvPfPKj": [("HMMA", ".16816.F32.BF16")],
        "_Z8matricesILb0EEvPj": [("LDSM", ".16.M88.4")],
        "_Z8matricesILb1EEvPj": [("LDSM", ".16.MT88.4")],
        "_Z5powerPf": [("MUFU", ".EX2")],
        "_Z4copyPf": [("LDGSTS", ".E.BYPASS.128"), ("LDGDEPBAR", ""), ("DEPBAR", ".LE SB0, 0x0")],
        "_Z6groupsPf": [("LDGSTS", ".E.BYPASS.128"), ("LDGDEPBAR", ""), ("DEPBAR", ".LE SB0, 0x2")],
        "_Z10neighboursP6float2": arch == "sm_90a" and [
            ("SYNCS", ".EXCH.64"), ("SYNCS", ".ARRIVE.TRANS64"), ("UCGABAR", "_ARV"), ("UCGABAR", "_WAIT"),
            ("STAS", ".64"), *[("SYNCS", ".PHASECHK.TRANS64.TRYWAIT")] * 2] or [],
    }


@pytest.mark.skipif(not NVCC.exists() or not disassembler(), reason="needs nvcc and nvdisasm")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_assembly_becomes_the_instructions_it_names(arch, tmp_path):
    check_assembly(ROOT / "csrc", arch, tmp_path)


@pytest.mark.skipif(not NVCC.exists(), reason="needs nvcc")
@pytest.mark.parametrize("name", ["sinkhorn", "assignment_loss"])
def test_clusters_fit_their_registers(name, tmp_path):
    """One block of 512 threads to a multiprocessor, which has 65,536 of them; nothing spilled."""
    flags = "-std=c++20", "-O3", "-arch=sm_90a", "-cubin", "--ptxas-options=-v", "-o", tmp_path / "cubin"
    done = subprocess.run([NVCC, *flags, ROOT / f"csrc/{name}.cu"], capture_output=True, text=True)
    said = re.findall(r"Compiling entry function '\w+by_clusters\w+'(.*?)Used (\d+) registers", done.stderr, re.S)
    assert len(said) == 3 and max(int(n) for _, n in said) * 512 <= 65_536
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in each for each, _ in said)


@pytest.mark.skipif(not NVCC.exists(), reason="needs nvcc")
def test_attention_fits_its_registers(tmp_path):
    """Three warps to a quarter of a multiprocessor, which has 16,384 of them; nothing spilled."""
    flags = "-std=c++20", "-O3", "-arch=sm_90a", "-cubin", "--ptxas-options=-v", "-o", tmp_path / "attention.cubin"
    done = subprocess.run([NVCC, *flags, ROOT / "csrc/rope_attention.cu"], capture_output=True, text=True)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 4 and max(registers) * 32 * 3 <= 16384     # measured: 164, 168
    assert done.stderr.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 4


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("name", ["sinkhorn_cpu", "assignment_loss_cpu", "rope_attention_cpu", "colours_cpu",
                                  "cut_cpu"])
def test_cpu_kernel_passes_its_own_check(name, tmp_path):
    """Without -march=native: with the vectors of the oldest machine, not only this one's."""
    source = str(ROOT / f"csrc/{name}.cpp")
    subprocess.run(["g++", "-std=c++20", "-O1", "-w", "-DALONE", source, "-o", str(tmp_path / "check")], check=True)
    done = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
