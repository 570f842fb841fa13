"""
Every speed claim beside its baseline, in one run: interleaved, medians, on the machine at hand.

    python bench.py              all
    python bench.py forward      ViT-S, 8 images of 256 px: ours beside transformers' DINOv3ViTModel (needs extra: test)
    python bench.py data         crops of one image for training: images per second of one core
    python bench.py sinkhorn     balanced assignments: ours beside the textbook's and what torch.compile makes of it
    python bench.py loss         the same with the cross-entropy and its gradient
    python bench.py attention    RoPE and attention: ours beside what is written elsewhere, and the errors of both
"""

import math
import re
import statistics
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import ops
from data import Batches, open_source
from engine import config as command_line
from losses import assignments, ibot_loss, sinkhorn_knopp
from model import SIZES, ViT, rope_tables
from train import RECIPES


def medians(functions, rounds):
    """Seconds of each function, median over rounds in which each runs once, so that noise meets all alike."""
    times = {name: [] for name in functions}
    for i in range(rounds + 2):  # two to warm up
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def forward():
    try:
        from transformers import DINOv3ViTConfig, DINOv3ViTModel
    except ImportError as error:
        raise ValueError("bench forward: transformers is not installed; pip install -e '.[test]'") from error
    c = SIZES["s"]
    ours = ViT(c).eval()
    theirs = DINOv3ViTModel(DINOv3ViTConfig(
        hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads, intermediate_size=c.hidden,
        num_register_tokens=c.n_registers, attn_implementation="sdpa")).eval()
    for dtype in torch.float32, torch.bfloat16:
        images = torch.randn(8, 3, 256, 256, dtype=dtype)
        both = dict(ours=ours.to(dtype), transformers=theirs.to(dtype))
        t = medians({name: lambda vit=vit, x=images: vit(x) for name, vit in both.items()}, 15)
        print(f"forward ViT-S 8x256 px {str(dtype)[6:]:9} ours {1e3 * t['ours']:7.1f} ms   transformers "
              f"{1e3 * t['transformers']:7.1f} ms   ratio {t['transformers'] / t['ours']:.2f}")


def data():
    source = open_source("shapes", 64)
    for name in "tiny", "l":
        c = replace(RECIPES[name], batch=64, group=16)
        c = replace(c, patch_size=c.vit.patch_size)
        batches = Batches(c, source, 0, 64)
        t = medians(dict(batch=lambda b=batches: b[0]), 5)["batch"]
        print(f"data    crops of recipe {name:5} {64 / t:7.1f} images/s, {torch.get_num_threads()} threads")


# --------------------------------------------------------------------------------
# RoPE attention


CPU_SHAPES = [  # images, patches a side, heads, head width: 3 to 16 a side are tiny's and the recipes' crops
    ([64], [3], 6, 64), ([64], [4], 6, 64), ([64], [5], 6, 64), ([32], [7], 6, 64), ([16], [14], 6, 64),
    ([16], [16], 6, 64), ([8], [16], 3, 128), ([2], [32], 6, 64)]
GPU_SHAPES = [([128], [16], 16, 64), ([32], [16], 32, 128), ([512], [7], 16, 64), ([76], [7], 32, 128),
              ([16], [32], 16, 64), ([16], [48], 32, 128), ([128, 512], [16, 7], 16, 64), ([19, 76], [16, 7], 32, 128)]


def attention_written_out(qkv, n_images, rope, heads):
    """The base: q and k turned in float32 by cat and rotate-half, heads transposed to the front, SDPA."""
    out, start, wide = [], 0, torch.promote_types(qkv.dtype, torch.float32)
    for n, (cos, sin) in zip(n_images, rope, strict=True):
        N, end = len(cos), start + n * len(cos)
        cos, sin = (torch.cat([x, x], dim=-1).view(N, -1) for x in (cos, sin))                # N E
        q, k, v = qkv[start:end].view(n, N, 3, heads, -1).permute(2, 0, 3, 1, 4)              # B A N E
        q, k = ((x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin).to(v.dtype)
                for x in (q.to(wide), k.to(wide)))
        out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n * N, -1))
        start = end
    return torch.cat(out)


def without_kernels(function, *arguments):
    ops.use_kernels("off")
    try:
        return function(*arguments)
    finally:
        ops.use_kernels("auto")


def both_ways(function, qkv, grad, *rest):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, *rest)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


def attention_arguments(device, dtype, n_images, sides, heads, E):
    periods = 100 ** (torch.arange(E // 4) / (E // 4))
    rope = [tuple(x[0].to(device) for x in rope_tables(side, side, 5, periods, [1.0])) for side in sides]
    T = sum(n * len(cos) for n, (cos, _) in zip(n_images, rope, strict=True))
    qkv, grad = (torch.randn(T, k * heads * E, device=device, dtype=dtype) for k in (3, 1))
    return qkv, grad, n_images, rope, heads


def attention_error(function, device, dtype, n_images, *shape):
    """The larger relative error, of the result and of its gradient, against float64, for one image of each size."""
    qkv, grad, *rest = attention_arguments(device, dtype, [1] * len(n_images), *shape)
    exact = both_ways(attention_written_out, qkv.double(), grad.double(), *rest)
    pairs = zip(both_ways(function, qkv, grad, *rest), exact, strict=True)
    return max(((ours - true).norm() / true.norm()).item() for ours, true in pairs)


def best_backend(dtype, n_images, sides, heads, E):
    """The fastest of SDPA's backends for the largest of these shapes on the GPU, forward and backward."""
    x = torch.randn(n_images[0], heads, sides[0] ** 2 + 5, E, device="cuda", dtype=dtype, requires_grad=True)
    runs = {}
    for backend in SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION:
        def run(backend=backend):
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(x, x, x).sum().backward()
        try:
            run()
        except RuntimeError:  # it was not built, or not for this shape
            continue
        runs[backend] = run
    times = medians(runs, 10)
    return min(times, key=times.get)


def attention():
    gpu = torch.cuda.is_available()
    if not gpu:
        print("attention    no GPU here: its shapes are not measured")
    if not ops.have("rope_attention", torch.device("cuda" if gpu else "cpu")):
        print("attention    csrc is not built: what is called ours is the definition")
    for *shape, dtype in [(*shape, dtype) for shape in (GPU_SHAPES if gpu else CPU_SHAPES)
                          for dtype in ([] if gpu else [torch.float32]) + [torch.bfloat16]]:
        device, (n_images, sides, heads, E) = "cuda" if gpu else "cpu", shape
        backend = best_backend(dtype, *shape) if gpu else None
        qkv, grad, *rest = attention_arguments(device, dtype, *shape)
        functions = dict(base=attention_written_out, definition=partial(without_kernels, ops.rope_attention),
                         ours=ops.rope_attention)
        if gpu or sides == [16]:  # on a CPU it takes 10 s to compile
            torch.compiler.reset()  # its caches hold few shapes
            functions["compiled"] = partial(without_kernels, torch.compile(ops.rope_attention))
        if len(n_images) > 1:
            sizes = [n * len(cos) for n, (cos, _) in zip(n_images, rest[1], strict=True)]
            functions["calls"] = lambda x, n_images, rope, A, sizes=sizes: torch.cat([
                ops.rope_attention(x, [n], [r], A) for x, n, r in zip(x.split(sizes), n_images, rope, strict=True)])
        with sdpa_kernel(backend) if gpu else nullcontext():
            runs = [{name: partial(torch.no_grad()(f), qkv, *rest) for name, f in functions.items()},
                    {name: partial(both_ways, f, qkv, grad, *rest) for name, f in functions.items()}]
            times = [medians(each, 15) for each in runs]
            memory = {name: peak_memory(runs[1][name]) for name in ("base", "ours")} if gpu else {}
        flop = 4 * heads * E * sum(n * (side * side + 5) ** 2 for n, side in zip(n_images, sides, strict=True))
        print(f"attention    {str(dtype)[6:]} B {n_images} N {[side * side + 5 for side in sides]} A {heads} E {E}"
              f"  error {attention_error(ops.rope_attention, device, dtype, *shape):.1e}, of the base "
              f"{attention_error(attention_written_out, device, dtype, *shape):.1e}"
              + "".join(f"  peak of {name} {size / 1e6:.0f} MB" for name, size in memory.items()), flush=True)
        for what, t, products in zip(("forward", "both ways"), times, (1, 3.5), strict=True):
            print(f"  {what:9} " + "   ".join(f"{name} {1e3 * seconds:8.3f} ms" for name, seconds in t.items())
                  + f"   base/ours {t['base'] / t['ours']:.2f}   best of the others/ours "
                  f"{min(v for k, v in t.items() if k not in ('ours', 'calls')) / t['ours']:.2f}   "
                  f"{products * flop / t['ours'] / 1e9:.0f} GFLOP/s", flush=True)


def peak_memory(function):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before

# --------------------------------------------------------------------------------
# Sinkhorn-Knopp and the cross-entropies: rows and prototypes of the heads' logits


def textbook_sinkhorn(logits):
    q = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / 0.07).exp()            # n K
    for _ in range(3):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def textbook_loss(student, logits):
    x, q = student.detach().requires_grad_(), textbook_sinkhorn(logits)
    loss = -(q * (x.to(q.dtype) / 0.1).log_softmax(-1)).sum(-1).mean()
    return torch.autograd.grad(loss, x)[0]


def our_loss(student, logits):
    x, weights = student.detach().requires_grad_(), torch.ones(len(logits), device=logits.device)
    return torch.autograd.grad(ibot_loss(x, assignments(logits, 0.07), weights, len(logits)), x)[0]


def peak(function):
    """MB that a call adds to what is held before it; on the CPU of Linux, from what the kernel counts."""
    if torch.cuda.is_available():
        return peak_memory(function) / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1])
        function()
        return (int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) - before) / 1e3
    except OSError:
        return math.nan


def compare(title, ways, inputs, n_bytes):
    """A line for each way, of which the first is the base; relative errors against it in float64."""
    runs = {name: partial(way, *inputs) for name, way in ways.items()}
    exact, times = next(iter(ways.values()))(*(x.double() for x in inputs)), medians(runs, 15)
    print(f"{title}, {n_bytes / 1e6:.0f} MB to move at least")
    for name, t in times.items():
        x = runs[name]()
        error = f"  error {((x - exact).norm() / exact.norm()).item():.1e}" if x.shape == exact.shape else ""
        del x
        print(f"  {name:21} {1e3 * t:8.2f} ms  base/this {times['textbook'] / t:5.2f}  {n_bytes / t / 1e9:7.1f} GB/s  "
              f"peak {peak(runs[name]):5.0f} MB{error}", flush=True)


def heads(cpu, gpu):
    """Logits as of heads whose rows are unit vectors."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for n, K in gpu if device == "cuda" else cpu:
        torch.compiler.reset()
        yield n, K, [torch.randn(n, K, device=device).mul(0.3).bfloat16() for _ in range(2)]


def sinkhorn():
    for n, K, (logits, _) in heads([(64, 65536), (256, 65536), (32, 262144), (128, 4096), (64, 256)],
                                   [(1274, 98304), (32, 262144), (4941, 65536), (128, 65536)]):
        define = partial(sinkhorn_knopp, temperature=0.07)
        compare(f"sinkhorn {n} x {K}", {
            "textbook": textbook_sinkhorn, "textbook, compiled": torch.compile(textbook_sinkhorn),
            "definition": partial(without_kernels, define),
            "definition, compiled": partial(without_kernels, torch.compile(define)),
            "ours": define, "ours, bfloat16 out": lambda x: assignments(x, 0.07).written(torch.bfloat16),
            "ours, log u only": lambda x: assignments(x, 0.07).log_u}, [logits], 6 * n * K)


def loss():
    for n, K, pair in heads([(64, 65536), (256, 65536), (128, 4096), (128, 256)],
                            [(1274, 98304), (4941, 65536), (128, 65536)]):
        compare(f"sinkhorn, loss and gradient {n} x {K}", {
            "textbook": textbook_loss, "textbook, compiled": torch.compile(textbook_loss),
            "definition": partial(without_kernels, our_loss), "ours": our_loss}, pair, 12 * n * K)


BENCHMARKS = dict(forward=forward, data=data, attention=attention, sinkhorn=sinkhorn, loss=loss)


def main(argv):
    if "--help" in argv:
        print(__doc__.strip())
        return
    _, names = command_line.read_words(argv, {"help": bool})
    for name in names or BENCHMARKS:
        if name not in BENCHMARKS:
            raise ValueError(f"unknown benchmark {name!r}; choose from {', '.join(BENCHMARKS)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for name in names or BENCHMARKS:
        BENCHMARKS[name]()


if __name__ == "__main__":
    command_line.run(main)
