"""
Every speed claim beside its baseline, in one run: interleaved, medians, on the machine at hand.

    python bench.py              forward, data, attention, sinkhorn, loss: what a CPU can be asked in minutes
    python bench.py forward      ViT-S, 8 images of 256 px: ours beside transformers' DINOv3ViTModel (needs extra: test)
    python bench.py data         crops of one image for training: images per second of one core
    python bench.py sinkhorn     balanced assignments: ours beside the textbook's and what torch.compile makes of it
    python bench.py loss         the same with the cross-entropy and its gradient
    python bench.py attention    RoPE and attention: ours beside what is written elsewhere, and the errors of both
    python bench.py steps        training steps of tiny and ViT-S, kernels off and auto

The last four run once for each level of the CPU kernels that this processor has, or at the one that NANODINO_CPU names;
what is slower than its base says SLOWER. With a GPU, one call each, in this order (make gpu-NAME):

    python bench.py gpu-build    builds csrc/ there: NANODINO_ARCHS=90a for an H100 saves a minute
    python bench.py gpu-test     kernels against float64, shape by shape; the tests of ops.py
    python bench.py gpu-1        the trainer: losses beside the CPU's, resume, waits of the host, SIGTERM, evaluations
    python bench.py gpu-2        what the card can do; Sinkhorn and the losses
    python bench.py gpu-3        attention beside SDPA's backends
    python bench.py gpu-4        whole steps of S, B, L, H+ and four blocks of the 7B; JPEG to batch
    python bench.py gpu-5        trains for --minutes, measures, draws
    python bench.py check-OP     sinkhorn, loss or attention alone, as gpu-test asks it

A gpu- call writes NAME.json after every row and tables for LOG.md at its end, NAME.md, to --out. --dry rehearses it on a
CPU. Options:
"""

import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import ops
from data import Batches, colour_batch, loader, open_source
from engine import config as command_line
from engine import versus
from engine.opponents import same, with_kernels
from engine.ranks import start_ranks
from engine.report import Report, verdict
from engine.timing import Cpu, machine, medians
from model import SIZES, Noise, ViT
from train import (
    RECIPES,
    Finite,
    build_networks,
    clip_gradients,
    configure,
    loss_terms,
    on_device,
    parameter_groups,
    set_schedules,
    settle,
    teacher_targets,
    term_weights,
    update_ema,
)


@dataclass(frozen=True)
class BenchConfig:
    json: str = ""             # forward to steps: a file to write the rows to, and NAME.md beside it
    out: str = "build/gpu"     # gpu-: folder of what is written
    minutes: float = 7.5       # gpu-: no row is begun later, so that a call ends within 8; gpu-5: of it all
    data: str = "shapes"       # gpu-4, gpu-5: photos, a folder as train.py takes it; shapes = generated
    size: str = "s"            # gpu-5: what is trained
    dry: bool = False          # gpu-: on the CPU, on tiny shapes: every line runs, no number means anything

# --------------------------------------------------------------------------------
# On a CPU


@torch.inference_mode()
def forward(machine, report, compiled):
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
        times = medians(machine, dict(transformers=theirs.to(dtype), ours=ours.to(dtype)), [(images,)])
        for name, t in times.items():
            report.add("forward", what="ViT-S, 8 x 256 px", dtype=str(dtype)[6:], way=name, ms=t.seconds * 1e3,
                       spread=t.spread, base_over_this=times["transformers"].seconds / t.seconds)


def data(machine, report, compiled):
    source = open_source("shapes", 64)
    for name in "tiny", "l":
        c = replace(RECIPES[name], batch=64, group=16)
        c = replace(c, patch_size=c.vit.patch_size)
        batches = Batches(c, source, 0, 64)
        t = medians(machine, dict(batch=lambda b=batches: b[0]), rounds=5)["batch"]
        report.add("crops", recipe=name, images_per_s=64 / t.seconds, spread=t.spread)


def of_ops(name):
    """The benchmark of versus.py for a CPU, where a card's limits are not asked."""
    return lambda machine, report, compiled: getattr(versus, name)(machine, report, {}, compiled)


def steps(machine, report, compiled):
    for size, argv, rounds in ("tiny", ["--batch", "32"], 5), ("s", ["--batch", "4"], 3):
        step = Step(machine, ["--size", size, "--precision", "fp32", *argv])
        ways = {choice: partial(with_kernels, choice, step) for choice in ("off", "auto")}
        times = medians(machine, ways, rounds=rounds)
        for choice, t in times.items():
            slower = choice == "auto" and t.seconds > times["off"].seconds
            report.add("training steps", size=size, images=step.c.batch, kernels=choice, ms=t.seconds * 1e3,
                       spread=t.spread, base_over_this=times["off"].seconds / t.seconds,
                       **dict(flag="SLOWER than without kernels") if slower else {})


ON_CPU = dict(forward=forward, data=data, attention=of_ops("attention"), sinkhorn=of_ops("sinkhorn"),
              loss=of_ops("loss"), steps=steps)
BY_LEVEL = "attention", "sinkhorn", "loss", "steps"


def levels():
    """Levels of the CPU kernels that this processor has, the highest first."""
    have = dict(avx512=torch.cpu._is_avx512_supported(), avx2=torch.cpu._is_avx2_supported(), baseline=True)
    return [level for level in have if have[level]]


def on_cpu(names, config):
    report = Report("bench", config.json or None, here := Cpu())
    forced = os.environ.get("NANODINO_CPU")
    for name in names:
        if name not in BY_LEVEL or forced or not ops.BUILT:
            print(f"{name}: {here.describe()['device']}; kernels: {ops.describe(here.device)}", flush=True)
            ON_CPU[name](here, report, forced in (None, levels()[0]))  # what torch.compile makes: once
            continue
        for level in levels():
            with tempfile.TemporaryDirectory() as folder:
                rows = Path(folder, "rows.json")
                subprocess.run([sys.executable, __file__, name, "--json", rows], check=True,
                               env=os.environ | dict(NANODINO_CPU=level))
                for table, found in json.loads(rows.read_text())["tables"].items():
                    report.keep(table, [dict(level=level) | row for row in found])
    report.close()

# --------------------------------------------------------------------------------
# A training step


class Step:
    """
    The lines of train.train between two batches, on one batch that stays: step() trains once more.

    argv      of train.py    compiled  the blocks, by torch.compile
    """
    def __init__(self, machine, argv, compiled=False):
        self.ranks = start_ranks(machine.kind)
        self.c = c = settle(configure([*argv, "--out", "build/bench", "--workers", "0"]), self.ranks)
        self.source = open_source("shapes", c.batch)
        self.student, self.teacher = build_networks(c, self.ranks), build_networks(c, self.ranks)
        self.teacher.requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(parameter_groups(c, self.student), betas=(c.beta1, c.beta2), fused=True)
        self.weights = term_weights(c)
        if compiled:
            torch.compiler.reset()  # its caches hold few shapes
            for block in [*self.student["backbone"].blocks, *self.teacher["backbone"].blocks]:
                machine.compile_module(block)
        self.waiting = self.prepared()
        self.batch = self.moved()

    def prepared(self):
        """As the trainer's loader hands it over."""
        batches = Batches(self.c, self.source, 0, self.c.batch, colour_here=self.ranks.device.type == "cpu")
        cuda = self.ranks.device.type == "cuda"
        return {k: v.pin_memory() if cuda and isinstance(v, torch.Tensor) else v for k, v in batches[0].items()}

    def moved(self):
        return on_device(self.c, self.ranks, dict(self.waiting), {})

    def __call__(self):
        c, batch, group = self.c, self.batch, self.ranks.group
        noise = Noise(c.seed, 0, 0, c.batch, c.group, c.drop_path, c.rope_rescale)
        set_schedules(self.optimizer, c.lr * c.lr_factor, c.weight_decay, False)
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=c.precision == "bf16"):
            with torch.no_grad():
                targets = teacher_targets(self.teacher, batch, c.teacher_temp, group)
            terms, _ = loss_terms(c, self.student, batch, targets, noise, group)
        loss = sum(self.weights[name] * term for name, term in terms.items())
        finite = Finite(terms)
        loss.backward()
        finite.check(0, self.ranks, batch, self.source)
        self.update()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self):
        clip_gradients(self.student, self.c.clip)
        self.optimizer.step()
        update_ema(self.teacher, self.student, self.c.momentum)

# --------------------------------------------------------------------------------
# gpu-build, gpu-test


def command(script, *argv, apart=True, **options):
    """(exit code, output) of a command of ours; in this process for a rehearsal, which has no time for another."""
    argv = [str(word) for word in argv]
    if apart:
        done = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, **options)
        return done.returncode, done.stdout + done.stderr[-2000:]
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            importlib.import_module(script.removesuffix(".py")).main(argv)
    except ValueError as error:
        return 2, f"{out.getvalue()}\n{error}"
    return 0, out.getvalue()


def gpu_build(machine, report, config):
    words = ["--name"] if config.dry else ["build_ext", "--inplace"]  # the former only asks what would be built
    code, output = command("setup.py", *words)
    found = next((line for line in output.splitlines() if line.startswith("csrc:")), output[-300:])
    size = sum(path.stat().st_size for path in Path().glob("nanodino_C*"))
    report.add("build", exit_code=code, seconds=report.seconds, mb=size / 1e6, says=found)
    if code:
        raise ValueError(f"gpu-build: setup.py ended with {code}: {output[-1500:]}")
    code, output = command("bench.py", "--help")  # a fresh process: what was built must load
    report.add("build", exit_code=code, says="bench.py --help" if not code else output[-300:])


def check(op, machine, report, config):
    if machine.kind == "cuda" and not ops.BUILT:
        raise ValueError(f"check-{op}: csrc is not built here; make gpu-build")
    versus.check(machine, report, op, largest=3000 if config.dry else float("inf"))


def gpu_test(machine, report, config):
    """Each op in a process of its own: a kernel that takes the card's context down takes no other op with it."""
    for op in versus.CASES:
        dry = ["--dry"] if config.dry else []
        path = Path(config.out, f"check-{op}.json")
        path.unlink(missing_ok=True)
        apart = not config.dry or op == "sinkhorn"
        code, output = command("bench.py", f"check-{op}", "--out", config.out, *dry, apart=apart)
        found = json.loads(path.read_text()) if path.exists() else dict(tables={}, notes=[], at="its start")
        for table, rows in found["tables"].items():
            report.keep(table, rows)
        for note in found["notes"]:
            report.note(note)
        if code:
            report.note(f"{op}: ended with {code} at {found.get('at', 'its end')}: {output[-500:]}")
    tests = ["--collect-only", "tests/test_house.py"] if config.dry else [
        *map(str, sorted(Path("tests").glob("test_ops*.py"))), "-k", "cuda", "--timeout-method=thread"][:-1]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", *tests], capture_output=True, text=True)
    report.add("tests", exit_code=done.returncode, says=done.stdout.strip().splitlines()[-1])
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    for line in failed:
        report.note(line[:200])

# --------------------------------------------------------------------------------
# gpu-1: the trainer


def gpu_1(machine, report, config):
    folder = Path(config.out, "trainer")
    shutil.rmtree(folder, ignore_errors=True)
    dry = config.dry
    argv = ["--size", "tiny", "--log_every", "1"]
    argv += TINY if dry else ["--steps", "20", "--batch", "32", "--n_shapes", "256"]
    middle = 1 if dry else 10

    def train(name, *words, on=machine.kind):
        start = time.perf_counter()
        code, output = command("train.py", *words, "--device", on, "--out", folder / name, apart=not dry)
        rows = [json.loads(line) for line in lines(folder / name / "metrics.jsonl")]
        return dict(code=code, rows=rows, seconds=time.perf_counter() - start, says=output.strip()[-200:])
    base = train("cpu", *argv, "--precision", "fp32", "--kernels", "off", on="cpu")
    reference = [row["loss"] for row in base["rows"]]
    for precision, first in ("fp32", 1e-3), ("bf16", 3e-2):  # of the first loss; later ones part, as rounding grows
        for kernels in "off", "auto":
            found = train(f"{precision}-{kernels}", *argv, "--precision", precision, "--kernels", kernels)
            losses = [row["loss"] for row in found["rows"]]
            apart = [abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=False)] or [float("nan")]
            fine = found["code"] == 0 and len(losses) == len(reference) and apart[0] < first
            report.add("20 steps of tiny beside the CPU's", precision=precision, kernels=kernels,
                       first_loss=losses[0] if losses else None, cpu=reference[0], first_apart=apart[0],
                       last_loss=losses[-1] if losses else None, last_apart=apart[-1], seconds=found["seconds"],
                       verdict="right" if fine else f"WRONG: {found['says']}")
    for name, words in dict(again=argv, resumed=[*argv, "--stop_after", middle]).items():
        found = train(name, *words, "--precision", "fp32")
        if name == "resumed":
            found = train(name, "--resume")
        report.add("same bits", what=f"{name}, as fp32-auto", verdict=found["says"][-80:] if found["code"] else
                   differences(folder / "fp32-auto", folder / name))
    report.add("the host waits", **waits(machine, dry))
    report.add("SIGTERM", **terminated(folder / "stopped", argv, machine, dry))
    evaluations(report, folder / "fp32-auto", machine, config)


TINY = ("--steps 2 --batch 4 --n_local 1 --global_size 32 --local_size 16 --n_shapes 8 --dino_prototypes 32 "
        "--ibot_prototypes 32 --dino_hidden 32 --ibot_hidden 32 --depth 2 --workers 0").split()


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def differences(one, other):
    a, b = (load_file(path / "teacher.safetensors") for path in (one, other))
    unequal = [name for name in a if not same(a[name], b[name])]
    return "right" if not unequal and a.keys() == b.keys() else f"WRONG: {len(unequal)} of {len(a)} tensors differ, first {unequal[:1]}"


def waits(machine, dry):
    """A step, batch to update, with every wait of the host an error; what is logged afterwards may wait."""
    step = Step(machine, ["--size", "tiny", *(TINY if dry else ["--batch", "32"])])
    step()
    step()
    machine.synchronize()
    try:
        machine.sync_is_error(True)
        step.batch = step.moved()
        step()
        return dict(verdict="right: nowhere between batch and update")
    except RuntimeError as error:
        frames = [error.__traceback__]
        while frames[-1].tb_next:
            frames.append(frames[-1].tb_next)
        ours = [f for f in frames if "site-packages" not in f.tb_frame.f_code.co_filename]
        at = ", ".join(f"{Path(f.tb_frame.f_code.co_filename).name}:{f.tb_lineno}" for f in ours[-3:])
        return dict(verdict=f"WRONG: {str(error).splitlines()[0][:80]} at {at}")
    finally:
        machine.sync_is_error(False)


def terminated(out, argv, machine, dry):
    """SIGTERM at the first logged step: the run saves, says so, and ends with 0."""
    words = [*argv, "--device", machine.kind, "--out", str(out), "--steps", "100000"]
    process = subprocess.Popen([sys.executable, "train.py", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True)
    end = time.monotonic() + 90
    while not lines(out / "metrics.jsonl") and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        output = process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return dict(verdict="WRONG: it ran on for 60 s")
    fine = process.returncode == 0 and "stopped at step" in output and (out / "checkpoint").exists()
    return dict(seconds=time.monotonic() - asked, verdict="right" if fine else f"WRONG: {output[-150:]}")


def evaluations(report, weights, machine, config):
    if not (weights / "teacher.safetensors").exists():
        report.note(f"{weights}: no weights to evaluate")
        return
    small = "--limit 24 --resolution 32 --workers 0" if config.dry else "--limit 400"
    for task, words in ("knn", small), ("segmentation", f"{small} --iterations 5"), ("tracking", "--limit 2"):
        if config.dry and task == "tracking":
            words = "--limit 1 --resolution 64 --workers 0"
        elif task == "segmentation" and not config.dry:
            words = "--limit 60 --iterations 50"
        start = time.perf_counter()
        code, output = command("evaluate.py", "--task", task, "--weights", weights, "--device", machine.kind,
                               *words.split(), apart=not config.dry)
        last = output.strip().splitlines()[-1][:300] if output.strip() else ""
        report.add("evaluations", task=task, exit_code=code, seconds=time.perf_counter() - start, says=last)

# --------------------------------------------------------------------------------
# gpu-2, gpu-3: the ops


def gpu_2(machine, report, config):
    card = versus.limits(machine, report)
    versus.sinkhorn(machine, report, card)
    versus.loss(machine, report, card)


def gpu_3(machine, report, config):
    versus.attention(machine, report, versus.limits(machine, report))

# --------------------------------------------------------------------------------
# gpu-4: whole steps


SEVEN = "7b", ["--depth", "4", "--checkpointing", "false"], (16, 8)  # four blocks of its width, and its heads
ON_GPU = [("s", [], (64,)), ("l", [], (64,)), ("b", [], (64,)), SEVEN, ("h+", [], (64, 32, 16))]  # batches to try
FIRST_TO_COMPILE = "s", "l", "7b"


def gpu_4(machine, report, config):
    card = versus.limits(machine, report)
    sizes = [("tiny", TINY, (4,))] if config.dry else ON_GPU
    fits = {}
    for size, argv, batches in sizes:
        for batch in batches:
            fits[size] = whole_steps(machine, report, card, size, [*argv, "--batch", str(batch)], compiled=False)
            if fits[size]:
                break
    pictures(machine, report, config)
    for size in [*FIRST_TO_COMPILE, *(size for size, *_ in sizes if size not in FIRST_TO_COMPILE)]:
        if fits.get(size):
            whole_steps(machine, report, card, size, fits[size], compiled=True)
    inference(machine, report, config.dry)


def whole_steps(machine, report, card, size, argv, compiled):
    """A row for kernels auto and off; returns argv, or None if they do not fit in the memory."""
    if report.over:
        return report.note(f"steps of {size}, {'compiled' if compiled else 'eager'}: no time was left")
    step, failed = None, {}
    try:
        step = Step(machine, ["--size", size, "--precision", "bf16", *argv], compiled)
        ways = {choice: partial(with_kernels, choice, step) for choice in ("auto", "off")}
        times = medians(machine, ways, rounds=7, failed=failed, graph=False)
        flops = {} if compiled or "off" in failed else counted(ways["off"])
        for choice, t in times.items():
            launched = machine.launches(ways[choice])
            longest = {name[:60]: round(us / 1e3, 2) for name, (_, us) in list(launched.items())[:12]}
            rate = step.c.batch / t.seconds
            goal = dict(goal=verdict("G13", dict(images_per_s=rate))) if size == "l" and choice == "auto" else {}
            report.add("steps", size=size, images=step.c.batch, blocks="compiled" if compiled else "eager",
                       kernels=choice, ms=t.seconds * 1e3, spread=t.spread, images_per_s=rate,
                       peak_gb=(machine.peak(ways[choice]) + machine.held()) / 1e9,
                       launches=sum(n for n, _ in launched.values()),
                       device_ms=sum(us for _, us in launched.values()) / 1e3,
                       mfu_of_989=flops and flops["all"] / t.seconds / 989.4e12 or None,
                       of_gemm=flops and flops["all"] / t.seconds / card["gemm"] or None, **goal)
            report.note(f"longest of {size}, kernels {choice}, {'compiled' if compiled else 'eager'}, ms: {longest}")
        if size in ("l", "tiny") and not compiled:
            update_alone(machine, report, card, step)
    except RuntimeError as error:
        failed["all"] = str(error).splitlines()[0][:200]
    for choice, why in failed.items():
        report.add("steps", size=size, images=int(argv[-1]), blocks="compiled" if compiled else "eager", kernels=choice,
                   note=why)
    out_of_memory = any("out of memory" in why for why in failed.values())
    del step
    machine.release()
    return None if out_of_memory else argv


def counted(step):
    """Operations of a step's products, from what runs without kernels."""
    with FlopCounterMode(display=False) as counter:
        step()
    return dict(all=counter.get_total_flops())


def update_alone(machine, report, card, step):
    """Clipping, AdamW and the average on gradients that stay."""
    n = sum(p.numel() for p in step.student.parameters())
    for p in step.student.parameters():
        p.grad = torch.full_like(p, 1e-6)
    t = medians(machine, dict(update=step.update), rounds=10, graph=False)["update"]
    ms = t.seconds * 1e3 * 350e6 / n
    report.add("update", parameters=f"{n:,}", ms=t.seconds * 1e3, spread=t.spread, ms_for_350m=ms,
               goal=verdict("G11", dict(ms=ms), card["copy"]))


def pictures(machine, report, config):
    """JPEG to a coloured batch on the device with all cores; the colours alone."""
    c = configure(["--size", "tiny", *TINY, "--out", "build/bench"] if config.dry else
                  ["--size", "s", "--batch", "64", "--out", "build/bench"])
    ranks = start_ranks(machine.kind)
    with tempfile.TemporaryDirectory() as folder:
        root = config.data if config.data != "shapes" else jpegs(Path(folder), 4 if config.dry else 512)
        workers = 0 if config.dry else max(1, len(os.sched_getaffinity(0)) - 1)
        batches = Batches(c, open_source(str(root)), 0, c.batch, colour_here=ranks.device.type == "cpu")
        n, warm = (3, 1) if config.dry else (workers + 40, workers)  # the first of each worker are not counted
        for i, batch in enumerate(loader(batches, range(n), workers, pin_memory=machine.kind == "cuda")):
            last = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()} if i == 0 else last
            on_device(c, ranks, batch, {})
            if i == warm - 1:
                machine.synchronize()
                start = time.perf_counter()
        machine.synchronize()
        rate = (n - warm) * c.batch / (time.perf_counter() - start)
    report.add("JPEG to batch", images=str(root) if config.data != "shapes" else "500 x 375 px, generated",
               workers=workers, images_per_s=rate, goal=verdict("G16", dict(images_per_s=rate)))
    if "colours" in last:  # uint8, as a GPU gets it
        there = {k: v.to(ranks.device) if isinstance(v, torch.Tensor) and k != "colours" else v for k, v in last.items()}
        t = medians(machine, dict(colours=lambda: colour_batch(dict(there), c)), rounds=10, graph=False)["colours"]
        report.add("colours", images=c.batch, ms=t.seconds * 1e3, spread=t.spread,
                   goal=verdict("G10", dict(ms=t.seconds * 1e3)))


def jpegs(folder, n):
    """Pictures of the size that those of ImageNet have, smooth and noisy, so that they compress like photos."""
    rng = np.random.default_rng(0)
    for i in range(n):
        smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        noisy = np.asarray(smooth, dtype=np.int16) + rng.integers(-12, 13, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    return folder


@torch.inference_mode()
def inference(machine, report, dry):
    """ViT-L at 256 px in bf16, beside transformers where that is installed."""
    if report.over:
        return report.note("inference: no time was left")
    c = SIZES["tiny" if dry else "l"]
    images = torch.randn(2 if dry else 64, 3, 32 if dry else 256, 32 if dry else 256, device=machine.device).bfloat16()
    ways = dict(ours=ViT(c).eval().to(machine.device, torch.bfloat16))
    try:
        from transformers import DINOv3ViTConfig, DINOv3ViTModel
        theirs = DINOv3ViTModel(DINOv3ViTConfig(
            hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads, intermediate_size=c.hidden,
            patch_size=c.patch_size, num_register_tokens=c.n_registers, attn_implementation="sdpa")).eval()
        theirs = theirs.to(machine.device, torch.bfloat16)
        ways |= dict(transformers=theirs, transformers_compiled=machine.compile(theirs))
    except ImportError:
        report.note("inference: transformers is not installed, no base")
    failed = {}
    times = medians(machine, ways, [(images,)], rounds=7, failed=failed)
    for name, note in failed.items():
        report.add("inference", way=name, note=note)
    for name, t in times.items():
        ratios = {n: other.seconds / t.seconds for n, other in times.items() if n != "ours"}
        report.add("inference", way=name, images=len(images), ms=t.seconds * 1e3, spread=t.spread, timed=t.how,
                   images_per_s=len(images) / t.seconds, **dict(goal=verdict("G15", ratios)) if name == "ours" else {})

# --------------------------------------------------------------------------------
# gpu-5: a run


def gpu_5(machine, report, config):
    """As many steps as the minutes allow, after a short run that tells how long one takes; then scores and a picture."""
    dry, folder = config.dry, Path(config.out, "run")
    shutil.rmtree(folder, ignore_errors=True)
    argv = ["--size", "tiny", *TINY] if dry else ["--size", config.size, "--batch", "128", "--data", config.data]
    argv += ["--device", machine.kind]
    code, output = command("train.py", *argv, *([] if dry else ["--steps", "40"]), "--log_every", "1",
                           "--out", folder / "probe", apart=not dry)
    rows = [json.loads(line) for line in lines(folder / "probe/metrics.jsonl")]
    if code or not rows:
        raise ValueError(f"gpu-5: the first steps failed: {output[-500:]}")
    speed = rows[-1]["images_per_s"]
    seconds = config.minutes * 60 * 0.8 - report.seconds - 30                 # the rest is for scores and picture
    count = 2 if dry else max(100, int(seconds * speed / 128))
    report.add("run", what="probe", images_per_s=speed, steps=count)
    code, output = command("train.py", *argv, "--steps", count, "--log_every", max(1, count // 100), "--out",
                           folder / "run", apart=not dry)
    rows = [json.loads(line) for line in lines(folder / "run/metrics.jsonl")]
    report.add("run", what="training", exit_code=code, steps=len(rows) and rows[-1]["step"] + 1,
               images_per_s=rows[-1]["images_per_s"] if rows else None, says=output.strip().splitlines()[-1][-100:])
    for row in rows[:: max(1, len(rows) // 10)]:
        names = "step", "loss", "dino_global", "dino_local", "ibot", "koleo", "dino_entropy", "prototypes_used", "cls_rank"
        report.add("curve", **{name: row[name] for name in names if name in row})
    small = "--limit 24 --resolution 32 --iterations 20 --workers 0" if dry else "--limit 2000 --iterations 2000"
    for task in "knn", "linear":
        for name in str(folder / "run"), f"untrained:{'tiny' if dry else config.size}":
            code, output = command("evaluate.py", "--task", task, "--weights", name, "--data", config.data, "--device",
                                   machine.kind, *small.split(), apart=not dry)
            report.add("scores", task=task, weights=name, exit_code=code, says=output.strip().splitlines()[-1][:300])
    images = [f"shapes:{i}" for i in range(2 if dry else 6)] if config.data == "shapes" else [config.data]
    code, output = command("visualize.py", "pca", *images, "--weights", folder / "run", "--out",
                           Path(config.out, "gpu-5.png"), apart=not dry)
    report.add("picture", exit_code=code, file=f"{config.out}/gpu-5.png", says=output.strip()[-100:])


ON_A_GPU = {"gpu-build": gpu_build, "gpu-test": gpu_test, "gpu-1": gpu_1, "gpu-2": gpu_2, "gpu-3": gpu_3,
            "gpu-4": gpu_4, "gpu-5": gpu_5} | {f"check-{op}": partial(check, op) for op in versus.CASES}


def on_gpu(name, config):
    here = machine(config.dry)
    if here.kind != "cuda" and not config.dry and name.startswith("gpu"):
        raise ValueError(f"{name}: no GPU here; add --dry to rehearse it on the CPU")
    report = Report(name, Path(config.out, f"{name}.json"), here, config.minutes * 60)
    report.note(f"kernels: {ops.describe(here.device)}")
    ON_A_GPU[name](here, report, config)
    report.close()


def main(argv):
    if "--help" in argv:
        print(__doc__.strip(), command_line.describe(BenchConfig()), sep="\n\n")
        return
    values, names = command_line.read_words(argv, command_line.types(BenchConfig()))
    config = command_line.apply(BenchConfig(), values)
    for name in names:
        if name not in ON_CPU | ON_A_GPU:
            raise ValueError(f"unknown benchmark {name!r}; choose from {', '.join(ON_CPU | ON_A_GPU)}")
    on_cpu([name for name in names or [*ON_CPU][:-1] if name in ON_CPU], config)
    for name in names:
        if name in ON_A_GPU:
            on_gpu(name, config)


if __name__ == "__main__":
    command_line.run(main)
