"""
Plants faults in copies of csrc/*.cu and runs the checks of test_ops_cuda.py on each: all must be caught.

    python tests/mutants.py [NAME...]     prints the table; exit code 1 if a fault survives, or cannot be planted
"""

import multiprocessing
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import emulated  # noqa: E402
import test_ops_cuda  # noqa: E402

SINKHORN, LOSS, ROWS, COMMON = "sinkhorn.cu", "assignment_loss.cu", "row_sums.cuh", "common.cuh"
FORWARD, BACKWARD, ROPE = "rope_attention_forward.cu", "rope_attention_backward.cu", "rope_attention.cuh"
RESIDENT = "rope_attention_resident.cu"
MMA, COLOURS, PIXELS = "mma.cuh", "colours.cu", "colours.h"
USED = {SINKHORN: ([SINKHORN], ["sinkhorn", "targets"]), LOSS: ([LOSS], ["loss"]),  # by which sources, which checks
        ROWS: ([SINKHORN], ["sinkhorn"]), COMMON: ([SINKHORN], ["targets", "sinkhorn"]),
        FORWARD: ([FORWARD], ["attention"]), BACKWARD: ([BACKWARD], ["attention"]),
        RESIDENT: ([RESIDENT], ["resident"]), ROPE: ([FORWARD, BACKWARD], ["attention"]), MMA: ([], ["assembly"]),
        COLOURS: ([COLOURS], ["colours"]), PIXELS: ([COLOURS], ["colours"])}
WAIT, TURN = (f"            {line}\n" for line in (
    "wait_for_copies();", "turn_rows<T, E>(ks, part * keys, keys, group);"))
ANGLE = "(first + row) * (E / 2) + one"
BARRIER, INNER = "    __syncthreads();\n", "        __syncthreads();\n"

MUTANTS = {  # name: file, old text, new text; every place of the old text
    # barriers
    "forward: before keys are replaced": (FORWARD, INNER + "        fetch_rows<T, E>(k", "        fetch_rows<T, E>(k"),
    "forward: after keys came": (FORWARD, "j, KEYS, N);\n" + INNER, "j, KEYS, N);\n"),
    "dq: before keys are replaced": (BACKWARD, INNER + "        fetch_rows<T, E>(k", "        fetch_rows<T, E>(k"),
    "dq: after keys came": (BACKWARD, "j, KEYS, N);\n" + INNER, "j, KEYS, N);\n"),
    "dq: after dout came": (BACKWARD, "D, i, rows, N);\n" + BARRIER, "D, i, rows, N);\n"),
    "dq: lanes read delta at once": (BACKWARD, "    __syncwarp();\n", ""),
    "dkdv: before queries are replaced": (BACKWARD, INNER + "        fetch_rows<T, E>(q", "        fetch_rows<T, E>(q"),
    "dkdv: after queries came": (BACKWARD, "        }\n" + INNER, "        }\n"),
    "columns: after v": (SINKHORN, BARRIER + "#pragma unroll 4", "#pragma unroll 4"),
    "columns: before the warps' sums": (SINKHORN, "= sum[j];\n" + BARRIER, "= sum[j];\n"),
    "first columns: before the warps' sums": (SINKHORN, "= total[j];\n" + BARRIER, "= total[j];\n"),
    "targets: before the warps' sums": (SINKHORN, BARRIER + "    total = shared", "    total = shared"),
    "rows: before the warps' sums": (ROWS, BARRIER + "    if (warp < ROWS)", "    if (warp < ROWS)"),
    "loss: before the warps' sums": (LOSS, BARRIER + "\n", "\n"),
    "loss: before the warps' dots": (LOSS, BARRIER + "    if (warp == 0)", "    if (warp == 0)"),
    # groups, indices, strides
    "forward: first of the group": (FORWARD, "group.first + image * N", "image * N"),
    "backward: first of the group": (BACKWARD, "group.first + image * N", "image * N"),
    "forward: second block's queries": (FORWARD, "% blocks * (int64_t)rows", "% blocks * (int64_t)128"),
    "dq: delta of another image": (BACKWARD, "delta[at] = sum", "delta[at - group.first] = sum"),
    "forward: lse of another head": (FORWARD, "lse[a * n_tokens + token", "lse[a * N + token"),
    "dkdv: part beside shift": (BACKWARD, "*part = shift + M", "*part = shift + 32"),
    "loss: rows of the teacher": (LOSS, "teacher + (t * B + b) * K", "teacher + (t + b * T) * K"),
    "loss: parts of the teacher": (LOSS, "(c * T + warp) * B + b", "(c * T + warp) * B"),
    "loss: weight of another image": (LOSS, "weights[b]", "weights[0]"),
    "loss: pair of another crop": (LOSS, "pairs[s * T + t]", "pairs[t * T + t]"),
    "columns: earlier panels": (SINKHORN, "is_first ? 0 : sums[column]", "0"),
    "first columns: last strip": (SINKHORN, "s < strips; s++", "s < strips - 1; s++"),
    "rows: row within the part": (ROWS, "[blockIdx.y * n + first + warp]", "[blockIdx.y + first + warp]"),
    "bf16: load8 backwards": (COMMON, "out[i + j] = to_float(pack.values[j])",
                              "out[N == 8 ? 7 - j : i + j] = to_float(pack.values[j])"),
    "bf16: store8 backwards": (COMMON, "pack.values[j] = from_float<T>(in[i + j])",
                               "pack.values[j] = from_float<T>(in[N == 8 ? 7 - j : i + j])"),
    # sizes
    "dkdv: shared memory without lse": (BACKWARD, "QUERIES<E> * (2 * row + 8)", "QUERIES<E> * (2 * row)"),
    "forward: shared memory of keys alone": (FORWARD, "(s.warps * 16 + 2 * KEYS)", "(s.warps * 16 + KEYS)"),
    "loss: half the shared memory": (LOSS, "keep ? all : least", "keep ? all / 2 : least"),
    "sinkhorn: half the scratch": (SINKHORN, "return 2 * std::max", "return std::max"),
    "columns: beyond the last column": (SINKHORN, "    if (VECTOR) k = min(k, K - 8);  // past", "    // past"),
    "scalar: one beyond the row": (COMMON, "out[j] = k + j < K ?", "out[j] = k + j <= K ?"),
    "scalar: writes one beyond the row": (COMMON, "if (k + j < K) row", "if (k + j <= K) row"),
    "fetch: beyond the image": (ROPE, "if (n < N) {", "if (true) {"),
    "put: beyond the image": (ROPE, "if (n >= N) continue;", ""),
    "vectors: wherever rows start": (COMMON, "(((uintptr_t)rows % 16 == 0) && ...)", "((uintptr_t)rows && ...)"),
    "attention: wherever rows start": (BACKWARD, "if (!aligned(*g, dqkv, dout, qkv, out)) return", "if (false) return"),
    # masks, scales, rounding, sums
    "forward: keys beyond the image": (FORWARD, "c % 2 < N ? s[n][c]", "c % 2 < N + 1 ? s[n][c]"),
    "forward: scale of E = 64": (FORWARD, "LOG2E * rsqrtf(E)", "LOG2E * rsqrtf(64)"),
    "forward: old keys not shrunk": (FORWARD, "sum[half] *= shrink", "sum[half] *= 1"),
    "dq: without delta": (BACKWARD, "ds[n][c] = p * (ds[n][c] - part[c / 2])", "ds[n][c] = p * ds[n][c]"),
    "dk: not scaled": (BACKWARD, "N, dk, {scale, scale}", "N, dk, {1, 1}"),
    "put: turned on, not back": (ROPE, "low[0] = a[0] * x.x + high[0] * z.x", "low[0] = a[0] * x.x - high[0] * z.x"),
    "f16: as if bfloat16": (SINKHORN, "return run((const __half*)logits)", "return run((const __nv_bfloat16*)logits)"),
    "f16: attention as if bfloat16": (FORWARD, "dtype == Dtype::f16 ?", "dtype == Dtype::bf16 ?"),
    "f16: a bit less": (COMMON, "return __float2half_rn(v);",
                        "return __half{(uint16_t)(__float2half_rn(v).bits & ~1)};"),
    "bf16: cut, not rounded": (COMMON, "return __float2bfloat16_rn(v);",
                               "return __nv_bfloat16{(uint16_t)(same_bits<uint32_t>(v) >> 16)};"),
    "sums: not shrunk when the top rises": (ROWS, "sum *= exp2_fast(before - top);", ""),
    "warp: half of it": (COMMON, "lane = 16; lane; lane /= 2) v += ", "lane = 8; lane; lane /= 2) v += "),
    "loss: gradient in log2 units": (LOSS, "weight * student_scale * LN2;", "weight * student_scale;"),
    "loss: mass of one crop": (LOSS, "mass += pair;", "mass = pair;"),
    # colours
    "colours: before the warps' sums": (COLOURS, "= v;\n    __syncthreads();", "= v;"),
    "colours: before the blur": (COLOURS, BARRIER + "    float taps[5];", "    float taps[5];"),
    "colours: before rows are blurred across": (COLOURS, INNER + "        for (int y = t", "        for (int y = t"),
    "colours: before the ring is filled again": (COLOURS, INNER + "    }\n}", "    }\n}"),
    "colours: another row of the ring": (COLOURS, "(y + EDGE + t) % rows", "(y + EDGE + t + 1) % rows"),
    "colours: rows that the last band left": (COLOURS, "top ? top + EDGE : -EDGE", "top ? top + EDGE + 1 : -EDGE"),
    "colours: another crop": (COLOURS, "table + (int64_t)blockIdx.x * 12", "table"),
    "colours: half the ring": (COLOURS, "HEAD + 4 * beside * width", "HEAD + 2 * beside * width"),
    "colours: scratch of one crop": (COLOURS, "? 0 : n * 3", "? 0 : 3"),
    "colours: by four wherever rows start": (COLOURS, "(uintptr_t)crops % 4 == 0", "true"),
    "colours: what came before contrast": (COLOURS, "if (INSIDE || done) x = copy;", ""),
    "colours: not solarised without a blur": (COLOURS, "recipe.solarize && j < N", "false && j < N"),
    "colours: edges mirrored with themselves": (PIXELS, "2 * n - 2 - i", "2 * n - 1 - i"),
    "colours: mean cut, not rounded": (PIXELS, "(2 * sum + n) / (2 * n)", "sum / n"),
    "colours: luma cut, not rounded": (PIXELS, " + 32768.f", ""),
    "colours: blend rounded": (PIXELS, "(to - from) * factor, V{}", "(to - from) * factor + 0.5f, V{}"),
    "colours: hue not around the circle": (PIXELS, "hue >= V{} + 256.f ? hue - 256.f : hue", "hue"),
    "colours: lowest channel of another": (PIXELS, "red ? p.g : green ? p.b : p.r", "red ? p.b : green ? p.r : p.g"),
    "colours: saturation rounded": (PIXELS, "max(top, one) * 255.f)", "max(top, one) * 255.f + 0.5f)"),
    "colours: solarised a level off": (PIXELS, "min(v, V{} + 255.f - v)", "min(v, V{} + 256.f - v)"),
    "colours: taps not normalised": (PIXELS, "t ? 2 * weights[t]", "t ? weights[t]"),
    # resident attention
    "resident: nobody waits for copies": (RESIDENT, WAIT, ""),
    "resident: waits after turning": (RESIDENT, WAIT + TURN, TURN + WAIT),
    "resident: no barrier": (RESIDENT, "            __syncthreads();", ""),
    "resident: the next copies before the barrier": (
        RESIDENT, WAIT, WAIT + "            if (head + gridDim.x < group.n * A) begin(head + gridDim.x, 0, buffer ^ 1, "
        "slot ^ 1);\n"),
    "resident: keys of the other buffer": (RESIDENT, "ks = k + buffer * keys", "ks = k + (buffer ^ 1) * keys"),
    "resident: values of the other buffer": (RESIDENT, "vs = v + buffer * keys", "vs = v + (buffer ^ 1) * keys"),
    "resident: one buffer for all": (RESIDENT, "part++, buffer ^= 1", "part++"),
    "resident: one place for queries": (RESIDENT, "gridDim.x, slot ^= 1", "gridDim.x"),
    "resident: copies into the buffer in use": (RESIDENT, "buffer ^ 1, slot ^ 1)", "buffer, slot ^ 1)"),
    "resident: keys read without the swizzle": (
        RESIDENT, "k + j * E + place<E>(lane / 16 * 8 + lane % 8, 2 * e + lane / 8 % 2)",
        "k + (j + lane / 16 * 8 + lane % 8) * E + 16 * e + lane / 8 % 2 * 8"),
    "resident: values read without the swizzle": (
        RESIDENT, "v + j * E + place<E>(lane % 16, 2 * e + lane / 16)",
        "v + (j + lane % 16) * E + 16 * e + lane / 16 * 8"),
    "resident: results put without the swizzle": (RESIDENT, "place<E>(g, n) + 2 * t", "g * E + 8 * n + 2 * t"),
    "resident: results read at once": (RESIDENT, "        __syncwarp();\n", ""),
    "resident: keys beyond the image": (RESIDENT, "c % 2 >= n)", "c % 2 >= n + 1)"),
    "resident: no mask": (RESIDENT, "if (j + 16 > n) {", "if (false) {"),
    "resident: rows beyond the image": (RESIDENT, "from + other * 8, first + row < N)", "from + other * 8, true)"),
    "resident: results beyond the image": (RESIDENT, "if (row < left) *", "if (true) *"),
    "resident: lse beyond the image": (RESIDENT, "t == 0 && row < left", "t == 0"),
    "resident: keys turned by the next angles": (RESIDENT, ANGLE, ANGLE.replace("row", "row + 1")),
    "resident: keys turned by the first part's angles": (RESIDENT, ANGLE, ANGLE.replace("(first + row)", "row")),
    "resident: queries turned by other angles": (RESIDENT, "+ 16 * e + i / 2 * 8", "+ 16 * e + i % 2 * 8"),
    "resident: queries turned by the first block's angles": (RESIDENT, "first + mine + 16 * m,", "mine + 16 * m,"),
    "resident: odd rows turned back": (RESIDENT, "group.sin + at, row % 2)", "group.sin + at, false)"),
    "resident: values turned": (RESIDENT, TURN, TURN + TURN.replace("ks", "vs")),
    "resident: scale of E = 64": (RESIDENT, "LOG2E * rsqrtf(E)", "LOG2E * rsqrtf(64)"),
    "resident: the top of two lanes": (RESIDENT, "__shfl_xor_sync(~0u, most[half], 2)", "most[half]"),
    "resident: the top never rises": (RESIDENT, "SLACK = 8;", "SLACK = 1e3;"),
    "resident: old sums not shrunk": (RESIDENT, "tile.sum[half] *= shrink", "tile.sum[half] *= 1"),
    "resident: old results not shrunk": (RESIDENT, "tile.o[n][2 * half] *= shrink, ", ""),
    "resident: lse of another head": (RESIDENT, "lse[a * n_tokens + token", "lse[a * N + token"),
    "resident: first of the group": (RESIDENT, "group.first + head", "head"),
    "resident: queries of the first block": (RESIDENT, "first = first_of(slot)", "first = 0"),
    "resident: queries of another turn": (RESIDENT, "D, first_of(slot), rows", "D, first_of(slot ^ 1), rows"),
    "resident: keys of the first part": (RESIDENT, "x + D, 3 * D, part * keys", "x + D, 3 * D, 0"),
    "resident: a second tile is left out": (RESIDENT, "left > 16)", "left > 32)"),
    "resident: shared memory of one buffer": (RESIDENT, "queries + 4 * keys * row", "queries + 2 * keys * row"),
    "resident: f16 as if bfloat16": (RESIDENT, "dtype == Dtype::f16 ?", "dtype == Dtype::bf16 ?"),
    "resident: wherever rows start": (RESIDENT, "if (!aligned(*g, out, qkv)) return", "if (false) return"),
    # what is never executed
    "assembly: products of float16": (MMA, 'MMA("f16")', 'MMA("bf16")'),
    "assembly: not transposed": (MMA, ".x4.trans.", ".x4."),
}


def survivor(name, folder):
    """None if a check fails with this fault planted; else what was found."""
    file, old, new = MUTANTS[name]
    csrc = folder / "csrc"
    shutil.copytree(emulated.ROOT / "csrc", csrc)
    text = (csrc / file).read_text()
    if old not in text:
        return f"{file} has no {old!r}"
    (csrc / file).write_text(text.replace(old, new))
    sources, prefixes = USED[file]
    try:
        emulated.load(emulated.built(csrc, sources, jobs=1))
    except subprocess.CalledProcessError:
        return "DOES NOT COMPILE"
    for prefix in prefixes:
        for check, *arguments in checks(prefix, csrc, folder):
            try:
                check(*arguments)
            except (AssertionError, RuntimeError):
                return None
    return "NOT CAUGHT"


def checks(prefix, csrc, folder):
    if prefix == "assembly":
        return [(test_ops_cuda.check_assembly, csrc, "sm_80", folder)]
    return [check for name, check in test_ops_cuda.CHECKS.items() if name.startswith(prefix)]


def run(name):
    """name, None or what went wrong, seconds"""
    torch.set_num_threads(1)
    start = time.perf_counter()
    signal.alarm(300)  # for a loop without an end: the process dies, and with it the table
    with tempfile.TemporaryDirectory() as folder:
        wrong = survivor(name, Path(folder))
    signal.alarm(0)
    return name, wrong, time.perf_counter() - start


def possible():
    """The faults that can be planted on this machine."""
    assembly = test_ops_cuda.NVCC.exists() and test_ops_cuda.disassembler()
    return [name for name, (file, *_) in MUTANTS.items() if file != MMA or assembly]


def main(names):
    unknown = set(names) - set(MUTANTS)
    if unknown:
        print(f"mutants: {sorted(unknown)} are not known; choose of {list(MUTANTS)}", file=sys.stderr)
        return 2
    emulated.built()
    survivors = 0
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        for name, wrong, seconds in pool.map(run, names or possible()):
            survivors += wrong is not None
            print(f"{name:42} {MUTANTS[name][0]:28} {seconds:5.1f} s  {wrong or 'caught'}", flush=True)
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
