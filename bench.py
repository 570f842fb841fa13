"""
Every speed claim beside its baseline, in one run: interleaved, medians, on the machine at hand.

    python bench.py              all
    python bench.py forward      ViT-S, 8 images of 256 px: ours beside transformers' DINOv3ViTModel (needs extra: test)
    python bench.py data         crops of one image for training: images per second of one core
"""

import statistics
import time
from dataclasses import replace

import torch

import config as command_line
from data import Batches, open_source
from model import SIZES, ViT
from train import RECIPES


def medians(functions, rounds):
    """Seconds of each function, median over rounds in which each runs once, so that noise meets all alike."""
    times = {name: [] for name in functions}
    for i in range(rounds + 2):  # two to warm up
        for name, function in functions.items():
            start = time.perf_counter()
            function()
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


BENCHMARKS = dict(forward=forward, data=data)


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
