"""
What one call of bench.py measured: JSON after every row, tables for LOG.md at the end, each figure beside its goal.

    GOALS, verdict    what the kernels and the trainer are to reach on a GPU, and whether a row does
    Report            the rows of a call

The goals were computed from bytes and operations before anything had run on a GPU, for an H200 whose copy moves 4.3
TB/s: on another card the times are scaled by its own copy. Ratios are to the base's time, in the same run.
"""

import json
import math
import time
from pathlib import Path

from weights import commit

COPY = 4.3e12              # bytes/s of the H200 that times in GOALS are meant for, read and written

# at least so many times as fast as eager, compiled, best, calls; at most ms; images/s; share of the base's memory
GOALS = {
    "G1": dict(what="Sinkhorn 1274 x 98304, to u", eager=14, compiled=5, ms=0.30),
    "G2": dict(what="Sinkhorn 32 x 262144, to u", eager=10, ms=0.025),
    "G3": dict(what="Sinkhorn, iBOT loss, gradient, 1274 x 98304", mixed=6, eager=10, ms=0.60, memory=1 / 3.4),
    "G4": dict(what="the same at 4941 x 65536", mixed=6, ms=1.6),
    "G5": dict(what="attention N = 261, forward", eager=8, best=1.8, ms=0.110),
    "G6": dict(what="attention N = 261, both ways", eager=5, best=1.6),
    "G7": dict(what="attention N = 54, both ways", eager=8, best=2),
    "G8": dict(what="attention N = 1029, both ways", best=1.0),
    "G8b": dict(what="attention N = 2309, both ways", best=0.95),
    "G9": dict(what="attention of global and local crops in one call", calls=1.1),
    "G10": dict(what="colours of 64 images, 2 + 8 crops", ms=0.100),
    "G11": dict(what="clip, AdamW, average; 350 M parameters", ms=3.3),
    "G13": dict(what="step of ViT-L, 224/96 px, 64 images", images_per_s=300),
    "G15": dict(what="inference of ViT-L, 256 px", transformers=1.5, transformers_compiled=1.15),
    "G16": dict(what="JPEG to a batch on the GPU", images_per_s=2500),
    "G20": dict(what="same bits in 10 runs", equal=10),
}
NO_BASE = ("G12 (a step beside the released code's), G14 (its blocks at 7B width), G17 (its peak memory), G18 (its "
           "launches): no such code here, only the absolute figures; G19 (the whole 7B on one H200): not run")
AT_MOST = "ms", "memory"


def verdict(goal, measured, copy=COPY):
    """
    "met", or each figure that is not: the goal's name, what came, what was wanted.

    goal      of GOALS    measured  {figure: value}; a figure that nobody measured is said to be missing
    copy      bytes/s of this card's copy, by which goals in ms are scaled
    """
    short = []
    for name, wanted in GOALS[goal].items():
        if name == "what":
            continue
        wanted *= COPY / copy if name == "ms" else 1
        value = measured.get(name)
        if value is None:
            short.append(f"{name} not measured, wanted {wanted:.3g}")
        elif not (value <= wanted if name in AT_MOST else value >= wanted):  # nan is neither
            short.append(f"{name} {value:.3g}, wanted {wanted:.3g}")
    return f"{goal} met" if not short else f"{goal} not met: {'; '.join(short)}"


class Report:
    """
    add(table, ...) prints the row and keeps it in the JSON file at once: what was measured before a machine is lost is
    not lost. close() writes the tables beside it, NAME.md.

    path    None = print alone
    budget  seconds after which `over` is True, so that a call ends by itself and not by its limit
    """
    def __init__(self, name, path, machine, budget=math.inf):
        self.path, self.start, self.budget = path and Path(path), time.perf_counter(), budget
        self.head = dict(name=name, date=time.strftime("%Y-%m-%d %H:%M"), commit=commit(), **machine.describe())
        self.tables, self.notes = {}, []
        if path:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self):
        return time.perf_counter() - self.start

    @property
    def over(self):
        return self.seconds > self.budget

    def add(self, table, **row):
        self.tables.setdefault(table, []).append(row)
        print(f"{table}:  " + "   ".join(f"{k} {shown(v)}" for k, v in row.items() if v is not None), flush=True)
        self.save()
        return row

    def keep(self, table, rows):
        """Rows that another process has printed."""
        self.tables.setdefault(table, []).extend(rows)
        self.save()

    def note(self, text):
        self.notes.append(text)
        print(text, flush=True)
        self.save()

    def save(self):
        if not self.path:
            return
        whole = dict(self.head, seconds=round(self.seconds, 1), tables=self.tables, notes=self.notes)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(whole, indent=1))
        part.replace(self.path)

    def markdown(self):
        """The tables as LOG.md holds them."""
        h = self.head
        lines = [f"## {h['date'][:10]}  bench.py {h['name']}", "", ", ".join(
            f"{k} {v}" for k, v in h.items() if k not in ("name", "date", "at")) + f"; {self.seconds:.0f} s", ""]
        for table, rows in self.tables.items():
            columns = list(dict.fromkeys(key for row in rows for key in row))
            cells = [columns, ["---"] * len(columns), *([shown(row.get(c)) for c in columns] for row in rows)]
            lines += [f"**{table}**", "", *(f"| {' | '.join(row)} |" for row in cells), ""]
        return "\n".join([*lines, *(f"{note}\n" for note in self.notes)])

    def close(self):
        if not self.path:
            return
        self.save()
        self.path.with_suffix(".md").write_text(self.markdown())
        print(f"\n{self.markdown()}\n{self.path} and .md, {self.seconds:.0f} s", flush=True)


def shown(value):
    """Three digits of a float, nothing for None, no bars that would end a cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "/").replace("\n", " ")
