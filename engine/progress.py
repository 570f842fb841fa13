"""
What a run says of itself while it runs.

    open_log    config.json, and metrics.jsonl without what a resumed run will do again
    Progress    the next batch, how long it took, and what of it could not be read; a row of metrics.jsonl, and a line
                for who watches
"""

import json
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.checkpoint import last_good, replace_text
from engine.loggers import Loggers
from weights import commit

SHOWN = "loss", "dino_global", "dino_local", "ibot", "koleo", "gram"  # beside the step, in a line for people
RECENT, MOST = 10_000, 100  # samples of a rank, and how many of them may turn out unreadable before it stops


def open_log(c, start, **notes):
    """Writes OUT/config.json, with the notes, and cuts metrics.jsonl; each is replaced whole. Raises OSError."""
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    versions = dict(commit=commit(), torch=torch.__version__, numpy=np.__version__)
    replace_text(out / "config.json", json.dumps(asdict(c) | versions | notes, indent=1))
    lines = (out / "metrics.jsonl").read_bytes().splitlines() if start and (out / "metrics.jsonl").exists() else []
    replace_text(out / "metrics.jsonl", "".join(f"{line.decode()}\n" for line in lines if step_of(line) < start))


def step_of(line):
    """Of a row of metrics.jsonl; infinite for one that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")


class Progress:
    """
    Of this rank, from step `start` to `end`; the first one has a bar if there is a terminal, else a line for each row.

    unreadable  {name: reason} of the images that others stood in for
    """
    def __init__(self, c, ranks, start, end):
        self.c, self.ranks, self.end = c, ranks, end
        self.terminal = ranks.main and sys.stderr.isatty()
        self.bar = tqdm(total=end, initial=start, unit="step", disable=not self.terminal, dynamic_ncols=True)
        self.clock, self.logged, self.waited = time.perf_counter(), start, 0.0
        self.enlarged = None  # images of this rank, in this run, that Gram crops enlarge; None: there are no such crops
        self.loggers, self.unreadable, self.recent = Loggers(c), {}, deque()

    def next(self, stream):
        """The next of the batches; what it takes counts as waiting for them. Raises ValueError if a disk is failing."""
        before = time.perf_counter()
        batch = next(stream)
        self.waited += time.perf_counter() - before
        if "enlarged" in batch:
            self.count(batch["enlarged"], len(batch["indices"]))
        self.lose(batch.pop("broken"), len(batch["indices"]))
        return batch

    def count(self, small, n):
        """Of n images, those that a Gram crop enlarges; the first of them are said."""
        if small and not self.enlarged and self.ranks.main:
            print(f"{small} of these {n} images are smaller than the Gram crops; such are "
                  "enlarged, which adds no detail, and counted in metrics.jsonl", flush=True)
        self.enlarged = (self.enlarged or 0) + small

    def lose(self, broken, n):
        """Of n samples; a known image counts once: a small folder comes again and again, with the same holes in it."""
        new = dict(broken).keys() - self.unreadable.keys()
        self.unreadable |= dict(broken)
        self.recent.append((n, len(new)))
        while sum(n for n, _ in self.recent) - self.recent[0][0] >= RECENT:
            self.recent.popleft()
        seen, lost = (sum(column) for column in zip(*self.recent, strict=True))
        if lost > MOST:
            raise ValueError(f"--data: {lost} of the last {seen} images cannot be read; the last: {broken[-1][1]}; is "
                             "their disk failing? data.py stats names all that are damaged")

    def speed(self, step):
        """What to add to the row of this step, over the steps since the last one."""
        n, seconds = step + 1 - self.logged, max(time.perf_counter() - self.clock, 1e-9)
        row = dict(images_per_s=self.c.batch * n / seconds, waiting=self.waited / seconds)
        if self.enlarged is not None:
            row["enlarged"] = self.enlarged
        if self.ranks.device.type == "cuda":
            row["peak_memory"] = torch.cuda.max_memory_allocated(self.ranks.device)  # bytes
        self.eta = (self.end - step - 1) * seconds / n
        return row

    def mark(self, step):
        """What comes after this step counts for the next row."""
        self.clock, self.logged, self.waited = time.perf_counter(), step + 1, 0.0

    def log(self, out, row):
        """A row of OUT/metrics.jsonl, and of what --log names. Raises ValueError if the disk is full."""
        path = Path(out, "metrics.jsonl")
        try:
            with open(path, "a") as file:
                file.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()})
                           + "\n")
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; {last_good(out)}") from error
        self.loggers.write(out, row)
        shown = " ".join(f"{k} {row[k]:.3f}" for k in SHOWN if k in row) + f" {row['images_per_s']:.0f} img/s"
        if self.terminal:
            self.bar.set_postfix_str(shown)
            return
        minutes, seconds = divmod(round(self.eta), 60)
        memory = f", peak {row['peak_memory'] / 2**30:.1f} GiB" if "peak_memory" in row else ""
        print(f"step {row['step']:,}/{self.end:,} {shown} lr {row['lr']:.3g}, {minutes // 60}:{minutes % 60:02}:"
              f"{seconds:02} to go, {100 * row['waiting']:.0f} % waiting for images{memory}", flush=True)
