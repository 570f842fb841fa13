"""
Measure frozen features.

    python evaluate.py --task knn --weights runs/tiny                             on the generated `shapes`
    python evaluate.py --task linear --weights runs/s --data PHOTOS               PHOTOS/train/CLASS, PHOTOS/val/CLASS
    python evaluate.py --task knn --weights pixels --data PHOTOS                  floor: 16x16 pixels as features
    python evaluate.py --task knn --weights untrained:s --data PHOTOS             floor: the network before training
    python evaluate.py --task knn --weights runs/s --data PHOTOS --control        floor: shuffled labels, or patches
    torchrun --nproc-per-node 8 evaluate.py --task ade20k --weights runs/s --data ADE      features from 8 GPUs
    python evaluate.py --task ade20k --weights runs/s --data ADE --head DIR/head.safetensors    as --out DIR kept it
    python evaluate.py --task depth --weights untrained:7b --decoder dpt --plan --memory 80      what its training needs
    python evaluate.py --task depth --help                                        the options of one task

What a task is stands in tasks/, one protocol a file. Prints a table, and last one line of JSON.
"""

import json
import signal
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace

from engine import config as command_line
from engine import heads
from engine.channels import of_run
from engine.chunks import kept, serve, turn
from engine.features import Frozen, chosen_layers, describe, load, whole_patches
from engine.layouts import size_of
from engine.ranks import choose_precision, count_workers, leading, start_ranks
from engine.task import SKIPPED, EvaluateConfig
from tasks import TASKS


def evaluate(c):
    """Runs one task; returns its line of JSON as a dict, or None on a rank that served."""
    start, task, ranks = time.perf_counter(), TASKS[c.task], start_ranks(c.device, talk=True)
    c = replace(c, precision=choose_precision(c.precision, ranks.device))
    if ranks.rank:
        with redirect_stdout(None):
            frozen = network(task, c, ranks)
        return serve(frozen, c, ranks)
    SKIPPED.clear()
    with leading(ranks), kept(c) as c:
        data = task.open(c)  # what is wrong with it is said before any weights are loaded
        frozen = network(task, c, ranks)
        metrics = by_block(task, data, frozen, c) if getattr(c, "layers", "") == "each" else task.run(data, frozen, c)
    size = "" if c.weights == "pixels" else size_of(frozen.model.config)
    return dict(task=c.task, weights=c.weights, data=c.data, **metrics, **task.beside(c, size, metrics),
                **task.settings(c, metrics), skipped=sum(SKIPPED.values()), ranks=ranks.count,
                seconds=round(time.perf_counter() - start, 1))


def network(task, c, ranks):
    """Read and put on its device by one rank of a machine after the other: the host has room for one, not for eight."""
    with turn("reading"):
        backbone = load(c.weights, c.size, c.precision)
        return Frozen(task.network(backbone, c) if task.network else backbone, task, c, ranks)


def by_block(task, data, frozen, c):
    """The task once for every block:  those of the last one, and {METRIC_by_block: the one that counts, of each}"""
    scores = []
    for block in range(frozen.model.config.depth):
        frozen.layers = [block]
        metrics = task.run(data, frozen, replace(c, layers=str(block)))
        if task.metric not in metrics:
            raise ValueError(f"--layers each: of so few images {c.task} has no {task.metric} to compare blocks by")
        scores.append(metrics[task.metric])
        print(f"block {block:3} {task.metric} {scores[-1]:.3f}")
    return metrics | {f"{task.metric}_by_block": scores}


def task_of(argv):
    """The record that --task names. Raises ValueError if none does."""
    words = [word.partition("=") for word in argv]
    names = [after or [*argv, ""][i + 1] for i, (word, _, after) in enumerate(words) if word == "--task"]
    name = names[-1] if names else ""  # of several the last counts, as of every option
    if name not in TASKS:
        raise ValueError(f"--task {name or '(none)'}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def configure(argv):
    """The command line -> the task's config, checked as far as it can be without --data."""
    task = task_of(argv)
    known = command_line.types(task.config())
    foreign = {option.name for other in TASKS.values() for option in other.all_options()} - known.keys()
    for word in argv:
        field = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and field in foreign:
            own = ", ".join(f"--{option.name}" for option in task.all_options()) or "none"
            raise ValueError(f"--{field}: {task.name} does not read it; its own options are: {own}")
    values, words = command_line.read_words(argv, known)
    if words:
        raise ValueError(f"{words[0]!r} is not an option; write --field value")
    trained = {name: text for name, text in of_run(values.get("weights", "")).items() if name in known}
    c = command_line.apply(task.config(data=values.get("data", "shapes")), trained | values)
    task.check(c)
    config = describe(c.weights)
    side, patch = c.resolution or task.sides[c.data == "shapes"], config.patch_size
    c = replace(c, resolution=c.resolution or -(-side // patch) * patch, workers=count_workers(c.workers))
    chosen_layers(c, config)
    if task.wants == "maps" and c.resolution:
        whole_patches(c, config)
    if getattr(c, "head", ""):
        heads.check(task, c, config)
    return c


def explain(argv):
    """--help: all tasks, or the one that is named and its options"""
    named = any(word.partition("=")[0] == "--task" for word in argv)
    lines = [__doc__.strip(), "", command_line.describe(EvaluateConfig())]
    for task in [task_of(argv)] if named else TASKS.values():
        lines += ["", f"{task.name:14} --data {task.layout}" + ("" if task.shapes else "; not shapes"),
                  f"{'':14} {task.metric}, {'lower' if task.lower else 'higher'} is better; --resolution "
                  f"{task.sides[0] or 'native'}, shapes {task.sides[1]}; --control shuffles {task.control}"]
        for option in task.all_options() if named else ():
            default = f"{option.default}" + (f", shapes {option.shapes}" if option.shapes is not None else "")
            lines.append(f"    --{option.name:16} {default or '-':18} {option.note}")
    return "\n".join(lines)


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(explain(argv))
        return
    c = configure(argv)
    if getattr(c, "plan", False):
        print(json.dumps(dict(task=c.task, weights=c.weights, **TASKS[c.task].plan(c))))
        return
    result = evaluate(c)
    if result is None:  # a rank that served
        return
    command_line.show(result)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # torchrun's, too: temporary folders go as after Ctrl-C
    command_line.run(main)
