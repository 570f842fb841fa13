"""
visualize.py curves RUN...: metrics.jsonl of runs of train.py or distill.py in one picture, a panel for each number.

    find_runs   folders -> what each run has written; rows that a kill cut short are left out
    marks       what a network that predicts nothing would show: ln K, uniform
    draw        the picture
"""

import json
import math
from pathlib import Path

import numpy as np

from engine.progress import step_of

FIRST = ("loss", "dino_global", "dino_local", "ibot", "koleo", "gram", "dino_entropy", "prototypes_used", "cls_rank",
         "patch_rank", "patch_neighbours", "patch_others", "patch_cls",
         "grad_norm_backbone", "grad_norm_dino_head", "grad_norm_ibot_head", "lr")  # panels, then all others
COLUMNS, PARTS = 4, 50  # panels in a row; a bold line is the mean over 1/PARTS of the run
GREY = "#777777"


def find_runs(words):
    """RUN... -> {label: (config, rows)}; the folder of distill.py stands for its students. Raises ValueError."""
    folders = []
    for word in words:
        path = Path(word)
        found = [each for each in (path, *sorted(path.glob("*/"))) if (each / "metrics.jsonl").is_file()]
        if not found:
            raise ValueError(f"RUN {word}: no metrics.jsonl there; name folders of runs")
        folders += found
    if not folders:
        raise ValueError("RUN: none in the command; name folders of runs, as in curves runs/a runs/b")
    folders = list(dict.fromkeys(folders))
    names = [path.resolve().name for path in folders]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, folders, strict=True)]
    return {label: read_run(path) for label, path in zip(labels, folders, strict=True)}


def read_run(path):
    """config.json, {} if it cannot be read, and the rows of metrics.jsonl that are whole."""
    lines = (path / "metrics.jsonl").read_bytes().splitlines()
    rows = [json.loads(line) for line in lines if step_of(line) < math.inf]
    if not rows:
        raise ValueError(f"RUN {path}: metrics.jsonl has no row yet; wait for the first")
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        config = {}
    return config if isinstance(config, dict) else {}, rows


def panels(runs):
    """Names of the numbers to draw: those that change in some run, FIRST before others."""
    seen = {}
    for _, rows in runs.values():
        for name in dict.fromkeys(name for row in rows for name in row):
            seen.setdefault(name, set()).update(column(rows, name)[1])
    names = [name for name in seen if name != "step" and (len(seen[name]) > 1 or name in FIRST)]
    return sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def column(rows, name):
    """Steps and values of the rows that have this number; one that is not finite cannot be drawn."""
    pairs = [(row["step"], row[name]) for row in rows
             if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])]
    return [step for step, _ in pairs], [value for _, value in pairs]


def marks(name, config):
    """{what a line says: its value}, of a student whose predictions are uniform, or of such targets."""
    try:
        if name in ("dino_global", "dino_local"):
            return {"ln K": math.log(config["dino_prototypes"])}
        if name == "ibot":
            return {"uniform": config["mask_share"] * math.log(config["ibot_prototypes"])}
    except (KeyError, TypeError, ValueError):  # no config.json, or one of another kind
        return {}
    return {"uniform": 1.0} if name == "dino_entropy" else {}


def draw(runs, path):
    """Writes the picture; returns its number of panels. Raises ValueError without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('curves are drawn by matplotlib, which is not installed; pip install -e ".[demo]"') from error
    names, few = panels(runs), colormaps["tab10"].colors
    columns = min(COLUMNS, len(names))
    height = -(-len(names) // columns)
    figure = Figure(figsize=(3.5 * columns, 2.3 * height + 0.4), dpi=110, layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).flatten()
    colours = few[: len(runs)] if len(runs) <= len(few) else colormaps["turbo"](np.linspace(0.05, 0.95, len(runs)))
    for axis, name in zip(axes[: len(names)], names, strict=True):
        panel(axis, name, runs, colours)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    lines = [axes[0].plot([], [], color=colour, linewidth=2)[0] for colour, _ in zip(colours, runs, strict=True)]
    figure.legend(lines, list(runs), loc="outside upper left", ncols=min(len(runs), 6), frameon=False)
    figure.savefig(path)
    return len(names)


def panel(axis, name, runs, colours):
    """One number of all runs: each row thin, and where there are many their running mean over it."""
    smallest, largest, said = math.inf, 0, {}
    for (config, rows), colour in zip(runs.values(), colours, strict=True):
        steps, values = (np.array(each, float) for each in column(rows, name))
        said |= {(text, round(value, 3)): None for text, value in marks(name, config).items()}
        if not len(values):
            continue
        n = len(values) // PARTS
        axis.plot(steps, values, color=colour, linewidth=1.2 if n < 2 else 0.6, alpha=1 if n < 2 else 0.3)
        if n >= 2:
            mean = np.convolve(values, np.full(n, 1 / n), "valid")
            axis.plot(steps[n // 2 :][: len(mean)], mean, color=colour, linewidth=1.4)
        smallest, largest = min(smallest, values.min()), max(largest, values.max())
    for text, value in said:
        axis.axhline(value, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.annotate(f"{text} = {value:g}", (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 2),
                      textcoords="offset points", ha="right", va="bottom", fontsize=8, color=GREY)
    if 0 < 100 * smallest < largest:
        axis.set_yscale("log")
    axis.set_title(name.replace("_", " "), fontsize=10, loc="left")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
