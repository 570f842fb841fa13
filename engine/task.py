"""
What a task declares about itself, once, in its own file: evaluate.py knows nothing else of it.

    Task      its name, what --data holds, how it is opened and run, the options that it reads
    Option    one that not all tasks have
    Paper     numbers of the paper, and what must agree before they are printed beside ours: side, items, options
    skip      what cannot be used is named when it is met, and counted in the line of JSON

    TASK = Task("knn", layout="train/CLASS/, val/CLASS/", open=open_splits, run=run, wants="tokens", metric="top1_k20")

A file in tasks/ ends with such a record, and tasks/__init__.py has a line for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from typing import NamedTuple

from engine import config as command_line
from engine.images import ImageConfig
from engine.views import fitted

WIDE = 512  # pixels of --resolution
SIZES = "s", "s+", "b", "l", "h+", "7b", "convnext_t", "convnext_s", "convnext_b", "convnext_l"  # of the paper's tables


@dataclass(frozen=True)
class EvaluateConfig:
    task: str = ""             # knn, linear, logreg, segmentation, ...: see the list
    weights: str = ""          # a run's folder, a weights file, pixels, or untrained:SIZE
    data: str = "shapes"       # a folder in the layout that the task has, or shapes: generated
    size: str = ""             # s, b, convnext_t, ...: stop if the weights are of another
    resolution: int = 0        # [0, 16384]: pixels of the square, or short side, that the network sees; 0 = the task's
    batch: int = 64            # [1, 1e6]: images at a time
    limit: int = 0             # [0, inf): images, clips of each split, evenly spaced; 0 = all, or as many as shapes has
    device: str = "auto"       # auto, cpu, cuda, mps
    workers: int = -1          # [-1, 256]: processes that read images, for each rank; -1 = as the machine allows
    precision: str = "auto"    # of the network: bf16, fp32; auto = bf16 where the hardware multiplies it
    seed: int = 0              # [0, 4294967295]: of the order of samples, the heads, the control
    control: bool = False      # truth that is shuffled, or patches that are: the score must be that of chance
    cache: str = ""            # folder that keeps features, to read or to go on with; empty = TMPDIR, while this runs


SKIPPED = {}  # what this run could not use: {line: how many}


def skip(what, n=1):
    """Says what is skipped, and counts it, once however often it is met."""
    print(f"skipped {what}")
    SKIPPED[what] = n


class Option(NamedTuple):
    name: str
    default: object            # on photos; its type is the option's
    note: str                  # for --help: unit, meaning
    shapes: object = None      # the default on shapes, if that is another
    least: float = 0           # that a number may be
    scored: bool = True        # another value is another protocol, and the paper's number no longer beside

    def at(self, data):
        return self.shapes if data == "shapes" and self.shapes is not None else self.default


LAYERS = Option("layers", "", "blocks, 0-based, as in 3,5, side by side; empty = the last; each = every one by itself")
NORM = Option("norm", True, "features after the final norm; false = before it")
OUT = Option("out", "", "folder for ", scored=False)
IMAGES = tuple(Option(field.name, field.default, command_line.notes(ImageConfig)[field.name])
               for field in fields(ImageConfig))
PLAN = (Option("plan", False, "print what training the head needs, and start nothing", scored=False),
        Option("memory", 0.0, "with --plan: GB (1e9 bytes) of one CUDA device; 0 = what this machine has",
               scored=False))
HEAD = Option("head", "", "head.safetensors that an earlier run with --out has left: nothing is trained")


GIVEN = object()  # any value but the default


class Paper(NamedTuple):
    metric: str
    values: dict               # {size: number}
    side: int                  # of --resolution
    items: dict                # {metric: how many there are in the whole set}
    options: dict = {}         # {name: its value there, or GIVEN}; all others of the task are at their defaults


def by_size(*values):
    """One number for each of SIZES, None where the paper has none."""
    return {size: value for size, value in zip(SIZES[: len(values)], values, strict=True) if value is not None}


@dataclass(frozen=True)
class Task:
    name: str                  # of --task
    layout: str                # what --data holds, one line of --help
    open: Callable             # c -> data: what the set holds, read and checked before any weights are loaded
    run: Callable              # (data, frozen, c) -> {metric: number}
    wants: str                 # tokens: class tokens and mean patches; maps: patches
    metric: str                # the one that counts
    lower: bool = False        # lower is better
    view: Callable = fitted    # what the network sees: see views.py
    wide: Callable = None      # the same from 512 pixels on, if the paper has another than the released code at 224
    sides: tuple = (224, 80)   # --resolution on photos, on shapes, in whole patches; 0 = as large as they are
    network: Callable = None   # (backbone, c) -> what stands in its place, as a head on it; None = itself
    options: tuple = ()        # Option: read beside the common ones; all others are refused
    decoders: tuple = ()       # names in decoders/; the first is the default
    control: str = "truth"     # what --control shuffles: truth, patches
    pictures: str = ""         # what --out draws
    released: tuple = ()       # decoders whose --head may also be a file that load_decoder reads
    heads: str = ""            # metric of the task whose --head it reads; empty = its own
    trains: bool = True        # on --data, where that is not shapes; else --head is wanted
    plan: Callable = None      # c -> {what: bytes} of training a head, without weights or data: --plan
    shapes: bool = True        # --data shapes works
    needs: tuple = ()          # modules to import, of the optional ones
    paper: tuple = ()          # Paper

    def all_options(self):
        """Those of the record, and those that follow from it."""
        own = self.options + ((LAYERS,) if self.wants == "maps" and not self.network else ())
        if self.decoders:
            own += (Option("decoder", self.decoders[0], "one of " + ", ".join(self.decoders)), HEAD)
        own += PLAN if self.plan else ()
        left = [f"a picture: {self.pictures}"] * bool(self.pictures) + ["head.safetensors"] * (HEAD in own)
        return own + ((OUT._replace(note=OUT.note + "; ".join(left)),) if left else ())

    def config(self, **values):
        """A frozen EvaluateConfig with the task's own fields, defaults where none are given."""
        data = values.get("data", "shapes")
        own = [(option.name, type(option.default), option.at(data)) for option in self.all_options()]
        images = command_line.ranges(ImageConfig)
        ranges = {option.name: images.get(option.name, f"[{option.least}, inf)") for option in self.all_options()
                  if type(option.default) in (int, float, tuple)}
        kind = make_dataclass("EvaluateConfig", own, bases=(EvaluateConfig,), frozen=True,
                              namespace=dict(ranges=ranges))
        return kind(task=self.name, **values)

    def view_at(self, side):
        return self.wide if self.wide and side >= WIDE else self.view

    def check(self, c):
        """What the command line alone can tell. Raises ValueError."""
        for option in ("cache", "out"):
            if getattr(c, option, ""):
                command_line.writable(getattr(c, option), option=f"--{option}")
        if c.data == "shapes" and not self.shapes:
            raise ValueError(f"--data: {self.name} does not run on shapes; name a folder with {self.layout}")
        if not self.trains and c.data != "shapes" and not c.head:
            raise ValueError(f"--head is missing: {self.name} has nothing to train on; name a released head, or "
                             "head.safetensors of another task of its kind")
        if c.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"--precision {c.precision}: write auto, bf16 or fp32")
        if self.decoders and c.decoder not in self.decoders:
            raise ValueError(f"--decoder {c.decoder}: {self.name} has {', '.join(self.decoders)}")
        for module in self.needs:
            try:
                __import__(module)
            except ImportError as error:
                raise ValueError(f"{self.name}: {module} is not installed; pip install -e .[eval]") from error

    def beside(self, c, size, metrics):
        """{paper_METRIC: its number for a network of this size}, if it was measured as the paper did."""
        if c.control or c.limit:
            return {}
        return {f"paper_{row.metric}": row.values[size] for row in self.paper
                if size in row.values and row.metric in metrics and c.resolution == row.side
                and all(metrics.get(name) == n for name, n in row.items.items()) and self.agrees(c, row.options)}

    def agrees(self, c, wanted):
        """Whether the options are those of a protocol"""
        for option in self.all_options():
            value, there = getattr(c, option.name), wanted.get(option.name, option.default)
            if option.scored and (option != HEAD or self.trains) and (
                    value == option.default if there is GIVEN else value != there):
                return False
        return True

    def settings(self, c, metrics):
        """The options that the task has read, beside those that its metrics name."""
        names = ["resolution", "batch", "limit", "precision", "control", "seed"]
        names += [field.name for field in fields(c)[len(fields(EvaluateConfig)) :]
                  if field.name not in ("out", "plan", "memory")]
        unsaid = {option.name for option in IMAGES if getattr(c, option.name, None) == option.default}
        return {name: getattr(c, name) for name in names if name not in unsaid | metrics.keys()}
