"""
Words for a frozen backbone: train dino.txt's towers on images with captions.

    python text.py --weights runs/demo --out runs/words                               on the generated `shapes`
    python text.py --weights runs/s --data CAPTIONS --out runs/words                  see sets/captions.py
    torchrun --nproc-per-node 8 text.py --recipe full --weights dinov3_vitl16.pth --data CAPTIONS --out runs/words
    python text.py --weights dinov3_vitl16.pth --data CAPTIONS --accumulate 64 ...    the loss of 8,192, 128 at a time
    python text.py --recipe full --weights dinov3_vitl16.pth --plan                   what a step needs; starts nothing
    python evaluate.py --task zeroshot --weights runs/words                           then captions, openvocab

    TextConfig, RECIPES   every number                                                DINOv3 §5.3
    contrastive_loss      each image finds its text among all, each text its image    CLIP; dino.txt
    learn                 its gradient, of a batch in parts, exactly
    train                 the loop

OUT/text.safetensors has the towers, OUT/teacher.safetensors the backbone as it was. The networks: see dinotxt.py.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import Batches, CropConfig, cut, draw_crops, loader
from dinotxt import (  # noqa: F401  load_dinotxt is what others look for here
    FILE,
    TowerConfig,
    Towers,
    image_vector,
    load_dinotxt,
    new_towers,
    save_towers,
)
from engine import budget
from engine import config as command_line
from engine.bpe import CLIP_MERGES, Tokenizer, learn_merges
from engine.checkpoint import begin_state, check_space, load_checkpoint, newest, saved
from engine.features import describe, load
from engine.interrupt import Interrupt, Peers, Verdicts
from engine.keys import weights_of
from engine.layouts import size_of
from engine.loggers import check_loggers
from engine.profile import tracer
from engine.progress import Progress, open_log
from engine.ranks import add_up, count_workers, start_ranks
from engine.saver import Saver
from engine.tokens import keep, split
from engine.views import middle
from losses import GatherRows
from model import Noise, ViT, ViTConfig, to_device
from recipes import go_on, resumes, saved_config, saved_text
from sets.captions import open_captions
from train import clip_gradients, schedule, set_schedules, settle

LARGEST = math.log(100)        # of the cosines' scale
NETWORKS_SEE = {"tokens", "images", "ids", "noise"}  # of a batch; the rest is for the host
READ_FOR_MERGES = 100_000      # captions that an own tokenizer is learned from, at most

# --------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class TextConfig:
    weights: str = ""              # the frozen backbone, a ViT: a run's folder, a weights file, or untrained:SIZE
    size: str = ""                 # s, b, ...: stop if the weights are of another
    data: str = "shapes"           # images with captions, see sets/captions.py; or shapes: the generated set
    n_shapes: int = 2000           # [2, 100000]: images of the generated set
    recipe: str = "laptop"         # laptop, or full: the numbers of the paper
    out: str = "runs/text"         # folder of the run
    resume: bool = False           # go on from OUT's newest checkpoint, with its config; auto = or begin
    seed: int = 0                  # [0, 4294967295]: of weights, crops, captions, stochastic depth
    device: str = "auto"           # auto, cpu, cuda, mps
    precision: str = "auto"        # bf16 (autocast), fp32, or auto
    workers: int = -1              # [-1, 256]: processes that prepare batches, of each rank; -1 = as the machine allows
    save_every: int = 1000         # [1, inf): steps between checkpoints
    keep: int = 2                  # [1, inf): checkpoints, the newest ones
    keep_every: int = 0            # [0, inf): steps between checkpoints that are kept besides; 0 = none
    log_every: int = 10            # [1, inf): steps between lines of metrics.jsonl
    log: str = ""                  # tensorboard, wandb, or tensorboard,wandb: rows of metrics.jsonl go there as well
    profile: tuple = (0, 0)        # [0, 1e7] rising: steps of this run, from, up to, traced in OUT; equal = off
    stop_after: int = 0            # [0, inf): save and leave after this many steps of this run; 0 = at the end
    steps: int = 50_000            # [1, 1e7]: optimizer steps; the warm-up of the recipe shrinks and grows with it
    batch: int = 8192              # [2, 1e6]: pairs of a step, over all ranks: each is told from all others
    accumulate: int = 1            # [1, 1e6]: parts of it, one after the other: less memory, the loss of the whole
    resolution: int = 224          # [1, 4096]: pixels
    augment: bool = True           # random crops and flips; false: the middle of each image, its tokens kept in OUT
    crop_scale: tuple = (0.08, 1.0)  # (0, 1] rising: share of the image's area
    flip: float = 0.5              # [0, 1]: probability
    control: bool = False          # captions of other images: all that is learned must be at chance
    head_blocks: int = 2           # [0, 64]: on the backbone; 0 = a norm alone
    depth: int = 24                # [1, 1000]: blocks of the text tower
    width: int = 1280              # [64, 65536]: t, in whole heads of 64
    context: int = 77              # [3, 4096]: tokens of a caption, start and end among them; longer ones are cut
    merges: int = 0                # [0, 1e6]: of an own tokenizer, learned from the captions; 0 = CLIP's 48,894
    drop_path: float = 0.3         # [0, 1): share of samples that skip a branch of the head's blocks
    group: int = 16                # [1, 1e6]: consecutive samples that this is drawn for at once
    lr: float = 7e-4               # [0, 10]: peak; a cosine to 0 after the warm-up
    lr_warmup: int = 2000          # [0, 1e7]: steps, linear from 0
    weight_decay: float = 1e-4     # [0, 10]: none for biases, norms, LayerScale and the scale
    beta1: float = 0.9             # [0, 1): AdamW
    beta2: float = 0.99            # [0, 1): the same
    ranks: int = 1                 # [1, 1e6]: with --plan: devices, as torchrun would start them

    order = "random"  # no option: what is asked of every trainer's config, as its end is

    @property
    def end(self):
        return self.steps

    @property
    def head_noise(self):
        return self.drop_path if self.head_blocks else 0.0


RECIPES = {
    # paper: §5.3 refers to dino.txt, whose batch was 65,536; these are the released numbers. 538,131,200 parameters in
    #   the text tower, 25,326,336 in the head of ViT-L. Not run
    # differs: drop path is drawn for groups of samples, whatever the ranks; there for each rank's batch
    "full": TextConfig(recipe="full"),
    # 2 CPU cores; measured in LOG.md
    "laptop": TextConfig(
        n_shapes=4000, steps=300, batch=128, resolution=80, augment=False, depth=3, width=128, merges=1000,
        drop_path=0.0, lr=2e-3, lr_warmup=30, save_every=100, log_every=20,
    ),
}


def configure(argv):
    """The command line -> TextConfig; every mistake that can be found without reading captions ends here."""
    values, words = command_line.read_words(argv, command_line.types(TextConfig()))
    if words:
        raise ValueError(f"{words[0]!r} is not an option; write --field value")
    out, name = values.get("out", TextConfig.out), values.get("recipe", "laptop")
    if resumes(values, out):
        c, done = go_on(saved_config(out, TextConfig), values, out, derive=lambda c: c), newest(out)[0]
        if c.steps < done:
            raise ValueError(f"--steps {c.steps}: {out} has {done} steps already; ask for as many, or for more")
        return check(c)
    if name not in RECIPES:
        raise ValueError(f"--recipe {name} is not known; choose one of {', '.join(RECIPES)}")
    c = command_line.apply(RECIPES[name], values)
    if "lr_warmup" not in values:
        c = replace(c, lr_warmup=round(c.lr_warmup * c.steps / RECIPES[name].steps))
    vit = describe(c.weights)
    if not isinstance(vit, ViTConfig) or vit.in_chans != 3:
        raise ValueError(f"--weights {c.weights}: words want a ViT for RGB; name the folder of a run, or a file of one")
    if c.size and c.size != size_of(vit):
        raise ValueError(f"--size {c.size}: {c.weights} is {size_of(vit)}; leave it out, or name another file")
    if c.resolution % vit.patch_size:
        raise ValueError(f"--resolution {c.resolution} is not a multiple of the patch, {vit.patch_size}; try "
                         f"{max(c.resolution // vit.patch_size, 1) * vit.patch_size}")
    if saved(c.out):
        raise ValueError(f"--out {c.out} holds a run already; add --resume to go on, or name another folder")
    return check(replace(c, size=size_of(vit), group=min(c.group, c.batch)))


def check(c):
    """c; raises ValueError for values that cannot be trained with."""
    command_line.writable(c.out)
    check_loggers(c.log)
    if c.precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"--precision {c.precision} is not known; choose auto, bf16 or fp32")
    if c.width % 64:
        raise ValueError(f"--width {c.width}: the text tower has heads of 64; try {max(c.width // 64, 1) * 64}")
    if c.batch % c.accumulate:
        raise ValueError(f"--batch {c.batch} is not divisible by --accumulate {c.accumulate}")
    return c

# --------------------------------------------------------------------------------
# Batches


def make_tokenizer(c, source):
    """CLIP's, or one of the captions' own words: the same again of the same captions"""
    if not c.merges:
        return Tokenizer()
    step = -(-len(source) // READ_FOR_MERGES)
    return Tokenizer(learn_merges([text for i in range(0, len(source), step) for text in source.captions(i)], c.merges))


class Pairs(Batches):
    """
    batches[step K + part] -> this rank's part of a step, a dict of

        images   B C H W uint8; or tokens  B N D, of a source that keeps them
        ids      B N' int64    cut  how many captions were too long    noise  what is random in the vision head
        indices  B, in the source    broken  [(name, reason)] of unreadable images that others stand in for

    One of an image's captions is drawn each time that it is seen.
    """
    def __init__(self, c, source, tokenizer, vit, first, samples):
        super().__init__(c, source, first, samples, parts=c.accumulate)
        self.tokenizer, self.vit, self.kept = tokenizer, vit, not c.augment
        self.crops = CropConfig(n_local=0, global_scale=c.crop_scale, flip=c.flip)
        self.said = np.random.default_rng([c.seed, 7]).permutation(len(source)) if c.control else range(len(source))

    def __getitem__(self, place):
        c, seen, texts, indices, broken = self.config, [], [], [], []
        step, part = divmod(place, self.parts)
        first = self.first + part * self.samples
        for i in range(first, first + self.samples):
            rng = np.random.default_rng([c.seed, 6, step * c.batch + i])
            index, x = self.read(step, i, broken)
            captions = self.source.captions(self.said[index])
            texts.append(captions[rng.integers(len(captions))])
            if not self.kept:
                boxes, flips, _ = draw_crops(rng, self.crops, *x.shape[1:])
                x = cut(x, boxes[0].tolist(), flips[0], c.resolution)
            seen.append(x)
            indices.append(index)
        ids, n_cut = self.tokenizer(texts, c.context)
        noise = Noise(c.seed, step, first, self.samples, c.group, c.head_noise)
        n_tokens = 1 + self.vit.n_registers + (c.resolution // self.vit.patch_size) ** 2
        return {"tokens" if self.kept else "images": torch.stack(seen), "ids": ids, "cut": n_cut, "broken": broken,
                "noise": noise.draw(c.head_blocks, [self.samples], [n_tokens]), "indices": torch.tensor(indices)}


def square(i, source, side, patch):
    """The middle of an image, whose tokens are kept"""
    image, = middle(source.load(i), side, patch)
    return image

# --------------------------------------------------------------------------------
# Objective


def contrastive_loss(images, texts, logit_scale, group=None):
    """
    Each image finds its text among all of the batch, and each text its image.

        l_ij = exp(logit_scale) cos(image_i, text_j)
        loss = -1/2B sum_i log softmax(l_i.)_i + log softmax(l_.i)_i

    images, texts  B 2D of this rank, B alike on all    group  of the ranks, whose batch is one
    returns        this rank's share of the sum, 0-dim float32: all ranks' add up to the loss;  images that found theirs

    paper: dino.txt (Jose et al. 2024); CLIP (Radford et al. 2021)
    """
    both = torch.cat([F.normalize(x.float(), dim=1) for x in (images, texts)], 1)                  # B 4D
    everyone = both if group is None else GatherRows.apply(both, group)                            # (S B) 4D
    own, every = both.chunk(2, 1), everyone.chunk(2, 1)
    truth = torch.arange(len(both), device=both.device)
    truth = truth + (0 if group is None else dist.get_rank(group) * len(both))
    by_image, by_text = (logit_scale.float().exp() * own[k] @ every[1 - k].T for k in (0, 1))      # B (S B)
    total = sum(F.cross_entropy(logits, truth, reduction="sum") for logits in (by_image, by_text))
    return total / (2 * len(everyone)), (by_image.argmax(1) == truth).sum()


def learn(c, ranks, backbone, towers, parts):
    """
    Adds the gradient of contrastive_loss, of all parts on all ranks, to the towers'. Of several parts each goes through
    the towers twice: without a graph for its vectors, and again, with what was random the same, for their gradient.
    Beside the graph of one part there are the tokens of all.

    returns  loss, share of images that found their text: 0-dim, of the whole batch once ranks' are averaged
    """
    cast = partial(torch.autocast, ranks.device.type, torch.bfloat16, enabled=c.precision == "bf16")
    with torch.no_grad(), cast():
        seen = [see(c, backbone, part) for part in parts]

    def vectors(k):
        with cast():
            return image_vector(towers.see(seen[k], parts[k]["noise"])), towers.read(parts[k]["ids"])
    with torch.set_grad_enabled(len(parts) == 1):
        found = [vectors(k) for k in range(len(parts))]
    images, texts = (torch.cat(each).detach().requires_grad_() for each in zip(*found, strict=True))
    loss, right = contrastive_loss(images, texts, towers.logit_scale, ranks.group)
    loss.backward()
    size = len(images) // len(parts)
    for k, gradients in enumerate(zip(images.grad.split(size), texts.grad.split(size), strict=True)):
        torch.autograd.backward(found[k] if len(parts) == 1 else vectors(k), gradients)
    add_up([p.grad for p in towers.parameters()], ranks)
    return ranks.count * loss.detach(), right / len(images)


def see(c, backbone, part):
    """Features of a part: from its images, or from the tokens that were kept of them"""
    grid = (c.resolution // backbone.config.patch_size,) * 2
    if "tokens" in part:
        return split(part["tokens"], backbone.config.n_registers, grid)
    return backbone(normalised(part["images"], backbone.config))


def normalised(images, config):
    """B C H W uint8 -> float32"""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (config.mean, config.std))
    return (images.float() / 255 - mean) / std

# --------------------------------------------------------------------------------
# The loop


def make_networks(c, ranks, n_ids):
    """The towers, and the frozen backbone as what a checkpoint calls its teacher; a resumed run has it there."""
    backbone = load(c.out if c.resume else c.weights).to(ranks.device).requires_grad_(False)
    config = TowerConfig(c.depth, c.width, c.context, n_ids, c.head_blocks)
    return new_towers(backbone.config, config, ranks.device, c.seed), nn.ModuleDict(dict(backbone=backbone))


def make_optimizer(c, towers):
    """No decay of what is not a matrix: biases, norms, LayerScale, the scale."""
    groups = [dict(params=[p for p in towers.parameters() if (p.ndim > 1) == decays], decays=decays, lr_factor=1.0,
                   still=0) for decays in (True, False)]
    return torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), fused=True)


def tokens_of(c, ranks, backbone, source):
    """The source, with the tokens of its images' middles in their place"""
    vit = backbone.config
    P = (c.resolution // vit.patch_size) ** 2

    @torch.no_grad()
    def tokens(images):
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=c.precision == "bf16"):
            f = backbone(normalised(images.to(ranks.device), vit))
        return torch.cat([f.cls[:, None], f.registers, f.patches], 1)
    view = partial(square, source=source, side=c.resolution, patch=vit.patch_size)
    dtype = torch.bfloat16 if c.precision == "bf16" else torch.float32
    return keep(c, ranks, source, view, tokens, (1 + vit.n_registers + P, vit.width), dtype,
                (weights_of(backbone), c.resolution))


def open_same(c):
    """The captions, and what tells them from others; raises ValueError if a resumed run was begun with others."""
    source = open_captions(c.data, n_shapes=c.n_shapes, seed=c.seed)
    digest = source.digest()
    if c.resume and saved_text(c.out).get("data_digest") != digest:
        raise ValueError(f"--data {c.data} does not hold the captions that {c.out} was begun with; name the same ones, "
                         "or another --out")
    return source, digest


def begin(c, ranks, start, source, digest, tokenizer, towers, frozen, optimizer):
    """On main, before the first step: is there room; what will be done; config.json."""
    n = {name: sum(p.numel() for p in part.parameters())
         for name, part in (("text", towers.text_model), ("head", towers.visual_model))}
    check_space(c, start, towers, frozen, optimizer)
    print(f"{c.weights}, {c.size}, frozen; text tower {n['text']:,} parameters, vision head {n['head']:,}, vocabulary "
          f"{tokenizer.size:,}; {len(source):,} images of {c.data}; {ranks}, {c.precision}")
    print(f"{c.steps:,} steps of {c.batch} pairs in {c.accumulate} parts, {c.resolution} px; lr {c.lr:g} after "
          f"{c.lr_warmup} steps; chance is at ln B = {math.log(c.batch):.3f}; writing to {c.out}", flush=True)
    open_log(c, start, parameters=asdict(towers.config), data_digest=digest)


def publish(c, ranks, step, towers, tokenizer):
    if ranks.main:
        save_towers(Path(c.out, FILE), towers, tokenizer.merges if c.merges else None, step=step)


def train(c, ranks, interrupt):
    """Trains; returns whether all steps are done, False after an interrupt.    paper: §5.3"""
    if c.batch % (ranks.count * c.accumulate):
        raise ValueError(f"--batch {c.batch} is not divisible by {ranks.count} ranks x --accumulate {c.accumulate}")
    source, digest = open_same(c)
    tokenizer = make_tokenizer(c, source)
    towers, frozen = make_networks(c, ranks, tokenizer.size)
    backbone, optimizer = frozen["backbone"], make_optimizer(c, towers)
    begin_state(optimizer)
    start = load_checkpoint(c, ranks, towers, frozen, optimizer) if c.resume else 0
    ranks.together(lambda: ranks.main and begin(c, ranks, start, source, digest, tokenizer, towers,
                                                 frozen, optimizer))
    c = replace(c, workers=count_workers(c.workers))
    kept = source if c.augment else tokens_of(c, ranks, backbone, source)

    lr, samples = schedule(0, c.lr, 0, c.lr_warmup, c.steps), c.batch // ranks.count // c.accumulate
    batches = Pairs(c, kept, tokenizer, backbone.config, ranks.rank * samples * c.accumulate, samples)
    batches.read(start, 0, [])  # if nothing can be read, say so here and not from a worker
    stream = loader(batches, range(start * c.accumulate, c.steps * c.accumulate), c.workers,
                    pin_memory=ranks.device.type == "cuda")
    saver = Saver(c, ranks, towers, frozen, optimizer, failed=interrupt.leave)
    verdicts, n_cut = Verdicts(ranks, interrupt, source.name), 0
    progress, trace = Progress(c, ranks, start, c.steps), tracer(c, ranks, c.steps - start)

    for step in range(start, c.steps + 1):
        # save: at the end, once in a while, and before leaving
        leave = step == c.steps or step == start + c.stop_after > start or verdicts.leave
        if step > start and (leave or step % c.save_every == 0):
            verdicts.settle()
            saver(step, wait=leave)
            ranks.together(partial(publish, c, ranks, step, towers, tokenizer))
        trace(leave)
        if leave:
            break

        # a batch, in parts
        parts = [progress.next(stream) for _ in range(c.accumulate)]
        n_cut += sum(part["cut"] for part in parts)
        set_schedules(optimizer, lr[step], c.weight_decay, step)

        # every image against every text; update, unless a number is not finite
        loss, top1 = learn(c, ranks, backbone, towers, [
            {name: to_device(part[name], ranks.device) for name in part.keys() & NETWORKS_SEE} for part in parts])
        norms = clip_gradients(dict(towers=towers), math.inf)
        means = verdicts.judge(step, dict(loss=loss, top1=top1), norms,
                               torch.cat([part["indices"] for part in parts]))
        optimizer.found_inf = verdicts.skip
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            towers.logit_scale.clamp_(0, LARGEST)
        interrupt.collect(step)

        # log: the only lines that make the host wait for the device
        progress.bar.update()
        if step % c.log_every == 0 or step == c.steps - 1:
            verdicts.settle()
            row = {name: x.item() for name, x in means.items()} | progress.speed(step)
            if ranks.main:
                progress.log(c.out, dict(step=step, **row, lr=lr[step], scale=towers.logit_scale.exp().item(),
                                         skipped=verdicts.skipped, cut=n_cut, unreadable=len(progress.unreadable)))
            progress.mark(step)

    progress.bar.close()
    report(c, ranks, step, progress.unreadable, n_cut)
    return step == c.steps


def report(c, ranks, step, unreadable, n_cut):
    for name, reason in unreadable.items():
        print(f"rank {ranks.rank}: skipped unreadable {name}: {reason}")
    if n_cut:
        print(f"rank {ranks.rank}: {n_cut} captions were longer than --context {c.context}, and cut")
    if not ranks.main:
        return
    done = step == c.steps
    for path in Path(c.out).glob("tokens-*") if done else ():
        path.unlink()
    print(f"{'finished' if done else f'stopped at step {step} of {c.steps}, --resume goes on'}: {c.out}/{FILE}")


def plan(c):
    """Prints what a step needs; nothing is loaded."""
    vit, vocabulary = describe(c.weights), 514 + (c.merges or CLIP_MERGES)
    with torch.device("meta"):
        budget.report(c, Towers(vit, TowerConfig(c.depth, c.width, c.context, vocabulary, c.head_blocks)), ViT(vit))


def main(argv):
    if "--help" in argv or "-h" in argv:
        name = argv[argv.index("--recipe") + 1] if "--recipe" in argv[:-1] else "laptop"
        print(__doc__.strip(), command_line.describe(RECIPES.get(name, RECIPES["laptop"]))
              + "\n  --plan               print what a step needs, and start nothing", sep="\n\n")
        return
    if "--plan" in argv:
        return plan(configure([word for word in argv if word != "--plan"]))
    c = configure(argv)
    with Interrupt() as interrupt, Peers(start_ranks(c.device)) as ranks:
        return train(settle(c, ranks), ranks, interrupt)


if __name__ == "__main__":
    command_line.run(main)
