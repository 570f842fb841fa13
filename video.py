"""
Classify videos by the frozen patch features of their frames. evaluate.py is the command.

    python evaluate.py --task video --weights runs/tiny          videos of the generated `shapes`
    python evaluate.py --task k400 --weights runs/s --data K400  {train,val}/CLASS/*.mp4, or {train,val}.csv: path label

    Clip, Views      files, folders of frames or moving shapes; T of their frames, as features.Patches wants images
    Probe            attention among all patches of all frames, then one query of them     DINOv3 §6.1.6, App. D.6
    classification   top-1 of one view of each clip, and of six averaged                   DINOv3 Tab. 6

A task is (patches, config) -> {metric: number}. b views of T frames, N = T h w tokens, W wide; else see model.py.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import shapes
from data import loader, read_image, resize
from engine.chunks import Computed
from engine.features import GENERATED, SHOWN, evenly, folders, images_below, save_pictures
from ops import rotate

EXTENSIONS = {".avi", ".mp4", ".webm", ".mkv"}
RATE = 25            # frames a second of a folder of frames
HEAD = 64            # E
PART = 8             # views that go through a probe at once; of 64 x 4096 tokens it would keep some 50 GB (reckoned)
TIME = 0.5, 50.0     # seconds: the shortest and the longest wave that tells positions; chosen by eye, as is
SPACE = 0.125, 12.5  # the same, in sides of the square


@dataclass(frozen=True)
class Recipe:
    width: int = 1024    # W
    depth: int = 4       # self-attention blocks
    std: float = 0.02    # of the linears' start values
    n_frames: int = 16   # T
    batch: int = 64      # clips
    epochs: int = 20
    rates: tuple = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
    decays: tuple = (1e-3, 1e-2, 1e-1)


SHAPES = Recipe(width=128, depth=2, std=0.07, n_frames=8, batch=16, epochs=10, rates=(1e-3, 2e-3), decays=(1e-2,))

# --------------------------------------------------------------------------------
# Clips and views of them


@dataclass(frozen=True)
class Clip:
    source: object       # Path of a video file or of a folder of frames, or arguments of shapes.video
    label: int
    times: np.ndarray    # seconds, one for each frame

    def frames(self, chosen):
        """The frames of these numbers, in ascending order, each C H W uint8"""
        if isinstance(self.source, tuple):
            scenes = shapes.video(*self.source)
            return [torch.from_numpy(scenes[k].image).permute(2, 0, 1) for k in chosen]
        if self.source.is_dir():
            files = stills(self.source)
            return [read_image(files[k]) for k in chosen]
        return film(self.source, chosen)[1]


def stills(folder):
    return sorted(images_below(folder), key=lambda file: (len(file.name), file.name))          # 9.jpg before 10.jpg


def film(path, chosen):
    """Seconds of all frames, and the chosen ones, each C H W uint8; for one that is damaged stands one before it."""
    try:
        import av
    except ImportError as error:
        raise ValueError("video: PyAV is not installed; pip install -e .[eval]") from error
    stamps, found, n, why = [], {}, 0, "no frame in it"
    try:
        with av.open(str(path)) as file:
            stream = file.streams.best("video")
            for packet in file.demux(stream) if stream else ():
                if packet.size and not packet.is_discard:  # .avi may know the order of decoding alone
                    stamps.append(packet.dts if packet.pts is None else packet.pts)
                for frame in packet.decode() if n <= chosen[-1] else ():
                    if n == 0 or n in chosen:
                        found[n] = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                    n += 1
    except av.FFmpegError as error:
        why = error.strerror
    if not found:
        raise OSError(f"{path}: {why}")
    if n <= chosen[-1]:
        print(f"{path}: only {n} frames can be read; an earlier one stands for each that is missing")
    times = np.float32(np.sort(stamps) - min(stamps)) * float(stream.time_base)
    return times, [found[max(i for i in found if i <= k)] for k in chosen]


def opened(row):
    """(path, label) -> Clip; raises OSError if its first frame cannot be read."""
    path, label = row
    if not path.is_dir():
        return Clip(path, label, film(path, [0])[0])
    if not stills(path):
        raise OSError(f"{path}: no image in it")
    read_image(stills(path)[0])
    return Clip(path, label, np.arange(len(stills(path))) / RATE)


def listed(c, split):
    """(path, class) of each clip: lines "path label" of SPLIT.csv, or what lies in SPLIT/CLASS/"""
    table = Path(c.data, f"{split}.csv")
    if not table.is_file():
        return [(path, path.parent.name) for path in sorted(folders(c, split).glob("*/*"))
                if path.suffix.lower() in EXTENSIONS or path.is_dir()]
    rows = [line.rsplit(maxsplit=1) for line in table.read_text().splitlines() if line.strip()]
    if short := [row[0] for row in rows if len(row) == 1]:
        raise ValueError(f"--data: {table} has a line {short[0]!r}; wanted: path label")
    return [(Path(c.data, path), label) for path, label in rows]


def open_clips(c, n_frames):
    """Train clips, val clips, names of the classes, number of clips that cannot be read; n_frames of each of shapes"""
    if c.data == "shapes":  # 8 frames a second; the label is the main object's class
        splits = [[Clip((i, n_frames, c.resolution, seed), shapes.scene(i, 16, seed).label, np.arange(n_frames) / 8)
                   for i in range(c.limit or n)] for n, seed in zip(GENERATED, (1000, 1001), strict=True)]
        return *splits, shapes.CLASSES, 0
    rows, splits = [listed(c, split) for split in ("train", "val")], []
    classes = sorted({name for _, name in rows[0]}, key=lambda name: (len(name) * name.isdecimal(), name))
    strange = sorted({name for _, name in rows[1]} - set(classes))[:5]
    if strange or len(classes) < 2:
        raise ValueError(f"--data: {c.data} has in train {len(classes)} classes, wanted two; in val others: {strange}")
    for part in rows:
        part = [(path, classes.index(label)) for path, label in evenly(part, c.limit)]
        splits.append([*tqdm(loader(Computed(opened), part, c.workers), "clips", len(part), leave=False, disable=None)])
    errors = [clip for clips in splits for clip in clips if isinstance(clip, Exception)]
    for error in errors:
        if isinstance(error, ValueError):
            raise error
        print(f"skipped unreadable {error}")
    splits = [[clip for clip in clips if isinstance(clip, Clip)] for clips in splits]
    if min(n := [len(clips) for clips in splits]) < 2:
        raise ValueError(f"--data: {c.data} has {n} readable clips in train, val; wanted two of each")
    return *splits, classes, len(errors)


def uniform(clip, T, first=0, step=1):
    """First, last, and uniform between: T frames, some twice if there are fewer; one of `step` views that interleave"""
    return clip, np.linspace(0, len(clip.times) - 1, T * step).round().astype(int)[first::step]


def squares(frames, side, at):
    """The largest squares of frames, resized; 0, 0.5, 1: all frames' left (or top) ones, middle ones, right ones"""
    (H, W), found = frames[0].shape[1:], []
    for share in at:
        top, left = int(share * max(H - W, 0)), int(share * max(W - H, 0))
        found += [resize(x[:, top : top + min(H, W), left : left + min(H, W)], side, side) for x in frames]
    return found


class Views:
    """Views as features.Patches wants images: len, image(i) -> T frames, each C H W uint8;  times, views T, seconds"""

    def __init__(self, views):
        self.views = views
        self.times = torch.tensor(np.array([clip.times[chosen] for clip, chosen in views])).float()

    def __len__(self):
        return len(self.views)

    def image(self, i):
        clip, chosen = self.views[i]
        return clip.frames(chosen)


def seen(found, times, views, device):
    """What a probe sees: maps b T h w D float16, times b T; b is views by squares.    found  Patches of Views"""
    maps = torch.from_numpy(np.array([found[i] for i in views.tolist()]))                      # views (squares T) h w D
    maps = maps.unflatten(1, (-1, times.shape[1]))
    return maps.flatten(0, 1).to(device), times[views].repeat_interleave(maps.shape[1], 0).to(device)

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


def fit(data, labels, clips, n_classes, recipe, c, device):
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


def classification(patches, c):
    """
    Percent, of the probe that a tenth of train picks (DINOv3 Tab. 6):  top1  of the middle square and T frames of each
    val clip,  top1_tta  of the mean of six probabilities: three squares by two times T frames that interleave
    """
    recipe, device, rng = SHAPES if c.data == "shapes" else Recipe(), patches.device, np.random.default_rng(c.seed)
    (train, val, classes, n_skipped), T, data = open_clips(c, 2 * recipe.n_frames), recipe.n_frames, {}
    for name, views, at in (("train", [uniform(clip, T) for clip in train], [0.5]),
                            ("val", [uniform(clip, T) for clip in val], [0.5]),
                            ("averaged", [uniform(clip, T, k, 2) for clip in val for k in range(2)], [0, 0.5, 1])):
        source = Views(views)
        data[name] = patches(name, source, partial(squares, side=c.resolution, at=at)), source.times
    labels, truth = (torch.tensor([clip.label for clip in clips]) for clips in (train, val))
    if c.control:
        labels, truth = (x[torch.from_numpy(rng.permutation(len(x)))] for x in (labels, truth))
    held, clips = torch.tensor(rng.permutation(len(train))).tensor_split([max(len(train) // 10, 1)])
    probes = fit(data["train"], labels, clips, len(classes), recipe, c, device)
    found = [probabilities(probe, data["train"], held, device).argmax(1) for probe, *_ in probes]
    held_out = [100 * (each == labels[held]).double().mean().item() for each in found]
    probe, lr, decay = probes[int(np.argmax(held_out))]
    one = probabilities(probe, data["val"], torch.arange(len(val)), device)
    six = probabilities(probe, data["averaged"], torch.arange(2 * len(val)), device).unflatten(0, (-1, 6)).mean(1)
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
                best_lr=lr, best_weight_decay=decay, n_train=len(train), n_val=len(val), n_skipped=n_skipped)
