"""
What the claims of this repository rest on: commands, what each of them found, and the page that is made of that alone.

    python pages.py evidence                          runs every leg that evidence/ has no file of; then writes the page
    python pages.py evidence --minutes 40             as many as this allows; the same command goes on, on any machine
    python pages.py evidence --only base,no_koleo     these alone
    python pages.py evidence --photos PHOTOS --camvid CAMVID     and those on photos: PHOTOS/{train,val}/CLASS
    python pages.py evidence --minutes 0              the page alone, and README's table

    LEGS         what is run: a network by one change, one seed; each line is a command that stands by itself
    run          a leg's commands, one after the other -> evidence/NAME-SEED.json, whole or not at all
    page_text    all of evidence/*.json -> evidence/README.md
    into_readme  README, with its section of results made of the same

A leg that was cut goes on where its training was saved, in --work; that folder is not needed by those that are done.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from engine import config as command_line
from engine import curves
from engine.timing import processor
from weights import commit

ROOT = Path(__file__).parents[1]
SEEDS = 0, 1, 2
KEPT = 100  # steps from one kept network to the next: pictures over time, Gram teachers
# Of `make demo`, but for a network of three blocks with smaller patches and crops: some minutes of one core
BASE = """--size tiny --device DEVICE --depth 3 --patch_size 8 --n_shapes 2048 --steps 400 --lr 2e-3 --lr_end 1e-3
          --momentum_end 0.994 --n_local 4 --global_size 48 --local_size 24 --global_scale 0.5,1.0 --local_scale 0.2,0.5
          --blur_sigma 0.05,0.5 --solarize 0 --hue 0.5 --rope_rescale 1.2""".split()
ON = "--device DEVICE --lr 2e-4 --lr_end 2e-4 --gram_refresh 0 --steps 200".split()  # a stage, after BASE
DISTILL = f"--device DEVICE --n_shapes 2048 --steps 400 --cooldown 200 --save_every {KEPT} --keep_every {KEPT}".split()
TASKS = dict(knn=("top1_k20", "k-NN", []), linear=("top1", "linear", ["--iterations", "500"]),
             segmentation=("miou", "segmentation, mIoU", []), discovery=("corloc", "discovery, CorLoc", []))
ON_PHOTOS = dict(knn=("top1_k20", "k-NN", ["--data", "PHOTOS", "--resolution", "SIDE"]),
                 linear=("top1", "linear", ["--data", "PHOTOS", "--resolution", "SIDE", "--iterations", "2000"]),
                 camvid=("miou", "CamVid, mIoU", ["--data", "CAMVID", "--resolution", "256", "--iterations", "600"]))
# words of commands that depend on the device; with a GPU 800,000 photos are seen in what should be some minutes
MACHINES = dict(cpu=dict(DEVICE="cpu", SIZE="tiny", PHOTO_STEPS="2500", BATCH="32", SIDE="128", KEPT="500"),
                cuda=dict(DEVICE="cuda", SIZE="s", PHOTO_STEPS="12500", BATCH="64", SIDE="224", KEPT="2500"))
ROWS = "dino_global", "ibot", "dino_entropy", "cls_rank", "patch_neighbours", "patch_others"  # of metrics.jsonl
PHOTOS = "train.py --size SIZE --device DEVICE --data PHOTOS/train --steps PHOTO_STEPS --batch BATCH".split()
DEMO = "import sys, demo, train; train.main(demo.OPTIONS + sys.argv[1:])"
SWAPPED = "import sys, model, distill, train; model.SIZES['tiny'] = {}; train.main(sys.argv[1:])"


@dataclass(frozen=True)
class EvidenceConfig:
    minutes: float = 10000     # [0, 30000]: a leg that is not done by then is saved and left
    only: str = ""             # names of legs, as in base,no_koleo; empty = all
    device: str = "cpu"        # cpu or cuda: ViT-S learns from the photos; wants an --out and a --work of its own
    photos: str = ""           # folder {train,val}/CLASS/: legs on photos; empty = none
    camvid: str = ""           # folder {images,annotations}/{training,validation}/: their segmentation; empty = none
    out: str = "evidence"      # what is kept
    work: str = "runs/evidence"  # runs, on the way


class Leg(NamedTuple):
    name: str
    about: str                 # what is changed
    expected: str              # what the paper, or its reasons, lead one to expect: better, worse, alike; or nothing
    commands: Callable         # (seed, folder of all runs) -> [words], the training first
    beside: str = "base"       # the leg that it is compared with
    weights: str = "{run}"     # what is measured
    after: str = ""            # the leg whose run it goes on from
    seeds: tuple = SEEDS
    tasks: dict = TASKS
    lasts: bool = True         # whether it has a course to draw and to judge

# --------------------------------------------------------------------------------
# What is run


def trained(*more, by=("train.py", *BASE), kept=KEPT):
    """A training"""
    return lambda seed, run: [*by, "--save_every", str(kept), "--keep_every", str(kept), *more, "--seed", str(seed),
                              "--out", run, "--resume", "auto"]


def swapped(size, base=BASE):
    """The same, of a network that has no size of its own"""
    return trained(by=("-c", SWAPPED.format(size), *base))


def stage(*more, before="base"):
    """A stage that goes on from a leg's run of the same seed"""
    return lambda seed, run: ["train.py", *ON, *more, "--seed", str(seed), "--start", sibling(run, before), "--out",
                              run, "--resume", "auto"]


def sibling(run, name):
    """Another leg's folder, of the same seed; name may end with @STEP"""
    path, (name, *step) = Path(run), name.split("@")
    return str(path.with_name(f"{name}-{path.name.rpartition('-')[2]}")) + "".join(f"@{each}" for each in step)


def gram(teacher, *more):
    def words(seed, run):
        found = teacher if teacher == "self" else sibling(run, teacher)
        return stage("--stage", "gram", "--gram_teacher", found, *more)(seed, run)
    return words


def on_labels(*words):
    """The same network, trained on labels; what is cut begins again"""
    return lambda seed, run: ["-m", "engine.supervised", *words, "--seed", str(seed), "--out", run]


def distilled(seed, run):
    return ["distill.py", "--teacher", sibling(run, "base"), "--students", "tiny_half", *DISTILL, "--seed", str(seed),
            "--out", run, "--resume", "auto"]


def nothing(seed, run):
    """No training"""


LEGS = [
    Leg("base", "all of it", "", trained()),
    Leg("untrained", "the same network, before training", "worse",
        trained("--steps", "1", "--lr", "0", "--lr_end", "0"), lasts=False),
    Leg("pixels", "raw pixels", "worse", nothing, weights="pixels", seeds=(0,), lasts=False),
    Leg("demo", "six blocks, patches of 16, 1,250 steps: the options of `make demo`", "better",
        trained(by=("-c", DEMO), kept=250), seeds=(0,)),
    Leg("supervised", "trained on the labels of the same images", "better", on_labels(*BASE), lasts=False),
    Leg("no_centring", "targets not centred: a softmax", "worse", trained("--sinkhorn_iterations", "0")),
    Leg("no_local", "no local crops", "worse", trained("--n_local", "0")),
    Leg("no_average", "no averaging: the teacher is the student", "worse",
        trained("--momentum", "0", "--momentum_end", "0")),
    Leg("no_koleo", "no KoLeo term", "worse", trained("--koleo_weight", "0")),
    Leg("no_ibot", "no iBOT term", "worse", trained("--ibot_weight", "0")),
    Leg("scratch_half", "a network half the size, from scratch", "",
        swapped("distill.STUDENTS['tiny_half']", [w for w in BASE if w not in ("--depth", "3")])),
    Leg("distilled_half", "the same network, distilled, as distill.py trains", "better", distilled, "scratch_half",
        "{run}/tiny_half", "base"),
    Leg("longer", "200 steps more, without Gram", "", stage("--stage", "gram", "--gram_weight", "0"), after="base"),
    Leg("gram_100", "the same with Gram, teacher of step 100, twice the resolution", "better", gram("base@100"),
        "longer", after="base"),
    Leg("gram_400", "the same, teacher of step 400", "worse", gram("base@400"), "gram_100", after="base"),
    Leg("gram_200", "the same, teacher of step 200", "alike", gram("base@200"), "gram_100", after="base"),
    Leg("gram_ref", "the same, teacher of step 100 at the student's own resolution", "worse",
        gram("base@100", "--gram_size", "48"), "gram_100", after="base"),
    Leg("one_size", "100 steps more of the last stage, crops of one size", "",
        stage("--stage", "highres", "--gram_teacher", "self", "--resolutions", "48x24x96*1.0", "--steps", "100"),
        after="base"),
    Leg("high_res", "the same, crops of up to 96 px", "better",
        stage("--stage", "highres", "--gram_teacher", "self", "--resolutions", "48x24x96*0.5,96x40x144*0.5", "--steps",
              "100"), "one_size", after="base"),
    Leg("constant", "the learning rate stays at its peak", "alike", trained("--lr_end", "2e-3")),
    Leg("cosine", "the learning rate falls to 0", "alike", trained("--lr_end", "0")),
    Leg("no_registers", "no registers", "alike", trained("--n_registers", "0")),
    Leg("no_jitter", "positions not jittered", "alike", trained("--rope_rescale", "1")),
    Leg("own_norm", "local crops have a norm of their own, as 7B", "alike",
        swapped("__import__('dataclasses').replace(model.SIZES['tiny'], local_norm=True)")),
]
OF_PHOTOS = dict(tasks=ON_PHOTOS, seeds=(0,), beside="photos")
LEGS += [
    Leg("photos", "self-supervised", "", trained(by=PHOTOS, kept="KEPT"), **OF_PHOTOS),
    Leg("photos_supervised", "trained on their labels", "better", on_labels(*PHOTOS[1:]), lasts=False, **OF_PHOTOS),
    Leg("photos_pixels", "raw pixels", "worse", nothing, weights="pixels", lasts=False, **OF_PHOTOS),
    Leg("photos_untrained", "before training", "worse", nothing, weights="untrained:SIZE", lasts=False, **OF_PHOTOS),
]
PICTURED = "base", "demo", "no_centring", "no_ibot", "longer", "gram_100"  # of seed 0; photos are not ours to show
DRAWN = "base", "no_centring", "no_local", "no_average", "no_koleo", "no_ibot"  # of seed 0, as one can read
IN_README = ("pixels", "untrained", "supervised", "base", "demo", "no_centring", "no_average", "no_koleo", "no_ibot")


def legs(c):
    """All that --only names, in order. Raises ValueError for a name that is none."""
    names = c.only.split(",") if c.only else [leg.name for leg in LEGS]
    strange = set(names) - {leg.name for leg in LEGS}
    if strange:
        raise ValueError(f"--only {min(strange)}: there are {', '.join(leg.name for leg in LEGS)}")
    asked = [leg for leg in LEGS if leg.name in names]
    return [leg for leg in asked if leg.tasks is not ON_PHOTOS or c.photos and c.camvid]


def filled(words, machine):
    """Of the words of a command those that the machine decides; others as they are"""
    return [re.sub(f"^({'|'.join(machine)})$|(?<=^untrained:)SIZE$", lambda m: machine[m[0]], word) for word in words]


class Over(Exception):
    """The minutes are over"""


def call(c, words, end):
    """Runs a command of ours; what it printed. Raises ValueError if it fails, Over if it is not done by `end`."""
    there = dict(PHOTOS=c.photos, CAMVID=c.camvid)
    script, *rest = (re.sub("^(PHOTOS|CAMVID)(?=/|$)", lambda m: there[m[1]], word) for word in words)
    script = str(ROOT / script) if script.endswith(".py") else script
    with subprocess.Popen([sys.executable, script, *rest], env=os.environ | dict(PYTHONPATH=str(ROOT)), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            said, errors = process.communicate(timeout=max(end - time.monotonic(), 0))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            process.send_signal(signal.SIGINT)  # a training saves, and leaves
            process.communicate()
            raise Over from error
    if process.returncode:
        raise ValueError(f"{typed(words)} failed: {(errors.strip() or str(process.returncode)).splitlines()[-1]}")
    return said


def typed(words):
    """A command as one types it"""
    return "python " + " ".join(f'"{word}"' if " " in word else word for word in words)


def run(leg, seed, c, end):
    """Runs a leg -> what its file holds"""
    start, folder, machine = sum(os_times()), Path(c.work, f"{leg.name}-{seed}"), MACHINES[c.device]
    words = filled(leg.commands(seed, str(folder)) or [], machine)
    if leg.after:
        before = next(each for each in LEGS if each.name == leg.after)
        before = filled(before.commands(seed, sibling(str(folder), leg.after)), machine)
        call(c, before, end)  # at once done, where it is there
    weights, lines = filled([leg.weights.format(run=folder)], machine)[0], [words] if words else []
    if words:
        call(c, words, end)
    scores = {}
    for task, (metric, _, options) in leg.tasks.items():
        words = ["evaluate.py", "--task", task, "--weights", weights, "--device", "DEVICE", *options]
        lines.append(filled(words, machine))
        found = call(c, [*lines[-1], "--cache", str(folder / "features")], end)
        scores[task] = round(json.loads(found.splitlines()[-1])[metric], 4)
    result = dict(leg=leg.name, seed=seed, scores=scores)
    if leg.tasks is ON_PHOTOS:
        result |= dict(photos=counted(c.photos), camvid=counted(Path(c.camvid, "images")))
    if leg.lasts:
        lines.append(["health.py", weights])
        result |= dict(health=json.loads(call(c, lines[-1], end).splitlines()[-1])["verdict"], rows=course(weights))
    if leg.name in PICTURED and seed == 0:
        Path(c.out).mkdir(exist_ok=True)
        lines.append(["visualize.py", "training", weights, "--out", str(Path(c.out, f"{leg.name}.gif"))])
        call(c, lines[-1], end)
    return result | dict(commands=[typed(line) for line in lines], commit=commit(), hardware=processor(),
                         cpu_seconds=round(sum(os_times()) - start))


def counted(folder):
    """[files below each folder in this one, by name]"""
    return [sum(path.is_file() for path in each.rglob("*")) for each in sorted(Path(folder).iterdir()) if each.is_dir()]


def os_times():
    """Seconds that processors have spent on what was started here"""
    found = os.times()
    return found.children_user, found.children_system


def course(run):
    """Of metrics.jsonl, what the page draws"""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [{name: float(f"{row[name]:.4g}") if name != "step" else row[name] for name in ("step", *ROWS)
             if name in row} for row in rows]


def run_all(c):
    """Every leg that has no file yet, until the minutes are over; lines that say what failed."""
    end, failed = time.monotonic() + 60 * c.minutes, []
    going_on = {leg.after for leg in LEGS}
    for leg in legs(c):
        for seed in leg.seeds:
            path = Path(c.out, f"{leg.name}-{seed}.json")
            if path.exists():
                continue
            if time.monotonic() >= end:
                return failed
            try:
                found = run(leg, seed, c, end)
            except Over:
                return failed
            except ValueError as error:
                failed.append(str(error))
                print(error, flush=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with command_line.whole(path) as new:
                new.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{path}: {found['scores']}", flush=True)
            if leg.name not in going_on:
                shutil.rmtree(Path(c.work, f"{leg.name}-{seed}"), ignore_errors=True)
    return failed

# --------------------------------------------------------------------------------
# What it says


def read(folder):
    """{leg: {seed: what its file holds}}, in the order of LEGS"""
    found = {leg.name: {} for leg in LEGS}
    for path in sorted(Path(folder).glob("*-*.json")):
        each = json.loads(path.read_text())
        found.setdefault(each["leg"], {})[each["seed"]] = each
    return {name: runs for name, runs in found.items() if runs}


def scores(runs, task):
    """{seed: score}"""
    return {seed: run["scores"][task] for seed, run in runs.items() if task in run["scores"]}


def spread(values):
    """Mean, and the deviation of single runs if there are several"""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def change(runs, others, task):
    """
    1, -1: more or less than the other leg with each seed, and by more than the differences deviate; 0: not told apart;
    None: fewer than two seeds have both
    """
    a, b = scores(runs, task), scores(others, task)
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    if len(differences) < 2:
        return None
    told = abs(mean(differences)) > stdev(differences) and len({d > 0 for d in differences}) == 1
    return told * (1 if differences[0] > 0 else -1)


def outcome(leg, found):
    """
    better, worse, mixed or alike than the leg beside, by two scores at least that are told apart: one is in three of
    five rows by chance alone; what of it is not as expected; nothing to say: empty
    """
    changes = {task: change(found[leg.name], found.get(leg.beside, {}), task) for task in leg.tasks}
    if leg.name == leg.beside or None in changes.values():
        return "", ""
    signs = [sign for sign in changes.values() if sign]
    here = "alike" if len(signs) < min(2, len(changes)) else {1: "better", -1: "worse"}.get(mean(signs), "mixed")
    strange = leg.expected and here != leg.expected and (here != "alike" or leg.expected != "alike")
    return here, "not shown" if strange and here == "alike" else "not as expected" if strange else ""


def table(found, legs, tasks=TASKS):
    """Rows of Markdown: a leg each, mean and deviation of each score; arrows where all seeds agree"""
    titles = [title for _, title, _ in tasks.values()]
    head = ["what is changed", "seeds", *titles, "health", "beside", "expected", "here"]
    rows = [head, ["---"] * len(head)]
    for leg in legs:
        runs = found[leg.name]
        arrows = {1: " ▲", -1: " ▼"} if leg.beside != leg.name else {}
        cells = [spread([*scores(runs, task).values()]) + arrows.get(change(runs, found.get(leg.beside, {}), task), "")
                 if scores(runs, task) else "" for task in tasks]
        here, strange = outcome(leg, found)
        health = sorted({run["health"] for run in runs.values() if "health" in run})
        rows.append([f"{leg.about} (`{leg.name}`)", len(runs), *cells, ", ".join(health),
                     "" if leg.beside == leg.name else f"`{leg.beside}`", leg.expected,
                     f"{here}{', **' + strange + '**' if strange else ''}"])
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def commands_of(leg, runs):
    """The commands of a leg, of all seeds where only the seed differs, and where they ran"""
    first, *_ = runs
    lines = [re.sub(rf"(?<=-){first}(?=[/@ ]|$)|(?<=--seed ){first}", "$S", line) for line in runs[first]["commands"]]
    where = sorted({f"{run['hardware']}, commit {run['commit']}" for run in runs.values()})
    return [f"### {leg.name}", "", leg.about + ".", "", "```sh", f"S={first}  # {', '.join(map(str, runs))}", *lines,
            "```", "", "; ".join(where), ""]


ARROWS = """▲ ▼: above or below the leg named under *beside* with every seed, by more than differences deviate; three
seeds are by chance in one cell of five, so *here* goes by two scores. *Health* is the word of `health.py`."""
SAID = dict(alike="not told from", mixed="mixed beside")
GUESSES = dict(  # why it may be so, of what is not as expected; nothing here was tried
    no_average="an average of many steps is behind while a run is as short as this",
    supervised="labels say what an image shows, not where",
    no_ibot="400 steps are too few",
    gram_100="in so short a run nothing has decayed that an early teacher could repair; in LOG.md's longer one it has",
    gram_400="of a run in which nothing has decayed, the latest teacher is the best",
    gram_ref="as above, and a teacher of its own resolution holds the student back less",
    cosine="what ends early is learned less, in so few steps")


COMMITS = """Where a commit ends in +, some files were not committed yet, among them those of this page. Legs of a page
should be of one kind of processor: those that multiply bfloat16 train in it, others in float32, to other numbers."""


def page_text(folder):
    """The page, of the files alone"""
    found, out = read(folder), Path(folder)
    here = [leg for leg in LEGS if leg.name in found]
    on_photos = [leg for leg in here if leg.tasks is ON_PHOTOS]
    left = {leg.name: [seed for seed in leg.seeds if seed not in found.get(leg.name, {})] for leg in LEGS}
    missing = [f"{name} {', '.join(map(str, seeds))}" for name, seeds in left.items() if seeds]
    strange = [(leg, *outcome(leg, found)) for leg in here]
    strange = [f"- {leg.about} (`{leg.name}`): {SAID.get(here, f'{here} than')} `{leg.beside}`, expected "
               f"{leg.expected}: {what}" + (f"; a guess: {GUESSES[leg.name]}" if leg.name in GUESSES else "")
               for leg, here, what in strange if what]
    seconds = sum(run["cpu_seconds"] for runs in found.values() for run in runs.values())
    parts = ["# Evidence", "", "Each number here, and the command that gave it.", "",
             f"Mean and deviation over seeds, in percent; {round(seconds / 3600)} core hours in all. {ARROWS}", "",
             "## On `shapes`",
             "", table(found, [leg for leg in here if leg not in on_photos]), ""]
    if on_photos:
        parts += ["## On photos", "", which_photos(found), "", table(found, on_photos, ON_PHOTOS), ""]
    parts += ["## Not as expected, or not shown", "", *(strange or ["Nothing."]), ""]
    drawn = courses(found)
    if drawn:
        parts += ["## Curves", "", "Of seed 0, with all and with one thing left out.", "",
                  "![losses and meters over the steps](curves.png)", ""]
    gifs = [name for name in PICTURED if (out / f"{name}.gif").exists()]
    if gifs:
        parts += ["## Maps over time", "", "Of seed 0: components of patches, and cosines to one of them.", ""]
        parts += [line for name in gifs for line in (f"`{name}`", "", f"![{name}]({name}.gif)", "")]
    parts += ["## Commands", "", COMMITS, "", *(line for leg in here for line in commands_of(leg, found[leg.name]))]
    parts += [f"Not run yet, by seed: {'; '.join(missing)}.", ""] if missing else []
    return "\n".join(parts)


def which_photos(found):
    """How many there were, in words"""
    runs = [run for leg in LEGS if leg.tasks is ON_PHOTOS for run in found.get(leg.name, {}).values()]
    (train, val), (street, other) = (next(run[kind] for run in runs) for kind in ("photos", "camvid"))
    return (f"Trained on {train:,} photos, k-NN and linear asked with {val:,} others; CamVid has {street:,} photos of "
            f"streets to learn from, and {other:,} others.")


def courses(found):
    """{leg: (config, rows)} of seed 0, as curves.draw takes them"""
    return {name: ({}, found[name][0]["rows"]) for name in DRAWN if "rows" in found.get(name, {}).get(0, {})}


RESULTS = """## Results

Frozen features of networks that two cores train in minutes, on generated scenes: percent, mean and deviation over
seeds; ▲ ▼: told apart from the row under *beside* in every seed. `python pages.py evidence` makes this table, in hours;
[its page](evidence/README.md) has Gram anchoring, distillation, high resolution, how *here* is judged, every command,
curves, what is not as expected. [LOG.md](LOG.md): failures, GPUs. [By hand](docs/measured.md): the rest.

{}

"""
PHOTOS_TOO = """{}

On photos, with `--photos` and `--camvid`. {}

{}"""


def into_readme(path, folder):
    """README with that section in the place of what stood there; before any leg has run, of the demo"""
    text, found = path.read_text(), read(folder)
    start, end = text.index("## Results"), text.index("\n## ", text.index("## Results")) + 1
    legs = [leg for leg in LEGS if leg.name in IN_README and leg.name in found]
    rows = table(found, legs) if legs else "No leg of it has run yet. By hand:\n\n" + by_hand()
    if photos := [leg for leg in LEGS if leg.tasks is ON_PHOTOS and leg.name in found]:
        rows = PHOTOS_TOO.format(rows, which_photos(found), table(found, photos, ON_PHOTOS))
    return text[:start] + RESULTS.format(rows) + text[end:]


def by_hand():
    """The rows of docs/measured.md that `make demo` prints"""
    rows = re.findall(r"^\|.*", (ROOT / "docs/measured.md").read_text(), re.M)
    return "\n".join(rows[:2] + [row for row in rows if "| `make demo` |" in row])


def main(argv):
    values, words = command_line.read_words(argv, command_line.types(EvidenceConfig()))
    if words:
        raise ValueError(f"{words[0]!r} is not an option; write --field value")
    c = command_line.apply(EvidenceConfig(), values)
    if c.device not in MACHINES:
        raise ValueError(f"--device {c.device}: wanted {' or '.join(MACHINES)}")
    for option in "out", "work":
        command_line.writable(getattr(c, option), option=f"--{option}")
    legs(c)
    failed = run_all(c)
    if drawn := courses(read(c.out)):
        curves.draw(drawn, Path(c.out, "curves.png"))
    Path(c.out).mkdir(parents=True, exist_ok=True)
    Path(c.out, "README.md").write_text(page_text(c.out))
    print(f"wrote {c.out}/README.md")
    if Path(c.out).resolve() == ROOT / "evidence":
        (ROOT / "README.md").write_text(into_readme(ROOT / "README.md", c.out))
    if failed:
        raise ValueError(f"{len(failed)} legs failed, the first: {failed[0]}")
