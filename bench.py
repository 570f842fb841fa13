"""
Every speed claim beside its baseline, in one run: interleaved, medians, on the machine at hand.

    python bench.py              all of these but inference and steps: what a CPU can be asked in minutes
    python bench.py inference    ViT-S, B, L, one image and eight: ours, compiled, bf16, int8, beside other libraries
    python bench.py augment      photos to training crops on one core, beside Pillow and torchvision, and part by part
    python bench.py loader       batches of photos from a folder, a tar and a zip, by 0 to 2 workers, and part by part
    python bench.py data         crops of one image for training: images per second of one core
    python bench.py sinkhorn     balanced assignments: ours beside the textbook's and what torch.compile makes of it
    python bench.py loss         the same with the cross-entropy and its gradient
    python bench.py attention    RoPE and attention: ours beside what is written elsewhere, and the errors of both
    python bench.py gram         the Gram loss and its gradient, image by image, beside the definition: time and memory
    python bench.py embed        vectors of a folder of photos beside the network alone: images per second
    python bench.py steps        steps of tiny and ViT-S: kernels off, auto, recomputed, compiled, transformers'
    python bench.py limit        forward passes and steps over their matrix products alone, and where the rest is

sinkhorn, loss, attention, augment and steps run once for each level of the CPU kernels that this processor has, or at
the one that NANODINO_CPU names; what is slower than its base says SLOWER. With a GPU, one call each, in this order
(make gpu-NAME):

    python bench.py gpu-build    builds csrc/ there: NANODINO_ARCHS=90a for an H100 saves a minute
    python bench.py gpu-test     kernels against float64, shape by shape; the tests of ops.py
    python bench.py gpu-1        the trainer: losses beside the CPU's, resume, waits of the host, SIGTERM, evaluations
    python bench.py gpu-2        what the card can do; Sinkhorn and the losses
    python bench.py gpu-3        attention beside SDPA's backends
    python bench.py gpu-4        whole steps of S, B, L, H+ and four blocks of the 7B; JPEG to batch
    python bench.py gpu-5        trains for --minutes, measures, draws
    python bench.py check-OP     sinkhorn, loss or attention alone, as gpu-test asks it

A gpu- call writes NAME.json after every row, and at its end NAME.md, tables for LOG.md, to --out. --dry rehearses it on
a CPU, and steps and limit as well. Options:
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import data as training_data
import ops
from data import Batches, draw_crops
from embed import CROPS, TASK, EmbedConfig
from engine import config as command_line
from engine import fp8, trials, versus
from engine import inference as ways
from engine.features import Frozen, load
from engine.limit import limit
from engine.opponents import crops_by_pillow, gram_written_out, with_gradient, with_kernels
from engine.ranks import count_workers
from engine.report import NO_BASE, Report
from engine.sources import Drawn, Unlabelled, open_source
from engine.timing import Cpu, Rehearsal, machine, medians
from losses import gram_loss
from model import SIZES
from recipes import RECIPES


@dataclass(frozen=True)
class BenchConfig:
    json: str = ""             # forward to steps: a file to write the rows to, and NAME.md beside it
    out: str = "build/gpu"     # gpu-: folder of what is written
    minutes: float = 7.5       # [0, inf): gpu-: no row is begun later, so that a call ends within 8; gpu-5: of it all
    sizes: str = "s,b,l"       # inference: which ViTs
    data: str = "shapes"       # augment, loader, embed, gpu-4, -5: a folder of photos; shapes = generated ones
    size: str = "s"            # gpu-5: what is trained
    largest: int = 0           # [0, inf): check-OP: elements of the largest shape; 0 = all
    dry: bool = False          # gpu-, steps: on a CPU, on tiny shapes: every line runs, no number means anything

# --------------------------------------------------------------------------------
# On a CPU


def inference(machine, report, sizes):
    """The longest of all: ViT-L alone takes minutes."""
    small = dict(config=replace(SIZES["s"], depth=1, layerscale=1.0), batches=[(2, 32)])
    for size in sizes:
        ways.compare(machine, report, size, **small if machine.shapes == "dry" else {})


def data(machine, report, compiled):
    source = open_source("shapes", 64)
    for name in "tiny", "l":
        c = replace(RECIPES[name], batch=64, group=16)
        c = replace(c, patch_size=c.vit.patch_size)
        batches = Batches(c, source, 0, 64)
        t = medians(machine, dict(batch=lambda b=batches: coloured(b, 0)), rounds=5)["batch"]
        report.add("crops", recipe=name, images_per_s=64 / t.seconds, spread=t.spread)


def coloured(batches, step):
    return training_data.colour_batch(batches[step], batches.config)


@contextmanager
def photos(path, batch, n=64):
    """The recipe of ViT-L's crops, batches of a folder of photos, or of n generated ones of 500 x 375; one thread."""
    c, threads = replace(RECIPES["l"], batch=batch, group=batch), torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(path if path != "shapes" else trials.jpegs(Path(folder), n))
        yield Batches(replace(c, patch_size=c.vit.patch_size), source, 0, batch)
    torch.set_num_threads(threads)


def augment(machine, report, path):
    """Of the same photos and the same crops; a batch is one photo, without masks, which the others do not draw."""
    with photos(path, 1) as batches:
        batches.masks = lambda *_: {}
        c, source, n = batches.config, batches.source, 2 if machine.shapes == "dry" else 32
        order = [next(batches.order(i, 0)) for i in range(n)]
        drawn = [draw_crops(np.random.default_rng([c.seed, 3, i]), c, *source.load(at).shape[1:])
                 for i, at in enumerate(order)]
        sizes = [c.global_size] * 2 + [c.local_size] * c.n_local

        def theirs(i):
            return crops_by_pillow(source.name(order[i]), *drawn[i], sizes, c.mean, c.std)
        ours = partial(coloured, batches)
        ways = {"Pillow and torchvision": theirs, "ours": ours,
                "ours, colours by the definition": partial(with_kernels, "off", ours)}
        times = medians(machine, ways, [(i,) for i in range(n)], rounds=5)
        base = times["Pillow and torchvision"].seconds
        for name, t in times.items():
            slow = name == "ours" and base < 6 * t.seconds
            report.add("photo to crops", way=name, ms=t.seconds * 1e3, spread=t.spread, images_per_s=1 / t.seconds,
                       base_over_this=base / t.seconds, **dict(flag="SLOWER than 6x") if slow else {})
        functions = [(source, "load")] + [(training_data, name) for name in ("draw_crops", "cut", "augment")]
        parts = parts_of(lambda: [ours(i) for i in range(n)], functions)
    for name, seconds in parts.items():
        report.add("parts of ours", part=name, ms=seconds / n * 1e3, share=seconds / sum(parts.values()))


def parts_of(run, functions):
    """Seconds that functions, each a module and a name in it, take in run(), and the rest of it."""
    before, seconds = [(*at, getattr(*at)) for at in functions], {name: 0.0 for _, name in functions}

    def timed(name, function, *arguments):
        start = time.perf_counter()
        found = function(*arguments)
        seconds[name] += time.perf_counter() - start
        return found
    try:
        for module, name, function in before:
            setattr(module, name, partial(timed, name, function))
        start = time.perf_counter()
        run()
        return seconds | dict(rest=time.perf_counter() - start - sum(seconds.values()))
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def loader(machine, report, path):
    """
    As the trainer asks for them, of the same photos in a folder, a tar and a zip; the cache warm, and cold. Their
    colours are the training device's work, and only among the parts.
    """
    dry, rates, alone = machine.shapes == "dry", {}, {}
    with photos(path, 2 if dry else 16, 8 if dry else 512) as batches, tempfile.TemporaryDirectory() as folder:
        forms = packed(batches.source, Path(folder), 1024)
        for _ in range(1 if dry else 3):  # in turn, so that noise meets all alike
            for form, files in forms.items():
                batches = Batches(batches.config, open_source(Path(folder, form)), 0, batches.samples)
                for cache, workers in product(("warm", "cold"), (0, 1, 2)):
                    if cache == "cold":
                        forget(files)
                    key = form, cache, workers
                    rates.setdefault(key, []).append(rate(batches, workers, *(0, 1) if dry else (3, 8)))
        for (form, cache, workers), found in rates.items():
            median = statistics.median(found)
            alone.setdefault(form, median)  # warm, without a worker: one core
            share = median / alone[form] / max(workers, 1)
            report.add("batches of photos", form=form, cache=cache, workers=workers, images_per_s=median,
                       spread=(max(found) - min(found)) / median, share_of_cores=share,
                       **dict(flag="LOWER than 95 %") if share < 0.95 and not dry else {})
        for form in forms:
            batches = Batches(batches.config, open_source(Path(folder, form)), 0, batches.samples)
            parts = shares(batches, 1 if dry else 6)
            for name, seconds in parts.items():
                report.add("parts of a photo's time", form=form, part=name, ms=seconds * 1e3,
                           share=seconds / sum(parts.values()))


def packed(source, folder, most):
    """Up to `most` photos of a source as copies in a folder, a tar and a zip -> {form: [its files]}"""
    rows = range(0, len(source), max(1, len(source) // most))[:most]
    forms = dict(folder=[], tar=[folder / "tar/x.tar"], zip=[folder / "zip/x.zip"])
    for form in forms:
        (folder / form).mkdir()
    with tarfile.open(forms["tar"][0], "w") as tar, zipfile.ZipFile(forms["zip"][0], "w") as packed:
        for k, i in enumerate(rows):
            data, name = source.raw(i)
            path = folder / "folder" / f"{k:08}{Path(name).suffix}"
            path.write_bytes(data)
            tar.add(path, path.name)
            packed.write(path, path.name)
            forms["folder"].append(path)
    os.sync()  # what is not on the disk yet is not forgotten
    return forms


def forget(files):
    """The next one who reads them waits for the disk; where the system can do that."""
    for path in files if hasattr(os, "posix_fadvise") else ():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(batches, workers, first, more):
    """Images per second of `more` batches for each worker; the first ones, while they start, are not counted."""
    first, n = first * workers, more * max(workers, 1)
    stream = training_data.loader(batches, range(first + n), workers)
    for _ in range(first):
        next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    return batches.samples * n / (time.perf_counter() - start)


def shares(batches, n):
    """Seconds of one photo's time, on one core, that each part takes, of n batches: {part: seconds}."""
    source, count = batches.source, n * batches.samples
    order = [next(batches.order(*divmod(i, batches.samples))) for i in range(count)]
    functions = [(source, "load")] + [(training_data, name) for name in ("draw_crops", "cut", "augment")]
    found = parts_of(lambda: [coloured(batches, step) for step in range(n)], functions)
    start = time.perf_counter()
    for i in order:
        source.raw(i)
    read = time.perf_counter() - start
    parts = dict(read=read, decode=found["load"] - read, crop=found["draw_crops"] + found["cut"],
                 colours=found["augment"], collate=found["rest"])
    return {name: seconds / count for name, seconds in parts.items()}


def embed(machine, report, path):
    """Decoding, resizing, batching and writing happen beside the network, or it waits for them."""
    n, size = (6, "tiny") if machine.shapes == "dry" else (256, "s")
    with tempfile.TemporaryDirectory() as folder:
        path = path if path != "shapes" else str(trials.jpegs(Path(folder), n))
        c = EmbedConfig(data=path, weights=f"untrained:{size}", resolution=224, crop="centre", precision="fp32",
                        workers=count_workers(-1))
        photos, frozen = open_source(c.data), Frozen(load(c.weights), TASK, c)
        photos, view = Unlabelled(Drawn(photos, range(min(n, len(photos))))), frozen.seen(CROPS[c.crop])
        ready = [view(photos.load(i))[0] for i in range(len(photos))]
        parts = [ready[i : i + c.batch] for i in range(0, len(ready), c.batch)]
        ways = dict(network=lambda: [frozen.tokens_of(part) for part in parts],
                    embed=lambda: frozen.tokens("images", photos, view))
        times = medians(machine, ways, rounds=5)
    for name, t in times.items():
        share = times["network"].seconds / t.seconds
        report.add("vectors", what=f"ViT of size {size}, {len(ready)} photos, at 224", way=name, workers=c.workers,
                   images_per_s=len(ready) / t.seconds, spread=t.spread, base_over_this=share,
                   **dict(flag="SLOWER than 95 %") if share < 0.95 else {})


def gram(machine, report, compiled):
    for B, P, D in (64, 36, 128), (16, 256, 384), (64, 256, 384), (8, 1024, 384), (32, 1024, 384):
        sets = [(torch.randn(B, P, D, requires_grad=True), torch.randn(B, P, D))]
        ways = dict(definition=partial(with_gradient, gram_written_out), ours=partial(with_gradient, gram_loss))
        times = medians(machine, ways, sets, rounds=3)
        for name, t in times.items():
            report.add("Gram loss, gradient", shape=f"{B} images, {P} patches, width {D}", way=name, ms=t.seconds * 1e3,
                       spread=t.spread, base_over_this=times["definition"].seconds / t.seconds,
                       peak_mb=machine.peak(partial(ways[name], *sets[0])) / 1e6, gradient_mb=4e-6 * B * P * D)


def of_ops(name):
    """The benchmark of versus.py for a CPU, where a card's limits are not asked."""
    return lambda machine, report, compiled: getattr(versus, name)(machine, report, {}, compiled)


def steps(machine, report, compiled):
    """Interleaved, with the bytes that each way adds; then with and without a save in flight."""
    sizes = [("tiny", trials.TINY, 2)] if machine.shapes == "dry" else [
        ("tiny", ["--batch", "32"], 5), ("s", ["--batch", "4"], 3)]
    for size, argv, rounds in sizes:
        step = trials.Step(machine, ["--size", size, "--precision", "fp32", *argv])
        ways = {f"kernels {choice}": partial(with_kernels, choice, step) for choice in ("off", "auto")}
        ways |= {f"checkpointing {how}": partial(step.recomputing, how) for how in ("selective", "full")}
        if compiled:
            ways["compiled"] = partial(step.compiled, machine)
        if theirs := trials.hugging_face(step.c.vit):
            plain = trials.Step(machine, ["--size", size, "--precision", "fp32", *argv], trials.Plain(theirs.train()))
            ways["transformers' blocks, kernels off"] = partial(with_kernels, "off", plain)
        times = medians(machine, ways, rounds=rounds)
        base = times["kernels off"].seconds
        for name, t in times.items():
            slower = name == "kernels auto" and t.seconds > base
            report.add("training steps", size=size, images=step.c.batch, way=name, ms=t.seconds * 1e3, spread=t.spread,
                       base_over_this=base / t.seconds, peak_mb=machine.peak(ways[name]) / 1e6,
                       **dict(flag="SLOWER than without kernels") if slower else {})
        trials.saves(machine, report, size, step, min(rounds, 3))


ON_CPU = dict(augment=augment, loader=loader, data=data, embed=embed, attention=of_ops("attention"),
              sinkhorn=of_ops("sinkhorn"), loss=of_ops("loss"), gram=gram, inference=inference, steps=steps,
              limit=limit)
LONG = "inference", "steps", "limit"      # when asked for
ON_PHOTOS = "augment", "loader", "embed"  # of --data
BY_LEVEL = "attention", "sinkhorn", "loss", "augment", "steps"


def rehearsal():
    torch.set_num_threads(1)  # nothing in it is large enough for more
    return Rehearsal()


def on_cpu(names, config):
    report = Report("bench", config.json or None, here := rehearsal() if config.dry else Cpu())
    forced, best = os.environ.get("NANODINO_CPU"), ops.LEVELS[-1] if ops.BUILT else None
    for name in names:
        if name not in BY_LEVEL or forced or not ops.BUILT:
            print(f"{name}: {here.describe()['device']}; kernels: {ops.describe(here.device)}", flush=True)
            compiled = forced in (None, best)  # what torch.compile makes: once
            more = config.data if name in ON_PHOTOS else config.sizes.split(",") if name == "inference" else compiled
            ON_CPU[name](here, report, more)
            continue
        for level in reversed(ops.LEVELS):
            with tempfile.TemporaryDirectory() as folder:
                rows = Path(folder, "rows.json")
                subprocess.run([sys.executable, __file__, name, "--json", rows, "--dry", str(config.dry), "--data",
                                config.data], check=True, env=os.environ | dict(NANODINO_CPU=level))
                for table, found in json.loads(rows.read_text())["tables"].items():
                    report.keep(table, [dict(level=level) | row for row in found])
    report.close()

# --------------------------------------------------------------------------------
# With a GPU


def gpu_build(machine, report, config):
    words = ["--name"] if config.dry else ["build_ext", "--inplace"]  # the former only asks what would be built
    code, output = trials.command("setup.py", *words)
    says = next((line for line in output.splitlines() if line.startswith("csrc:")), "")
    size = sum(path.stat().st_size for path in Path().glob("nanodino_C*.so"))
    report.add("build", what="setup.py", seconds=report.seconds, mb=size / 1e6, says=says)
    if code:
        raise ValueError(f"gpu-build: setup.py ended with {code}: {output[-1500:]}")
    code, output = trials.command("bench.py", "--help", apart=not config.dry)  # a fresh process: what was built loads
    report.add("build", what="import", verdict="right" if code == 0 else f"WRONG: {output[-300:]}")


def check(op, machine, report, config):
    if machine.kind == "cuda" and not ops.BUILT:
        raise ValueError(f"check-{op}: csrc is not built here; run make gpu-build")
    versus.check(machine, report, op, config.largest or float("inf"))


def gpu_test(machine, report, config):
    """Each op in a process of its own: a kernel that takes the card's context down takes no other op with it."""
    for op in versus.CASES:
        for table, found in checked(op, report, config, apart=not config.dry or op == "sinkhorn").items():
            report.keep(table, found)
    files = [f"tests/test_{name}.py" for name in ("ops", "ops_attention", "ops_extension", "fp8")]
    tests = ["--collect-only", "tests/test_house.py"] if config.dry else [*files, "-k", "cuda and not cpu"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], capture_output=True, text=True)
    report.add("tests", what="pytest", says=done.stdout.strip().splitlines()[-1] if done.stdout else done.stderr[-200:],
               verdict="right" if done.returncode == 0 else f"WRONG: {done.returncode}")
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            report.note(line[:200])
    if shutil.which("compute-sanitizer") and not config.dry:
        for op in versus.CASES:
            checked(op, report, replace(config, largest=30_000), True, ["compute-sanitizer", "--error-exitcode", "3"])


def checked(op, report, config, apart, under=()):
    """Tables of check-OP; where it died, if it did.    under  a command that runs it"""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"check-{op}", "--out", folder, "--largest", config.largest, *(["--dry"] if config.dry else [])]
        left = max(30, 60 * config.minutes - report.seconds)
        code, output = trials.command("bench.py", *words, apart=apart, under=under, timeout=left)
        path = Path(folder, f"check-{op}.json")
        found = json.loads(path.read_text()) if path.exists() else dict(tables={}, notes=[])
    for note in found["notes"][1:]:
        report.note(" ".join([*under[:1], note]))
    report.add("tests", what=" ".join([*under[:1], f"check-{op}"]),
               verdict="right" if code == 0 else f"WRONG: {code} at {found.get('at', 'its end')}: {output[-300:]}")
    return found["tables"]


def gpu_1(machine, report, config):
    trials.trainer(machine, report, config)


def gpu_2(machine, report, config):
    card = versus.limits(machine, report)
    versus.sinkhorn(machine, report, card)
    versus.loss(machine, report, card)


def gpu_3(machine, report, config):
    versus.attention(machine, report, versus.limits(machine, report))


def gpu_4(machine, report, config):
    trials.whole_steps(machine, report, config, versus.limits(machine, report))
    report.note(NO_BASE)


def gpu_5(machine, report, config):
    trials.run(machine, report, config)


ON_A_GPU = {f"check-{op}": partial(check, op) for op in versus.CASES} | {
    "gpu-build": gpu_build, "gpu-test": gpu_test, "gpu-1": gpu_1, "gpu-2": gpu_2, "gpu-3": gpu_3, "gpu-4": gpu_4,
    "gpu-5": gpu_5}
# whose rehearsal runs the CUDA kernels; those of attention read no float32, which the trainer's first runs are in
REHEARSED = {"gpu-2", "gpu-3", "gpu-4", *(f"check-{op}" for op in versus.CASES)}
EMULATED = ("sinkhorn", "sinkhorn_pass", "sinkhorn_targets", "assignment_loss", "assignment_loss_", "rope_attention",
            "colours")


@contextmanager
def emulator():
    """Within, the CUDA kernels, which tests/emulated.py runs, take the place of the CPU's."""
    from tests import emulated
    if not emulated.AVAILABLE or not ops.BUILT:
        print("rehearsal: no g++, or csrc is not built: without the emulator of the CUDA kernels")
        yield
        return
    # the proofs of first use are rehearsed too, and what they found is forgotten
    proofs = [asked for asked in vars(ops).values() if hasattr(asked, "cache_clear")]
    library = torch.library.Library("nanodino", "IMPL")
    try:
        for name in EMULATED:
            library.impl(name, getattr(emulated, name), "CPU")
        for asked in proofs:
            asked.cache_clear()
        yield
    finally:
        library._destroy()
        for asked in proofs:
            asked.cache_clear()


def on_gpu(name, config):
    here = rehearsal() if config.dry else machine()
    if here.kind != "cuda" and not config.dry and name.startswith("gpu"):
        raise ValueError(f"{name}: no GPU here; add --dry to rehearse it on the CPU")
    report = Report(name, Path(config.out, f"{name}.json"), here, config.minutes * 60)
    report.note(f"kernels: {ops.describe(here.device)}")
    lent = patch.dict(fp8.PRODUCTS, cpu=fp8.emulated) if config.dry else nullcontext()
    with lent, emulator() if config.dry and name in REHEARSED else nullcontext():
        ON_A_GPU[name](here, report, config)
    report.close()


def main(argv):
    if "--help" in argv:
        print(__doc__.strip(), command_line.describe(BenchConfig()), sep="\n\n")
        return
    values, names = command_line.read_words(argv, command_line.types(BenchConfig()))
    config = command_line.apply(BenchConfig(), values)
    if config.json:
        command_line.writable(config.json, folder=False, option="--json")
    command_line.writable(config.out)
    for size in config.sizes.split(","):
        if size not in ways.TIMM:
            raise ValueError(f"--sizes {config.sizes}: choose from {', '.join(ways.TIMM)}, as in s,b,l")
    for name in names:
        if name not in ON_CPU | ON_A_GPU:
            raise ValueError(f"unknown benchmark {name!r}; choose from {', '.join(ON_CPU | ON_A_GPU)}")
    chosen = [name for name in names or ON_CPU if name in ON_CPU and (names or name not in LONG)]
    if chosen:
        on_cpu(chosen, config)
    for name in names:
        if name in ON_A_GPU:
            on_gpu(name, config)


if __name__ == "__main__":
    command_line.run(main)
