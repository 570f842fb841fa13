"""
What a run is: every number of every recipe, with what the paper has, and how the command line makes a run of it.

    TrainConfig        every number of a run, with its legal range
    RECIPES, NAMED     by size; by size and name                               DINOv3 §3.2, Tab. 2
    STAGES             by size and stage: what it changes of the run before    DINOv3 §4, §5.1
    configure          the command line -> TrainConfig; mistakes end here
    resumed_config     config.json of a run, and what a resumed one may change
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import ops
from data import CropConfig, read_resolutions
from engine import config as command_line
from engine import satellite
from engine.channels import of_run, reader
from engine.checkpoint import newest, saved
from engine.layouts import size_of, widen
from engine.loggers import check_loggers
from engine.order import ORDERS
from engine.sources import open_source
from engine.stages import gram_config, kept
from model import SIZES, ViTConfig
from weights import identify, inflated


@dataclass(frozen=True)
class TrainConfig(CropConfig):
    size: str = "tiny"             # tiny, s, s+, b, l, l+, h+, 7b
    recipe: str = ""               # instead of the size's own: photos (s, b; K by their count), released (l), satellite
    stage: str = "pretrain"        # pretrain; gram, highres: from --start RUN; adapt: from --init WEIGHTS
    data: str = "shapes"           # folder, list, tars, mixture A*0.7,B*0.3: see open_source; shapes: generated
    data_changed: bool = False     # go on, this once, with images that are not those the run was begun with
    n_shapes: int = 4096           # [1, 100000]: images of the generated set
    order: str = "random"          # of each epoch: random, or windows: 64 neighbours at a time, for a slow disk
    out: str = ""                  # folder of the run; empty = runs/SIZE
    init: str = ""                 # weights that student and teacher start from, of any layout; the heads start fresh
    start: str = ""                # run that a stage goes on from, with all of its newest checkpoint; or RUN@STEP
    began: int = 0                 # [0, 1e9]: its step there, which is the first of the stage; --start finds it
    resume: bool = False           # go on from OUT's newest checkpoint, with its config; auto = or begin
    seed: int = 0                  # [0, 4294967295]: of weights, crops, masks, stochastic depth
    device: str = "auto"           # auto, cpu, cuda, mps
    compile: bool = False          # torch.compile, block by block: a minute before the first step; see LOG.md
    kernels: str = "auto"          # csrc: auto = where it is built, off, or on = stop where it is not
    precision: str = "auto"        # bf16 (autocast: float32 weights and stream), fp8 (blocks alone), fp32, auto
    workers: int = -1              # [-1, 256]: processes that prepare batches, of each rank; -1 = as the machine allows
    save_every: int = 1000         # [1, inf): steps between checkpoints
    keep: int = 3                  # [1, inf): checkpoints, the newest ones
    keep_every: int = 0            # [0, inf): steps between checkpoints that are kept besides; 0 = none
    log_every: int = 10            # [1, inf): steps between lines of metrics.jsonl; each makes the host wait for a GPU
    log: str = ""                  # tensorboard, wandb, or tensorboard,wandb: rows of metrics.jsonl go there as well
    profile: tuple = (0, 0)        # [0, 1e7] rising: steps of this run, from, up to, traced in OUT; equal = off
    stop_after: int = 0            # [0, inf): save and leave after this many steps of this run; 0 = at the end
    steps: int = 1000              # [1, 1e7]: optimizer steps; the warm-ups of the recipe shrink and grow with it
    batch: int = 64                # [2, 1e6]: images of a step, over all ranks
    replicas: int = 1              # [1, 1e6]: ranks in so many groups, that each hold it all; 1 = sharded over all
    accumulate: int = 1            # [1, 1e6]: parts of it, one after the other: less memory, the losses of the whole
    depth: int = 0                 # [0, 1000]: blocks; 0 = the size's own
    patch_size: int = 0            # [0, 256]: pixels; 0 = the size's own
    n_registers: int = 4           # [0, 1000]: R
    key_bias: bool = False         # the attention's keys have a bias
    norm_eps: float = 1e-5         # (0, 1]: of the backbone's LayerNorms
    in_chans: int = 3              # [1, 1024]: C; of --init for RGB, the kernels of others are the mean of its three
    mean: tuple = SIZES["tiny"].mean  # [0, 1]: of the images' channels, RGB in [0, 1]; kept with the weights
    std: tuple = SIZES["tiny"].std  # (0, 1]: the same: standard deviation
    group: int = 16                # [1, 1e6]: consecutive samples that masks and stochastic depth are drawn for at once
    drop_path: float = 0.0         # [0, 1): share of samples that skip a branch, the same in all blocks
    rope_rescale: float = 2.0      # [1, 100]: RoPE box jitter: coordinates times a factor in [1/this, this]
    checkpointing: str = "none"    # recomputed in the backward pass: none, selective: all but products, full: blocks
    dino_hidden: int = 2048        # [1, 65536]: H of the DINO head
    dino_bottleneck: int = 256     # [1, 65536]: Z
    dino_prototypes: int = 65536   # [2, 1e7]: K
    ibot_hidden: int = 2048        # [1, 65536]: the same of the iBOT head
    ibot_bottleneck: int = 256     # [1, 65536]: Z
    ibot_prototypes: int = 65536   # [2, 1e7]: K
    prototype_std: float = 0.02    # (0, 10]: of both heads' last layer at the start
    lr: float = 1e-3               # [0, 10]: peak, before the factor 4 sqrt(batch / 1024)
    lr_end: float = 1e-6           # [0, 10]: before the same factor; cosine after the warm-up; the peak's = constant
    lr_warmup: int = 100           # [0, 1e7]: steps, linear from 0
    cosine_warmup: bool = False    # it rises along half a cosine instead
    weight_decay: float = 0.04     # [0, 10]: at the start; none for biases, norms and LayerScale
    weight_decay_end: float = 0.4  # [0, 10]: at the end, cosine
    momentum: float = 0.992        # [0, 1]: of the teacher's average; 1 = frozen
    momentum_end: float = 1.0      # [0, 1]: at the end, cosine
    teacher_temp: float = 0.07     # [0.001, 10]: after the warm-up
    teacher_temp_start: float = 0.04  # [0.001, 10]: linear from here
    teacher_temp_warmup: int = 300  # [0, 1e7]: steps
    student_temp: float = 0.1      # [0.001, 10]: of all cross-entropies
    sinkhorn_iterations: int = 3   # [0, 100]: that balance the targets; 0 = softmax, and nothing keeps them apart
    beta1: float = 0.9             # [0, 1): AdamW
    beta2: float = 0.999           # [0, 1): the same
    moments: str = "fp32"          # of AdamW: fp32; or bf16, rounded at random: 4 bytes a parameter fewer
    clip: float = 3.0              # [0, inf): largest gradient norm, of backbone and heads separately; 0 = off
    layer_decay: float = 0.9       # (0, 1]: lr of a block is that of the next one times this
    patch_embed_lr: float = 0.2    # [0, 100]: further factor on the patch embedding's lr
    freeze_last_layer: int = 10    # [0, 1e7]: first steps in which the prototypes do not move
    backbone_lr: float = 1.0       # [0, 100]: further factor on the lr of all of the backbone
    freeze_backbone: int = 0       # [0, 1e7]: first steps in which it does not move: the heads are fresh
    local_weight: float = 1.0      # [0, 1000]: factor on the DINO term of local crops
    local_weight_start: float = 1.0  # [0, 1000]: the same in the first step of --gram_warmup
    ibot_weight: float = 1.0       # [0, 1000]: factor on the iBOT term
    koleo_weight: float = 0.1      # [0, 1000]: factor on the KoLeo term of each global crop
    koleo_group: int = 16          # [2, 1e6]: consecutive samples that KoLeo looks for neighbours in
    gram_teacher: str = ""         # weights, RUN@STEP, or self: the teacher as it is at the start; empty = no Gram term
    gram_weight: float = 0.0       # [0, 1000]: factor on the Gram term
    gram_warmup: int = 0           # [0, 1e7]: steps, half a cosine from 0; the local weight meanwhile from its start
    gram_refresh: int = 0          # [0, 1e7]: steps after which the Gram teacher becomes the teacher of then; 0 = never
    gram_refreshes: int = 0        # [0, 1e6]: how often, at most

    @property
    def vit(self):
        own = SIZES[self.size]
        return replace(own, depth=self.depth or own.depth, patch_size=self.patch_size or own.patch_size,
                       n_registers=self.n_registers, key_bias=self.key_bias, norm_eps=self.norm_eps,
                       in_chans=self.in_chans, mean=self.mean, std=self.std)

    @property
    def lr_factor(self):
        return 4 * math.sqrt(self.batch / 1024)

    @property
    def end(self):
        return self.began + self.steps

    def at(self, step):
        """The config of one step: the sides that it draws, and the weights of --gram_warmup."""
        now, done = super().at(step), step - self.began
        now = now if self.gram_teacher or not now.gram_size else replace(now, gram_size=0)
        if done >= self.gram_warmup:
            return now
        share = (1 - math.cos(math.pi * done / self.gram_warmup)) / 2
        return replace(now, gram_weight=share * self.gram_weight,
                       local_weight=self.local_weight_start + share * (self.local_weight - self.local_weight_start))


NETWORK = "n_registers", "key_bias", "norm_eps", "in_chans", "mean", "std"  # fields that are the network's own

# ViT-L from scratch on ImageNet-1k: the released recipe's numbers, for the network of the released weights and of
# the paper's augmentation; as it was: `released`, below
IMAGENET = TrainConfig(
    size="l", steps=125_000, batch=2048, group=64, koleo_group=64, global_size=224, local_size=96, flip=0.5,
    drop_path=0.3, lr=1e-3, lr_end=1e-6, lr_warmup=12_500, weight_decay=0.04, weight_decay_end=0.4, momentum=0.992,
    momentum_end=1.0, teacher_temp_warmup=37_500, layer_decay=0.9, beta2=0.999, clip=3.0, freeze_last_layer=1250,
)  # paper: none for this size from scratch

NAMED = {  # (size, recipe): beside the size's own
    # As the released code trains it: k-NN 82.0, linear 83.5, in 14 h of 32 H100, are its authors' figures. Its network
    # is another than that of the released weights, it blurs inverted, and its last lr is not multiplied for the batch.
    # differs: RoPE is float32 here, bfloat16 there
    # differs: schedules are a step apart at their ends. Theirs begin with the start value, so that the first step, at
    #   lr 0, teaches nothing, peak in the last step of the warm-up, and end one step of the cosine short of the end
    #   value; see `schedule`
    ("l", "released"): replace(
        IMAGENET, recipe="released", n_registers=0, key_bias=True, norm_eps=1e-6, rope_rescale=1.0, blur_global_1=0.0,
        blur_global_2=0.9, blur_local=0.5, lr_end=1e-6 / IMAGENET.lr_factor, save_every=3750, keep=3,
    ),
    # One GPU of 24 GB and a folder of photos: ImageNet's recipe at a batch that fits, K by `suited_prototypes`; not run
    # s saves 139 MB an image for the backward pass, measured on a CPU in bf16: 18 GB; b is about twice that
    # planned: 123 and 464 GFLOP an image by hand; at 21 TFLOP/s, 30 % of what an RTX 3090 multiplies, 21 h and 39 h
    # differs: no recipe is published for so small a batch
    ("s", "photos"): replace(
        IMAGENET, size="s", recipe="photos", steps=100_000, batch=128, drop_path=0.0, lr_warmup=10_000,
        teacher_temp_warmup=30_000, freeze_last_layer=1000,
    ),
    ("b", "photos"): replace(
        IMAGENET, size="b", recipe="photos", steps=100_000, batch=64, drop_path=0.1, lr_warmup=10_000,
        teacher_temp_warmup=30_000, freeze_last_layer=1000,
    ),
}

RECIPES = {
    # 2 CPU cores; measured in LOG.md
    # differs: in a network so small the gradient of iBOT drowns that of DINO, so it weighs a tenth
    "tiny": TrainConfig(
        size="tiny", steps=3000, batch=32, global_size=96, local_size=48, n_local=6, flip=0.5, blur_sigma=(0.05, 0.7),
        dino_hidden=512, dino_bottleneck=64, dino_prototypes=256, ibot_hidden=512, ibot_bottleneck=64,
        ibot_prototypes=256, prototype_std=0.125, lr=1e-3, weight_decay_end=0.04, teacher_temp=0.04, koleo_weight=0.05,
        ibot_weight=0.1, layer_decay=1.0, patch_embed_lr=1.0, save_every=250, log_every=20, freeze_last_layer=50,
    ),
    # differs: no recipe is published for these sizes from scratch; ImageNet's with other stochastic depth, not run yet
    "s":  replace(IMAGENET, size="s", drop_path=0.0),
    "s+": replace(IMAGENET, size="s+", drop_path=0.0),
    "b":  replace(IMAGENET, size="b", drop_path=0.1),
    "l":  IMAGENET,
    "l+": replace(IMAGENET, size="l+"),
    "h+": replace(IMAGENET, size="h+", drop_path=0.4),
    # paper: Tab. 2, §3.2: constant lr, weight decay and momentum; 61,440 H100 hours
    # differs: Tab. 2 has an iBOT head of 8192 hidden, the released recipe 4096 as here; bf16 where they have fp8
    "7b": TrainConfig(
        size="7b", steps=1_000_000, batch=4096, group=16, koleo_group=16, global_size=256, local_size=112,
        drop_path=0.4, lr=5e-5, lr_end=5e-5, lr_warmup=100_000, weight_decay=0.04, weight_decay_end=0.04,
        momentum=0.994, momentum_end=0.994, teacher_temp_warmup=100_000, layer_decay=0.98, beta2=0.99, clip=30.0,
        freeze_last_layer=5000, dino_hidden=8192, dino_bottleneck=512, dino_prototypes=262_144, ibot_hidden=4096,
        ibot_bottleneck=384, ibot_prototypes=98_304, checkpointing="full",
    ),
}

# What a stage changes of the run that it starts from; all else is that run's
GRAM = dict(
    # paper: §4.2: on global crops, w_Gram with the other terms of eq. 3, after 1M steps; the Gram teacher an early one
    #   (100k or 200k), replaced by the teacher every 10k steps; §4.3: at twice the resolution
    # differs: the paper gives neither weight, rates nor when the refreshes end; the numbers are the released recipe's
    steps=200_000, lr=3e-5, lr_end=3e-5, lr_warmup=0, weight_decay=0.04, weight_decay_end=0.04, momentum=0.999,
    momentum_end=0.999, teacher_temp_warmup=0, freeze_last_layer=0, local_weight_start=1.0, local_weight=0.5,
    gram_weight=2.0, gram_warmup=1000, gram_refresh=10_000, gram_refreshes=3,
)
HIGHRES = GRAM | dict(
    # paper: §5.1: global crops of 512 and 768 px, local ones of 112 to 336, a pair a batch; 10k steps; the Gram
    #   teacher is the teacher that the stage begins with
    # differs: 30k steps as released, the first 10k of them the warm-up; triples, their shares, weight and rate are the
    #   released recipe's, as the paper gives none; 8 images a GPU as there, on the 256 GPUs of the pretraining
    steps=30_000, batch=2048, group=8, koleo_group=16, lr=1.25e-5, lr_end=1.25e-5, lr_warmup=10_000, cosine_warmup=True,
    local_weight_start=0.5, gram_teacher="self", gram_weight=1.5, gram_warmup=0, gram_refresh=0, gram_refreshes=0,
    resolutions="512x112x768*0.3,768x112x1152*0.3,768x168x1152*0.3,768x224x1152*0.05,768x336x1152*0.05",
)
# differs: for smaller sizes no stage is published. Steps are in proportion to ImageNet's 125,000 as 7b's are to 1M, the
#   warm-ups likewise; lr a tenth and a twenty-fifth of its peak, chosen, as it ends near 0; the rest as 7b; not run
SCALED = dict(
    gram=GRAM | dict(steps=25_000, lr=1e-4, lr_end=1e-4, gram_warmup=125, gram_refresh=1250),
    highres=HIGHRES | dict(steps=3750, batch=256, lr=4e-5, lr_end=4e-5, lr_warmup=1250),
)
STAGES = {(size, stage): changes for stage, changes in SCALED.items() for size in ("s", "s+", "b", "l", "l+", "h+")} | {
    ("7b", "gram"): GRAM,
    ("7b", "highres"): HIGHRES,
    # differs: chosen for some hundred steps: averages of 100 steps where 7b's are of 1,000; crops that a laptop holds
    ("tiny", "gram"): GRAM | dict(steps=600, lr=3e-4, lr_end=3e-4, momentum=0.99, momentum_end=0.99, gram_warmup=30,
                                  gram_refresh=150),
    ("tiny", "highres"): HIGHRES | dict(
        steps=150, batch=16, group=16, lr=1e-4, lr_end=1e-4, lr_warmup=50, momentum=0.99, momentum_end=0.99,
        resolutions="96x48x192*0.4,160x64x240*0.4,224x80x336*0.2"),
}
# differs: the paper has no such stage. The heads are fresh, so the backbone waits a tenth of the time; then low rates
#   and the Gram term to the released weights, at the resolution of the student; not run
ADAPT = dict(
    stage="adapt", steps=4000, batch=64, group=16, koleo_group=16, lr=1e-4, lr_end=1e-6, lr_warmup=100,
    teacher_temp_start=0.04, teacher_temp=0.04, teacher_temp_warmup=0, freeze_last_layer=0, weight_decay=0.04,
    weight_decay_end=0.04, momentum=0.99, momentum_end=0.999, layer_decay=0.9, drop_path=0.0, backbone_lr=0.1,
    freeze_backbone=400, gram_weight=2.0, save_every=200,
)
TINY_ADAPT = dict(  # measured, LOG.md
    steps=120, batch=16, n_local=2, lr=3e-3, lr_warmup=3, momentum=0.98, momentum_end=0.98, layer_decay=1.0,
    backbone_lr=1.0, freeze_backbone=24, save_every=60,
)
AFTER = dict(gram=("pretrain", "gram"), highres=("pretrain", "gram", "highres"))  # stages that one may go on from
WARMUPS = ("lr_warmup", "teacher_temp_warmup", "freeze_last_layer", "freeze_backbone", "gram_warmup", "gram_refresh")
NAMED |= {(size, "satellite"): satellite.recipe(c, WARMUPS) for size, c in RECIPES.items()}
HEADS = tuple(f"{head}_{part}" for head in ("dino", "ibot") for part in ("hidden", "bottleneck", "prototypes"))
OF_RUN = ("size", "recipe", "depth", "patch_size", *NETWORK, *HEADS, "prototype_std", "began")
FREE = ("out", "resume", "data", "data_changed", "device", "kernels", "precision", "workers", "save_every", "keep",
        "keep_every", "log_every", "log", "profile", "stop_after", "steps", "checkpointing", "accumulate", "replicas",
        "compile")  # what a resumed run may change; data by another name, or with --data_changed


def configure(argv, starts=True):
    """The command line -> TrainConfig, all derivations made; every mistake ends here, before the first batch."""
    values, words = command_line.read_words(argv, command_line.types(TrainConfig()))
    if words:
        raise ValueError(f"{words[0]!r} is not an option; write --field value")
    if values.get("out") and resumes(values, values["out"]):
        return resumed_config(values, values["out"])
    given = values
    if values.get("start") or values.get("stage") in AFTER:
        return stage_config(values, starts)
    adapts = values.get("stage") == "adapt"
    if adapts and not values.get("init"):
        raise ValueError("--stage adapt goes on from weights; name them: --init WEIGHTS")
    if values.get("init"):
        values = say_init(values["init"], values.get("in_chans")) | values
    size = values.get("size") or size_for(values.get("recipe"))
    recipe = find_recipe(size, values.get("recipe", ""))
    if not values.get("out") and resumes(given, f"runs/{size}"):
        return resumed_config(given, f"runs/{size}")
    if adapts:
        recipe = replace(recipe, gram_teacher=values["init"], **(ADAPT | TINY_ADAPT if size == "tiny" else ADAPT))
    c = command_line.apply(of_channels(recipe, values.get("in_chans")), values)
    if adapts and not c.gram_size:
        c = replace(c, gram_size=c.global_size)
    if c.recipe == "photos" or adapts:
        K = suited_prototypes(len(open_source(c.data, c.n_shapes, c.seed, reader(c, c))), c.batch)
        c = replace(c, **{name: K for name in ("dino_prototypes", "ibot_prototypes") if name not in values})
    return settled(c, values, recipe.steps, f"runs/{size}", starts)


def settled(c, values, steps, out, starts):
    """c with what follows from other fields, checked.    steps  of its recipe    out  if none is named"""
    shrink = {name: round(getattr(c, name) * c.steps / steps) for name in WARMUPS if name not in values}
    c = derive(replace(c, **shrink, out=c.out or out))
    check(c)
    if starts:
        command_line.writable(c.out)
    if starts and saved(c.out):
        raise ValueError(f"--out {c.out} holds a run already; add --resume to go on, or name another folder")
    return c


def stage_config(values, starts):
    """A stage of the run that --start names: its config, what STAGES changes of it, and the command line."""
    stage = values.get("stage", "pretrain")
    if not values.get("start") and starts:
        raise ValueError(f"--stage {stage} goes on from a run; name it: --start RUN, or RUN@STEP for a kept checkpoint")
    run, began = kept(values["start"]) if values.get("start") else ("runs/none", 0)
    out = values.get("out", f"{run}-{stage}")
    if resumes(values, out):
        return resumed_config(values, out)
    before = saved_config(run) if values.get("start") else planned(values)
    if before.stage not in AFTER.get(stage, ()) or (before.size, stage) not in STAGES:
        raise ValueError(f"--stage {stage} does not follow {run}, {before.size} {before.stage}; there are pretrain, "
                         f"then gram, then highres, of the sizes {', '.join(RECIPES)}")
    changes = STAGES[before.size, stage] | satellite.stage(before, stage)
    fresh = replace(before, out="", init="", resume=False, stop_after=0, profile=(0, 0), began=began, resolutions="",
                    gram_teacher="", gram_size=2 * before.global_size * (stage == "gram"))
    base = replace(fresh, **changes)
    c = command_line.apply(base, values)
    if not c.gram_weight:
        c = replace(c, gram_teacher="", gram_size=0, gram_refreshes=0)
    other = [name for name in OF_RUN if name in values and getattr(c, name) != getattr(base, name)]
    if other or c.init:
        raise ValueError(f"--{(other or ['init'])[0]}: networks and heads are those of --start {run}, with its "
                         f"{before.size}; leave it out")
    return settled(c, values, base.steps, out, starts)


def planned(values):
    """The run that a stage would go on from, where it is only to be planned: one of its recipe."""
    values.setdefault("gram_teacher", "self")
    return derive(find_recipe(values.get("size") or size_for(values.get("recipe")), values.get("recipe", "")))


def find_recipe(size, name):
    """The size's own, or the one of that name beside it."""
    if size not in RECIPES:
        raise ValueError(f"unknown size {size!r}; choose one of {', '.join(RECIPES)}")
    if name and (size, name) not in NAMED:
        there = ", or ".join(f"--size {size} --recipe {name}" for size, name in NAMED if name != "satellite")
        raise ValueError(f"--size {size} has no recipe {name!r}; leave it out, or write {there}, or --recipe satellite")
    return NAMED[size, name] if name else RECIPES[size]


def size_for(recipe):
    """The size that is meant where none is named: the first that has the recipe, or tiny."""
    return next((size for size, name in NAMED if name == recipe), "tiny")


def of_channels(c, in_chans):
    """c for images of so many channels, None = c's own; mean and std of new ones are those of RGB, and their mean."""
    n = command_line.apply(c, dict(in_chans=str(in_chans or c.in_chans))).in_chans
    return replace(c, in_chans=n, mean=widen(c.mean, n), std=widen(c.std, n))


def suited_prototypes(n_images, batch):
    """
    K for a set of images, a power of two from 256 to 65,536.

    At least 16 images for each prototype, as `tiny` has (4,096 and 256) and ImageNet-1k (20: 1.28 M and 65,536); and at
    most 32 prototypes for each global crop of a step, as 7b has: above it Sinkhorn-Knopp's targets are nearly uniform.
    """
    return 2 ** int(min(16, max(8, math.log2(min(n_images / 16, 32 * 2 * batch)))))


def resumes(values, out):
    """Whether the command line asks to go on with the run in `out`; puts an answer in the place of "auto"."""
    if values.get("resume", "").lower() == "auto":
        values["resume"] = str(bool(saved(out)))
    return values.get("resume", "").lower() == "true"


def derive(c):
    """c with what follows from other fields."""
    before = dict(true="full", false="none")  # of runs that knew no other
    return replace(c, patch_size=c.vit.patch_size, depth=c.vit.depth, group=min(c.group, c.batch),
                   koleo_group=min(c.koleo_group, c.batch),
                   checkpointing=before.get(c.checkpointing.lower(), c.checkpointing))


def say_init(path, in_chans):
    """
    What a weights file says of itself, as options: those of the command line stand above them.

    in_chans  of the command line, a text, or None: weights for RGB become weights for more channels
    """
    found = identify(path).config
    size = size_of(found).partition(",")[0]
    if not isinstance(found, ViTConfig) or size not in RECIPES:
        raise ValueError(f"--init {path} is {size_of(found)}; it must be a ViT, one of {', '.join(RECIPES)}")
    n = of_channels(TrainConfig(), in_chans).in_chans if in_chans else found.in_chans
    if n != found.in_chans and (found.in_chans, n > 3) != (3, True):
        raise ValueError(f"--in_chans {n}: --init {path} is for images of {found.in_chans} channels; leave it out, or "
                         "start from weights for RGB and ask for more than 3")
    found = found if n == found.in_chans else inflated(found, n)
    names = "depth", "patch_size", *NETWORK
    return of_run(path) | dict(size=size) | {name: str(getattr(found, name)) for name in names}


def resumed_config(values, out):
    """The config that the run was started with, and what the command line may change of it."""
    c = go_on(saved_config(out), values, out)
    command_line.writable(out)
    done = newest(out)[0]
    if c.end < done:
        raise ValueError(f"--steps {c.steps}: {out} has {done - c.began} steps already; ask for as many, or for more")
    check(c)
    return c


def go_on(before, values, out, free=(), derive=derive):
    """The saved config with the command line's words. Raises ValueError if they would make it another run."""
    values = {name: text for name, text in values.items() if (name, text) != ("precision", "auto")}  # as it was settled
    fresh = replace(before, stop_after=0, profile=(0, 0))  # they count the steps of one run
    c = derive(replace(command_line.apply(fresh, values), out=str(out), resume=True))
    changed = [name for name in values if name not in (*FREE, *free) and getattr(c, name) != getattr(before, name)]
    if changed:
        said, was = (", ".join(f"--{name} {getattr(each, name)}" for name in changed) for each in (c, before))
        raise ValueError(f"--resume: {out} was begun with {was}, not with {said}: that would be another run; leave it "
                         "out, or name another --out")
    return c


def saved_config(out, kind=TrainConfig):
    """The config in a run's folder, as a `kind`."""
    saved, given = saved_text(out), {}
    n = saved.get("in_chans")  # None: of a run of words, or of before there were others than 3
    like = of_channels(kind(), n) if type(n) is int and 1 <= n <= 1024 else kind()
    for name, old in vars(like).items():
        if name in saved:
            value = tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
            value = str(value) if name == "checkpointing" else value  # once it was true or false
            given[name] = float(value) if type(old) is float and type(value) is int else value
            if not command_line.fits(given[name], old):
                raise ValueError(f"{out}/config.json: {name} is {value!r}, where a {type(old).__name__} belongs; "
                                 "restore it from a copy")
    try:
        return command_line.checked(replace(like, **given))
    except ValueError as error:
        raise ValueError(f"{out}/config.json: {error}; restore it from a copy") from error


def fingerprint(c, source):
    """For config.json: what tells these images from others. Raises ValueError if c.out was begun with others."""
    digest, before = source.digest(), saved_text(c.out) if c.resume else {}
    if before.get("data_digest", digest) != digest and not c.data_changed:
        raise ValueError(
            f"--data {c.data} does not hold the images that {c.out} was begun with, those of {before.get('data')}: "
            f"before {before.get('data_images', '?')} of fingerprint {before['data_digest'][:12]}, after {len(source)} "
            f"of {digest[:12]}; name the same ones, or another --out, or go on with these: --data_changed true")
    return dict(data_digest=digest, data_images=len(source), data_changed=False)  # it was asked for once


def saved_text(out):
    """config.json of a run's folder, as a dict."""
    path = Path(out, "config.json")
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{out}: no run to go on with, or to learn from ({error}); name the folder of one") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object; restore it from a copy")
    return found


def check(c):
    """Raises ValueError for values that cannot be trained with."""
    if c.stage not in ("pretrain", "adapt", *AFTER):
        raise ValueError(f"--stage {c.stage} is not known; there are: pretrain, adapt, {', '.join(AFTER)}")
    ops.use_kernels(c.kernels)
    check_loggers(c.log)
    for name, legal in dict(order=ORDERS, precision=("auto", "bf16", "fp8", "fp32"), moments=("fp32", "bf16"),
                            checkpointing=ops.RECOMPUTED).items():
        if getattr(c, name) not in legal:
            raise ValueError(f"--{name} {getattr(c, name)} is not known; choose one of {', '.join(legal)}")
    if c.compile and c.checkpointing == "selective":
        raise ValueError("--compile chooses by itself what of a block stays in memory; --checkpointing: none, or full")
    reader(c, c)
    check_sides(c)
    check_gram(c)
    for name in ("group", "koleo_group"):
        if c.batch % getattr(c, name):
            raise ValueError(f"--batch {c.batch} is not a multiple of --{name} {getattr(c, name)}; change one of them")


def check_sides(c):
    """Raises ValueError for crops that are not whole patches; in --resolutions a local crop may have a rest."""
    sides = [(f"--{name} {getattr(c, name)}", getattr(c, name), False) for name in ("global_size", "local_size")]
    for triple, _ in read_resolutions(c.resolutions) if c.resolutions else ():
        where = f"--resolutions {'x'.join(map(str, triple))}: {{}} px"
        sides += [(where.format(side), side, place == 1) for place, side in enumerate(triple[:2])]
    for said, side, rest in sides:
        if side < c.patch_size:
            raise ValueError(f"{said}: the image is smaller than a patch of {c.patch_size} pixels; at least that")
        if side % c.patch_size and not rest:
            raise ValueError(f"{said} is not a multiple of the patch, {c.patch_size}; try "
                             f"{side // c.patch_size * c.patch_size}")


def check_gram(c):
    """Raises ValueError for a Gram term without a teacher, or one that is not of use; its file is looked at."""
    if c.gram_weight and not c.gram_teacher:
        raise ValueError(f"--stage {c.stage} --gram_weight {c.gram_weight:g} wants a Gram teacher: --gram_teacher "
                         "WEIGHTS, RUN@STEP, or self; --gram_weight 0 goes without")
    sized = c.gram_size or c.resolutions and c.gram_weight
    if bool(c.gram_teacher) != bool(sized) or c.gram_teacher and not c.gram_weight:
        raise ValueError(f"--gram_teacher {c.gram_teacher or '(none)'} --gram_size {c.gram_size} --gram_weight "
                         f"{c.gram_weight:g}: a Gram term wants all three; without one leave all three out")
    if c.gram_teacher:
        gram_config(c)
