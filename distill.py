"""
Distil a frozen teacher into many students at once.

    python distill.py --teacher runs/tiny --students tiny_half,convnext_micro --out runs/small      in turn, one device
    torchrun --nproc-per-node 8 distill.py --teacher runs/7b --students s,b,l --data PHOTOS --out runs/family
    python distill.py --teacher vitl16.pth --mode features --students s --data PHOTOS --out runs/s  without its heads
    python distill.py --out runs/small --resume --students tiny_half,tiny                           with other students
    python distill.py --teacher runs/tiny --students tiny --lr 1e-3 --cache DIR --out runs/slow     its words from disk

    DistillConfig, RECIPES, STUDENTS    every number                                               DINOv3 §5.2
    make_teacher, teacher_says          the teacher, on 1/S of the batch; what of it travels
    Student, head_terms, feature_terms  a student on its group of ranks; the two objectives
    distill                             the loop; groups.py says which rank trains what            DINOv3 §5.2, Fig. 12

OUT/NAME is a student's run: teacher.safetensors there is its average. Dimension letters: see the top of model.py.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import recipes
import train
from convnext import CONVNEXT_SIZES, ConvNeXtConfig, on_grid
from data import Batches, CropConfig, loader
from engine import config as command_line
from engine.cache import Cached, folder_of
from engine.channels import reader
from engine.checkpoint import begin_state, load_checkpoint, load_teacher, newest, replace_text, saved, take_rows
from engine.groups import clock, kept_by, make_group, make_plan, share, wait
from engine.interrupt import Interrupt, Later, Peers, Verdicts
from engine.meters import of_features
from engine.profile import tracer
from engine.progress import Progress, open_log
from engine.ranks import count_workers, start_ranks
from engine.saver import Saver
from engine.sources import open_source
from losses import assignments
from model import SIZES, Noise, ViTConfig, set_std
from recipes import TrainConfig
from train import schedule
from weights import commit, identify, stream_backbone

# --------------------------------------------------------------------------------
# Configuration

STUDENTS = SIZES | CONVNEXT_SIZES | {  # and two for tests and laptops; parameters:
    "tiny_half":      ViTConfig(6, 64, 1, 256, layerscale=1.0, init_std=0.1),                         # 350,400
    "convnext_micro": ConvNeXtConfig((1, 1, 3, 1), (24, 48, 96, 128), layerscale=1.0, init_std=0.1),  # 477,880
}


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    teacher: str = ""              # a run of train.py, with its heads; with --mode features any weights
    students: str = ""             # s,b,convnext_t; with the ranks of each, s:1,b:2, nothing is timed
    mode: str = "heads"            # heads: the losses of pretraining; features: cosine and smooth L1 through adapters
    recipe: str = ""               # paper, released, convnext or tiny; empty = as teacher and students want it
    cooldown: int = 250_000        # [0, 1e7]: last steps, in which the learning rate falls from lr to lr_end, a cosine
    linear: bool = False           # weight decay and momentum go straight to their ends, not along a cosine
    teacher_scale: float = 1.0     # (0, 16]: side of the teacher's crops, over that of the students'
    momentum: float = 0.994        # [0, 1]: of the average of each student, which is what is saved to be used
    cache: str = ""                # folder: what the teacher, whole on each rank, says is kept there for later runs
    joined: int = 0                # [0, 1e7]: step of the run at which a student's own first step was

    @property
    def vit(self):
        """The student's configuration: patches as large as the teacher's, channels and statistics the teacher's."""
        own = replace(STUDENTS[self.size], in_chans=self.in_chans, mean=self.mean, std=self.std)
        if isinstance(own, ConvNeXtConfig):
            return own
        return replace(own, depth=self.depth or own.depth, patch_size=self.patch_size or own.patch_size,
                       **{name: getattr(self, name) for name in recipes.NETWORK})


RECIPES = {
    # paper: §5.2: 1M steps, then 250k of cooldown; warm-ups are pretraining's, the rest is as released. Not run yet
    "paper": DistillConfig(
        steps=1_250_000, batch=1920, lr=2e-4, lr_end=5e-5, lr_warmup=100_000, weight_decay_end=0.2,
        teacher_temp_warmup=100_000, layer_decay=0.99, freeze_last_layer=0,
    ),
    # ViT students as the released code reads its recipe, from a high-resolution checkpoint
    # differs: its lr rises by half a cosine, its teacher temperature by one over all steps; here both are lines
    "released": DistillConfig(
        steps=25_000, cooldown=0, batch=1920, lr=5e-5, lr_end=5e-5, lr_warmup=12_500, weight_decay_end=0.04,
        teacher_temp_warmup=25_000, layer_decay=0.99, freeze_last_layer=0,
    ),
    # ConvNeXt students as the released code intends them, 500 epochs of 1,250 steps; crops twice the teacher's side, so
    # that a patch of 32 px is one of its 16. OWN has what is not alike for all. The batch is that of `paper`
    # differs: there the setting for the teacher's half is not found, so that the grids differ; and lr rises from 1e-6
    "convnext": DistillConfig(
        steps=625_000, cooldown=525_000, batch=1920, lr=2e-4, lr_end=1e-6, lr_warmup=100_000, weight_decay_end=0.2,
        linear=True, teacher_temp_warmup=150_000, layer_decay=1.0, patch_embed_lr=1.0, freeze_last_layer=1250,
        teacher_scale=0.5,
    ),
    # teachers as narrow as tiny, 2 CPU cores; measured in LOG.md
    "tiny": DistillConfig(
        steps=600, cooldown=300, batch=32, lr=2e-3, lr_end=1e-5, lr_warmup=30, weight_decay_end=0.04, momentum=0.97,
        momentum_end=0.995, teacher_temp=0.04, teacher_temp_warmup=0, layer_decay=1.0, patch_embed_lr=1.0,
        freeze_last_layer=0, save_every=250, log_every=20,
    ),
}
OWN = dict(convnext_b=dict(lr=1e-4, weight_decay=0.02), convnext_l=dict(lr=1e-4))  # of recipe convnext
OF_TEACHER = {"size", "stage", "init", "depth", "patch_size", "n_registers", "key_bias", "norm_eps", "in_chans", "mean",
              "std", "joined", "dino_prototypes", "ibot_prototypes"}  # or of the student
FOREIGN = OF_TEACHER | {"accumulate", "replicas", "moments", "start", "began", "resolutions", "cosine_warmup",
                        "local_weight_start", "gram_teacher", "gram_size", "gram_weight", "gram_warmup", "gram_refresh",
                        "gram_refreshes"}
OPTIONS = {name: kind for name, kind in command_line.types(DistillConfig()).items() if name not in FOREIGN}
OBJECTIVE = ("dino_hidden", "dino_bottleneck", "dino_prototypes", "ibot_hidden", "ibot_bottleneck", "ibot_prototypes",
             "prototype_std", "student_temp", "local_weight", "ibot_weight", "koleo_weight", "rope_rescale")


def configure(argv):
    """The command line -> DistillConfig of the whole run; every mistake ends here, before the first batch."""
    values, words = command_line.read_words(argv, OPTIONS)
    if words:
        raise ValueError(f"{words[0]!r} is not an option; write --field value")
    out = values.get("out", "runs/distilled")
    command_line.writable(out)
    if values.get("cache"):
        command_line.writable(values["cache"], option="--cache")
    begun = Path(out, "config.json").exists()
    if values.get("resume", "").lower() == "auto":
        values["resume"] = str(begun)
    if values.get("resume", "").lower() == "true":
        c = recipes.go_on(recipes.saved_config(out, DistillConfig), values, out, ("students", "cache"))
    else:
        said = of_teacher(values.get("teacher", ""), values.get("mode", "heads"))
        name = choose_recipe(values, said.pop("width"))
        recipe = RECIPES[name]
        c = replace(recipe, **said | dict(recipe=name))
        scaled = "global_size", "local_size", "patch_size"  # what the teacher said of its own
        c = replace(c, **{field: round(getattr(c, field) / c.teacher_scale) for field in scaled})
        c = replace(command_line.apply(c, values), recipe=name)
        shrink = [name for name in (*recipes.WARMUPS, "cooldown") if name not in values]
        c = replace(c, **{name: round(getattr(c, name) * c.steps / recipe.steps) for name in shrink})
        c = replace(c, group=min(c.group, c.batch), koleo_group=min(c.koleo_group, c.batch))
        if begun:
            raise ValueError(f"--out {out} holds a run already; add --resume to go on, or name another folder")
    read_students(c.students)
    recipes.check(c)
    if c.precision == "fp8":
        raise ValueError("--precision fp8 is of train.py alone; choose auto, bf16 or fp32")
    if not 0 < c.teacher_scale <= 1:
        raise ValueError(f"--teacher_scale is {c.teacher_scale}; it must be above 0, and at most 1")
    if c.mode == "features" and c.n_local or not 0 <= c.cooldown <= c.steps:
        raise ValueError(f"--n_local {c.n_local} --cooldown {c.cooldown}: a cooldown has 0 to --steps {c.steps} steps, "
                         "and --mode features looks at global crops alone")
    return replace(c, out=out)


def choose_recipe(values, width):
    """The name of the recipe that the command line asks for, or that suits a teacher of this width and the students."""
    convnexts = [isinstance(STUDENTS[name], ConvNeXtConfig) for name in read_students(values.get("students", ""))]
    suits = "tiny" if width <= SIZES["tiny"].width else "convnext" if all(convnexts) else "paper"
    name = values.get("recipe") or suits
    if name not in RECIPES or name == "convnext" and not all(convnexts):
        raise ValueError(f"--recipe {name}: choose one of {', '.join(RECIPES)}; convnext is for ConvNeXts alone")
    return name


def of_student(c, name):
    """The config of one student: what its recipe has for it alone, where nothing else was asked for."""
    own, others = OWN.get(name, {}) if c.recipe == "convnext" else {}, RECIPES["convnext"]
    own = {field: value for field, value in own.items() if getattr(c, field) == getattr(others, field)}
    return replace(c, size=name, **own)


def of_teacher(path, mode):
    """What a teacher settles: normalisation, patches and, if it is a run, crops and the objective with its heads."""
    if mode not in ("heads", "features") or not path:
        raise ValueError(f"--teacher {path or '(none)'} --mode {mode}: name a run, or weights and --mode features")
    found, run = identify(path).config, bool(saved(path))
    if mode == "heads" and not run:
        raise ValueError(f"--teacher {path} has no heads: it is not the folder of a run; take --mode features")
    crops = [field.name for field in fields(CropConfig) if field.name not in FOREIGN]
    names = crops + [*OBJECTIVE] * (mode == "heads")
    said = {name: getattr(recipes.saved_config(path, DistillConfig), name) for name in names if run}
    if mode == "features":
        said |= dict(n_local=0, mask_share=1.0, mask_ratio=(1.0, 1.0))  # every patch is compared
    patch = min(found.patch_size, 16)                                   # a ConvNeXt's 32 as 2x2
    return said | dict(in_chans=found.in_chans, mean=found.mean, std=found.std, patch_size=patch, width=found.width)


def read_students(text):
    """"s:2,b:6" -> {"s": 2, "b": 6};  "s,b" -> {"s": 0, "b": 0}"""
    words = [word.partition(":") for word in text.split(",")]
    names, colons, counts = map(list, zip(*words, strict=True))
    right = set(names) <= STUDENTS.keys() and len(set(names)) == len(names) and len(set(colons)) == 1
    if not right or not all(n.isdigit() and int(n) for n in counts if ":" in colons):
        raise ValueError(f"--students {text or '(none)'}: write s,b or s:1,b:2, ranks for all or for none, no student "
                         f"twice; there are {', '.join(STUDENTS)}")
    return {name: int(n or 0) for name, n in zip(names, counts, strict=True)}

# --------------------------------------------------------------------------------
# Teacher


def make_teacher(c, ranks):
    """
    Backbone and, in mode heads, heads, read by rows: no host holds it whole for this. All ranks run the backbone
    together, so it is sharded over them, as in train.py; not with --cache, where a rank that has its words stays idle.
    What is not sharded is bfloat16 where autocast rounds it: heads too, which a group runs for its students alone.
    """
    if c.mode == "heads":
        with torch.device("meta"):
            teacher = train.make_networks(recipes.saved_config(c.teacher, DistillConfig))
    else:
        model, tensors = stream_backbone(c.teacher)
        teacher = nn.ModuleDict(dict(backbone=model))
    teacher = train.freeze(c, ranks, teacher, [] if c.cache else [*teacher["backbone"].blocks, teacher["backbone"]])
    if c.mode == "heads":
        load_teacher(c.teacher, teacher)
    else:
        own = teacher["backbone"].state_dict()
        for name, x in tensors:
            take_rows(own[name], x)
    return teacher


def seen(backbone, c):
    """The backbone, its crops resized to whole patches, with patches on the grid that the masks are drawn for."""
    return on_grid(backbone, (c.global_size // c.patch_size,) * 2)


@torch.no_grad()
def teacher_says(c, teacher, batch):
    """What of the teacher travels, of unmasked global crops:  cls  (G B) Z,  patches  M Z;  in mode features D wide"""
    with autocast(c, batch):
        crops, side = batch["global_crops"], round(c.global_size * c.teacher_scale)
        if side != c.global_size:
            crops = F.interpolate(crops, (side, side), mode="bilinear", antialias=True)
        features, = seen(teacher["backbone"], c)([crops])
        patches = features.patches.flatten(0, 1).index_select(0, batch["masked"])            # M D
        if c.mode == "features":
            return dict(cls=features.cls, patches=patches)
        return dict(cls=teacher["dino_head"].bottleneck(features.cls), patches=teacher["ibot_head"].bottleneck(patches))

# --------------------------------------------------------------------------------
# Students and their objectives


class Student:
    """One student on the ranks of its group: networks, their average, optimizer, and schedules by its own step."""

    def __init__(self, c, ranks, width, done=0, verdicts=None):
        """width: of the teacher;  done: steps, if there is a checkpoint to go on from;  verdicts: None = never asked"""
        self.c, self.ranks, self.step, self.verdicts = c, ranks, done, verdicts
        self.networks, self.ema = (train.build_networks(c, ranks, lambda c: make_student(c, width)) for _ in range(2))
        self.ema.requires_grad_(False).eval()
        groups = train.parameter_groups(c, self.networks)
        self.optimizer = torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), fused=True)
        plateau = schedule(0, c.lr, c.lr, c.lr_warmup, c.steps - c.cooldown)
        self.lr = np.concatenate([plateau, schedule(0, c.lr, c.lr_end, 0, c.cooldown)]) * c.lr_factor
        course = np.linspace if c.linear else lambda start, end, steps: schedule(0, start, end, 0, steps)
        self.weight_decay = course(c.weight_decay, c.weight_decay_end, c.steps)
        self.momentum = course(c.momentum, c.momentum_end, c.steps)
        self.temp = schedule(c.teacher_temp_start, c.teacher_temp, c.teacher_temp, c.teacher_temp_warmup, c.steps)
        begin_state(self.optimizer)
        if done:
            load_checkpoint(c, ranks, self.networks, self.ema, self.optimizer)
        self.saver = Saver(c, ranks, self.networks, self.ema, self.optimizer)

    def learn(self, teacher, batch, noise, meters=False):
        """One step; returns its numbers, 0-dim. A loss that is not finite raises ValueError, on all its ranks."""
        c, t = self.c, self.step
        train.set_schedules(self.optimizer, self.lr[t], self.weight_decay[t], t)
        with autocast(c, batch):
            terms, weights, health = (head_terms if c.mode == "heads" else feature_terms)(self, teacher, batch, noise)
        loss = sum(weights[name] * term for name, term in terms.items())
        loss.backward()
        norms = train.clip_gradients(self.networks, c.clip)
        row = self.verdicts.judge(t, dict(loss=loss, **terms), norms, batch["indices"])
        self.optimizer.found_inf = self.verdicts.skip
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        train.update_ema(self.ema, self.networks, self.momentum[t])
        self.step += 1
        if not meters:
            return row
        self.verdicts.settle()
        return row | dict(lr=self.lr[t], skipped=self.verdicts.skipped) | health()

    def save(self, wait=True):
        self.verdicts.settle()
        self.saver(self.step, wait)


def make_student(c, width):
    """With the teacher's number of prototypes; in mode features with linear maps to the teacher's width."""
    networks = train.make_networks(c)
    for name, p in networks.named_parameters():
        p.requires_grad_(not name.endswith("mask_token"))  # nothing is hidden: it would have no gradient to save
    if c.mode == "features":
        adapters = {name: nn.Linear(c.vit.width, width) for name in ("cls_adapter", "patches_adapter")}
        networks = nn.ModuleDict(dict(backbone=networks["backbone"], **adapters))
        for name in adapters:
            set_std(networks[name], c.vit.init_std)
    return networks


def head_terms(student, teacher, batch, noise):
    """The terms of pretraining, weights, what tells its meters; prototypes balanced in the group.    paper: §5.2"""
    c, group, targets = student.c, student.ranks.group, {}
    for name, part in dict(dino="cls", ibot="patches").items():
        logits = teacher[f"{name}_head"].last_layer(batch[part])                             # rows K
        targets[name] = assignments(logits, student.temp[student.step], n_iterations=c.sinkhorn_iterations, group=group)
    targets["dino"] = targets["dino"].unflatten(0, (2, -1))                                  # G B K
    networks = dict(student.networks.items()) | dict(backbone=seen(student.networks["backbone"], c))
    unmasked = batch | dict(masks=None)  # as released: iBOT's patches are drawn, but the student sees them
    terms, features = train.loss_terms(c, networks, unmasked, targets, noise, group)
    return terms, train.term_weights(c), partial(train.health, c, targets, features)


def feature_terms(student, teacher, batch, noise):
    """Cosine distance and smooth L1 to the teacher's features, of the student's after a linear map; each weighs 1."""
    features, = seen(student.networks["backbone"], student.c)([batch["global_crops"]], None, noise)
    own, terms = dict(cls=features.cls, patches=features.patches.flatten(0, 1).index_select(0, batch["masked"])), {}
    for name, x in own.items():
        x, target = student.networks[f"{name}_adapter"](x).float(), batch[name].float()      # rows D of the teacher
        terms |= {f"{name}_cosine": 1 - F.cosine_similarity(x, target, dim=-1).mean(),
                  f"{name}_l1": F.smooth_l1_loss(x, target)}
    return terms, dict.fromkeys(terms, 1.0), partial(of_features, features)


def autocast(c, batch):
    return torch.autocast(batch["global_crops"].device.type, torch.bfloat16, enabled=c.precision == "bf16")

# --------------------------------------------------------------------------------
# The loop


def step_to_time(c, teacher, source, name, ranks, n):
    """() -> a step of n images on each rank: of the teacher, or of a student's training, three of them at most."""
    noise = Noise(c.seed, 0, ranks.rank * n, n, c.group, c.drop_path, c.rope_rescale)
    batch = train.on_device(c, ranks, Batches(c, source, ranks.rank * n, n)[0])
    batch |= teacher_says(c, teacher, batch)
    if name == "teacher":
        return partial(teacher_says, c, teacher, batch)
    own, verdicts = replace(c, size=name, steps=max(c.steps, 3)), Verdicts(ranks, Interrupt(), source.name)
    student = Student(own, ranks, teacher["backbone"].config.width, verdicts=verdicts)
    return partial(student.learn, teacher, batch, noise)


def standing(c, name, ranks):
    """Own steps that a student's checkpoint holds, and the step of the run at which it was saved; 0, 0 without one."""
    out = Path(c.out, name)
    if not saved(out):
        return 0, 0
    done = newest(out, ranks)[0]
    return done, done + recipes.saved_config(out, DistillConfig).joined


def begin(c, ranks, source, students, data):
    """Before the first step: the students' and the run's config.json, metrics.jsonl, what will be done."""
    for student in students:
        open_log(student.c, student.step, parameters=asdict(student.c.vit))
    if ranks.main:
        Path(c.out).mkdir(parents=True, exist_ok=True)
        replace_text(Path(c.out, "config.json"), json.dumps(asdict(c) | data | dict(commit=commit()), indent=1))
        print(f"{c.teacher}, mode {c.mode}, mean {c.mean}, std {c.std}: {c.steps} steps of {c.batch} images, of "
              f"{len(source):,} of {c.data}; crops of {c.global_size} and {c.local_size} px; to {c.out}", flush=True)


def distill(c, ranks, interrupt):
    """Trains all students; returns whether all have all their steps.    paper: §5.2, Fig. 12"""
    found = {name: standing(c, name, ranks) for name in read_students(c.students)}
    done, start = {name: own for name, (own, _) in found.items()}, max(at for _, at in found.values())
    counts = {name: n for name, n in read_students(c.students).items() if done[name] < c.steps}
    if not counts:
        raise ValueError(f"--students {c.students}: all have their {c.steps} steps; ask for more, or for another")
    source, teacher = open_source(c.data, c.n_shapes, c.seed, reader(c, c)), make_teacher(c, ranks)
    data = recipes.fingerprint(c, source)
    samples = -(-c.batch // ranks.count)  # as released: what the last ranks have beyond the batch is cut in `share`
    here = c, source, ranks.rank * samples, samples
    batches = Cached(*here, folder_of(c, teacher, ranks.device)) if c.cache else Batches(*here)
    batches.read(start, 0, [])  # if nothing can be read, say so here and not from a worker
    plan = make_plan(c, ranks, counts, partial(step_to_time, c, teacher, source))
    group, keep, mine = make_group(c, ranks, plan)
    keeps, shared = kept_by(c, ranks, plan), plan[0][1] < ranks.count
    if shared and mine:
        batches.kept = Batches(c, source, keep.start, keep.stop - keep.start)
    own = {name: replace(of_student(c, name), out=str(Path(c.out, name)), joined=start - done[name]) for name in mine}
    students = [Student(own[name], group, teacher["backbone"].config.width, done[name],
                        Verdicts(group, interrupt, source.name)) for name in mine]
    end = start + c.steps - min(done[name] for name in counts)
    wait(ranks)  # all have read what stands in OUT
    ranks.together(lambda: begin(c, ranks, source, students if group.main else [], data))
    stream = loader(batches, range(start, end), count_workers(c.workers), pin_memory=ranks.device.type == "cuda")
    failed, heard, progress = [], None, Progress(c, ranks, start, end)
    trace = tracer(c, ranks, end - start)

    def attempt(student, work, *args):
        """work(*args), unless it raises: that ends the student, and no other."""
        try:
            return work(*args)
        except (ValueError, torch.OutOfMemoryError) as error:
            if group.count > 1 and not isinstance(error, ValueError):
                raise  # a ValueError comes on all ranks of the group; the others would wait for this one
            students.remove(student)
            failed.append(f"{student.c.size}: {str(error).partition(chr(10))[0]}")
            print(f"student {failed[-1]}; the others go on", flush=True)

    for step in range(start, end + 1):
        # save: once in a while, and before leaving; who has all its steps is saved already
        logs = step % c.log_every == 0
        asked, busy = heard.read() if heard else (0, 1)  # of the step before
        leave = step == end or step == start + c.stop_after > start or asked or not busy
        if step > start and (leave or step % c.save_every == 0):
            for student in list(students):
                attempt(student, student.save, leave)
        trace(leave)
        if leave:
            break
        state = [torch.full((1,), float(x), device=ranks.device) for x in (bool(interrupt.asked), len(students))]
        heard = Later(ranks.mean(torch.cat(state)))

        # the teacher sees this rank's part of the batch; then all groups get theirs
        batch = progress.next(stream)
        path = batch.pop("path", None)
        kept = batch.get("kept", dict(masks=torch.zeros(0, 1, dtype=torch.bool)))
        counts = [masks["masks"].sum(1) for masks in (batch, kept)]
        batch = train.on_device(c, ranks, batch)
        t0 = clock(ranks, logs)
        if "cls" not in batch:
            batch |= teacher_says(c, teacher, batch)
            if c.cache:
                batches.keep(path, batch)
        if c.cache and ranks.main and step == start:
            print(batches.describe(batch), flush=True)
        t1 = clock(ranks, logs)
        batch, received = share(c, ranks, batch, keeps, counts) if shared else (batch, 0)
        row = dict(ms_teacher=1000 * (t1 - t0), ms_share=1000 * (clock(ranks, logs) - t1), gathered_bytes=received)
        if received and ranks.main and step == start:
            print(f"a step brings {received:,} bytes to this rank", flush=True)

        # each group trains its students
        noise = Noise(c.seed, step, keep.start, keep.stop - keep.start, c.group, c.drop_path, c.rope_rescale)
        for student in list(students):
            t0, last = clock(ranks, logs), student.step == c.steps - 1
            numbers = attempt(student, student.learn, teacher, batch, noise, logs or last)
            t1 = clock(ranks, logs)
            if numbers and group.main and (logs or last):
                row |= {name: float(x) for name, x in numbers.items()} | dict(
                    ms_student=1000 * (t1 - t0), **progress.speed(step))
                progress.log(student.c.out, dict(step=student.step - 1, **row, unreadable=len(progress.unreadable)))
            if numbers and last:
                attempt(student, student.save)
                students = [other for other in students if other is not student]
        interrupt.collect(step)
        progress.bar.update()
        if logs:
            progress.mark(step)

    progress.bar.close()
    for name, reason in progress.unreadable.items():
        print(f"rank {ranks.rank}: skipped unreadable {name}: {reason}")
    wait(ranks)  # some still save
    if failed:
        raise ValueError(f"stopped before their end: {'; '.join(failed)}; --resume goes on from their checkpoints")
    return step == end


def main(argv):
    if "--help" in argv or "-h" in argv:
        name = argv[argv.index("--recipe") + 1] if "--recipe" in argv[:-1] else "paper"
        lines = command_line.describe(RECIPES.get(name, RECIPES["paper"])).splitlines()
        print(__doc__.strip(), "\n".join(line for line in lines if line.split()[0][2:] in OPTIONS), sep="\n\n")
        return
    c = configure(argv)
    with Interrupt() as interrupt, Peers(start_ranks(c.device)) as ranks:
        return distill(train.settle(c, ranks), ranks, interrupt)


if __name__ == "__main__":
    command_line.run(main)
