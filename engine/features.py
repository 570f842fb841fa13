"""
A frozen network, and what it says of images: once, in order, on disk, by any number of ranks. See chunks.py.

    Frozen    tokens, maps: on disk;  walk, live: patches, on none;  keep, each: truths, scores, on disk
    Pixels    the floor under every feature: the image itself
    load      --weights -> network;  describe: its config alone, before anything is loaded;  reads: how images are read

Dimension letters: see the top of model.py.
"""

import json
import shutil
import time
import zlib
from functools import cached_property, partial
from itertools import groupby, islice
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from convnext import CONVNEXT_SIZES, ConvNeXt, resize_map
from data import loader
from engine.channels import reader
from engine.chunks import Computed, Job, Keyed, Stored, Table, everywhere, index, lent, make, named, read, write
from engine.images import read_image, unit
from engine.keys import code_of, files_of, weights_of
from engine.ranks import Ranks, choose_precision
from engine.task import IMAGES, skip
from model import SIZES, Features, ViT, build
from weights import identify, load_backbone

CHUNK = 64              # images whose patches lie in one file
MANY = 20000            # images from which on a pass over them is planned
ROWS = 256              # images whose class tokens do, or as many more as fill the last batch
UNTRAINED = SIZES | CONVNEXT_SIZES

# --------------------------------------------------------------------------------
# Networks


class Pixels(nn.Module):
    """The floor under every feature: the image itself, 16x16 as its class token, the colours of a patch, 4x4, as it."""

    config = SimpleNamespace(patch_size=16, width=48, depth=1, in_chans=3, mean=SIZES["s"].mean,
                             std=SIZES["s"].std)

    def forward(self, images):
        x = F.pixel_unshuffle(F.avg_pool2d(images, 4), 4)                                      # B 48 h w
        patches = x.flatten(2).transpose(1, 2)                                                 # B P 48
        return Features(self.thumbnail(images), patches[:, :0], patches, tuple(x.shape[2:]))

    def layers(self, images, indices, norm=True):
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


def reads(c):
    """What makes an image of a file, for the network of --weights: see channels.py. Raises ValueError."""
    return reader(c, describe(c.weights)) if hasattr(c, "bands") and c.weights else read_image


def load(weights, size="", precision="fp32"):
    """--weights, --size, --precision -> the network, in eval mode, its parameters in that type"""
    if weights == "pixels":
        return Pixels()
    if weights.startswith("untrained:"):
        config = describe(weights)
        return build(lambda: (ViT if weights.partition(":")[2] in SIZES else ConvNeXt)(config)).eval()
    net = load_backbone(weights, size or None, torch.bfloat16 if precision == "bf16" else torch.float32)
    for norm in (module for module in net.modules() if isinstance(module, nn.LayerNorm)):
        norm.float()  # they see the residual stream, which stays float32
    return net


def chosen_layers(c, config):
    """--layers -> blocks; [] = the last. Raises ValueError."""
    if getattr(c, "layers", "") == "each":
        return [config.depth - 1]
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
    """Of the images of a source that could be read:  cls n D,  patches n D, their mean;  their rows in it, labels n"""

    def __init__(self, job, source):
        self.folder, self.paths = job.folder, [*job.chunks]
        self.files = [index(path) for path in self.paths]
        read_rows = [read(*file["rows"]) for file in self.files]
        self.rows = [items[k] for items, rows in zip(job.chunks.values(), read_rows, strict=True) for k in rows]
        self.labels = torch.tensor([source.label(row) for row in self.rows])  # never from disk: folders are renamed
        self.files = [file for file, rows in zip(self.files, read_rows, strict=True) if rows.size]

    def drop(self):
        """Room for others, if no --cache is to keep them."""
        for path in self.paths if lent(self.folder.path.parent) else ():
            path.unlink()

    def table(self, *names):
        """The named ones side by side, on disk until a row is asked for"""
        return Table(self.files, names, self.folder)

    cls = property(lambda self: self.table("cls")[:])
    patches = property(lambda self: self.table("patches")[:])


class Frozen:
    """
    model    a network in eval mode; a ConvNeXt's map is resized to patches of 16 pixels
    task     the record: its view is what the network sees if no other is named, its control may scatter patches; kept

    Each rank has one; rank 0 calls it, the others serve.
    """
    def __init__(self, model, task, c, ranks=None):
        self.c, self.task, self.ranks = c, task, ranks or Ranks()
        self.device, config = self.ranks.device, model.config
        self.model = model.to(self.device)
        self.layers, self.norm = chosen_layers(c, config), getattr(c, "norm", True)
        self.precision = choose_precision(c.precision, self.device)
        self.scattered = c.control and task.control == "patches"
        self.mean, self.std = (torch.tensor(v, device=self.device)[:, None, None] for v in (config.mean, config.std))
        self.view = self.seen(task.view_at(c.resolution))

    def seen(self, view):
        """A view with this side and this network's patches:  image -> list of C H W uint8"""
        return partial(view, side=self.c.resolution, patch=self.model.config.patch_size)

    # ---- of whole images

    def tokens(self, name, source, view=None, maps=False):
        """
        source   len, load(i) -> C H W uint8, label(i) -> int    view  image -> [C H W uint8], of one size; None = the
                 task's    name  of the split, in --cache    maps  keep all patches, too
        returns  Tokens; images that cannot be read are left out, and named;  raises ValueError if none can be
        """
        size, view = -(-(CHUNK if maps else ROWS) // self.c.batch) * self.c.batch, view or self.view
        images, more = Computed(partial(loaded, source=source, view=view)), dict(maps=True) if maps else {}
        job = self.job(name, images, len(source), partial(pack_tokens, layers=self.layers, maps=maps), size,
                       (view, source), view=view.func.__name__, more=view.keywords, layers=self.layers, **more)
        self.plan(job, lambda: [images[0]], self.tokens_of)
        make([job], self, self.c, self.ranks)
        unreadable = [error for path in job.chunks
                      for error in json.loads(read(*index(path)["unreadable"]).tobytes())]
        for error in unreadable:
            skip(f"unreadable {error}")
        if len(unreadable) == len(source):
            raise ValueError(f"--data: none of {len(source)} images could be read; the first: {unreadable[0]}")
        return Tokens(job, source)

    @torch.no_grad()
    def tokens_of(self, views, maps=False):
        """
        B C H W uint8, of one size, as a list -> cls B D, mean patch B D (pixels: no columns);  maps: B h w D float16
        """
        x = self.network_input(views)
        if isinstance(self.model, Pixels):
            return self.model.thumbnail(x).cpu().numpy(), np.empty((len(x), 0), np.float32)
        found = self.network(x, self.layers)                                       # each layer's; side by side in D
        said = [[f.cls.float() for f in found], [f.patches.mean(1).float() for f in found]]
        said += [[f.patches.half().unflatten(1, f.grid) for f in found]] if maps else []
        return [torch.cat(each, -1).cpu().numpy() for each in said]

    # ---- of patches

    def maps(self, name, source, views=None, layers=None):
        """
        source   len, image(i) -> C H W uint8    views  image -> list of C H W uint8; None = the task's
        layers   blocks, side by side in D; None = those of --layers, or the last
        returns  Stored: for each image the maps of its views, h w D float16, after the final norm;  raises ValueError
                 for an image that cannot be read
        """
        layers, views = self.layers if layers is None else layers, views or self.view
        images = Computed(partial(views_at, source=source, views=views))
        job = self.job(name, images, len(source),
                       partial(pack_maps, layers=layers), CHUNK, (views, source), task=self.c.task, layers=layers,
                       views=views.func.__name__, more=views.keywords, scattered=self.scattered)
        self.plan(job, lambda: images[0], lambda views: [np.stack(self.arrays(views, layers))])
        make([job], self, self.c, self.ranks)
        return Stored(job)

    def walk(self, source, views=None):
        """As maps, but one after the other, of all views of all images, and on no disk; images are read ahead."""
        read = Computed(partial(views_at, source=source, views=views or self.view))
        ahead = (view for _, view in named(loader(read, range(len(source)), self.c.workers)))
        for _, alike in groupby(ahead, lambda view: view.shape):
            while batch := list(islice(alike, self.c.batch)):
                yield from self.arrays(batch)

    @torch.no_grad()
    def live(self, images, layers=None):
        """B C H W uint8, of one size, as a list -> B h w D, on the device, and on no disk"""
        x, layers = self.network_input(images), self.layers if layers is None else layers      # B C H W
        found = self.network(x, layers)
        cell = min(16, self.model.config.patch_size)
        grid = x.shape[2] // cell, x.shape[3] // cell
        maps = torch.cat([resize_map(features, grid).patches.float() for features in found], dim=2)  # B P D
        return maps.unflatten(1, grid)

    def arrays(self, images, layers=None):
        """What `live` says, as it is stored:  h w D float16 each, on the host"""
        maps = self.live(images, layers).half().cpu().numpy()
        return [scatter(m) for m in maps] if self.scattered else list(maps)

    def network(self, x, layers):
        """B C H W -> Features of each block, or of the last one; in bf16 sums and norms stay float32"""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            if not layers and self.norm:
                return [self.model(x)]
            return self.model.layers(x, layers or [self.model.config.depth - 1], norm=self.norm)

    # ---- of anything

    def together(self, function):
        """function(frozen) on all ranks at once, as in training with a network that sees new views; rank 0's answer"""
        return everywhere(partial(at_layers, function=function, layers=self.layers), self, self.ranks)

    def keep(self, name, function, n, **about):
        """
        Stored arrays, function(i) -> list of them, of n images, such as truths: made by the readers of all ranks, and
        kept as features are.    about  what they depend on, beside the task, the seed and the control
        """
        return self.stored(name, Computed(function), n, pack_arrays, function, CHUNK, about)

    def each(self, name, function, n, size=CHUNK, **about):
        """
        As keep, but function(i, frozen) runs where the network is, on any rank: scores of one image each, of one pair,
        of one video.    size  how many lie in a file, and are made again if one of them is cut short
        """
        return self.stored(name, range(n), n, partial(pack_scores, function=function, layers=self.layers),
                           function, size,
                           about | dict(layers=self.layers, scattered=self.scattered))

    def once(self, name, function, **about):
        """One array, function() on rank 0 alone, kept as features are."""
        job = self.job(name, range(1), 1, None, 1, [function], task=self.c.task, **about)
        (path,) = job.chunks
        if not path.is_file():
            write(path, {name: function()})
        return read(*index(path)[name])

    def stored(self, name, dataset, n, compute, function, size, about):
        c = self.c
        about |= dict(task=c.task, control=c.control, seed=c.seed)
        job = self.job(name, dataset, n, compute, size, [function], **about)
        make([job], self, c, self.ranks)
        return Stored(job)

    # ---- what they have in common

    def network_input(self, images):
        return (unit(torch.stack(images).to(self.device)) - self.mean) / self.std

    @cached_property
    def about(self):
        """What all files depend on."""
        c = self.c
        return dict(weights=weights_of(self.model), files=files_of(c), device=self.device.type, data=str(c.data),
                    resolution=c.resolution, limit=c.limit, precision=self.precision, norm=self.norm,
                    images={option.name: getattr(c, option.name) for option in IMAGES if hasattr(c, option.name)})

    def plan(self, job, views, say):
        """
        Prints, before many images are looked at, what that takes: disk, memory, hours

        views  () -> those of the first image    say  B of them -> arrays of B rows
        """
        left = sum(len(items) for path, items in job.chunks.items() if not path.is_file())
        if left < MANY or isinstance(views := views(), Exception) or isinstance(views[0], Exception):
            return
        images = views[:1] * min(self.c.batch, 8)
        found = say(images)  # what is slow the first time is over
        start = time.perf_counter()
        found = say(images)
        hours = (time.perf_counter() - start) / len(images) * len(views) * left / self.ranks.count / 3600
        each = sum(x[0].nbytes for x in found) * len(views)
        network = sum(x.nbytes for x in [*self.model.parameters(), *self.model.buffers()])
        print(f"{job.name}: {left:,} images; disk {each * left / 1e9:.3g} GB in {job.folder.path}, where "
              f"{shutil.disk_usage(job.folder.path).free / 1e9:.0f} GB are free; memory {network / 1e9:.1f} GB of "
              f"weights on each of {self.ranks.count} devices; {hours:.2g} hours or more, by {len(images)} at a time")

    def job(self, name, dataset, n, compute, size, made_by, **about):
        about |= dict(name=name, n=n, size=size, code=code_of(type(self.model), *made_by))
        folder = Keyed(self.about | about, self.c)
        return Job(folder, name, dataset, folder.chunks(range(n), size), compute)


def loaded(i, source, view):
    (image,) = view(source.load(i))
    return image


def pack_tokens(frozen, images, layers, maps):
    """What can be read, in batches; what cannot, by what was said of it."""
    frozen.layers = layers
    found, waiting, rows, unreadable = [], {}, [], []
    for row, item in enumerate(images):
        if isinstance(item, ValueError):
            raise item
        if isinstance(item, OSError):
            unreadable.append(str(item))
            continue
        alike = waiting.setdefault(item.shape, [])  # images of one size go through the network together
        alike.append((len(rows), item))
        rows.append(row)
        if len(alike) == frozen.c.batch:
            found += tokens_in_place(frozen, waiting.pop(item.shape), maps)
    for alike in waiting.values():
        found += tokens_in_place(frozen, alike, maps)
    found = [said for _, *said in sorted(found, key=lambda row: row[0])]
    said = map(np.stack, zip(*found, strict=True)) if found else (np.empty((0, 0)),) * (2 + maps)
    names = ("cls", "patches", "maps")[: 2 + maps]
    return dict(zip(names, said, strict=True), rows=np.array(rows, np.int64),
                unreadable=np.frombuffer(json.dumps(unreadable).encode(), np.uint8))


def tokens_in_place(frozen, views, maps):
    """[(place, view)], views of one size -> [(place, cls D, mean patch D)], and its map"""
    places, views = zip(*views, strict=True)
    return list(zip(places, *frozen.tokens_of(views, *[True] * maps), strict=True))


def views_at(i, source, views):
    return views(source.image(i))


def pack_maps(frozen, images, layers):
    """Views of any sizes; those of one size go through the network together, wherever they stand in the chunk."""
    names, found = [], {}

    def views():
        for name, view in named(images):
            names.append(name)
            yield view

    for places, alike in batched(views(), frozen.c.batch):
        found |= zip(places, frozen.arrays(alike, layers), strict=True)
    return {name: found[k] for k, name in enumerate(names)}


def batched(views, size):
    """-> (places, views of one shape), `size` of them or what is left"""
    waiting = {}
    for k, view in enumerate(views):
        alike = waiting.setdefault(view.shape, [])
        alike.append((k, view))
        if len(alike) == size:
            yield zip(*waiting.pop(view.shape), strict=True)
    yield from (zip(*alike, strict=True) for alike in waiting.values())


def pack_arrays(frozen, images):
    return dict(named(images))


def pack_scores(frozen, images, function, layers):
    return dict(named(at_layers(frozen, partial(function, i), layers) for i in images))


def at_layers(frozen, function, layers):
    frozen.layers = layers  # rank 0's: it goes from block to block
    return function(frozen)


def scatter(map):
    """The patches of h w D in an order that is drawn from themselves: batches and chunks do not matter."""
    rng = np.random.default_rng(zlib.crc32(map.tobytes()))
    return rng.permutation(map.reshape(-1, map.shape[2])).reshape(map.shape)
