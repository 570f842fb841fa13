"""
The CUDA kernels on a CPU: torch.ops.nanodino.* of csrc/*.cu, built by g++ with cuda_on_cpu.h in place of CUDA.

    sinkhorn_pass sinkhorn_targets assignment_loss assignment_loss_ rope_attention rope_attention_backward colours
                        the operators' arguments and results, of CPU tensors;  RuntimeError where a kernel leaves its
                        memory, or a launcher refuses
    order(which)        of blocks, warps and lanes: 0 as numbered, 1 backwards, else drawn;  no bit may differ
    launches(), shared()    kernels started so far; bytes that a block of the last shared
    AVAILABLE           whether there is a g++;  the library is built at the first call, a few seconds, and kept

Tensors are copied to memory that ends at a protected page, and as far off a multiple of 16 bytes as they are here;
results are NaN until a kernel writes them. Slow: a product of 16 x 8 x 16 takes microseconds.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import ops

ROOT = Path(__file__).parents[1]
AVAILABLE = sys.platform == "linux" and shutil.which("g++") is not None
SOURCES = "sinkhorn.cu", "assignment_loss.cu", "rope_attention.cu", "colours.cu"
FLAGS = """-std=c++20 -O1 -w -fPIC -ffp-contract=off -fno-strict-aliasing -fno-gnu-unique -U_FORTIFY_SOURCE -DWITH_CUDA
           -fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error""".split()
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
library = None

# --------------------------------------------------------------------------------
# Building


def compiled(source, csrc, build, flags=()):
    """The object file of a source, made anew only if it, a header or the flags changed."""
    stubs = build / "stubs"
    stubs.mkdir(parents=True, exist_ok=True)
    for name in "cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h":  # cuda_on_cpu.h comes before them
        (stubs / name).touch()
    emulator = ROOT / "tests/cuda_on_cpu.h"
    words = ["g++", *FLAGS, *flags, "-x", "c++", "-include", str(emulator), f"-I{stubs}", f"-I{csrc}"]
    headers = [emulator, *sorted(csrc.glob("*.h")), *sorted(csrc.glob("*.cuh"))]
    text = b"\0".join([" ".join([*FLAGS, *flags]).encode(), *(path.read_bytes() for path in [source, *headers])])
    out = build / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}.o"
    if not out.exists():
        part = out.with_suffix(f".{os.getpid()}")
        subprocess.run([*words, "-c", str(source), "-o", str(part)], check=True)
        part.replace(out)
    return out


def linked(objects, out, *flags):
    part = out.with_suffix(f".{os.getpid()}")
    subprocess.run(["g++", *flags, *map(str, objects), "-o", str(part)], check=True)
    return part.replace(out)


def built(changed=None, names=(), build=ROOT / "build/emulated", jobs=2):
    """Path of the shared library of csrc/, in which `names` come from the folder `changed`."""
    folders = [(ROOT / "csrc" if name not in names else changed, name) for name in SOURCES]
    sources = [*((folder, folder / name) for folder, name in folders), (ROOT / "csrc", ROOT / "tests/emulated.cpp")]
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda pair: compiled(pair[1], pair[0], build), sources))
    name = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:16]
    out = build / f"emulated-{name}.so"
    return out if out.exists() else linked(objects, out, "-shared")


def load(path=None):
    """Takes the kernels of this library from here on; without a path those of csrc/."""
    global library
    library = ctypes.CDLL(str(path or built()))
    library.emulated_allocate.restype = ctypes.c_void_p
    library.emulated_words.restype = ctypes.c_char_p
    return library


def order(which):
    (library or load()).emulated_order(which)


def launches():
    return (library or load()).emulated_launches()


def shared():
    return (library or load()).emulated_shared()

# --------------------------------------------------------------------------------
# Calling


class Group(ctypes.Structure):
    _fields_ = [("first", ctypes.c_int64), ("n", ctypes.c_int64), ("N", ctypes.c_int64), ("cos", ctypes.c_void_p),
                ("sin", ctypes.c_void_p)]


class Device:
    """Memory of the emulated device, for one call: tensors go there, results come back."""

    def __init__(self):
        self.lib, self.there = library or load(), {}

    def new(self, tensor, residue=0):
        size = tensor.numel() * tensor.element_size()
        at = self.lib.emulated_allocate(ctypes.c_size_t(size), ctypes.c_size_t(residue))
        self.there[at] = tensor, size
        return ctypes.c_void_p(at)

    def give(self, tensor):
        """Where the device has it; None stays None."""
        if tensor is None:
            return None
        at = self.new(tensor.detach().contiguous(), tensor.data_ptr() % 16)
        tensor, size = self.there[at.value]
        ctypes.memmove(at, tensor.data_ptr(), size)
        return at

    def take(self, at):
        tensor, size = self.there[at.value]
        out = torch.empty(tensor.shape, dtype=tensor.dtype)
        ctypes.memmove(out.data_ptr(), at, size)
        return out

    def call(self, name, *arguments):
        kinds = {int: ctypes.c_int64, float: ctypes.c_double}
        self.check(name, getattr(self.lib, name)(*(kinds.get(type(x), lambda x: x)(x) for x in arguments)))

    def check(self, name, status):
        if status:
            raise RuntimeError(f"{name}: {self.lib.emulated_words(status).decode()}")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        status = [self.lib.emulated_free(ctypes.c_void_p(at)) for at in self.there]
        if kind is None:
            self.check("what lies beside a tensor was written", max(status, default=0))


def taken(by_clusters):
    """As asked, else as ops' extension has been told."""
    return int(torch.ops.nanodino.clusters() if by_clusters is None and ops.BUILT else by_clusters or 0)


def sinkhorn_pass(logits, log_u, temperature, by_clusters=None):
    with Device() as device:
        n, K = logits.shape
        log_r = device.give(torch.full((K,), -torch.inf)) if n == 0 else device.new(torch.empty(K))
        device.call("sinkhorn_pass", log_r, device.give(logits), device.give(log_u), n, K, float(temperature),
                    taken(by_clusters), DTYPES[logits.dtype])
        return device.take(log_r)


def sinkhorn(logits, temperature, iterations):
    """What ops.py does on CUDA, where no kernel takes all passes at once."""
    log_u = None
    for _ in range(iterations):
        log_u = -sinkhorn_pass(logits, log_u, temperature)
    return log_u


def sinkhorn_targets(logits, log_u, temperature, dtype):
    with Device() as device:
        q = device.new(torch.empty(logits.shape, dtype=dtype))
        device.call("sinkhorn_targets", q, DTYPES[dtype], device.give(logits), device.give(log_u), *logits.shape,
                    float(temperature), DTYPES[logits.dtype])
        return device.take(q)


def run_assignment_loss(student, teacher, log_u, weights, pairs, student_temp, teacher_temp, by_clusters, overwrite):
    (S, B, K), T = student.shape, len(teacher)
    with Device() as device:
        losses, x = device.new(torch.empty(S, B)), device.give(student)
        grad = x if overwrite else device.new(torch.empty(student.shape, dtype=student.dtype))
        rest = [device.give(each) for each in (teacher, log_u, weights, pairs)]
        device.call("assignment_loss", losses, grad, x, *rest, S, T, B, K, float(student_temp), float(teacher_temp),
                    taken(by_clusters), DTYPES[student.dtype])
        return device.take(losses).sum(1), device.take(grad)


def assignment_loss(*arguments, by_clusters=None):
    return run_assignment_loss(*arguments, by_clusters, False)


def assignment_loss_(student, *rest, by_clusters=None):
    losses, grad = run_assignment_loss(student, *rest, by_clusters, True)
    student.copy_(grad)
    return losses


def rope_groups(device, tables, n_images):
    groups, first = (Group * max(1, len(n_images)))(), 0
    for i, n in enumerate(n_images):
        cos, sin = tables[2 * i], tables[2 * i + 1]
        groups[i] = Group(first, n, len(cos), device.give(cos), device.give(sin))
        first += n * len(cos)
    return groups


def rope_attention(qkv, tables, n_images, heads):
    T, D = len(qkv), qkv.shape[1] // 3
    with Device() as device:
        out, lse = device.new(torch.empty(T, D, dtype=qkv.dtype)), device.new(torch.empty(heads, T))
        device.call("rope_attention", out, lse, device.give(qkv), rope_groups(device, tables, n_images),
                    len(n_images), T, heads, D // heads, DTYPES[qkv.dtype])
        return device.take(out), device.take(lse)


def colours(crops, table, mean, std):
    numbers = ctypes.c_float * 3
    scale, shift = numbers(*(1 / (255 * s) for s in std)), numbers(*(-m / s for m, s in zip(mean, std, strict=True)))
    with Device() as device:
        out = device.new(torch.empty(crops.shape))
        device.call("colours", out, device.give(crops), device.give(table), len(crops), *crops.shape[2:], scale, shift)
        return device.take(out)
