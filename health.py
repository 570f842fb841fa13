"""
Is this run well? One word, without labels, images or weights: config.json and metrics.jsonl are all that is read.

    python health.py RUN     also while it trains; of distill.py, a student's folder: OUT/NAME; or a run of text.py

    collapsed    one prototype for all images, or class tokens that have lost directions while the loss falls
                 words: one vector for all images, or all texts: the loss is ln B, and has no gradient or the
                 cosines' scale falls
    diverging    what was learnt is thrown away: steps that had to be skipped, a loss above ln K, directions lost while
                 nothing is learnt;  words: a loss above ln B, or images no longer find texts that they found
    uniform      the targets say the same of every image, or the student's guess is no better than ln K
                 words: images find their text no better than by chance, ln B
    decaying     patches of an image grow alike, or no longer resemble their neighbours; class tokens lose less
    saturated    words: the cosines' scale stands at its limit of 100, and texts still are not told apart
    starved      the processor waits for images
    warming      none of these, and the learning rate still rises
    healthy      none of these

    read_run        a folder -> its config and its rows
    measure         what they say, as a few numbers near the run's end; measure_words of text.py's
    judge           the first word of the above that fits
    VISION, WORDS   what is read of a run, and what it is judged by

The last line is one JSON object: verdict, step, and every number that it was judged by.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from engine import config as command_line

FEWEST = 3  # rows that can show a course
SOON = 50   # steps: before it class tokens of healthy runs lose directions too, and find them again; caches are cold


@dataclass(frozen=True)
class Sign:
    """A word, when it is said, by which numbers, and one thing to try."""
    word: str
    fits: object   # numbers -> bool; a comparison with one that the run does not have, nan, is False
    shows: str     # names of METERS
    advice: str


METERS = {  # name: what it is; what is usual: of the well runs of tests/sick_runs.py and of size tiny, 800 steps
    "dino": ("DINO loss of global crops, of ln K", "0.92 to 0.98"),
    "ibot": ("iBOT loss, of ln K", "0.68 to 0.81"),
    "entropy": ("targets' entropy, of ln K", "0.76 to 0.93"),
    "balance": ("entropy of their mean, of ln K", "0.99 to 1; less if the batch is small beside K"),
    "rank": ("rank of the class tokens, of the first row's", "0.95 to 1.2"),
    "patch_rank": ("rank of the patches, of the first row's", "0.8, in one run"),
    "spread": ("1 - cosine of any two patches of an image, of its best", "0.85 to 1"),
    "locality": ("what neighbours share of it, of its best", "0.75 to 1"),
    "patch_cls": ("cosine of patches and class token", "0.5 to 0.65"),
    "gradient": ("gradient norm of the backbone, of its median", "0.75 to 1.1"),
    "skipped": ("steps skipped, of those since the middle", "0"),
    "waiting": ("time spent waiting for images", "0.1 to 0.25 with --workers 0, 0.01 with workers"),
}

STARVED = Sign("starved", lambda m: m["step"] >= SOON and m["waiting"] > 0.4, "waiting",
               "more processes that prepare images: --workers; or smaller files, on a disk of this machine")

# Thresholds: set on seeds 100 to 119 of tests/sick_runs.py; LOG.md has what they say of other seeds
SIGNS = [
    Sign("collapsed", lambda m: m["balance"] < 0.5 and m["balance"] - m["entropy"] < 0.1
         or not m["warming"] and m["rank"] < (0.3 if m["spread"] < 0.4 else 0.75) and m["dino"] < 0.985,
         "balance entropy rank dino",
         "balance the targets and spread the class tokens: --sinkhorn_iterations 3, --koleo_weight 0.1; more images"),
    Sign("diverging", lambda m: m["skipped"] > 0.02
         or not m["warming"] and (m["dino"] > 1.02 or m["rank"] < 0.75 and m["dino"] >= 0.985),
         "skipped gradient rank dino", "a third of the learning rate, or a longer warm-up: --lr, --lr_warmup"),
    Sign("uniform", lambda m: not m["warming"] and (m["entropy"] > 0.985 or m["dino"] > 0.995 and m["entropy"] > 0.95),
         "entropy dino ibot", "sharper targets: --teacher_temp 0.04; or fewer prototypes: --dino_prototypes"),
    Sign("decaying", lambda m: not m["warming"] and (m["spread"] < 0.4 or m["locality"] < 0.4),
         "spread locality patch_cls patch_rank ibot",
         "--stage gram --start RUN --gram_teacher RUN@STEP, a step of before it; or more of what trains patches: "
         "--ibot_weight 1, --mask_ratio 0.1,0.5"),
    STARVED,
    Sign("warming", lambda m: m["warming"], "dino ibot rank", "nothing: look again after the learning rate's peak"),
    Sign("healthy", lambda m: True, "dino ibot entropy balance rank spread locality waiting", "nothing: let it train"),
]

WORD_METERS = {  # the same; of the well runs of words in tests/sick_runs.py, 120 steps of 32 pairs
    "loss": ("loss, of ln B", "0.7, and less the longer it trains"),
    "top1": ("images that find their text in the batch", "0.22 to 0.31 of 32 pairs"),
    "kept": ("the same, of its best", "0.8 to 1"),
    "scale": ("factor on the cosines: from 14.3 to 100, where it is stopped", "14.5; more the longer it trains"),
    "gradient": ("gradient norm of the towers, of the first row's", "0.57 to 0.89"),
    "skipped": METERS["skipped"],
    "waiting": ("time spent waiting for pairs", "0.35 to 0.4 with --workers 0, 0.1 with one"),
}

WORD_SIGNS = [
    Sign("diverging", lambda m: m["skipped"] > 0.02 or not m["warming"] and (m["loss"] > 1.05 or m["kept"] < 0.5),
         "skipped loss kept gradient", "a third of the learning rate, or a longer warm-up: --lr, --lr_warmup"),
    Sign("collapsed", lambda m: not m["warming"] and (m["loss"] > 0.99 and m["gradient"] < 1e-4
         or m["loss"] > 0.9 and m["scale"] < 10), "loss gradient scale",  # a scale begins at 14.3
         "a tenth of the learning rate, or a longer warm-up: --lr, --lr_warmup"),
    Sign("uniform", lambda m: not m["warming"] and m["loss"] > 0.97, "loss top1 gradient",
         "look whether captions belong to their images; if they do, a third of the learning rate, or more steps: "
         "--lr, --steps"),
    Sign("saturated", lambda m: m["scale"] > 95 and m["loss"] > 0.3, "scale loss top1",
         "captions that say the same of many images keep the loss up: more and other ones, or a smaller --batch"),
    STARVED,
    Sign("warming", lambda m: m["warming"], "loss top1", "nothing: look again after the learning rate's peak"),
    Sign("healthy", lambda m: True, "loss top1 kept scale waiting",
         "nothing: let it train; whether it has learned its captions by heart, evaluate.py --task captions tells"),
]

# --------------------------------------------------------------------------------
# What the run has written


def read_run(folder):
    """config.json as a dict, the rows of metrics.jsonl as dicts. Raises ValueError for all that no run writes."""
    config = read_config(Path(folder, "config.json"))
    path, rows = Path(folder, "metrics.jsonl"), []
    try:
        lines = path.read_text().split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); of a distillation, name a student's folder: RUN/NAME"
                         ) from error
    for number, line in enumerate(lines[:-1], 1):  # after the last newline: nothing, or a row half written
        rows.append(read_row(f"{path}, line {number}", line, kind_of(config).read))
        if len(rows) > 1 and rows[-1]["step"] <= rows[-2]["step"]:
            raise ValueError(f"{path}, line {number}: step {rows[-1]['step']} comes after {rows[-2]['step']}; each row "
                             "must have a later step: is it one run's?")
    if len(rows) < FEWEST:
        raise ValueError(f"{path} has {len(rows)} rows; {FEWEST} can be judged: wait, or train with a smaller "
                         "--log_every")
    return config, rows


def read_config(path):
    """A run's config.json, with the numbers that the meters are measured by."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.parent}: no run to judge ({error}); name the folder of one") from error
    for name, low in kind_of(config).config.items():
        value = config.get(name, 0 if name == "began" else None) if isinstance(config, dict) else None
        if not is_number(value) or not low <= value < math.inf:
            raise ValueError(f"{path}: {name} is {value!r}, where a number from {low} belongs; name a folder that "
                             "train.py or text.py has written, or of a student of distill.py")
    return config


def read_row(where, line, names):
    """A row of metrics.jsonl; its numbers of these names may be infinite or not a number, its step may not."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is cut short, or no JSON; delete it, or let --resume do so") from error
    step = row.get("step") if isinstance(row, dict) else None
    if type(step) is not int or not 0 <= step < 1e15:
        raise ValueError(f"{where} is no row of a run: an object with a step, a whole number, belongs there")
    wrong = [name for name in names if name in row and not is_number(row[name])]
    if wrong:
        raise ValueError(f"{where}: {wrong[0]} is {row[wrong[0]]!r}, where a number belongs; restore it from a copy")
    return row


def is_number(value):
    """Also one that is infinite, or none; an int that no float can hold is not."""
    return type(value) is float or type(value) is int and abs(value) < 1e15

# --------------------------------------------------------------------------------
# What that says


def course(rows, name):
    return [row[name] for row in rows if not math.isnan(row.get(name, math.nan))]  # runs of before have fewer


def late(values):
    """The median of the last quarter."""
    return median(values[-max(FEWEST, len(values) // 4) :]) if values else math.nan


def of_best(values):
    """Late ones over the median of the best quarter."""
    return late(values) / max(late(sorted(values)), 1e-6)


def skipped(rows):
    half, last = rows[len(rows) // 2], rows[-1]
    return max(last.get("skipped", math.nan) - half.get("skipped", math.nan), 0) / (last["step"] - half["step"])


def measure(config, rows):
    """The numbers of METERS, or those of WORD_METERS; nan where the run does not have them."""
    return kind_of(config).measure(config, rows)


def measure_vision(config, rows):
    """Medians of the last quarter of the rows."""
    step, began = rows[-1]["step"], config.get("began", 0)
    settled = [row for row in rows if row["step"] - began >= config["lr_warmup"]]
    settled = settled if len(settled) >= FEWEST else rows
    others = course(settled, "patch_others")
    shared = [(row["patch_neighbours"] - row["patch_others"]) / max(1 - row["patch_others"], 1e-6) for row in settled
              if {"patch_neighbours", "patch_others"} <= row.keys()]
    ranks, patches, gradients = course(rows, "cls_rank"), course(rows, "patch_rank"), course(rows, "grad_norm_backbone")
    k, ibot = math.log(config["dino_prototypes"]), math.log(config["ibot_prototypes"]) * config["mask_share"]
    return dict(
        step=step,
        warming=step - began < max(config["lr_warmup"], SOON),
        dino=late(course(rows, "dino_global")) / k,
        ibot=late(course(rows, "ibot")) / ibot if ibot else math.nan,
        entropy=late(course(rows, "dino_entropy")),
        balance=late(course(rows, "dino_balance")),
        rank=late(ranks) / max(ranks[0], 1e-6) if ranks else math.nan,
        spread=of_best([1 - x for x in others]),
        locality=of_best(shared),
        patch_cls=late(course(rows, "patch_cls")),
        patch_rank=late(patches) / max(patches[0], 1e-6) if patches else math.nan,
        gradient=late(gradients) / max(median(gradients), 1e-12) if gradients else math.nan,
        skipped=skipped(rows),
        waiting=late(course(rows, "waiting")),
    )


def measure_words(config, rows):
    """The same of a run of text.py."""
    step, found, gradients = rows[-1]["step"], course(rows, "top1"), course(rows, "grad_norm_towers")
    return dict(
        step=step,
        warming=step < max(config["lr_warmup"], SOON),
        loss=late(course(rows, "loss")) / math.log(config["batch"]),
        top1=late(found),
        kept=of_best(found) if found and late(sorted(found)) > 4 / config["batch"] else 1.0,  # or nothing to lose
        scale=late(course(rows, "scale")),
        gradient=late(gradients) / max(gradients[0], 1e-12) if gradients else math.nan,
        skipped=skipped(rows),
        waiting=late(course(rows, "waiting")),
    )


@dataclass(frozen=True)
class Kind:
    """What a trainer writes, and what its runs are judged by."""
    config: dict     # of config.json: a number's name, and the least that it may be
    read: tuple      # of metrics.jsonl: numbers that are looked at
    measure: object  # config, rows -> numbers
    meters: dict
    signs: list


VISION = Kind(
    dict(dino_prototypes=2, ibot_prototypes=2, mask_share=0, lr_warmup=0, steps=1, began=0),
    ("dino_global", "ibot", "dino_entropy", "dino_balance", "cls_rank", "patch_neighbours", "patch_others",
     "patch_cls", "patch_rank", "grad_norm_backbone", "skipped", "waiting"), measure_vision, METERS, SIGNS)
WORDS = Kind(
    dict(batch=2, lr_warmup=0, steps=1), ("loss", "top1", "scale", "grad_norm_towers", "skipped", "waiting"),
    measure_words, WORD_METERS, WORD_SIGNS)


def kind_of(config):
    """By what only text.py's config.json has."""
    return WORDS if isinstance(config, dict) and "head_blocks" in config else VISION


def judge(numbers, kind=VISION):
    """The Sign that fits first; the last one always does."""
    return next(sign for sign in kind.signs if sign.fits(numbers))


def describe(sign, numbers, kind=VISION):
    """Lines for people."""
    yield f"{sign.word}    step {numbers['step']:,}; medians of the last quarter of the rows"
    missing = [name for name in kind.meters if math.isnan(numbers[name])]
    for name in sign.shows.split():
        if name not in missing:
            what, usual = kind.meters[name]
            yield f"  {numbers[name]:7.3f}  {what}; usual: {usual}"
    if missing:
        yield f"not judged, for metrics.jsonl does not say it: {'; '.join(kind.meters[name][0] for name in missing)}"
    yield f"try: {sign.advice}"


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip())
        return
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ValueError(f"{' '.join(argv) or 'nothing'!r} names no run; write health.py RUN, the folder of one")
    config, rows = read_run(argv[0])
    numbers, kind = measure(config, rows), kind_of(config)
    sign = judge(numbers, kind)
    print(*describe(sign, numbers, kind), sep="\n")
    told = {name: x if type(x) is not float else float(f"{x:.4g}") if math.isfinite(x) else None
            for name, x in numbers.items()}
    print(json.dumps(dict(verdict=sign.word) | told | {"try": sign.advice}))


if __name__ == "__main__":
    command_line.run(main)
