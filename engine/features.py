"""
A frozen network, and what it says of images: once, in order, on disk, by any number of ranks. See chunks.py.

    Frozen    tokens, maps, live: class tokens, patches on disk, patches at once;  keep, each: truths, scores, on disk
    Pixels    the floor under every feature: the image itself
    load      --weights -> network;  describe: its config alone, before anything is loaded

Dimension letters: see the top of model.py.
"""

import json
import zlib
from functools import partial
from itertools import dropwhile
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from convnext import CONVNEXT_SIZES, ConvNeXt, resize_map
from engine.chunks import Computed, Job, Keyed, Stored, index, make, named, read
from engine.ranks import Ranks
from engine.task import skip
from model import SIZES, Features, ViT, build
from weights import identify, load_backbone

CHUNK = 64              # images whose patches lie in one file
ROWS = 256              # images whose class tokens do, or as many more as fill the last batch
UNTRAINED = SIZES | CONVNEXT_SIZES

# --------------------------------------------------------------------------------
# Networks


class Pixels(nn.Module):
    """The floor under every feature: the image itself, 16x16 as its class token, the colours of a patch, 4x4, as it."""

    config = SimpleNamespace(patch_size=16, width=48, depth=1, mean=SIZES["s"].mean, std=SIZES["s"].std)

    def forward(self, images):
        x = F.pixel_unshuffle(F.avg_pool2d(images, 4), 4)                                      # B 48 h w
        patches = x.flatten(2).transpose(1, 2)                                                 # B P 48
        return Features(self.thumbnail(images), patches[:, :0], patches, tuple(x.shape[2:]))

    def layers(self, images, indices):
        return [self(images) for _ in indices]

    def thumbnail(self, images):
        return F.interpolate(images, (16, 16), mode="bilinear", antialias=True).flatten(1)     # B 768


def describe(weights):
    """--weights -> the network's config; of a file only the shapes are read. Raises ValueError if there is none."""
    if not weights:
        raise ValueError("--weights is missing: a run's folder, a weights file, pixels, or untrained:SIZE")
    if weights == "pixels":
        return Pixels.config
    if not weights.startswith("untrained:"):
        return identify(weights).config
    name = weights.partition(":")[2]
    if name not in UNTRAINED:
        raise ValueError(f"--weights {weights}: unknown size {name!r}; choose one of {', '.join(UNTRAINED)}")
    return UNTRAINED[name]


def load(weights, size=""):
    """--weights, --size -> the network, in eval mode"""
    if weights == "pixels":
        return Pixels()
    if weights.startswith("untrained:"):
        config = describe(weights)
        return build(lambda: (ViT if weights.partition(":")[2] in SIZES else ConvNeXt)(config)).eval()
    return load_backbone(weights, size or None)


def chosen_layers(c, config):
    """--layers -> blocks; [] = the last. Raises ValueError."""
    names = c.layers.split(",") if getattr(c, "layers", "") else []
    if not all(layer.isdecimal() and int(layer) < config.depth for layer in names):
        raise ValueError(f"--layers {c.layers}: write blocks, 0-based, as in 3,5; this network has {config.depth}")
    return [int(layer) for layer in names]


def whole_patches(c, config):
    if c.resolution < 1 or c.resolution % config.patch_size:
        raise ValueError(f"--resolution {c.resolution}: write whole patches, a multiple of {config.patch_size}")

# --------------------------------------------------------------------------------
# Features


class Tokens:
    """Of the images of a source that could be read:  cls n D,  patches n D, their mean,  labels n;  read when asked."""

    def __init__(self, job):
        self.folder, self.files = job.folder, [index(path) for path in job.chunks]

    def column(self, name):
        found = [read(*file[name]) for file in self.files if read(*file["labels"]).size]
        return torch.from_numpy(np.concatenate(found))

    cls = property(lambda self: self.column("cls"))
    patches = property(lambda self: self.column("patches"))
    labels = property(lambda self: self.column("labels"))


class Frozen:
    """
    model    a network in eval mode; a ConvNeXt's map is resized to patches of 16 pixels
    task     the record: its view is what the network sees if no other is named, its control may scatter patches
    coming   calls of `maps` to come, in their order: ranks share out as many sources at once as there are ranks

    Each rank has one; rank 0 calls it, the others serve.
    """
    def __init__(self, model, task, c, ranks=None):
        self.c, self.ranks = c, ranks or Ranks()
        self.device, config = self.ranks.device, model.config
        self.model = model.to(self.device)
        self.layers, self.scattered = chosen_layers(c, config), c.control and task.control == "patches"
        self.mean, self.std = (torch.tensor(v, device=self.device)[:, None, None] for v in (config.mean, config.std))
        self.view = self.seen(task.view_at(c.resolution))
        self.coming, self.ready = [], {}

    def seen(self, view):
        """A view with this side and this network's patches:  image -> list of C H W uint8"""
        return partial(view, side=self.c.resolution, patch=self.model.config.patch_size)

    # ---- of whole images

    def tokens(self, name, source, view=None):
        """
        source   len, load(i) -> C H W uint8, label(i) -> int    view  image -> [C H W uint8], of one size; None = the
                 task's    name  of the split, in --cache
        returns  Tokens; images that cannot be read are left out, and named;  raises ValueError if none can be
        """
        size, view = -(-ROWS // self.c.batch) * self.c.batch, view or self.view
        images = Computed(partial(labelled, source=source, view=view))
        job = self.job(name, images, len(source), pack_tokens, size, view=view.func.__name__, more=view.keywords)
        make([job], self, self.c, self.ranks)
        unreadable = [error for path in job.chunks
                      for error in json.loads(read(*index(path)["unreadable"]).tobytes())]
        for error in unreadable:
            skip(f"unreadable {error}")
        if len(unreadable) == len(source):
            raise ValueError(f"--data: none of {len(source)} images could be read; the first: {unreadable[0]}")
        return Tokens(job)

    @torch.no_grad()
    def tokens_of(self, views):
        """B C H W uint8, of one size, as a list -> cls B D, mean patch B D (pixels: no columns)"""
        x = self.network_input(views)
        if isinstance(self.model, Pixels):
            return self.model.thumbnail(x).cpu().numpy(), np.empty((len(x), 0), np.float32)
        features = self.model(x)
        return features.cls.float().cpu().numpy(), features.patches.mean(1).float().cpu().numpy()

    # ---- of patches

    def maps(self, name, source, views=None, layers=None):
        """
        source   len, image(i) -> C H W uint8    views  image -> list of C H W uint8; None = the task's
        layers   blocks, side by side in D; None = those of --layers, or the last
        returns  Stored: for each image the maps of its views, h w D float16, after the final norm;  raises ValueError
                 for an image that cannot be read
        """
        if name not in self.ready:
            self.coming = list(dropwhile(lambda call: call[0] != name, self.coming))
            calls = self.coming[: self.ranks.count] or [(name, source)]
            jobs = [self.maps_job(*call, views or self.view, layers) for call in calls]
            make(jobs, self, self.c, self.ranks)
            self.ready |= {job.name: Stored(job) for job in jobs}
        return self.ready.pop(name)

    def maps_job(self, name, source, views, layers):
        layers = self.layers if layers is None else layers
        return self.job(name, Computed(partial(views_at, source=source, views=views)), len(source),
                        partial(pack_maps, layers=layers), CHUNK, task=self.c.task, layers=layers,
                        views=views.func.__name__, more=views.keywords, scattered=self.scattered)

    @torch.no_grad()
    def live(self, images, layers=None):
        """B C H W uint8, of one size, as a list -> B h w D, on the device, and on no disk"""
        x, layers = self.network_input(images), self.layers if layers is None else layers      # B C H W
        found = self.model.layers(x, layers) if layers else [self.model(x)]
        cell = min(16, self.model.config.patch_size)
        grid = x.shape[2] // cell, x.shape[3] // cell
        maps = torch.cat([resize_map(features, grid).patches for features in found], dim=2)    # B P D
        return maps.unflatten(1, grid)

    def arrays(self, images, layers=None):
        """What `live` says, as it is stored:  h w D float16 each, on the host"""
        maps = self.live(images, layers).half().cpu().numpy()
        return [scatter(m) for m in maps] if self.scattered else list(maps)

    # ---- of anything

    def keep(self, name, function, n, **about):
        """
        Stored arrays, function(i) -> list of them, of n images, such as truths: made by the readers of all ranks, and
        kept as features are.    about  what they depend on, beside the task, the seed and the control
        """
        return self.stored(name, Computed(function), n, pack_arrays, about)

    def each(self, name, function, n, **about):
        """As keep, but function(i, device) runs where the features are: scores of one image each, or of one pair."""
        return self.stored(name, range(n), n, partial(pack_scores, function=function),
                           about | dict(layers=self.layers, scattered=self.scattered))

    def stored(self, name, dataset, n, compute, about):
        c = self.c
        about |= dict(task=c.task, control=c.control, seed=c.seed)
        job = self.job(name, dataset, n, compute, CHUNK, **about)
        make([job], self, c, self.ranks)
        return Stored(job)

    # ---- what they have in common

    def network_input(self, images):
        return (torch.stack(images).to(self.device).float() / 255 - self.mean) / self.std

    def job(self, name, dataset, n, compute, size, **about):
        folder = Keyed(self.model, self.c, about | dict(name=name, n=n, size=size))
        return Job(folder, name, dataset, folder.chunks(range(n), size), compute)


def labelled(i, source, view):
    (image,) = view(source.load(i))
    return image, source.label(i)


def pack_tokens(frozen, images):
    """What can be read, in batches; what cannot, by what was said of it."""
    found, waiting, labels, unreadable = [], {}, [], []
    for item in images:
        if isinstance(item, ValueError):
            raise item
        if isinstance(item, OSError):
            unreadable.append(str(item))
            continue
        alike = waiting.setdefault(item[0].shape, [])  # images of one size go through the network together
        alike.append((len(labels), item[0]))
        labels.append(item[1])
        if len(alike) == frozen.c.batch:
            found += tokens_in_place(frozen, waiting.pop(item[0].shape))
    for alike in waiting.values():
        found += tokens_in_place(frozen, alike)
    found = [said for _, *said in sorted(found, key=lambda row: row[0])]
    cls, patches = map(np.stack, zip(*found, strict=True)) if found else (np.empty((0, 0)),) * 2
    return dict(cls=cls, patches=patches, labels=np.array(labels, np.int64),
                unreadable=np.frombuffer(json.dumps(unreadable).encode(), np.uint8))


def tokens_in_place(frozen, views):
    """[(place, view)], views of one size -> [(place, cls D, mean patch D)]"""
    places, views = zip(*views, strict=True)
    return list(zip(places, *frozen.tokens_of(views), strict=True))


def views_at(i, source, views):
    return views(source.image(i))


def pack_maps(frozen, images, layers):
    """Views of any sizes; neighbours of one size go through the network together."""
    names, views = zip(*named(images), strict=True)
    found, waiting = [], []
    for view in views:
        if waiting and (view.shape != waiting[0].shape or len(waiting) == frozen.c.batch):
            found += frozen.arrays(waiting, layers)
            waiting = []
        waiting.append(view)
    return dict(zip(names, found + frozen.arrays(waiting, layers), strict=True))


def pack_arrays(frozen, images):
    return dict(named(images))


def pack_scores(frozen, images, function):
    return dict(named(function(i, frozen.device) for i in images))


def scatter(map):
    """The patches of h w D in an order that is drawn from themselves: batches and chunks do not matter."""
    rng = np.random.default_rng(zlib.crc32(map.tobytes()))
    return rng.permutation(map.reshape(-1, map.shape[2])).reshape(map.shape)
