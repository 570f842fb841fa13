"""
Classify videos by the frozen patch features of their frames, and a small attentive probe.

    python evaluate.py --task video --weights runs/tiny          videos of the generated `shapes`
    python evaluate.py --task k400 --weights runs/s --data K400  {train,val}/CLASS/*.mp4, or {train,val}.csv: path label

    Probe          attention among all patches of all frames, then one query of them     DINOv3 §6.1.6, App. D.6
    Kept, Live     features of clips: of `shapes` from disk; else from the network, of new views in each epoch
    run            top-1 of one view of each clip, and of six averaged                   DINOv3 Tab. 6

b views of T frames, N = T h w tokens, W wide; else see model.py.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

from data import loader
from engine.chunks import Computed
from engine.pictures import SHOWN, save_pictures
from engine.ranks import Ranks, add_up, linked
from engine.task import Option, Paper, Task
from ops import rotate
from sets.clips import Samples, open_clips, sampled, squares, uniform, whole

HEAD = 64            # E
PART = 8             # views that go through a probe at once; of 64 x 4096 tokens it would keep some 50 GB (reckoned)
TIME = 0.5, 50.0     # seconds: the shortest and the longest wave that tells positions; chosen by eye, as is
SPACE = 0.125, 12.5  # the same, in sides of the square


@dataclass(frozen=True)
class ProbeConfig:
    width: int = 1024    # W
    depth: int = 4       # self-attention blocks
    std: float = 0.02    # of the linears' start values
    n_frames: int = 16   # T
    batch: int = 64      # clips
    epochs: int = 20
    rates: tuple = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
    decays: tuple = (1e-3, 1e-2, 1e-1)


SHAPES = ProbeConfig(width=128, depth=2, std=0.07, n_frames=8, batch=16, epochs=10, rates=(1e-3, 2e-3), decays=(1e-2,))

# --------------------------------------------------------------------------------
# The probe


def waves(n):
    """3 n: radians for each second, and for each side of the square down and across; geometric in wavelength"""
    return 2 * math.pi / torch.tensor(np.stack([np.geomspace(*ends, n) for ends in (TIME, SPACE, SPACE)])).float()


def embedding(positions, width):
    """b N 3 -> b N W: sines and cosines of time, of y, of x, W/6 of each; the few dimensions left are 0"""
    angles = positions[..., None] * waves(width // 6).to(positions)                            # b N 3 W/6
    return F.pad(torch.stack([angles.sin(), angles.cos()], -2).flatten(2), (0, width % 6))


def directions(heads):
    """
    Factorised RoPE: the angles of a head are b N 3 positions times A 3 E/2. A third of its pairs turn with time, the
    others with two perpendicular directions of the square, drawn for each head (RoPE-Mixed; fixed here, not learned).
    """
    turn, basis = 2 * math.pi * torch.rand(heads), torch.zeros(heads, 3, 3)
    basis[:, 0, 0] = 1
    basis[:, 1:, 1:] = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(heads, 2, 2)
    return F.pad((basis[..., None] * waves(HEAD // 6)).flatten(2), (0, HEAD // 2 % 3))


class Block(nn.Module):
    """Pre-LN attention of x, b N W, or of a query, b 1 W, to x; then an MLP."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.proj = (nn.Linear(width, k * width) for k in (1, 2, 1))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, tables=None, query=None):
        y = self.norm1(x)
        q, (k, v) = self.q(y if query is None else query), self.kv(y).chunk(2, dim=-1)
        q, k, v = (z.unflatten(-1, (-1, HEAD)) for z in (q, k, v))                             # b N A E
        if tables:
            q, k = rotate(q, *tables), rotate(k, *tables)
        found = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)))        # b A N E
        x = (x if query is None else query) + self.proj(found.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Probe(nn.Module):
    """maps b T h w D, times b T, seconds -> logits b n_classes, float32"""

    def __init__(self, width_in, n_classes, recipe):
        super().__init__()
        self.enter, self.classes = nn.Linear(width_in, recipe.width), nn.Linear(recipe.width, n_classes)
        self.blocks = nn.ModuleList(Block(recipe.width) for _ in range(recipe.depth + 1))
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, recipe.width), std=recipe.std))
        turns = [directions(recipe.width // HEAD) for _ in range(recipe.depth)]
        self.register_buffer("directions", torch.stack(turns))
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.trunc_normal_(linear.weight, std=recipe.std)
            nn.init.zeros_(linear.bias)
        for k, block in enumerate(self.blocks, 1):
            for linear in block.proj, block.mlp[2]:
                linear.weight.data /= math.sqrt(2 * k)

    def forward(self, maps, times):
        y, x = ((torch.arange(n, device=times.device) + 0.5).to(times) / n for n in maps.shape[2:4])
        positions = torch.stack(torch.broadcast_tensors(times[..., None, None], y[:, None], x), -1).flatten(1, 3)
        with torch.autocast(maps.device.type, torch.bfloat16, enabled=maps.is_cuda):
            x = self.enter(maps.flatten(1, 3).to(self.query.dtype)) + embedding(positions, self.query.shape[2])
            *blocks, last = self.blocks
            for block, turns in zip(blocks, self.directions, strict=True):
                angles = sum(positions[..., i, None, None] * turns[:, i] for i in range(3))    # b N A E/2, not rounded
                x = block(x, (angles.cos(), angles.sin()))                                     # b N W
            x = last(x, query=self.query.expand(len(x), -1, -1))                               # b 1 W
            return self.classes(x[:, 0]).float()


def train_probes(feed, labels, clips, n_classes, recipe, c, ranks):
    """
    Probes side by side on the same batches, of which each rank has a part:  [(probe, rate, weight decay)] for each pair

    feed     Kept or Live    labels  of each clip    clips  numbers of those to train on
    paper:   DINOv3 App. D.6; start values, and a cosine without warm-up, are V-JEPA 2's
    """
    device, rng, probes = feed.device, np.random.default_rng(c.seed), []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for lr in [c.lr] if c.lr else recipe.rates:
            for decay in recipe.decays:
                torch.manual_seed(c.seed)  # the same start for all, and on all ranks
                probe = Probe(feed.width, n_classes, recipe).to(device)
                for p in probe.parameters():
                    p.grad = torch.zeros_like(p)
                probes.append((probe, torch.optim.AdamW(probe.parameters(), lr, weight_decay=decay), lr, decay))
    batches = [[(epoch, k) for k in part.tolist()] for epoch in range(recipe.epochs)
               for part in torch.tensor(rng.permutation(clips)).split(recipe.batch)]
    mine = [places[ranks.rank :: ranks.count] for places in batches]
    bar = tqdm(feed(mine), f"{len(probes)} probes", len(mine), unit="it", leave=False, disable=ranks.rank > 0 or None)
    for step, (maps, times) in enumerate(bar):
        batch = maps, times, labels[[k for _, k in mine[step]]].to(device)
        for probe, optimizer, lr, _ in probes:
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / len(batches))) / 2
            for *part, truth in zip(*(x.split(PART) for x in batch), strict=True) if len(maps) else ():
                (F.cross_entropy(probe(*part), truth, reduction="sum") / len(batches[step])).backward()
            add_up([p.grad for p in probe.parameters()], ranks)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    return [(probe, lr, decay) for probe, _, lr, decay in probes]


@torch.no_grad()
def probabilities(probes, feed, views, ranks):
    """What each probe says of views, by number:  probes n squares n_classes, on the host, the same on every rank"""
    found = torch.zeros(len(probes), len(views), feed.squares, probes[0].classes.out_features)
    parts = torch.arange(len(views)).split(PART)[ranks.rank :: ranks.count]
    for rows, seen in zip(parts, feed([[(0, k) for k in views[rows].tolist()] for rows in parts]), strict=True):
        for k, probe in enumerate(probes):
            found[k, rows] = probe(*seen).softmax(1).cpu().unflatten(0, (-1, feed.squares))
    found = found.to(feed.device)
    add_up([found], ranks)
    return found.cpu()

# --------------------------------------------------------------------------------
# What it is fed


class Kept:
    """What a probe is fed, from disk: each epoch the same views, of `shapes`; elsewhere they would fill terabytes."""

    def __init__(self, frozen, name, views, at, side):
        self.source, self.squares, self.device = Samples(views), len(at), frozen.device
        self.found = frozen.maps(name, self.source, partial(squares, side=side, at=at))
        self.width = self.found[0][0].shape[2]

    def __call__(self, batches):
        """[[(epoch, number of a view)]] -> of each batch maps (b squares) T h w D float16, times (b squares) T"""
        for views in ([k for _, k in places] for places in batches):
            maps, times = torch.from_numpy(np.array([self.found[k] for k in views])), self.source.times[views]
            maps = maps.unflatten(1, (self.squares, -1)).flatten(0, 1)
            yield maps.to(self.device), times.repeat_interleave(self.squares, 0).to(self.device)


class Live:
    """The same, from a network that sees a view when it is its turn."""

    def __init__(self, frozen, look, at):
        """look  (epoch, number of a view) -> C H W uint8, squares T of them; their times T"""
        self.frozen, self.look, self.squares, self.device = frozen, look, len(at), frozen.device
        side = frozen.c.resolution
        self.width = frozen.live([torch.zeros(3, side, side, dtype=torch.uint8)]).shape[3]

    def __call__(self, batches):
        stream = loader(Computed(self.look), [place for places in batches for place in places],
                        self.frozen.c.workers)
        for places in batches:
            looked = [readable(next(stream)) for _ in places]
            if not looked:  # of a small batch other ranks have all
                yield torch.empty(0), torch.empty(0)
                continue
            frames = [frame for each, _ in looked for frame in each]
            maps = torch.cat([self.frozen.live(frames[i : i + self.frozen.c.batch]).half()
                              for i in range(0, len(frames), self.frozen.c.batch)])
            times = torch.from_numpy(np.stack([times for _, times in looked])).float().to(self.device)
            yield maps.unflatten(0, (-1, times.shape[1])), times.repeat_interleave(self.squares, 0)


def readable(looked):
    if isinstance(looked, Exception):
        raise ValueError(f"video: {looked}; it was readable before")
    return looked

# --------------------------------------------------------------------------------
# The task

MIDDLE, ALL = [0.5], [0, 0.5, 1]


def config_of(c):
    return SHAPES if c.data == "shapes" else ProbeConfig()


def open_data(c):
    """Twice as many frames of each clip of shapes as one view has: two views interleave."""
    return open_clips(c, 2 * config_of(c).n_frames)


def run(data, frozen, c):
    """
    Percent, of the probe that a tenth of train picks (DINOv3 Tab. 6):  top1  of the middle square and T frames of each
    val clip,  top1_tta  of the mean of six probabilities: three squares by two times T frames that interleave

    differs: on shapes each epoch has the same views, uniform ones; their features are computed once
    """
    (train, val, classes), T = data, config_of(c).n_frames
    one = {name: [uniform(clip, T) for clip in clips] for name, clips in (("train", train), ("val", val))}
    two = [uniform(clip, T, k, 2) for clip in val for k in range(2)]
    if c.data == "shapes":
        kept = partial(Kept, frozen, side=c.resolution)
        first = kept("train", one["train"], MIDDLE)
        feeds = first, first, kept("val", one["val"], MIDDLE), kept("averaged", two, ALL)
        metrics, found = score(feeds, data, c, Ranks())
    else:
        looks = [partial(sampled, clips=train, T=T, side=c.resolution, seed=c.seed)]
        looks += [partial(whole, views=views, side=c.resolution, at=at)
                  for views, at in ((one["train"], MIDDLE), (one["val"], MIDDLE), (two, ALL))]
        metrics, found = frozen.together(partial(live, looks=looks, data=data))
    if c.out:
        save_pictures(c, [shown(clip, classes, k) for clip, k in zip(val[:SHOWN], found[:SHOWN], strict=True)])
    return metrics


def live(frozen, looks, data):
    feeds = [Live(frozen, look, at) for look, at in zip(looks, (MIDDLE, MIDDLE, MIDDLE, ALL), strict=True)]
    return score(feeds, data, frozen.c, linked(frozen.ranks))


def score(feeds, data, c, ranks):
    """feeds  to train on, to pick a probe by, of val, of val averaged -> metrics, the class found in each val clip"""
    (train, val, classes), recipe, rng = data, config_of(c), np.random.default_rng(c.seed)
    labels, truth = (torch.tensor([clip.label for clip in clips]) for clips in (train, val))
    if c.control:
        labels, truth = (x[torch.from_numpy(rng.permutation(len(x)))] for x in (labels, truth))
    held, clips = torch.tensor(rng.permutation(len(train))).tensor_split([max(len(train) // 10, 1)])
    probes = train_probes(feeds[0], labels, clips, len(classes), recipe, c, ranks)
    found = probabilities([probe for probe, *_ in probes], feeds[1], held, ranks)[:, :, 0].argmax(2)
    held_out = (100 * (found == labels[held]).double().mean(1)).tolist()
    probe, lr, decay = probes[int(np.argmax(held_out))]
    one = probabilities([probe], feeds[2], torch.arange(len(val)), ranks)[0, :, 0]
    six = probabilities([probe], feeds[3], torch.arange(2 * len(val)), ranks)[0].unflatten(0, (-1, 2)).mean((1, 2))
    top1, top1_tta = (100 * (each.argmax(1) == truth).double().mean().item() for each in (one, six))
    return dict(top1=top1, top1_tta=top1_tta, chance=100 / len(classes), top1_held_out=max(held_out), best_lr=lr,
                best_weight_decay=decay, n_train=len(train), n_val=len(val)), one.argmax(1).tolist()


def shown(clip, classes, found):
    """Four frames, and words beside them: the clip's class, and the one found"""
    frames = clip.frames(uniform(clip, 4)[1])
    tile = Image.new("RGB", frames[0].shape[:0:-1], "white")
    ImageDraw.Draw(tile).text((4, 4), f"truth:\n{classes[clip.label]}\n\nfound:\n{classes[found]}", "black")
    return [*frames, torch.from_numpy(np.array(tile)).permute(2, 0, 1)]


def task(name, **paper):
    rows = tuple(Paper(metric, {"7b": value}, 256, {}) for metric, value in paper.items())  # Tab. 6
    return Task(name, "{train,val}/CLASS/*.mp4 or folders of frames; {train,val}.csv: path label", open_data, run,
                wants="maps", metric="top1", sides=(256, 80), options=(Option("lr", 0.0, "peak; 0 = a grid"),),
                pictures="frames, truth, prediction", paper=rows)


TASKS = task("video"), task("ucf101", top1=93.5, top1_tta=93.5), task("ssv2", top1=70.1, top1_tta=70.8), \
    task("k400", top1=87.8, top1_tta=88.2)
