"""
--log: rows of metrics.jsonl go to TensorBoard and W&B as well; both are in the extra `log` of pyproject.toml.

    check_loggers   before the first step: known, and installed
    Loggers         the same row to each of them, for each run's folder
"""

import os
import uuid
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path


def tensorboard(c, out, first):
    """row -> OUT/tensorboard. What a run before wrote from step `first` on is not shown: it is done again."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(Path(out, "tensorboard")), purge_step=first)

    def write(row):
        for name in row.keys() - {"step"}:
            writer.add_scalar(name, row[name], row["step"])
        writer.flush()  # a rank that fails leaves at once
    return write


def wandb(c, out, first):
    """
    row -> a W&B run, the same one after --resume: its id stays in OUT/wandb/id. WANDB_PROJECT and WANDB_MODE=offline
    work as they do elsewhere. W&B keeps what it has of a step, and drops what comes of it again.
    """
    import wandb
    note = Path(out, "wandb", "id")
    if not first or not note.exists():
        note.parent.mkdir(exist_ok=True)
        note.write_text(uuid.uuid4().hex)
    run = wandb.init(project=os.environ.get("WANDB_PROJECT", "nanodino"), name=str(out), id=note.read_text(), dir=out,
                     resume="allow", config=asdict(c), reinit="create_new")
    return lambda row: run.log(row, step=row["step"])


LOGGERS = dict(tensorboard=tensorboard, wandb=wandb)


def names_of(text):
    return text.split(",") if text else []


def check_loggers(text):
    """Raises ValueError for a logger that is not known, or not installed."""
    for name in names_of(text):
        if name not in LOGGERS:
            raise ValueError(f"--log {name} is not known; write tensorboard, wandb, or tensorboard,wandb")
        if not find_spec(name):
            raise ValueError(f'--log {name}: {name} is not installed; pip install -e ".[log]"')


class Loggers:
    """Each opens with a folder's first row. One that fails is left out from there: one line, and the run goes on."""
    def __init__(self, c):
        self.c, self.names, self.writers = c, names_of(c.log), {}

    def write(self, out, row):
        for name in list(self.names):
            try:
                if (name, out) not in self.writers:
                    self.writers[name, out] = LOGGERS[name](self.c, out, row["step"])
                self.writers[name, out](row)
            except Exception as error:  # another's code, and a network: anything
                self.names.remove(name)
                print(f"step {row['step']}: --log {name} fails and is left out: "
                      f"{str(error).partition(chr(10))[0] or type(error).__name__}", flush=True)
