"""
Frozen features of patches, for the evaluations in dense.py and matching.py.

    Pairs, Scenes    images with their truth: files, or the generated `shapes`
    Patches          images -> maps of features, on disk: see chunks.py
    windows, fitted  an image -> the views that the network sees
    save_pictures    image, truth and prediction side by side

Dimension letters: see the top of model.py.
"""

import math
import zlib
from functools import lru_cache, partial
from itertools import dropwhile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import shapes
from convnext import resize_map
from data import EXTENSIONS, read_image, resize
from engine.chunks import ALONE, Computed, Folder, Job, Stored, make, named
from engine.metrics import IGNORE
from model import SIZES, Features

CHUNK = 64              # images whose features lie in one file
SHOWN = 8               # images that --out gets
GENERATED = 400, 100    # shapes: scenes to train on, scenes to measure on

# --------------------------------------------------------------------------------
# Images with their truth: len, image(i) -> C H W uint8, truth(i) -> array


class Pairs:
    """Files: (image, truth) paths, and what reads a truth."""

    def __init__(self, paths, read, crop=None):
        self.paths, self.read, self.crop = paths, read, crop

    def __len__(self):
        return len(self.paths)

    def image(self, i):
        return self.cut(read_image(self.paths[i][0]))

    def truth(self, i):
        return self.cut(self.read(self.paths[i][1]))

    def cut(self, array):
        return self.crop(array) if self.crop else array


class Scenes:
    """Generated scenes of one seed, by their numbers, and which part of each is the truth."""

    def __init__(self, numbers, seed, side, read):
        self.numbers, self.seed, self.side, self.read = numbers, seed, side, read

    def __len__(self):
        return len(self.numbers)

    def image(self, i):
        return torch.from_numpy(scene(self.numbers[i], self.side, self.seed).image).permute(2, 0, 1)

    def truth(self, i):
        return self.read(scene(self.numbers[i], self.side, self.seed))


@lru_cache(maxsize=64)
def scene(i, side, seed):
    return shapes.scene(i, side, seed)


def generated(c, read):
    """Scenes to train on and scenes to measure on, as large as the network sees them."""
    counts = (c.limit, c.limit) if c.limit else GENERATED
    return [Scenes(range(n), seed, c.resolution, read) for n, seed in zip(counts, (1000, 1001), strict=True)]


def evenly(items, limit):
    """All of a list, or `limit` of them, evenly spaced, so that what is sorted by class stays balanced."""
    n = len(items)
    return list(items) if not limit or limit >= n else [items[i * n // limit] for i in range(limit)]


def folders(c, *names):
    """The first of the sub-folders that is there; otherwise says which were looked for."""
    found = [Path(c.data, name) for name in names if Path(c.data, name).is_dir()]
    if not found:
        raise ValueError(f"--data: {c.data} has no folder {' or '.join(names)}; {c.task} wants one")
    return found[0]


def paired(c, images, truths, key):
    """(image, truth) paths whose keys agree, sorted; raises ValueError if none do."""
    truths = {key(path): path for path in truths}
    paths = [(path, truths[key(path)]) for path in sorted(images) if key(path) in truths]
    if not paths:
        raise ValueError(f"--data: {c.data} has no image with a truth of the same name; {c.task} wants pairs of files")
    return evenly(paths, c.limit)


def images_below(folder):
    return [path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS]

# --------------------------------------------------------------------------------
# Features


class PixelPatches(nn.Module):
    """The floor under every dense feature: the colours of the patch itself, 4x4."""

    config = SimpleNamespace(patch_size=16, width=48, depth=1, mean=SIZES["s"].mean, std=SIZES["s"].std)

    def forward(self, images):
        x = F.pixel_unshuffle(F.avg_pool2d(images, 4), 4)                                      # B 48 h w
        patches = x.flatten(2).transpose(1, 2)                                                 # B P 48
        return Features(patches.mean(1), patches[:, :0], patches, tuple(x.shape[2:]))


class Patches:
    """
    patches(name, source, views_of)    source  len, image(i) -> C H W uint8    views_of  image -> list of C H W uint8
    returns  Stored: for each image the maps of its views, h w D float16, after the final norm; layers lie side by side
             in D. Raises ValueError for an image that cannot be read

    scattered  every patch of an image elsewhere in it: the control of tasks that train nothing
    coming     calls to come, in their order: ranks share out as many sources at once as there are ranks

    A ConvNeXt's map is resized to patches of 16 pixels. The features of 64 images are a file.
    """
    def __init__(self, model, c, device, scattered=False, ranks=ALONE):
        self.model, self.c, self.device, self.scattered, config = model.to(device), c, device, scattered, model.config
        if c.resolution < 1 or c.resolution % config.patch_size:
            raise ValueError(f"--resolution {c.resolution}: write whole patches, a multiple of {config.patch_size}")
        if not all(layer.isdecimal() and int(layer) < config.depth for layer in c.layers.split(",") if c.layers):
            raise ValueError(f"--layers {c.layers}: write blocks, 0-based, as in 3,5; this network has {config.depth}")
        self.layers = [int(layer) for layer in c.layers.split(",")] if c.layers else []
        self.mean, self.std = (torch.tensor(v, device=device)[:, None, None] for v in (config.mean, config.std))
        self.whole = partial(fitted, side=c.resolution, patch=config.patch_size)
        self.ranks, self.coming, self.ready = ranks, [], {}

    @torch.no_grad()
    def run(self, views):
        """n C H W uint8, of one size -> n h w D float16"""
        x = (torch.stack(views).to(self.device).float() / 255 - self.mean) / self.std          # n C H W
        found = self.model.layers(x, self.layers) if self.layers else [self.model(x)]
        cell = min(16, self.model.config.patch_size)
        grid = x.shape[2] // cell, x.shape[3] // cell
        maps = torch.cat([resize_map(features, grid).patches for features in found], dim=2)    # n P D
        maps = maps.unflatten(1, grid).half().cpu().numpy()
        if self.scattered:
            return [scatter(m) for m in maps]
        return list(maps)

    def maps(self, views):
        """As `run`, of views of any sizes; neighbours of one size go through the network together."""
        found, waiting = [], []
        for view in views:
            if waiting and (view.shape != waiting[0].shape or len(waiting) == self.c.batch):
                found += self.run(waiting)
                waiting = []
            waiting.append(view)
        return found + self.run(waiting)

    def __call__(self, name, source, views_of):
        if name not in self.ready:
            self.coming = list(dropwhile(lambda call: call[0] != name, self.coming))
            calls = self.coming[: self.ranks.count] or [(name, source, views_of)]
            jobs = [self.job(name, partial(views_at, source=source, views_of=views_of), len(source), Patches.pack,
                             views=views_of.func.__name__, more=views_of.keywords, scattered=self.scattered)
                    for name, source, views_of in calls]
            make(jobs, self, self.c, self.ranks)
            self.ready |= {job.name: Stored(job) for job in jobs}
        return self.ready.pop(name)

    def keep(self, name, arrays_of, n):
        """Stored as features are: arrays_of(i) -> [array] of n images, such as truths, of the seed and the control."""
        c = self.c
        job = self.job(name, arrays_of, n, Patches.as_is, control=c.control, seed=c.seed, ignore=c.ignore)
        make([job], self, c, self.ranks)
        return Stored(job)

    def job(self, name, function, n, compute, **about):
        folder = Folder(self.model, self.c, about | dict(task=self.c.task, name=name, n=n))
        return Job(folder, name, Computed(function), folder.chunks(range(n), CHUNK), compute)

    def pack(self, images):
        names, views = zip(*named(images), strict=True)
        return dict(zip(names, self.maps(views), strict=True))

    def as_is(self, images):
        return dict(named(images))


def views_at(i, source, views_of):
    return views_of(source.image(i))


def scatter(map):
    """The patches of h w D in an order that is drawn from themselves: batches and chunks do not matter."""
    rng = np.random.default_rng(zlib.crc32(map.tobytes()))
    return rng.permutation(map.reshape(-1, map.shape[2])).reshape(map.shape)


def scaled(image, side):
    """C H W -> its short side becomes `side`, the other follows."""
    scale = side / min(image.shape[1:])
    return resize(image, *(max(side, round(x * scale)) for x in image.shape[1:]))


def fitted(image, side, patch, mirrored=False):
    """The whole image as one view: its short side becomes `side`, the other is rounded up to whole patches."""
    short = min(image.shape[1:])
    view = resize(image, *(-(-x * side // (short * patch)) * patch for x in image.shape[1:]))
    return [view, view.flip(2)] if mirrored else [view]


def starts(length, side):
    """Where windows of a side begin, 2/3 of it apart (512: 341); the last one is shifted back to end with the image."""
    stride = max(round(side * 2 / 3), 1)
    return [min(k * stride, length - side) for k in range(max(length - side + stride - 1, 0) // stride + 1)]


def windows(image, side):
    """C H W -> square views that cover it, its short side being theirs; row by row"""
    image = scaled(image, side)
    return [image[..., y : y + side, x : x + side] for y in starts(image.shape[1], side)
            for x in starts(image.shape[2], side)]


def nearest(truth, size):
    """H W array -> another size, without mixing values"""
    rows, cols = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, truth.shape, strict=True))
    return np.ascontiguousarray(truth[rows][:, cols])

# --------------------------------------------------------------------------------
# Pictures


def hues(labels):
    """Class numbers H W -> C H W uint8: far hues for near numbers; 0 is dark, what is ignored is white."""
    k = torch.arange(256)[:, None]
    table = 128 + 100 * torch.cos(2 * math.pi * (k * 0.618 + torch.tensor([0, 1 / 3, 2 / 3])))
    table *= 1 - 0.35 * (k // 8 % 2)
    table[0], table[IGNORE] = 30, 255
    return table.to(torch.uint8)[labels.long()].permute(2, 0, 1)


def shades(depths, top):
    """Metres H W -> C H W uint8: near is bright; not known is black."""
    grey = np.where(depths > 0, 255 * (1 - np.clip(depths / top, 0, 1) ** 0.5), 0)
    return torch.from_numpy(grey.astype(np.uint8)).expand(3, -1, -1)


def save_pictures(c, rows, shown="image, truth, prediction"):
    """Rows of C H W uint8, image, truth, prediction, to OUT/TASK.png"""
    if not rows:
        return
    height, width = rows[0][0].shape[1:]
    tiles = [[F.interpolate(each[None], (height, width), mode="nearest-exact")[0] for each in row] for row in rows]
    sheet = torch.cat([torch.cat([F.pad(tile, (0, 4, 0, 4), value=255) for tile in row], 2) for row in tiles], 1)
    Path(c.out).mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(Path(c.out, f"{c.task}.png"))
    print(f"wrote {Path(c.out, f'{c.task}.png')}: {shown}")
