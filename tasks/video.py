"""
Classify videos by the frozen patch features of their frames, and a small attentive probe.

    python evaluate.py --task video --weights runs/tiny          videos of the generated `shapes`
    python evaluate.py --task k400 --weights runs/s --data K400  {train,val}/CLASS/*.mp4, or {train,val}.csv: path label

    Probe          attention among all patches of all frames, then one query of them     DINOv3 §6.1.6, App. D.6
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

from engine.pictures import SHOWN, save_pictures
from engine.task import Option, Paper, Task
from ops import rotate
from sets.clips import Samples, open_clips, squares, uniform

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


def seen(found, times, views, device):
    """What a probe sees: maps b T h w D float16, times b T; b is views by squares.    found  maps of Samples"""
    maps = torch.from_numpy(np.array([found[i] for i in views.tolist()]))                      # views (squares T) h w D
    maps = maps.unflatten(1, (-1, times.shape[1]))
    return maps.flatten(0, 1).to(device), times[views].repeat_interleave(maps.shape[1], 0).to(device)


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


def train_probes(data, labels, clips, n_classes, recipe, c, device):
    """
    Probes side by side on the same batches:  [(probe, rate, weight decay)] for each pair of the latter

    data     features and times of a view of each clip    labels  of each    clips  numbers of those to train on
    paper:   DINOv3 App. D.6; start values, and a cosine without warm-up, are V-JEPA 2's
    differs: features are computed once, of the views that the test has; there each epoch draws times and squares
    """
    probes, rng = [], np.random.default_rng(c.seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for lr in [c.lr] if c.lr else recipe.rates:
            for decay in recipe.decays:
                torch.manual_seed(c.seed)  # the same start for all
                probe = Probe(data[0][0][0].shape[2], n_classes, recipe).to(device)
                probes.append((probe, torch.optim.AdamW(probe.parameters(), lr, weight_decay=decay), lr, decay))
    batches = [part for _ in range(recipe.epochs) for part in torch.tensor(rng.permutation(clips)).split(recipe.batch)]
    for step, views in enumerate(tqdm(batches, f"{len(probes)} probes", unit="it", leave=False, disable=None)):
        batch = *seen(*data, views, device), labels[views].to(device)
        for probe, optimizer, lr, _ in probes:
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / len(batches))) / 2
            for maps, times, truth in zip(*(x.split(PART) for x in batch), strict=True):
                (F.cross_entropy(probe(maps, times), truth, reduction="sum") / len(views)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [(probe, lr, decay) for probe, _, lr, decay in probes]


@torch.no_grad()
def probabilities(probe, data, views, device):
    """(views squares) n_classes, on the host"""
    return torch.cat([probe(*seen(*data, part, device)).softmax(1).cpu() for part in views.split(PART)])

# --------------------------------------------------------------------------------
# The task


def config_of(c):
    return SHAPES if c.data == "shapes" else ProbeConfig()


def open_data(c):
    """Twice as many frames of each clip of shapes as one view has: two views interleave."""
    return open_clips(c, 2 * config_of(c).n_frames)


def run(data, frozen, c):
    """
    Percent, of the probe that a tenth of train picks (DINOv3 Tab. 6):  top1  of the middle square and T frames of each
    val clip,  top1_tta  of the mean of six probabilities: three squares by two times T frames that interleave
    """
    recipe, device, rng = config_of(c), frozen.device, np.random.default_rng(c.seed)
    (train, val, classes), T, seen_of = data, recipe.n_frames, {}
    for name, views, at in (("train", [uniform(clip, T) for clip in train], [0.5]),
                            ("val", [uniform(clip, T) for clip in val], [0.5]),
                            ("averaged", [uniform(clip, T, k, 2) for clip in val for k in range(2)], [0, 0.5, 1])):
        source = Samples(views)
        seen_of[name] = frozen.maps(name, source, partial(squares, side=c.resolution, at=at)), source.times
    labels, truth = (torch.tensor([clip.label for clip in clips]) for clips in (train, val))
    if c.control:
        labels, truth = (x[torch.from_numpy(rng.permutation(len(x)))] for x in (labels, truth))
    held, clips = torch.tensor(rng.permutation(len(train))).tensor_split([max(len(train) // 10, 1)])
    probes = train_probes(seen_of["train"], labels, clips, len(classes), recipe, c, device)
    found = [probabilities(probe, seen_of["train"], held, device).argmax(1) for probe, *_ in probes]
    held_out = [100 * (each == labels[held]).double().mean().item() for each in found]
    probe, lr, decay = probes[int(np.argmax(held_out))]
    one = probabilities(probe, seen_of["val"], torch.arange(len(val)), device)
    six = probabilities(probe, seen_of["averaged"], torch.arange(2 * len(val)), device).unflatten(0, (-1, 6)).mean(1)
    top1, top1_tta = (100 * (each.argmax(1) == truth).double().mean().item() for each in (one, six))
    rows, n_shown = [], SHOWN if c.out else 0
    for clip, *names in zip(*(each[:n_shown] for each in (val, truth, one.argmax(1))), strict=True):
        frames = clip.frames(uniform(clip, 4)[1])
        tile = Image.new("RGB", frames[0].shape[:0:-1], "white")
        text = "truth:\n{}\n\nfound:\n{}".format(*(classes[k] for k in names))
        ImageDraw.Draw(tile).text((4, 4), text, "black")
        rows.append([*frames, torch.from_numpy(np.array(tile)).permute(2, 0, 1)])
    save_pictures(c, rows)
    return dict(top1=top1, top1_tta=top1_tta, chance=100 / len(classes), top1_held_out=max(held_out),
                best_lr=lr, best_weight_decay=decay, n_train=len(train), n_val=len(val))


def task(name, **paper):
    rows = tuple(Paper(metric, {"7b": value}, 256, {}) for metric, value in paper.items())  # Tab. 6
    return Task(name, "{train,val}/CLASS/*.mp4 or folders of frames; {train,val}.csv: path label", open_data, run,
                wants="maps", metric="top1", sides=(256, 80), options=(Option("lr", 0.0, "peak; 0 = a grid"),),
                pictures="frames, truth, prediction", paper=rows)


TASKS = task("video"), task("ucf101", top1=93.5, top1_tta=93.5), task("ssv2", top1=70.1, top1_tta=70.8), \
    task("k400", top1=87.8, top1_tta=88.2)
