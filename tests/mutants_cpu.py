"""
Plants faults in copies of csrc/sinkhorn_cpu.cpp and runs the tests of all passes at once on each: all must be caught.

    python tests/mutants_cpu.py [WORD]     prints the table, of names that hold WORD; exit code 1 if a fault survives
"""

import ctypes
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import test_ops  # noqa: E402

import ops  # noqa: E402

MUTANTS = {  # name: old text, new text; every place of the old text
    "none": ("", ""),
    "a tile of other columns": ("x + b * K + first, there", "x + b * K, there"),
    "u beyond the last column": ("k < there ? 1 / r[k] : 0", "1 / r[k]"),
    "rows that four leave over, in r": ("for (; b < n; b++) add_to_r<1>", "for (; b < n - 1; b++) add_to_r<1>"),
    "rows that four leave over, in sums": ("for (; b < n; b++) row_dots<1>", "for (; b < n - 1; b++) row_dots<1>"),
    "v of another row": ("splat(v[i]), total)", "splat(v[0]), total)"),
    "v as it was": ("v[b] = mean / total;", "v[b] = v[b];"),
    "sums of one tile": ("tile < tiles; tile++) total +=", "!tile; tile++) total +="),
    "drift stays in": ("drift - r[k]", "-r[k]"),
    "drift of all iterations": ("(iterations - 1) * std::log", "iterations * std::log"),
    "drift out of range": ("mean = (float)K / n, drift", "mean = 1, drift"),
    "exponentials of no pass": ("b < n && !pass; b++", "b < n && false; b++"),
    "one pass less": ("last = pass == iterations - 1", "last = pass == std::max<int64_t>(iterations - 2, 0)"),
    "never in logarithms": ("return fine;\n}\n\n// ---", "return true;\n}\n\n// ---"),
    "always in logarithms": ("const bool keep = n &&", "const bool keep = false &&"),
    "small columns are fine": ("r[k] > 0x1p-60f && ", ""),
    "large columns are fine": (" && r[k] < 0x1p60f", ""),
    "lower rows are fine": ("total > 0x1p-24f && ", ""),
    "columns from 2^-50 alone": ("r[k] > 0x1p-60f", "r[k] > 0x1p-50f"),
    "rows from 2^-10 alone": ("total > 0x1p-24f", "total > 0x1p-10f"),
    "kept whatever its size": ("4 * n * K <= KEPT", "true"),
}
SHAPES = [(1, 5), (3, 16), (37, 1003), (70, 1857), (300, 500)]
CHANGES = next(mark.args[1] for mark in test_ops.test_what_products_cannot_hold_is_done_in_logarithms.pytestmark
               if mark.name == "parametrize")


def compiled(text, folder):
    """sinkhorn as ops.py calls it, of this source, for the level that runs."""
    flags = dict(avx2=["-mavx2", "-mfma"], avx512=["-march=native"]).get(ops.LEVEL, [])
    source, library = folder / "mutant.cpp", folder / "mutant.so"
    source.write_text(text)
    subprocess.run(["g++", "-shared", "-fPIC", "-O3", "-std=c++20", "-ffp-contract=off", "-fopenmp", *flags,
                    f"-DLEVEL={ops.LEVEL}", f"-I{ROOT / 'csrc'}", source, "-o", library], check=True,
                   capture_output=True)
    names = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    run, scratch = (getattr(ctypes.CDLL(library), next(word for word in names.split() if name in word))
                    for name in ("12sinkhorn_cpu", "20sinkhorn_scratch_cpu"))
    scratch.restype, long = ctypes.c_int64, ctypes.c_int64

    def sinkhorn(logits, temperature, iterations):
        (n, K), dtype = logits.shape, 0 if logits.dtype == torch.float32 else 2
        log_u = torch.full((K,), torch.nan)
        work = torch.ones(scratch(long(n), long(K), 2) + 1)
        work[-1] = 7
        run(*(ctypes.c_void_p(x.data_ptr()) for x in (log_u, logits, work)), long(n), long(K),
            ctypes.c_double(temperature), long(iterations), dtype, 2)
        assert work[-1] == 7
        return log_u
    return sinkhorn


def survives(sinkhorn):
    try:
        with patch.object(torch.ops.nanodino, "sinkhorn", sinkhorn):
            for shape, iterations in itertools.product(SHAPES, (1, 2, 3)):
                test_ops.test_all_passes_at_once_are_those_of_float64(*shape, torch.float32, iterations, "cpu")
            for change in CHANGES:
                test_ops.test_what_products_cannot_hold_is_done_in_logarithms("auto", change)
            test_ops.test_what_products_hold_is_not("auto")
    except AssertionError:
        return False
    return True


def main(word=""):
    text, wrong = (ROOT / "csrc" / "sinkhorn_cpu.cpp").read_text(), []
    for name, (old, new) in MUTANTS.items():
        if word not in name:
            continue
        if old not in text:
            print(f"mutants: {name}: no {old!r} in sinkhorn_cpu.cpp", file=sys.stderr)
            return 2
        with tempfile.TemporaryDirectory() as folder:
            alive = survives(compiled(text.replace(old, new) if old else text, Path(folder)))
        print(f"{name:40} {'survives' if alive else 'caught'}", flush=True)
        wrong += [name] if alive != (name == "none") else []
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
