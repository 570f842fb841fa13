"""
The trainer on trial, on a GPU or in a rehearsal on the CPU: does it work there, how fast is a step, what does it learn.

    Step         the lines of train.train between two batches
    Plain        the backbone that a step without us would have
    saves        what a save costs: the loop stands still, then its steps share the machine with it
    trainer      losses beside the CPU's, resume, waits of the host, SIGTERM, evaluations
    whole_steps  images/s, memory, launches and share of the card's products, by size; JPEG to batch; inference
    run          trains for some minutes, measures, draws

Each adds rows to a Report. It imports the commands it tries, and no command but bench.py imports it.
"""

import copy
import importlib
import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data import Batches, colour_batch, loader
from engine import fp8
from engine.interrupt import Interrupt, Verdicts
from engine.opponents import same, with_kernels
from engine.ranks import start_ranks
from engine.report import verdict
from engine.saver import Saver
from engine.sources import open_source
from engine.stages import gram_term, make_gram_teacher, refresh
from engine.timing import medians
from model import SIZES, Features, ViT
from recipes import configure
from train import (
    build_networks,
    clip_gradients,
    draw_noise,
    freeze,
    loss_terms,
    on_device,
    parameter_groups,
    set_schedules,
    settle,
    teacher_targets,
    term_weights,
    update_ema,
)

# of a rehearsal: the smallest run that has everything a run has
TINY = ("--steps 3 --batch 2 --n_local 1 --global_size 32 --local_size 16 --n_shapes 4 --dino_prototypes 32 "
        "--ibot_prototypes 32 --dino_hidden 32 --ibot_hidden 32 --depth 1 --workers 0").split()


def command(script, *argv, apart=True, under=(), timeout=None):
    """
    (exit code, output) of a command of ours.

    apart  False: in this process, for a rehearsal, which has no time to start another; under  a command that runs it
    """
    argv = [str(word) for word in argv]
    if apart:
        try:
            words = [*under, sys.executable, script, *argv]
            done = subprocess.run(words, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return 124, f"stopped after {timeout:.0f} s"
        return done.returncode, done.stdout + done.stderr[-2000:] if done.returncode else done.stdout
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            importlib.import_module(script.removesuffix(".py")).main(argv)
    except ValueError as error:
        return 2, f"{out.getvalue()}\n{error}"
    return 0, out.getvalue()

# --------------------------------------------------------------------------------
# A training step


class Step:
    """
    The lines of train.train between two batches, on one batch that stays: step() trains once more; returns the loss.

    argv      of train.py
    backbone  in the place of ours; the teacher has a copy
    """
    def __init__(self, machine, argv, backbone=None):
        self.ranks = start_ranks(machine.kind)
        self.c = c = settle(configure([*argv, "--out", "build/bench", "--workers", "0"]), self.ranks)
        self.source = open_source("shapes", c.n_shapes, c.seed)
        self.student = build_networks(c, self.ranks)
        if backbone is not None:
            self.student["backbone"] = backbone.to(self.ranks.device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()  # as two would start; sooner ready
        self.gram = make_gram_teacher(c, partial(freeze, c, self.ranks))
        if c.gram_teacher == "self":
            refresh(self.gram, self.teacher)
        self.optimizer = torch.optim.AdamW(parameter_groups(c, self.student), betas=(c.beta1, c.beta2), fused=True)
        self.weights, self.verdicts = term_weights(c), Verdicts(self.ranks, Interrupt(), self.source.name)
        self.made, self.waiting = [], self.prepared()
        self.batch = self.moved()

    def prepared(self):
        """As the trainer's loader hands it over."""
        noise = partial(draw_noise, self.c, self.c.batch)
        batches = Batches(self.c, self.source, 0, self.c.batch, noise)
        cuda = self.ranks.device.type == "cuda"
        return {k: v.pin_memory() if cuda and isinstance(v, torch.Tensor) else v for k, v in batches[0].items()}

    def compile(self, machine):
        """Its blocks, from here on."""
        torch.compiler.reset()  # its caches hold few shapes
        for block in [*self.student["backbone"].blocks, *self.teacher["backbone"].blocks]:
            machine.compile_module(block)

    def recomputing(self, how):
        """A step with --checkpointing how"""
        self.student["backbone"].checkpointing = how
        self()
        self.student["backbone"].checkpointing = self.c.checkpointing

    def compiled(self, machine):
        """A step with its blocks as torch.compile makes them; the others stay as they are."""
        blocks = [*self.student["backbone"].blocks, *self.teacher["backbone"].blocks]
        if not self.made:
            for block in blocks:
                machine.compile_module(block)
            self.made = [block._compiled_call_impl for block in blocks]
        for block, made in zip(blocks, self.made, strict=True):
            block._compiled_call_impl = made
        self()
        for block in blocks:
            block._compiled_call_impl = None

    def moved(self):
        return on_device(self.c, self.ranks, dict(self.waiting))

    def __call__(self):
        c, batch, group = self.c, self.batch, self.ranks.group
        set_schedules(self.optimizer, c.lr * c.lr_factor, c.weight_decay, c.freeze_last_layer)
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=c.precision != "fp32"):
            with torch.no_grad():
                targets = teacher_targets(self.teacher, [batch], c.teacher_temp, group)
            terms, features = loss_terms(c, self.student, batch, targets[0], batch["noise"], group)
            terms |= gram_term(c, self.gram, batch, features)
        loss = sum(self.weights[name] * term for name, term in terms.items())
        loss.backward()
        norms = clip_gradients(self.student, c.clip)
        self.verdicts.judge(0, dict(loss=loss, **terms), norms, batch["indices"])
        self.optimizer.found_inf = self.verdicts.skip
        self.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def update(self):
        self.optimizer.step()
        update_ema(self.teacher, self.student, self.c.momentum)

class Plain(nn.Module):
    """transformers' DINOv3ViTModel as a ViT is called: each group of crops by itself"""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, masks=None, noise=None):
        one = isinstance(images, torch.Tensor)
        images, masks = ([images], [masks]) if one else (images, masks)
        found = [self.features(*each) for each in zip(images, masks, strict=True)]
        return found[0] if one else found

    def features(self, images, mask):
        c = self.model.config
        grid = [side // c.patch_size for side in images.shape[2:]]
        x = self.model(images, bool_masked_pos=mask).last_hidden_state                         # B N D
        cls, registers, patches = x.split([1, c.num_register_tokens, math.prod(grid)], 1)
        return Features(cls[:, 0], registers, patches, tuple(grid))


def saves(machine, report, size, step, rounds):
    """
    In turns: steps alone, a save that the loop waits for, one that is written while the next steps run, and those.
    The first row is of a step, the second of what a save adds to a run: the time it stands still, and what the steps
    beside it take longer.
    """
    step()
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(replace(step.c, out=folder, keep=1), step.ranks, step.student, step.teacher, step.optimizer)
        saver(1, wait=False)  # takes the memory for the copy
        saver.settle()
        size_of = sum(x.nbytes for x in saver.copies.values()) if saver.copies else None
        took, number = {name: [] for name in ("alone", "beside", "waits", "copies", "adds")}, count(2)

        def clock(name, work, *args):
            machine.synchronize()
            start = time.perf_counter()
            work(*args)
            machine.synchronize()
            took[name].append(time.perf_counter() - start)
        for _ in range(rounds):
            for _ in range(3):
                clock("alone", step)
            clock("waits", saver, next(number))
            clock("copies", saver, next(number), False)
            before = len(took["beside"])
            while saver.behind is not None and saver.behind.is_alive():
                clock("beside", step)
            beside = took["beside"][before:]
            took["adds"].append(took["copies"][-1] + sum(beside) - len(beside) * statistics.median(took["alone"]))
            saver.settle()
    for way in "alone", "beside":
        report.add("a step, and a save in flight", size=size, way=way, steps=len(took[way]),
                   ms=1e3 * statistics.median(took[way]), longest_ms=1e3 * max(took[way]))
    report.add("what a save takes", size=size, copy_mb=size_of and size_of / 1e6,
               **{f"{name}_ms": 1e3 * statistics.median(took[name]) for name in ("waits", "copies", "adds")})

# --------------------------------------------------------------------------------
# Does it work


def trainer(machine, report, config):
    argv = ["--size", "tiny", *(TINY if config.dry else ["--steps", "20", "--batch", "32", "--n_shapes", "256"])]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        train = partial(trained, folder, dry=config.dry)
        plain = "--device", "cpu", "--precision", "fp32", "--kernels", "off"
        train("start", *argv, *plain, "--stop_after", 1)   # all go on from it: devices draw others

        def follow(name, *argv):
            shutil.copytree(folder / "start", folder / name)
            return later(train(name, "--resume", *argv))
        on = "--device", machine.kind
        precisions = [("fp32", 1e-3), ("bf16", 3e-2)] + [("fp8", 5e-2)] * fp8.there(machine.device)
        found = {(*each, kernels): follow(f"{each[0]}-{kernels}", *on, "--precision", each[0], "--kernels", kernels)
                 for each in precisions for kernels in ("off", "auto")}
        base = follow("cpu", *plain)
        for (precision, most, kernels), run in found.items():
            report.add("steps of tiny beside the CPU's in fp32", precision=precision, kernels=kernels,
                       **beside(run, base, most))
        exact = *on, "--precision", "fp32", "--kernels", "auto"
        follow("again", *exact)
        follow("resumed", *exact, "--stop_after", 1 if config.dry else 10)
        train("resumed", "--resume", *exact)
        for name in "again", "resumed":
            report.add("same bits as the run before", what=name,
                       verdict=differences(folder / "fp32-auto", folder / name))
        report.add("the host waits", **waits(machine, config.dry))
        report.add("SIGTERM", **terminated(folder / "stopped", argv))
        small = "--limit 24 --resolution 32 --workers 0" if config.dry else "--limit 400"
        evaluated(machine, report, config, "knn", folder / "fp32-auto", small)
        evaluated(machine, report, config, "segmentation", folder / "fp32-auto", f"{small} --iterations 5")
        small = "--limit 1 --resolution 64 --workers 0" if config.dry else "--limit 2"
        evaluated(machine, report, config, "tracking", folder / "fp32-auto", small)


def trained(folder, name, *argv, dry):
    """Logs every step; returns exit code, rows of metrics.jsonl, seconds, last words."""
    start = time.perf_counter()
    code, output = command("train.py", *argv, "--out", folder / name, "--log_every", 1, apart=not dry)
    return dict(code=code, rows=rows_of_log(folder / name), seconds=time.perf_counter() - start,
                says=output.strip()[-200:])


def later(found):
    """Without the first row, in which all began alike."""
    return found | dict(rows=found["rows"][1:])


def rows_of_log(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def beside(found, base, most):
    """
    Losses beside those of the CPU. The first may differ by `most`, relative; later ones part, as rounding grows.

    most  3e-2 in bf16: a rehearsal's first losses are 1.1e-3 apart, in fp8 5e-2; fp32 on a GPU sums in another order
          only
    """
    n = min(len(found["rows"]), len(base["rows"]))  # a run that broke off has fewer, and is wrong
    pairs = [(a["loss"], b["loss"]) for a, b in zip(found["rows"][:n], base["rows"][:n], strict=True)]
    apart = [abs(a - b) / abs(b) for a, b in pairs]
    fine = found["code"] == 0 and len(found["rows"]) == len(base["rows"]) > 0 and apart[0] < most
    row = dict(first=pairs[0][0], apart_at_first=apart[0], last=pairs[-1][0], apart_at_last=apart[-1]) if pairs else {}
    return row | dict(seconds=found["seconds"], verdict="right" if fine else f"WRONG: {found['says']}")


def differences(one, other):
    try:
        a, b = (load_file(path / "teacher.safetensors") for path in (one, other))
    except OSError as error:
        return f"WRONG: {error}"
    unequal = [name for name in a if not same(a[name], b[name])]
    if not unequal:
        return "right"
    first, second = ({row["step"]: row["loss"] for row in rows_of_log(path)} for path in (one, other))
    step = next((f"from step {x}'s on" for x in first if second.get(x) != first[x]), "never")
    return f"WRONG: {len(unequal)} of {len(a)} tensors differ, {unequal[0]} first; logged losses {step}"


def waits(machine, dry):
    """A step, from batch to update, with every wait of the host an error; what is logged afterwards may wait."""
    step = Step(machine, ["--size", "tiny", *(TINY if dry else ["--batch", "32"])])
    step()
    step()
    machine.synchronize()
    try:
        machine.sync_is_error(True)
        step.batch = step.moved()
        step()
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "site-packages" not in f.filename]
        return dict(verdict=f"WRONG: {str(error).splitlines()[0][:80]}, at {' '.join(ours[-3:])}")
    finally:
        machine.sync_is_error(False)
    return dict(verdict="right: nowhere between batch and update")


def terminated(out, argv):
    """SIGTERM at the first logged step: the run saves, says so, and ends with 0."""
    words = [*argv, "--out", str(out), "--log_every", "1", "--steps", "100000"]
    process = subprocess.Popen([sys.executable, "train.py", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True)
    end = time.monotonic() + 90
    while not rows_of_log(out) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        output = process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return dict(verdict="WRONG: it ran on for 60 s")
    fine = process.returncode == 0 and "stopped at step" in output and (out / "checkpoints").exists()
    return dict(seconds=time.monotonic() - asked, verdict="right" if fine else f"WRONG: {output[-150:]}")


SCORES = dict(knn="top1_k20", linear="top1", segmentation="miou", tracking="j_and_f")


def evaluated(machine, report, config, task, weights, words, name=None):
    start = time.perf_counter()
    code, output = command("evaluate.py", "--task", task, "--weights", weights, "--device", machine.kind,
                           *words.split(), apart=not config.dry)
    last = output.strip().splitlines()[-1] if output.strip() else ""
    score = json.loads(last)[SCORES[task]] if code == 0 else None
    report.add("evaluations", task=task, weights=name, figure=SCORES[task], score=score,
               seconds=time.perf_counter() - start, verdict="right" if code == 0 else f"WRONG: {code}, {last[:200]}")

# --------------------------------------------------------------------------------
# How fast

ON_GPU = [  # size, options, batches to try until one fits, whether compiled too; four blocks of the 7B, and its heads
    ("s", [], (64,), True), ("l", [], (64, 32), True),
    ("7b", ["--depth", "4", "--checkpointing", "none"], (16, 8), True),
    ("7b", ["--depth", "4", "--checkpointing", "none", "--precision", "fp8"], (16, 8), True), ("b", [], (64,), False),
    ("h+", [], (64, 32, 16), False)]


def whole_steps(machine, report, config, card):
    sizes = [("tiny", TINY, (2,), True), ("tiny", [*TINY, "--precision", "fp8"], (2,), False)] if config.dry else [
        each for each in ON_GPU if "fp8" not in each[1] or fp8.there(machine.device)]
    for i, (size, argv, batches, compiled) in enumerate(sizes):
        for batch in batches:
            if steps_of(machine, report, card, size, [*argv, "--batch", str(batch)], compiled):
                break
        if i == min(1, len(sizes) - 1):
            pictures(machine, report, config)
            inference(machine, report, config.dry)


def steps_of(machine, report, card, size, argv, compiled):
    """Rows for kernels auto and off, blocks eager, then compiled; returns whether the first ran, or time is over."""
    if report.over:
        report.note(f"steps of {size}: no time was left")
        return True
    ran, step, flops = {}, None, None
    for how in ("eager", "compiled") if compiled else ("eager",):
        failed = {}
        try:
            step = step or Step(machine, ["--size", size, "--precision", "bf16", *argv])
            if how == "compiled":
                step.compile(machine)
            ways = {choice: partial(with_kernels, choice, step) for choice in ("auto", "off")}
            times = medians(machine, ways, rounds=7, failed=failed, graph=False)
            flops = operations(ways["off"]) if how == "eager" and "off" in times else flops
            for choice, t in times.items():
                step_row(machine, report, card, step.c, how, choice, ways[choice], t, flops)
            if size in ("l", "tiny") and how == "eager":
                update_alone(machine, report, card, step)
        except RuntimeError as error:
            failed["auto"] = str(error).strip().splitlines()[0][:200]
        for choice, why in failed.items():
            report.add("steps", size=size, images=int(argv[-1]), blocks=how, kernels=choice, note=why)
        ran[how] = "auto" not in failed
        if not ran["eager"]:
            break
    step = ways = None  # their memory is the next size's
    machine.release()
    return ran["eager"]


def step_row(machine, report, card, c, how, choice, step, t, flops):
    size, images, precision = c.size, c.batch, c.precision
    launched, rate = machine.launches(step), images / t.seconds
    goal = dict(goal=verdict("G13", dict(images_per_s=rate))) if (size, choice) == ("l", "auto") else {}
    report.add("steps", size=size, images=images, precision=precision, blocks=how, kernels=choice, ms=t.seconds * 1e3,
               spread=t.spread, images_per_s=rate, peak_gb=(machine.peak(step) + machine.held()) / 1e9,
               launches=sum(n for n, _ in launched.values()), device_ms=sum(us for _, us in launched.values()) / 1e3,
               tflop_per_s=flops and flops / t.seconds / 1e12, mfu=flops and flops / t.seconds / 989.4e12,
               of_gemm=flops and flops / t.seconds / card["gemm"], **goal)
    report.keep("what takes longest in a step", [dict(size=size, precision=precision, blocks=how, kernels=choice,
                what=name[:80], times=n, ms=us / 1e3) for name, (n, us) in list(launched.items())[:8]])


def operations(step):
    """Floating-point operations of a step's products; counted where no kernel hides them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def update_alone(machine, report, card, step):
    """Clipping, AdamW and the teacher's average, on gradients that stay."""
    n = sum(p.numel() for p in step.student.parameters())
    for p in step.student.parameters():
        p.grad = torch.full_like(p, 1e-6)
    t = medians(machine, dict(update=step.update), rounds=10, graph=False)["update"]
    ms = t.seconds * 1e3 * 350e6 / n
    report.add("update", parameters=f"{n:,}", ms=t.seconds * 1e3, spread=t.spread, ms_for_350m=ms,
               goal=verdict("G11", dict(ms=ms), card["copy"]))


def pictures(machine, report, config):
    """JPEG to a coloured batch on the device, with all cores but one; then the colours alone."""
    if report.over:
        report.note("JPEG to batch: no time was left")
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers, n, warm = (0, 3, 1) if config.dry else (cores - 1, cores + 40, cores)  # first batches are not counted
    c = configure(["--size", "tiny", *TINY] if config.dry else ["--size", "s", "--batch", "64"])
    ranks = start_ranks(machine.kind)

    with tempfile.TemporaryDirectory() as folder:
        root = config.data if config.data != "shapes" else jpegs(Path(folder), 2 if config.dry else 512)
        batches = Batches(c, open_source(str(root)), 0, c.batch)
        for i, batch in enumerate(loader(batches, range(n), workers, pin_memory=machine.kind == "cuda")):
            if i == warm:
                machine.synchronize()
                start = time.perf_counter()
            on_device(c, ranks, dict(batch))
        machine.synchronize()
        rate = (n - warm) * c.batch / (time.perf_counter() - start)
    report.add("JPEG to batch", images="500 x 375 px, generated" if config.data == "shapes" else config.data,
               workers=workers, images_per_s=rate, goal=verdict("G16", dict(images_per_s=rate)))
    there = {k: v.to(ranks.device) if isinstance(v, torch.Tensor) and k != "colours" else v for k, v in batch.items()}
    t = medians(machine, dict(colours=lambda: colour_batch(there, c)), rounds=10, graph=False)["colours"]
    report.add("colours", images=c.batch, ms=t.seconds * 1e3, spread=t.spread, goal=verdict("G10", dict(
        ms=t.seconds * 1e3)))


def jpegs(folder, n):
    """Pictures of the size that those of ImageNet have, smooth and noisy, so that they compress like photos."""
    rng = np.random.default_rng(0)
    for i in range(n):
        smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        noisy = np.asarray(smooth, dtype=np.int16) + rng.integers(-12, 13, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    return folder


def hugging_face(c):
    """transformers' DINOv3ViTModel with this ViTConfig, or None where that is not installed."""
    try:
        from transformers import DINOv3ViTConfig, DINOv3ViTModel
    except ImportError:
        return None
    return DINOv3ViTModel(DINOv3ViTConfig(
        hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads, intermediate_size=c.hidden,
        patch_size=c.patch_size, num_register_tokens=c.n_registers, attn_implementation="sdpa")).eval()


@torch.inference_mode()
def inference(machine, report, dry):
    """ViT-L at 256 px in bf16, beside transformers' where that is installed."""
    if report.over:
        report.note("inference: no time was left")
        return
    c, n, side = (replace(SIZES["tiny"], depth=1), 1, 32) if dry else (SIZES["l"], 64, 256)
    images = torch.randn(n, 3, side, side, device=machine.device).bfloat16()
    ways, theirs = dict(ours=ViT(c).eval().to(machine.device, torch.bfloat16)), hugging_face(c)
    if theirs is not None:
        theirs = theirs.to(machine.device, torch.bfloat16)
        ways |= dict(transformers=theirs, transformers_compiled=machine.compile(theirs))
    failed = {}
    times = medians(machine, ways, [(images,)], rounds=7, failed=failed)
    for name, note in failed.items():
        report.add("inference", way=name, images=n, note=note)
    for name, t in times.items():
        ratios = {other: times[other].seconds / t.seconds for other in times}
        report.add("inference", way=name, images=n, ms=t.seconds * 1e3, spread=t.spread, timed=t.how,
                   images_per_s=n / t.seconds, **dict(goal=verdict("G15", ratios)) if name == "ours" else {})

# --------------------------------------------------------------------------------
# What does it learn


CURVE = "step", "loss", "dino_global", "dino_local", "ibot", "koleo", "dino_entropy", "prototypes_used", "cls_rank"


def run(machine, report, config):
    """As many steps as the minutes allow, after a short run that tells how many; then scores and a picture."""
    dry, out, size = config.dry, Path(config.out), "tiny" if config.dry else config.size
    argv = ["--size", size, "--device", machine.kind]
    argv += TINY if dry else ["--batch", "128", "--data", config.data]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        probe = trained(folder, "probe", *argv, *([] if dry else ["--steps", "40"]), dry=dry)
        if probe["code"] or not probe["rows"]:
            raise ValueError(f"gpu-5: the first steps failed: {probe['says']}")
        speed = probe["rows"][-1]["images_per_s"]
        seconds = 0.8 * (60 * config.minutes - report.seconds) - 30  # the rest is for start, scores and picture
        steps = 2 if dry else max(100, int(seconds * speed / 128))
        report.add("run", what="probe", images_per_s=speed, steps=steps)
        found = trained(folder, "run", *argv, "--steps", steps, dry=dry)
        report.add("run", what="training", steps=len(found["rows"]), seconds=found["seconds"],
                   images_per_s=found["rows"][-1]["images_per_s"] if found["rows"] else None,
                   verdict="right" if found["code"] == 0 else f"WRONG: {found['says']}")
        for row in found["rows"][:: max(1, len(found["rows"]) // 12)]:
            report.add("curve", **{name: row[name] for name in CURVE})
        shutil.copy(folder / "run/metrics.jsonl", out / "gpu-5.jsonl")
        small = "--limit 24 --resolution 32 --workers 0" if dry else f"--limit 2000 --data {config.data} --workers 8"
        for task, more in ("knn", ""), ("linear", f" --iterations {20 if dry else 2000}"):
            evaluated(machine, report, config, task, folder / "run", small + more, "trained")
            evaluated(machine, report, config, task, f"untrained:{size}", small + more, "untrained")
        images = [f"shapes:{i}" for i in range(2 if dry else 6)] if config.data == "shapes" else some(config.data, 6)
        code, output = command("visualize.py", "pca", *images, "--weights", folder / "run", "--out", out / "gpu-5.png",
                               apart=not dry)
    report.add("picture", file="gpu-5.png", verdict="right" if code == 0 else f"WRONG: {output[-200:]}")


def some(data, n):
    """Paths of n images of a folder, evenly spaced."""
    source = open_source(data)
    return [source.paths[i] for i in range(0, len(source), max(1, len(source) // n))][:n]
