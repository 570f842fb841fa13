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
ATTENTION, MMA, COLOURS, PIXELS = "rope_attention.cu", "mma.cuh", "colours.cu", "colours.h"
CLUSTERS = "clusters.cuh"
USED = {SINKHORN: ([SINKHORN], ["sinkhorn", "targets"]), LOSS: ([LOSS], ["loss"]),  # by which sources, which checks
        ROWS: ([SINKHORN], ["sinkhorn"]), COMMON: ([SINKHORN], ["targets", "sinkhorn"]),
        CLUSTERS: ([SINKHORN, LOSS], ["sinkhorn, clusters", "loss, clusters"]),
        ATTENTION: ([ATTENTION], ["attention"]), MMA: ([], ["assembly"]),
        COLOURS: ([COLOURS], ["colours"]), PIXELS: ([COLOURS], ["colours"])}
WAIT, TURN = (f"            {line}\n" for line in (
    "wait_for_copies();", "turn_rows<T, E>(ks, part * keys, keys, group);"))
ANGLE = "(first + row) * (E / 2) + one"
BARRIER, INNER = "    __syncthreads();\n", "        __syncthreads();\n"

MUTANTS = {  # name: file, old text, new text; every place of the old text
    # barriers
    "columns: after v": (SINKHORN, BARRIER + "#pragma unroll 4", "#pragma unroll 4"),
    "columns: before the warps' sums": (SINKHORN, "= sum[j];\n" + BARRIER, "= sum[j];\n"),
    "first columns: before the warps' sums": (SINKHORN, "= total[j];\n" + BARRIER, "= total[j];\n"),
    "targets: before the warps' sums": (SINKHORN, BARRIER + "    total = shared", "    total = shared"),
    "rows: before the warps' sums": (ROWS, BARRIER + "    if (warp < ROWS)", "    if (warp < ROWS)"),
    "loss: before the warps' sums": (LOSS, BARRIER + "\n", "\n"),
    "loss: before the warps' dots": (LOSS, BARRIER + "    if (warp == 0)", "    if (warp == 0)"),
    # groups, indices, strides
    "loss: rows of the teacher": (LOSS, "teacher + (t * B + b) * K", "teacher + (t + b * T) * K"),
    "loss: parts of the teacher": (LOSS, "(c * T + warp) * B + b", "(c * T + warp) * B"),
    "loss: weight of another image": (LOSS, "weights[b]", "weights[0]"),
    "loss: pair of another crop": (LOSS, "pairs[s * T + t]", "pairs[t * T + t]"),
    "columns: earlier panels": (SINKHORN, "is_first ? 0 : sums[column]", "0"),
    "first columns: last strip": (SINKHORN, "s < strips; s++", "s < strips - 1; s++"),
    "rows: row within the part": (ROWS, "[blockIdx.y * n + first + warp]", "[blockIdx.y + first + warp]"),
    "bf16: load8 swaps": (COMMON, "j % 2 ? two", "j % 2 == 0 ? two"),
    "f16: load8 backwards": (COMMON, "out[i + j] = to_float(pack.values[j])",
                             "out[N == 8 ? 7 - j : i + j] = to_float(pack.values[j])"),
    "bf16: store8 backwards": (COMMON, "pack.values[j] = from_float<T>(in[i + j])",
                               "pack.values[j] = from_float<T>(in[N == 8 ? 7 - j : i + j])"),
    # sizes
    "loss: half the shared memory": (LOSS, "keep ? all : least", "keep ? all / 2 : least"),
    "sinkhorn: half the scratch": (SINKHORN, "return 2 * std::max", "return std::max"),
    "columns: beyond the last column": (SINKHORN, "    if (VECTOR) k = min(k, K - 8);  // past", "    // past"),
    "scalar: one beyond the row": (COMMON, "out[j] = k + j < K ?", "out[j] = k + j <= K ?"),
    "scalar: writes one beyond the row": (COMMON, "if (k + j < K) row", "if (k + j <= K) row"),
    "vectors: wherever rows start": (COMMON, "(((uintptr_t)rows % 16 == 0) && ...)", "((uintptr_t)rows && ...)"),
    # masks, scales, rounding, sums
    "f16: as if bfloat16": (SINKHORN, "return run((const __half*)logits)", "return run((const __nv_bfloat16*)logits)"),
    "f16: a bit less": (COMMON, "return __float2half_rn(v);",
                        "return __half{(uint16_t)(__float2half_rn(v).bits & ~1)};"),
    "bf16: cut, not rounded": (COMMON, "return __float2bfloat16_rn(v);",
                               "return __nv_bfloat16{(uint16_t)(same_bits<uint32_t>(v) >> 16)};"),
    "sums: not shrunk when the top rises": (ROWS, "sum *= exp2_fast(before - top);", ""),
    "warp: half of it": (COMMON, "lane = 16; lane; lane /= 2) v += ", "lane = 8; lane; lane /= 2) v += "),
    "loss: gradient in log2 units": (LOSS, "weight * student_scale * LN2;", "weight * student_scale;"),
    "loss: mass of one crop": (LOSS, "mass += pair;", "mass = pair;"),
    # clusters
    "clusters: nobody waits": (CLUSTERS, "        wait_for(&boxes[i % 2], i / 2 % 2 == 0);\n", ""),
    "clusters: waits for the row before the last": (CLUSTERS, "i / 2 % 2 == 0)", "i / 2 % 2 == 1)"),
    "clusters: not met at first": (CLUSTERS, "        meet_in_cluster();\n", ""),
    "clusters: half of what is told": (CLUSTERS, "sizeof of_warps / 2", "sizeof of_warps / 4"),
    "clusters: expected once": (
        CLUSTERS, "        if (threadIdx.x == 0) expect(&boxes[i % 2], sizeof of_warps / 2);\n", ""),
    "clusters: one mailbox": (CLUSTERS, "sum, &boxes[i % 2]", "sum, &boxes[0]"),
    "clusters: one place for all rows": (CLUSTERS, "of_warps[i % 2]", "of_warps[0]"),
    "clusters: told in one's own place": (CLUSTERS, "rank_in_cluster() * WARPS + warp", "warp"),
    "clusters: seven blocks are told": (CLUSTERS, "if (lane < SIZE)", "if (lane < SIZE - 1)"),
    "clusters: parts as they are": (CLUSTERS, "parts[j].y * exp2_fast(parts[j].x - top)", "parts[j].y"),
    "clusters: rows of all": (CLUSTERS, "stride(by * K)", "stride(K)"),
    "clusters: rows from the first on": (CLUSTERS, "x(x + first * K + ", "x(x + "),
    "clusters: a row too few": (CLUSTERS, "left((n - first + by - 1) / by)", "left((n - first) / by)"),
    "clusters: rows without an end": (CLUSTERS, "if (left > 0) copy", "copy"),
    "clusters: columns beyond the last": (CLUSTERS, "there[g] = column<G>(g) < K;", "there[g] = true;"),
    "clusters: a ring of three": (CLUSTERS, "to = (to + 1) % STAGES", "to = (to + 1) % (STAGES - 1)"),
    "clusters: read from three": (CLUSTERS, "from = (from + 1) % STAGES", "from = (from + 1) % (STAGES - 1)"),
    "clusters: groups of others": (CLUSTERS, "rank_in_cluster() * G + g)", "rank_in_cluster() + g)"),
    "clusters: u beyond the last column": (CLUSTERS, "* LOG2E : -1e9f", "* LOG2E : 0.f"),
    "clusters: the top of half the columns": (CLUSTERS, "int i = 0; i < 8 * G", "int i = 0; i < 4 * G"),
    "clusters: wherever rows start": (CLUSTERS, "&& vectors(K, rows...)", ""),
    "clusters: sums read too early": (SINKHORN, "wait_for_copies<STAGES - 2>", "wait_for_copies<STAGES - 1>"),
    "clusters: the top of the first row": (SINKHORN, "        top = next;\n", ""),
    "clusters: no powers of the last row": (SINKHORN, "p[c / 8][c % 8] = z[c / 8][c % 8];", "p[c / 8][c % 8] = 0;"),
    "clusters: parts of one": (SINKHORN, "parts + first * K", "parts"),
    "clusters: a part is left out": (SINKHORN, "c < count; c++", "c < count - 1; c++"),
    "clusters: u stays in": (SINKHORN, "log_of(0, total, log_u[k]);\n}", "log_of(0, total, 0);\n}"),
    "clusters: logits read too early": (LOSS, "wait_for_copies<STAGES - 2>", "wait_for_copies<STAGES - 1>"),
    "clusters: student beyond the last column": (LOSS, "* student_scale : -1e9f", "* student_scale : 0.f"),
    "clusters: dots of another top": (LOSS, "warp_sum(dot * exp2_fast(own_q.top - of_q.top))", "warp_sum(dot)"),
    "clusters: gradient of another top": (LOSS, "exp2_fast(own_q.top - of_q.top) * of_sum", "of_sum"),
    "clusters: loss of no block": (LOSS, "rank_in_cluster() == 0 && threadIdx.x == 0", "rank_in_cluster() == SIZE"),
    "clusters: weight of another row": (LOSS, "weights[b] * pairs[0]", "weights[0] * pairs[0]"),
    "clusters: no pair": (LOSS, "weights[b] * pairs[0] * LN2", "weights[b] * LN2"),
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
    # attention
    "attention: nobody waits for copies": (ATTENTION, WAIT, ""),
    "attention: waits after turning": (ATTENTION, WAIT + TURN, TURN + WAIT),
    "attention: no barrier": (ATTENTION, "            __syncthreads();", ""),
    "attention: the next copies before the barrier": (
        ATTENTION, WAIT, WAIT + "            if (head + gridDim.x < group.n * A) "
        "begin(head + gridDim.x, 0, buffer ^ 1, slot ^ 1);\n"),
    "attention: keys of the other buffer": (ATTENTION, "ks = k + buffer * keys", "ks = k + (buffer ^ 1) * keys"),
    "attention: values of the other buffer": (ATTENTION, "vs = v + buffer * keys", "vs = v + (buffer ^ 1) * keys"),
    "attention: one buffer for all": (ATTENTION, "part++, buffer ^= 1", "part++"),
    "attention: one place for queries": (ATTENTION, "gridDim.x, slot ^= 1", "gridDim.x"),
    "attention: copies into the buffer in use": (ATTENTION, "buffer ^ 1, slot ^ 1)", "buffer, slot ^ 1)"),
    "attention: keys read without the swizzle": (
        ATTENTION, "k + j * E + place<E>(lane / 16 * 8 + lane % 8, 2 * e + lane / 8 % 2)",
        "k + (j + lane / 16 * 8 + lane % 8) * E + 16 * e + lane / 8 % 2 * 8"),
    "attention: values read without the swizzle": (
        ATTENTION, "v + j * E + place<E>(lane % 16, 2 * e + lane / 16)",
        "v + (j + lane % 16) * E + 16 * e + lane / 16 * 8"),
    "attention: results put without the swizzle": (ATTENTION, "place<E>(g, n) + 2 * t", "g * E + 8 * n + 2 * t"),
    "attention: results read at once": (ATTENTION, "        __syncwarp();\n", ""),
    "attention: keys beyond the image": (ATTENTION, "c % 2 >= n)", "c % 2 >= n + 1)"),
    "attention: no mask": (ATTENTION, "if (j + 16 > n) {", "if (false) {"),
    "attention: rows beyond the image": (ATTENTION, "from + other * 8, first + row < N)", "from + other * 8, true)"),
    "attention: results beyond the image": (ATTENTION, "if (row < left) *", "if (true) *"),
    "attention: lse beyond the image": (ATTENTION, "t == 0 && row < left", "t == 0"),
    "attention: keys turned by the next angles": (ATTENTION, ANGLE, ANGLE.replace("row", "row + 1")),
    "attention: keys turned by the first part's angles": (ATTENTION, ANGLE, ANGLE.replace("(first + row)", "row")),
    "attention: queries turned by other angles": (ATTENTION, "+ 16 * e + i / 2 * 8", "+ 16 * e + i % 2 * 8"),
    "attention: queries turned by the first block's angles": (ATTENTION, "first + mine + 16 * m,", "mine + 16 * m,"),
    "attention: odd rows turned back": (ATTENTION, "group.sin + at, row % 2)", "group.sin + at, false)"),
    "attention: values turned": (ATTENTION, TURN, TURN + TURN.replace("ks", "vs")),
    "attention: scale of E = 64": (ATTENTION, "LOG2E * rsqrtf(E)", "LOG2E * rsqrtf(64)"),
    "attention: the top of two lanes": (ATTENTION, "__shfl_xor_sync(~0u, most[half], 2)", "most[half]"),
    "attention: the top never rises": (ATTENTION, "SLACK = 8;", "SLACK = 1e3;"),
    "attention: old sums not shrunk": (ATTENTION, "tile.sum[half] *= shrink", "tile.sum[half] *= 1"),
    "attention: old results not shrunk": (ATTENTION, "tile.o[n][2 * half] *= shrink, ", ""),
    "attention: lse of another head": (ATTENTION, "lse[a * n_tokens + token", "lse[a * N + token"),
    "attention: first of the group": (ATTENTION, "group.first + head", "head"),
    "attention: queries of the first block": (ATTENTION, "first = first_of(slot)", "first = 0"),
    "attention: queries of another turn": (ATTENTION, "D, first_of(slot), rows", "D, first_of(slot ^ 1), rows"),
    "attention: keys of the first part": (ATTENTION, "x + D, 3 * D, part * keys", "x + D, 3 * D, 0"),
    "attention: a second tile is left out": (ATTENTION, "left > 16)", "left > 32)"),
    "attention: shared memory of one buffer": (ATTENTION, "queries + 4 * keys * row", "queries + 2 * keys * row"),
    "attention: f16 as if bfloat16": (ATTENTION, "dtype == Dtype::f16 ?", "dtype == Dtype::bf16 ?"),
    "attention: wherever rows start": (ATTENTION, "if (!aligned(*g, out, qkv)) return", "if (false) return"),
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
