"""
Pretrain a DINOv3 ViT.

    python train.py                                                  tiny, on the generated `shapes`, on anything
    python train.py --size s --data PHOTOS --out runs/s              one GPU, or patience
    python train.py --recipe photos --data PHOTOS --out runs/s       ViT-S or -B (--size b) on one GPU of 24 GB
    python train.py --size l --recipe released --data IMAGENET       ViT-L as the released code trains it from scratch
    python train.py --out runs/s --resume                            go on, bit for bit; --resume auto: or begin
    torchrun --nproc-per-node 8 train.py --size 7b --data PHOTOS     FSDP2, any number of ranks and nodes

    TrainConfig, RECIPES   every number, with what the paper has         DINOv3 §3.2, Tab. 2
    schedule               values for all steps, as arrays
    teacher_targets        balanced assignments of the global crops      DINOv3 §3.2
    loss_terms             DINO, iBOT, KoLeo                             DINOv3 eq. 1
    train                  the loop

Everything random in a step is a function of (seed, step, sample or block). Dimension letters: see the top of model.py.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import ops
from convnext import ConvNeXt, ConvNeXtConfig
from data import Batches, CropConfig, colour_batch, loader, open_source
from engine import config as command_line
from engine import plan
from engine.adam import AdamW16
from engine.checkpoint import begin_state, check_space, load_checkpoint, newest, save_checkpoint, saved, start_from
from engine.interrupt import Interrupt, Peers, Verdicts
from engine.layouts import size_of
from engine.loggers import check_loggers
from engine.meters import health
from engine.profile import tracer
from engine.progress import Progress, open_log
from engine.ranks import choose_precision, count_workers, start_ranks
from losses import balanced, dino_losses, ibot_loss, koleo_loss
from model import SIZES, Noise, ProjectionHead, ViT, ViTConfig, initialise, to_device
from weights import identify

# --------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class TrainConfig(CropConfig):
    size: str = "tiny"             # tiny, s, s+, b, l, l+, h+, 7b
    recipe: str = ""               # another than the size's own, by name: photos (s, b; K by their count), released (l)
    stage: str = "pretrain"        # the recipe's stage
    data: str = "shapes"           # a folder of images, or shapes: the generated set
    n_shapes: int = 4096           # [1, 100000]: images of the generated set
    out: str = ""                  # folder of the run; empty = runs/SIZE
    init: str = ""                 # weights that student and teacher start from, of any layout; the heads start fresh
    resume: bool = False           # go on from OUT's newest checkpoint, with its config; auto = or begin
    seed: int = 0                  # [0, 4294967295]: of weights, crops, masks, stochastic depth
    device: str = "auto"           # auto, cpu, cuda, mps
    compile: bool = False          # torch.compile, block by block: a minute before the first step; see LOG.md
    kernels: str = "auto"          # csrc: auto = where it is built, off, or on = stop where it is not
    precision: str = "auto"        # bf16 (autocast: float32 weights and residual stream), fp32, or auto
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
    local_weight: float = 1.0      # [0, 1000]: factor on the DINO term of local crops
    ibot_weight: float = 1.0       # [0, 1000]: factor on the iBOT term
    koleo_weight: float = 0.1      # [0, 1000]: factor on the KoLeo term of each global crop
    koleo_group: int = 16          # [2, 1e6]: consecutive samples that KoLeo looks for neighbours in

    @property
    def vit(self):
        own = SIZES[self.size]
        return replace(own, depth=self.depth or own.depth, patch_size=self.patch_size or own.patch_size,
                       n_registers=self.n_registers, key_bias=self.key_bias, norm_eps=self.norm_eps, mean=self.mean,
                       std=self.std)

    @property
    def lr_factor(self):
        return 4 * math.sqrt(self.batch / 1024)


NETWORK = "n_registers", "key_bias", "norm_eps", "mean", "std"  # fields that are the network's own

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
WARMUPS = "lr_warmup", "teacher_temp_warmup", "freeze_last_layer"
FREE = ("out", "resume", "data", "device", "kernels", "precision", "workers", "save_every", "keep", "keep_every",
        "log_every", "log", "profile", "stop_after", "steps", "checkpointing", "accumulate", "replicas",
        "compile")  # what a resumed run may change; data must be equal


def configure(argv, starts=True):
    """The command line -> TrainConfig, all derivations made; every mistake ends here, before the first batch."""
    values, words = command_line.read_words(argv, command_line.types(TrainConfig()))
    if words:
        raise ValueError(f"{words[0]!r} is not an option; write --field value")
    if values.get("out") and resumes(values, values["out"]):
        return resumed_config(values, values["out"])
    given = values
    if values.get("init"):
        values = say_init(values["init"]) | values
    size = values.get("size") or size_for(values.get("recipe"))
    recipe = find_recipe(size, values.get("recipe", ""))
    if not values.get("out") and resumes(given, f"runs/{size}"):
        return resumed_config(given, f"runs/{size}")
    c = command_line.apply(recipe, values)
    if c.recipe == "photos":
        K = suited_prototypes(len(open_source(c.data, c.n_shapes, c.seed)), c.batch)
        c = replace(c, **{name: K for name in ("dino_prototypes", "ibot_prototypes") if name not in values})
    shrink = {name: round(getattr(c, name) * c.steps / recipe.steps) for name in WARMUPS if name not in values}
    c = derive(replace(c, **shrink, out=c.out or f"runs/{size}"))
    check(c)
    if starts:
        command_line.writable(c.out)
    if starts and saved(c.out):
        raise ValueError(f"--out {c.out} holds a run already; add --resume to go on, or name another folder")
    return c


def find_recipe(size, name):
    """The size's own, or the one of that name beside it."""
    if size not in RECIPES:
        raise ValueError(f"unknown size {size!r}; choose one of {', '.join(RECIPES)}")
    if name and (size, name) not in NAMED:
        there = ", or ".join(f"--size {size} --recipe {name}" for size, name in NAMED)
        raise ValueError(f"--size {size} has no recipe {name!r}; leave it out, or write {there}")
    return NAMED[size, name] if name else RECIPES[size]


def size_for(recipe):
    """The size that is meant where none is named: the first that has the recipe, or tiny."""
    return next((size for size, name in NAMED if name == recipe), "tiny")


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


def say_init(path):
    """What a weights file says of itself, as options: those of the command line stand above them."""
    found = identify(path).config
    size = size_of(found).partition(",")[0]
    if not isinstance(found, ViTConfig) or found.in_chans != 3 or size not in RECIPES:
        raise ValueError(f"--init {path} is {size_of(found)}, {found.in_chans} channels; it must be a ViT for RGB, "
                         f"one of {', '.join(RECIPES)}")
    names = "depth", "patch_size", *NETWORK
    return dict(size=size) | {name: str(getattr(found, name)) for name in names}


def resumed_config(values, out):
    """The config that the run was started with, and what the command line may change of it."""
    c = go_on(saved_config(out), values, out)
    command_line.writable(out)
    done = newest(out)[0]
    if c.steps < done:
        raise ValueError(f"--steps {c.steps}: {out} has {done} steps already; ask for as many, or for more")
    check(c)
    return c


def go_on(before, values, out, free=()):
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
    for name, old in vars(kind()).items():
        if name in saved:
            value = tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
            value = str(value) if name == "checkpointing" else value  # once it was true or false
            given[name] = float(value) if type(old) is float and type(value) is int else value
            if not command_line.fits(given[name], old):
                raise ValueError(f"{out}/config.json: {name} is {value!r}, where a {type(old).__name__} belongs; "
                                 "restore it from a copy")
    try:
        return command_line.checked(kind(**given))
    except ValueError as error:
        raise ValueError(f"{out}/config.json: {error}; restore it from a copy") from error


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
    if c.stage != "pretrain":
        raise ValueError(f"--stage {c.stage} is not known; there is: pretrain")
    ops.use_kernels(c.kernels)
    check_loggers(c.log)
    if c.precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"--precision {c.precision} is not known; choose auto, bf16 or fp32")
    if c.moments not in ("fp32", "bf16"):
        raise ValueError(f"--moments {c.moments} is not known; choose fp32 or bf16")
    if c.checkpointing not in ops.RECOMPUTED:
        raise ValueError(f"--checkpointing {c.checkpointing} is not known; choose {', '.join(ops.RECOMPUTED)}")
    if c.compile and c.checkpointing == "selective":
        raise ValueError("--compile chooses by itself what of a block stays in memory; --checkpointing: none, or full")
    for name in ("global_size", "local_size"):
        side, patch = getattr(c, name), c.patch_size
        if side < patch:
            raise ValueError(f"--{name} {side}: the image is smaller than a patch of {patch} pixels; at least {patch}")
        if side % patch:
            raise ValueError(f"--{name} {side} is not a multiple of the patch, {patch}; try {side // patch * patch}")
    for name in ("group", "koleo_group"):
        if c.batch % getattr(c, name):
            raise ValueError(f"--batch {c.batch} is not a multiple of --{name} {getattr(c, name)}; change one of them")


def schedule(start, peak, end, warmup, steps):
    """
    Values for all steps, float64: linear from start to peak over `warmup` steps, then a cosine to end at the last step.

    differs: the first value is one step up from start, so that a learning rate that warms up from 0 is never 0, and the
             peak is that of the first step after the warm-up; the released code's begins with start, and stops one
             step short of end
    """
    ramp = start + (peak - start) * np.arange(1, warmup + 1) / (warmup + 1)
    t = np.linspace(0, 1, max(steps - warmup, 1))
    return np.concatenate([ramp, end + (peak - end) * (1 + np.cos(np.pi * t)) / 2])[:steps]

# --------------------------------------------------------------------------------
# Networks and optimizer


def settle(c, ranks):
    """c with the precision that this machine has in place of auto."""
    return replace(c, precision=choose_precision(c.precision, ranks.device))


def make_networks(c):
    D, stds = c.vit.width, (c.vit.init_std, c.prototype_std)
    return nn.ModuleDict(dict(
        backbone=(ConvNeXt if isinstance(c.vit, ConvNeXtConfig) else ViT)(c.vit),
        dino_head=ProjectionHead(D, c.dino_hidden, c.dino_bottleneck, c.dino_prototypes, *stds),
        ibot_head=ProjectionHead(D, c.ibot_hidden, c.ibot_bottleneck, c.ibot_prototypes, *stds),
    ))


def build_networks(c, ranks, make=make_networks):
    """Student or teacher: the same start values; sharded over the ranks, block by block, if there are several."""
    with torch.device("meta"):
        networks = make(c)
    networks["backbone"].checkpointing = c.checkpointing
    if not c.n_local and getattr(c.vit, "local_norm", False):
        networks["backbone"].local_cls_norm.requires_grad_(False)  # no crop passes it
    if c.compile:
        for block in networks["backbone"].blocks:
            block.compile()
    prototypes = [head.last_layer for name, head in networks.items() if name.endswith("_head")]
    shard_parts(c, ranks, [*networks["backbone"].blocks, *prototypes, *networks.values()])
    return initialise(networks.to_empty(device=ranks.device), c.seed)


def shard_parts(c, ranks, parts):
    """Cuts each part's parameters over the ranks, in place, if there are several; inner parts come first."""
    if ranks.group is None:
        return
    if c.replicas == 1:
        mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
    else:
        mesh = init_device_mesh(ranks.device.type, (c.replicas, ranks.count // c.replicas),
                                mesh_dim_names=("replicas", "shards"))
    # autocast computes in bf16; the shards stay float32, and travel as bf16 where that is what will be used
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = bf16 if c.precision == "bf16" and ranks.device.type == "cuda" else MixedPrecisionPolicy()
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def parameter_groups(c, student):
    """
    AdamW's groups, of equal lr factor and equal decay.

    lr factor  layer_decay^(L+1-layer)    decay  none for biases, norms, LayerScale: all that is not a matrix
    """
    groups, depths = {}, getattr(c.vit, "depths", [c.vit.depth])
    for name, p in filter(lambda pair: pair[1].requires_grad, student.named_parameters()):
        stem = name.startswith(("backbone.patch_embed.", "backbone.downsample_layers.0."))
        factor = c.layer_decay ** (sum(depths) + 1 - layer_of(name, depths)) * (c.patch_embed_lr if stem else 1)
        key = factor, p.ndim > 1, "last_layer" in name
        groups.setdefault(key, []).append(p)
    return [dict(params=params, lr_factor=factor, decays=decays, last_layer=last)
            for (factor, decays, last), params in groups.items()]


def make_optimizer(c, student):
    groups, betas = parameter_groups(c, student), (c.beta1, c.beta2)
    if c.moments == "bf16":
        return AdamW16(groups, {p: name for name, p in student.named_parameters()}, betas, c.seed)
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def layer_of(name, depths):
    """0 = embeddings and tokens, block i = i+1, L+1 = final norm and heads; a downsampling: that of the block before"""
    where, part, *place = name.split(".")
    if where != "backbone" or "norm" in part:
        return sum(depths) + 1
    before = sum(depths[: int(place[0])]) if part in ("stages", "downsample_layers") else 0
    return before + (int(place[part == "stages"]) + 1 if part in ("blocks", "stages") else 0)


def set_schedules(optimizer, lr, weight_decay, freeze_last_layer):
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if freeze_last_layer and group["last_layer"] else lr * group["lr_factor"]
        group["weight_decay"] = weight_decay * group["decays"]


def clip_gradients(student, clip):
    """Backbone and heads each to norm `clip`; returns their norms, 0-dim float32."""
    norms = {}
    for name, part in student.items():
        norm = nn.utils.clip_grad_norm_(part.parameters(), clip or math.inf)
        norms[f"grad_norm_{name}"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms


def share_gradients(student, last):
    """Whether ranks add up their gradients in the next backward pass: in that of the last part."""
    for part in student.values():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(last)


@torch.no_grad()
def update_ema(teacher, student, momentum):
    """teacher <- momentum teacher + (1 - momentum) student, in place, each rank its shards (even or not)."""
    local = [[p.to_local() if isinstance(p, DTensor) else p for p in n.parameters()] for n in (teacher, student)]
    assert all(a.shape == b.shape for a, b in zip(*local, strict=True))
    torch._foreach_lerp_(*local, 1 - momentum)

# --------------------------------------------------------------------------------
# Objective


def teacher_targets(teacher, parts, temperature, group, n_iterations=3):
    """
    Assignments of the two global crops, unmasked, balanced over all parts of the batch; for each part a dict of

        dino  G B K    ibot  M K                                                         paper: §3.2
    """
    dino, ibot = [], []
    for batch in parts:
        features = teacher["backbone"](batch["global_crops"])
        dino.append(teacher["dino_head"](features.cls))                                  # (G B) K
        ibot.append(teacher["ibot_head"](features.patches.flatten(0, 1).index_select(0, batch["masked"])))  # M K
    dino, ibot = (balanced(logits, temperature, n_iterations=n_iterations, group=group) for logits in (dino, ibot))
    return [dict(dino=d.unflatten(0, (2, -1)), ibot=i) for d, i in zip(dino, ibot, strict=True)]


def loss_terms(c, student, batch, targets, noise, group):
    """
    The unweighted terms of eq. 1, 0-dim float32 each, and the features of the global crops.

    dino_global  a global crop predicts the other one    dino_local  every local crop predicts both
    """
    crops, masks = [batch["global_crops"]], [batch["masks"]]
    if c.n_local:
        crops, masks = [*crops, batch["local_crops"]], [*masks, None]
    features = student["backbone"](crops, masks, noise)
    g, B, weights = features[0], len(batch["indices"]), term_weights(c)
    logits = student["dino_head"](torch.cat([f.cls for f in features])).unflatten(0, (-1, B))    # G+L B K
    ibot = student["ibot_head"](g.patches.flatten(0, 1).index_select(0, batch["masked"]))        # M K
    cls = g.cls.unflatten(0, (2, B))                                                             # G B D
    dino_global, dino_local = dino_losses(logits, targets["dino"], 2, c.student_temp,
                                          (weights["dino_global"], weights["dino_local"]))
    terms = dict(
        dino_global=dino_global,
        ibot=ibot_loss(ibot, targets["ibot"], batch["weights"], 2 * B, c.student_temp, weights["ibot"]),
        koleo=sum(koleo_loss(crop, group, c.koleo_group) for crop in cls),
    )
    if c.n_local:
        terms["dino_local"] = dino_local
    return terms, g


def term_weights(c):
    """Of the sum over terms and parts. The DINO terms share 1 by their number of pairs: 2 global, 2 L local ones."""
    pairs = 2 + 2 * c.n_local
    weights = dict(dino_global=2 / pairs, dino_local=2 * c.n_local / pairs * c.local_weight, ibot=c.ibot_weight,
                   koleo=c.koleo_weight)
    return {name: weight / c.accumulate for name, weight in weights.items()}

# --------------------------------------------------------------------------------
# Reports


def print_plan(c, ranks, source, student):
    n = {name: sum(p.numel() for p in part.parameters()) for name, part in student.items()}
    where = f"{ranks}, {ops.describe(ranks.device)}"
    side = c.global_size // c.patch_size
    name = f"{c.size} {c.recipe}".strip()
    print(f"{name}, {c.stage}: backbone {n['backbone']:,} parameters, heads {n['dino_head'] + n['ibot_head']:,}; "
          f"{len(source):,} images of {c.data}; {where}, {c.precision}")
    print(f"{c.steps:,} steps of {c.batch} images: 2 crops of {c.global_size} px ({side}x{side} patches), "
          f"{c.n_local} of {c.local_size} px")
    print(f"lr {c.lr:g} x 4 sqrt({c.batch}/1024) = {c.lr * c.lr_factor:.3g} after {c.lr_warmup} steps, to "
          f"{c.lr_end * c.lr_factor:.3g}; last layer fixed for {c.freeze_last_layer}; teacher temperature "
          f"{c.teacher_temp_start} to {c.teacher_temp} over {c.teacher_temp_warmup}")
    print(f"uniform predictions would be at dino ln K = {math.log(c.dino_prototypes):.3f}, "
          f"ibot x {c.mask_share:g} = {c.mask_share * math.log(c.ibot_prototypes):.3f}; writing to {c.out}", flush=True)

# --------------------------------------------------------------------------------
# The loop


def train(c, ranks, interrupt):
    """Trains; returns whether all steps are done, False after an interrupt.    paper: §3.2"""
    if c.batch % ranks.count:
        near = max(c.batch // ranks.count, 1) * ranks.count
        raise ValueError(f"--batch {c.batch} is not divisible by {ranks.count} ranks; try {near}")
    if ranks.count % c.replicas:
        raise ValueError(f"--replicas {c.replicas} does not divide {ranks.count} ranks; each must have as many")
    plan.announce(c, ranks, make_networks)
    source = open_source(c.data, c.n_shapes, c.seed)
    student, teacher = build_networks(c, ranks), build_networks(c, ranks)
    if c.init and not c.resume:
        start_from(c.init, ranks, student, teacher)
    teacher.requires_grad_(False).eval()
    optimizer = make_optimizer(c, student)
    begin_state(optimizer)
    start = load_checkpoint(c, ranks, student, teacher, optimizer) if c.resume else 0
    ranks.together(lambda: ranks.main and begin(c, ranks, start, source, student, teacher, optimizer))

    lr = schedule(0, c.lr, c.lr_end, c.lr_warmup, c.steps) * c.lr_factor
    weight_decay = schedule(0, c.weight_decay, c.weight_decay_end, 0, c.steps)
    momentum = schedule(0, c.momentum, c.momentum_end, 0, c.steps)
    teacher_temp = schedule(c.teacher_temp_start, c.teacher_temp, c.teacher_temp, c.teacher_temp_warmup, c.steps)
    weights, K, samples = term_weights(c), c.accumulate, samples_of_a_part(c, ranks)
    batches = Batches(c, source, ranks.rank * K * samples, samples, ranks.device.type == "cpu",
                      partial(draw_noise, c, samples), K)
    batches.read(start * c.batch, [])  # if nothing can be read, say so here and not from a worker
    stream = loader(batches, range(start * K, c.steps * K), count_workers(c.workers),
                    pin_memory=ranks.device.type == "cuda")
    verdicts, unreadable = Verdicts(ranks, interrupt, source.name), {}
    progress, trace = Progress(c, ranks, start, c.steps), tracer(c, ranks, c.steps - start)
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=c.precision == "bf16")

    for step in range(start, c.steps + 1):
        # save: at the end, once in a while, and before leaving
        leave = step == c.steps or step == start + c.stop_after > start or verdicts.leave
        if step > start and (leave or step % c.save_every == 0):
            verdicts.settle()
            save_checkpoint(c, ranks, step, student, teacher, optimizer)
        trace(leave)
        if leave:
            break

        # a batch, in parts, and this step's numbers
        parts = [on_device(c, ranks, progress.next(stream), unreadable) for _ in range(K)]
        set_schedules(optimizer, lr[step], weight_decay[step], step < c.freeze_last_layer)

        # the teacher sees the global crops whole and leaves no graph
        with autocast, torch.no_grad():
            targets = teacher_targets(teacher, parts, teacher_temp[step], ranks.group, c.sinkhorn_iterations)

        # forward and backward, part by part
        found = []
        for k, batch in enumerate(parts):
            with autocast:
                terms, features = loss_terms(c, student, batch, targets[k], batch["noise"], ranks.group)
            loss = sum(weights[name] * term for name, term in terms.items())
            share_gradients(student, k == K - 1)
            loss.backward()
            found.append(dict(loss=K * loss.detach(), **terms))

        # update, unless a number is not finite; the teacher follows the student's new weights
        norms = clip_gradients(student, c.clip)
        means = verdicts.judge(step, mean_of(found), norms, torch.cat([batch["indices"] for batch in parts]))
        optimizer.found_inf, optimizer.at = verdicts.skip, step
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(teacher, student, momentum[step])
        interrupt.collect(step)

        # log: the only lines that make the host wait for the device
        progress.bar.update()
        if step % c.log_every == 0 or step == c.steps - 1:
            verdicts.settle()
            row = {name: x.item() for name, x in means.items()} | health(c, targets[-1], features, batch["masks"])
            row |= progress.speed(step)
            if ranks.main:
                progress.log(c.out, dict(step=step, **row, lr=lr[step], skipped=verdicts.skipped,
                                         unreadable=len(unreadable)))
            progress.mark(step)

    progress.bar.close()
    report(c, ranks, step, unreadable)
    return step == c.steps


def begin(c, ranks, start, source, student, teacher, optimizer):
    """On main, before the first step: is it the same data, is there room; what will be done; config.json."""
    digest = source.digest()
    if c.resume and saved_text(c.out).get("data_digest", digest) != digest:
        raise ValueError(f"--data {c.data} does not hold the images that {c.out} was begun with; name the same ones, "
                         "or another --out")
    check_space(c, start, student, teacher, optimizer)
    print_plan(c, ranks, source, student)
    open_log(c, start, lr_scaled=c.lr * c.lr_factor, parameters=asdict(c.vit), data_digest=digest)


def samples_of_a_part(c, ranks):
    """B of a part, on a rank. Raises ValueError if it would cut what is drawn or compared at once."""
    samples, rest = divmod(c.batch // ranks.count, c.accumulate)
    if c.accumulate > 1 and (rest or samples % c.group or samples % c.koleo_group):
        raise ValueError(f"--accumulate {c.accumulate}: {c.batch // ranks.count} images of a rank in so many parts; "
                         f"each must hold whole --group {c.group} and --koleo_group {c.koleo_group}")
    return samples


def mean_of(rows):
    """[{name: 0-dim tensor}] -> the mean of each, without a graph"""
    return {name: sum(row[name].detach() for row in rows) / len(rows) for name in rows[0]}


def draw_noise(c, samples, step, first):
    """What is random in the student's forward of a step; no function of the device, so it is drawn with the batch."""
    grids = [(side // c.patch_size) ** 2 for side in (c.global_size, c.local_size)][: 1 + bool(c.n_local)]
    noise = Noise(c.seed, step, first, samples, c.group, c.drop_path, c.rope_rescale)
    n_images = [2 * samples, c.n_local * samples][: len(grids)]
    return noise.draw(c.vit.depth, n_images, [1 + c.vit.n_registers + P for P in grids])


def on_device(c, ranks, batch, unreadable):
    """The batch on this rank's device, coloured; adds the images that could not be read. Indices stay on the host."""
    unreadable |= dict(batch.pop("broken"))
    batch = to_device({k: v for k, v in batch.items() if k != "indices"}, ranks.device) | dict(indices=batch["indices"])
    return batch if ranks.device.type == "cpu" else colour_batch(batch, c)


def report(c, ranks, step, unreadable):
    for name, reason in unreadable.items():
        print(f"rank {ranks.rank}: skipped unreadable {name}: {reason}")
    if ranks.main:
        print(f"{'finished' if step == c.steps else f'stopped at step {step} of {c.steps}, --resume goes on'}: "
              f"{c.out}/teacher.safetensors")


def main(argv):
    if "--help" in argv or "-h" in argv:
        size, name = (argv[argv.index(option) + 1] if option in argv[:-1] else default
                      for option, default in (("--size", ""), ("--recipe", "")))
        print(__doc__.strip(), command_line.describe(find_recipe(size or size_for(name), name)),
              "  --plan               print what a step needs and costs, and start nothing\n"
              + command_line.describe(plan.Plan()), sep="\n\n")
        return
    if "--plan" in argv:
        return plan.main(argv, partial(configure, starts=False), make_networks)
    c = configure(argv)
    with Interrupt() as interrupt, Peers(start_ranks(c.device)) as ranks:
        return train(settle(c, ranks), ranks, interrupt)


if __name__ == "__main__":
    command_line.run(main)
