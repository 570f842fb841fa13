"""
Plain-DETR: objects of one map of frozen patches, without a pyramid and without suppression.

    DETRConfig       widths and counts
    seen             images -> the map: the whole image, small, beside its windows, each as large as the network likes
    Proposals        memory -> a token and an anchor for every cell of four strides
    BoxAttention     queries look at cells, biased by where those lie from the sides of a query's box
    DETR             map, padding -> Answers: of every layer class logits and boxes
    best             logits, boxes -> scores, labels, boxes in pixels, best first
    Head, layers_of  the decoder for a backbone, at its start values; the blocks that it sees; STAGES: of its training
    Detector         a backbone and its decoder: list of images -> list of dict(scores, labels, boxes)

Names of parameters are those of the released file. Boxes are centre x, y, width, height in pixels of the padded image,
unless they are called corners. Q queries, d the decoder's width, n proposals. Losses: objects.py.

paper: DINOv3 §6.3.1, App. D.9; Plain-DETR, Lin et al. 2023. Dimension letters: see the top of model.py.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from decoders.fit import Recipe
from decoders.objects import aware, corners, decode, focal

STRIDE = 16              # pixels of a cell of the map
FEWEST = 4               # cells a side: one of the coarsest
ANCHOR = 50.0            # pixels: side of the finest proposals' anchors
INSIDE = 0.01, 0.99      # of the image's sides: what an anchor's centre and sides must lie between
BEST = 1500              # answers for an image


@dataclass(frozen=True)
class DETRConfig:
    width: int               # of the map: the layers side by side, twice with windows
    windows: int = 3         # of the image, per side; 0 = the image as it is
    d: int = 768
    heads: int = 8           # A
    hidden: int = 2048       # of the feed-forward networks
    bias: int = 512          # hidden width of what makes the bias
    depths: tuple = (6, 6)   # layers of encoder and decoder
    queries: int = 1500      # each for one object
    repeated: int = 1500     # in training alone: of a second branch, in which several stand for one object
    n_classes: int = 91
    dropout: float = 0.1     # in the encoder's feed-forward networks
    recompute: bool = True   # in the backward, what attention keeps: it fills the memory, and the backbone costs more


@dataclass(frozen=True)
class Stage:
    recipe: Recipe
    epochs: int
    of_classes: Callable     # the loss of classes
    giou: float              # weight of the boxes' generalised IoU


UNDECAYED = "cpb_mlp", "level_embed"
STEPS = 22 * 2_500_000 // 32, 12 * 117_266 // 32  # of Objects365's images, of COCO's that have a box
STAGES = dict(
    small=Stage(Recipe(lr=1e-3, weight_decay=0.05, batch=4, part=1, warmup=0.05, drop=0.8, clip=0.1,
                       undecayed=UNDECAYED), 50, focal, 2.0),                                  # ours
    objects365=Stage(Recipe(lr=5e-5, weight_decay=0.05, batch=32, part=1, warmup=1000 / STEPS[0], drop=20 / 22,
                            clip=0.1, undecayed=UNDECAYED), 22, focal, 2.0),                   # at 1536 pixels
    objects365_large=Stage(Recipe(lr=2.5e-5, weight_decay=0.05, batch=32, part=1, drop=1.0, clip=0.1,
                                  undecayed=UNDECAYED), 4, focal, 2.0),                        # at 2048
    coco=Stage(Recipe(lr=2.5e-5, weight_decay=0.05, batch=32, part=1, warmup=2000 / STEPS[1], until=8 / 12, least=0.1,
                      clip=0.1, undecayed=UNDECAYED), 12, aware, 4.0))                         # at 2048


class Answer(NamedTuple):
    logits: torch.Tensor     # B Q C
    deltas: torch.Tensor     # B Q 4, of `before`
    before: torch.Tensor     # B Q 4
    boxes: torch.Tensor      # B Q 4


class Answers(NamedTuple):
    layers: list             # Answer of each layer
    repeated: list           # the same of the second branch; in training alone
    proposals: Answer        # of all cells, whose class 0 says that there is an object
    sizes: torch.Tensor      # B 2, width and height of each image, whole cells


# --------------------------------------------------------------------------------
# What the network sees


def edges(side, n):
    """Where n windows of a side begin, and its end: all whole patches, the last takes what remains"""
    size = STRIDE * math.ceil(side // n / STRIDE)
    return [*range(0, n * size, size), side]


def seen(images, look, n_windows):
    """
    images     B 3 H W, normalised, of whole patches    look  images -> Features of each layer
    n_windows  per side; 0 = the image as it is
    returns    B columns h w float32: layers side by side, shallow first; with windows those of the whole image, reduced
               to a window's size, then those of the windows
    raises     ValueError for an image that has too few patches for the windows

    paper:   App. D.9
    """
    def columns(x):
        return torch.cat([features.map() for features in look(x)], 1).float()
    if not n_windows:
        return columns(images)
    H, W = images.shape[2:]
    rows, cols = edges(H, n_windows), edges(W, n_windows)
    if rows[-1] <= rows[-2] or cols[-1] <= cols[-2]:
        raise ValueError(f"detr: {W}x{H} pixels do not go into {n_windows}x{n_windows} windows of whole patches; "
                         "take larger images, or fewer windows")
    windows = torch.cat([torch.cat([columns(images[:, :, top:bottom, left:right])
                                    for left, right in pairwise(cols)], 3)
                         for top, bottom in pairwise(rows)], 2)             # B columns h w
    whole = columns(F.interpolate(images, (rows[1], cols[1]), mode="bilinear", antialias=True))
    return torch.cat([F.interpolate(whole, windows.shape[2:], mode="bilinear"), windows], 1)


def batched(images):
    """
    Images C H W of any sizes -> B C H W in whole patches, zeros right and below;  B h w bool, True = padding
    Raises ValueError if that is not FEWEST patches a side.
    """
    H, W = (-(-max(image.shape[k] for image in images) // STRIDE) * STRIDE for k in (1, 2))
    if min(H, W) < FEWEST * STRIDE:
        raise ValueError(f"detr: images of {W}x{H} pixels; wanted at least {FEWEST * STRIDE} a side, for its coarsest "
                         "cells")
    x = torch.stack([F.pad(image, (0, W - image.shape[2], 0, H - image.shape[1])) for image in images])
    there = torch.stack([F.pad(torch.ones_like(image[0]), (0, W - image.shape[2], 0, H - image.shape[1]))
                         for image in images])[:, ::STRIDE, ::STRIDE]
    return x, there == 0

# --------------------------------------------------------------------------------
# Positions


def waves(x, n):
    """... angles -> ... n: sines and cosines in turn, of ever longer periods, 2 pi to 20,000 pi"""
    k = torch.arange(n, device=x.device)
    x = x[..., None] / 10000 ** (2 * (k // 2) / n)
    return torch.where(k % 2 == 0, x.sin(), x.cos())


def positions(padding, d):
    """B h w, True = padding -> B h w d: a half for the row, a half for the column, each image from 0 to 2 pi"""
    there, halves = (~padding).float(), []
    for axis in 1, 2:
        count = there.cumsum(axis)
        halves.append(waves((count - 0.5) / (count.narrow(axis, -1, 1) + 1e-6) * 2 * math.pi, d // 2))
    return torch.cat(halves, -1)

# --------------------------------------------------------------------------------
# Layers


class EncoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(c.d, c.heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(c.d, c.hidden), nn.Linear(c.hidden, c.d)
        self.norm1, self.norm2 = nn.LayerNorm(c.d), nn.LayerNorm(c.d)
        self.dropout, self.recompute = nn.Dropout(c.dropout), c.recompute

    def forward(self, *given):
        if self.training and self.recompute:
            return checkpoint(self.encode, *given, use_reentrant=False)
        return self.encode(*given)

    def encode(self, x, pos, padding):
        """x, pos  B P d    padding  B P"""
        at = x + pos
        x = self.norm1(x + self.self_attn(at, at, x, key_padding_mask=padding, need_weights=False)[0])
        return self.norm2(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class BoxAttention(nn.Module):
    """
    softmax(q k / sqrt(E) + bias) v, with the bias of cell (i, j) that of its column and that of its row: each of a
    small network, of the distances in pixels from the cell's centre to both sides of the box

    paper:   Plain-DETR §4.1, box relative position bias
    """

    def __init__(self, c):
        super().__init__()
        self.heads, self.recompute = c.heads, c.recompute
        self.cpb_mlp1, self.cpb_mlp2 = (nn.Sequential(
            nn.Linear(2, c.bias), nn.ReLU(), nn.Linear(c.bias, c.heads, bias=False)) for _ in range(2))
        self.q, self.k, self.v, self.proj = (nn.Linear(c.d, c.d) for _ in range(4))

    def bias(self, network, sides, n):
        """sides  B Q 2: low and high, along an axis of n cells -> B A Q n"""
        centres = STRIDE * (torch.arange(n, device=sides.device) + 0.5)
        return network(sides[:, :, None] - centres[:, None]).permute(0, 3, 1, 2)

    def forward(self, *given):
        if self.training and self.recompute:
            return checkpoint(self.attend, *given, use_reentrant=False, preserve_rng_state=False)
        return self.attend(*given)

    def attend(self, x, keys, memory, boxes, padding):
        """x  B Q d    keys, memory  B P d    boxes  B Q 4, corners    padding  B h w    returns  B Q d"""
        h, w = padding.shape[1:]
        q, k, v = (change(y).unflatten(2, (self.heads, -1)).transpose(1, 2)                    # B A Q E, B A P E
                   for change, y in ((self.q, x), (self.k, keys), (self.v, memory)))
        columns, rows = self.bias(self.cpb_mlp1, boxes[..., 0::2], w), self.bias(self.cpb_mlp2, boxes[..., 1::2], h)
        bias = columns[:, :, :, None] + rows[..., None] - 100.0 * padding[:, None, None]       # B A Q h w
        out = F.scaled_dot_product_attention(q, k, v, bias.flatten(3))
        return self.proj(out.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.cross_attn = BoxAttention(c)
        self.self_attn = nn.MultiheadAttention(c.d, c.heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(c.d, c.hidden), nn.Linear(c.hidden, c.d)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(c.d) for _ in range(3))

    def forward(self, x, pos, keys, memory, boxes, padding):
        z = self.norm2(x)  # the second norm comes first: so the file counts them
        x = x + self.self_attn(z + pos, z + pos, z, need_weights=False)[0]
        x = x + self.cross_attn(self.norm1(x) + pos, keys, memory, boxes, padding)
        return x + self.linear2(self.linear1(self.norm3(x)).relu())


class MLP(nn.Module):
    def __init__(self, d, n_out):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, n_out)])

    def forward(self, x):
        first, second, last = self.layers
        return last(second(first(x).relu()).relu())


class ChannelNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.ln = nn.LayerNorm(d)

    def forward(self, x):
        return self.ln(x.movedim(1, -1)).movedim(-1, 1)                                        # B d h w

# --------------------------------------------------------------------------------
# The decoder


class Layers(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Transformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c.d
        self.encoder = Layers(EncoderLayer(c) for _ in range(c.depths[0]))
        self.decoder = Layers(DecoderLayer(c) for _ in range(c.depths[1]))
        self.decoder.final_layer_norm = nn.LayerNorm(d)
        self.level_embed = nn.Parameter(torch.randn(1, d))
        self.enc_output, self.enc_output_norm = nn.Linear(d, d), nn.LayerNorm(d)
        self.pos_trans, self.pos_trans_norm = nn.Linear(2 * d, 2 * d), nn.LayerNorm(2 * d)
        half = [nn.Conv2d(d, d, 2, stride=2) for _ in range(3)]
        self.enc_output_proj = nn.ModuleList([                                                 # strides 8, 16, 32, 64
            nn.Sequential(nn.ConvTranspose2d(d, d, 2, stride=2)), nn.Identity(), nn.Sequential(half[0]),
            nn.Sequential(half[1], ChannelNorm(d), nn.GELU(), half[2])])

    def cells(self, memory, padding):
        """
        memory   B P d    padding  B h w
        returns  tokens B n d, those of cells that are padding or whose anchor is no part of the image 0;  their anchors
                 B n 4, of those cells one and the same;  sizes B 2, width and height
        """
        maps = [change(memory.transpose(1, 2).unflatten(2, padding.shape[1:])) for change in self.enc_output_proj]
        masks = [nearest(padding, m.shape[2:]) for m in maps]
        sizes = 8 * torch.stack([(~masks[0]).any(1).sum(1), (~masks[0]).any(2).sum(1)], 1)     # B 2
        anchors = torch.cat([anchors_of(m, 8 * 2**k, ANCHOR * 2**k) for k, m in enumerate(maps)])  # n 4
        padded = torch.cat([mask.flatten(1) for mask in masks], 1)                             # B n
        share = anchors / sizes.repeat(1, 2)[:, None]                                          # B n 4
        out = padded | ~((share > INSIDE[0]) & (share < INSIDE[1])).all(2)
        tokens = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)                    # B n d
        far = 8.0 * max(maps[0].shape[2:])
        return tokens.masked_fill(out[..., None], 0), anchors.expand_as(share).masked_fill(out[..., None], far), sizes


def nearest(mask, size):
    """B h w -> B of another size: row i of n is row floor(i h / n)"""
    rows, cols = (torch.arange(n, device=mask.device) * old // n for n, old in zip(size, mask.shape[1:], strict=True))
    return mask[:, rows][:, :, cols]


def anchors_of(map, stride, side):
    """A square of that side around the centre of each cell of B d h w:  (h w) 4"""
    y, x = (stride * (torch.arange(n, device=map.device) + 0.5) for n in map.shape[2:])
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y, torch.full_like(x, side), torch.full_like(x, side)], -1).flatten(0, 1)


class DETR(nn.Module):
    """
    B columns h w, B h w padding -> Answers; in training of both branches, each of which sees its own queries alone

    An image with fewer cells than queries has as many queries as cells. `see` is what a frozen network says of images.
    """

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.input_proj = nn.ModuleList([nn.Sequential(nn.Conv2d(c.width, c.d, 1), nn.GroupNorm(32, c.d))])
        self.query_embed = nn.Embedding(c.queries + c.repeated, c.d)
        self.class_embed = nn.ModuleList(nn.Linear(c.d, c.n_classes) for _ in range(c.depths[1] + 1))
        self.bbox_embed = nn.ModuleList(MLP(c.d, 4) for _ in range(c.depths[1] + 1))
        self.transformer = Transformer(c)

    def see(self, frozen, images):
        """frozen  see fit.py    images  C H W uint8 each, of any sizes -> what forward takes"""
        x, padding = batched([frozen.network_input([image])[0] for image in images])
        return seen(x, lambda y: frozen.network(y, frozen.layers), self.config.windows), padding

    def forward(self, given):
        (x, padding), c, t = given, self.config, self.transformer
        flat = padding.flatten(1)                                                              # B P
        pos = positions(padding, c.d).flatten(1, 2) + t.level_embed                            # B P d
        memory = self.input_proj[0](x).flatten(2).transpose(1, 2)                              # B P d
        for layer in t.encoder.layers:
            memory = layer(memory, pos, flat)
        tokens, anchors, sizes = t.cells(memory, padding)
        tokens = t.enc_output_norm(t.enc_output(tokens))                                       # B n d
        proposals = self.answer(-1, tokens, anchors, sizes)
        wanted = c.queries + c.repeated * self.training
        best = proposals.logits[..., 0].topk(min(wanted, tokens.shape[1])).indices             # B Q
        boxes = proposals.boxes.detach().gather(1, best[..., None].expand(-1, -1, 4))
        branches = [self.decoded(queries, start, memory, pos, padding, sizes) for queries, start in zip(
            self.query_embed.weight[: best.shape[1]].split(c.queries), boxes.split(c.queries, 1), strict=True)]
        return Answers(branches[0], sum(branches[1:], []), proposals, sizes)

    def answer(self, k, x, before, sizes):
        deltas = self.bbox_embed[k](x)
        return Answer(self.class_embed[k](x), deltas, before, decode(before, deltas, sizes))

    def decoded(self, queries, boxes, memory, pos, padding, sizes):
        """
        queries  Q d    boxes  B Q 4: the proposals    returns  Answer of each layer

        A layer's loss reaches its own step and the one before it: attention sees boxes without their gradient.
        """
        t, found = self.transformer, []
        x, keys = queries.expand(len(boxes), -1, -1), memory + pos
        at = waves(2 * math.pi * boxes, self.config.d // 2).flatten(2)                         # B Q 2d
        at = t.pos_trans_norm(t.pos_trans(at))[..., : self.config.d]
        for k, layer in enumerate(t.decoder.layers):
            x = layer(x, at, keys, memory, corners(boxes.detach()), padding)
            found.append(self.answer(k, t.decoder.final_layer_norm(x), boxes, sizes))
            boxes = decode(boxes.detach(), found[-1].deltas, sizes)
        return found

# --------------------------------------------------------------------------------
# Before training


def sized(width, n_columns):
    """Widths as released from 1024 on; below, ours. n_columns: of the map"""
    if width >= 1024:
        return DETRConfig(n_columns)
    if width >= 384:
        return DETRConfig(n_columns, d=256, hidden=1024, bias=256, queries=300, repeated=1500)
    return DETRConfig(n_columns, d=64, heads=4, hidden=256, bias=64, depths=(2, 3), queries=20, repeated=40,
                      dropout=0.0, recompute=False)


def Head(width, n_out, windows, n_layers=4):
    """The decoder for n_layers of a backbone of that width, at its start values"""
    c = sized(width, width * n_layers * (1 + (windows > 0)))
    head = start(DETR(replace(c, windows=windows, n_classes=n_out)))
    head.width = width
    return head


def layers_of(config, layers):
    """The blocks that it sees of a backbone: those, or four as released. Raises ValueError if it cannot see them."""
    if config.patch_size != STRIDE:
        raise ValueError(f"detr wants a backbone with patches of {STRIDE} pixels, this one has {config.patch_size}")
    return layers or [max(i * config.depth // 4 - 1, 0) for i in (1, 2, 3, 4)]


def start(head):
    """Its parameters as training finds them: every class at 0.01, boxes that do not move; decoder layers small"""
    for name, p in head.named_parameters():
        if name.endswith("level_embed") or name.startswith("query_embed"):
            nn.init.normal_(p)
        elif p.ndim > 1 and name.startswith("transformer.decoder."):
            nn.init.trunc_normal_(p, std=0.02)
        elif p.ndim > 1:
            nn.init.xavier_uniform_(p)
        elif not name.endswith("weight"):
            nn.init.zeros_(p)
    for classes, boxes in zip(head.class_embed, head.bbox_embed, strict=True):
        nn.init.constant_(classes.bias, -math.log(99))
        nn.init.zeros_(boxes.layers[2].weight)
    return head

# --------------------------------------------------------------------------------
# Answers for an image


def best(logits, boxes, size, most=BEST):
    """
    logits   Q C    boxes  Q 4    size  height and width of the image, pixels
    returns  dict(scores n, labels n, boxes n 4: left, top, right, bottom), best first; n is `most`, or Q C
    """
    scores, index = logits.sigmoid().flatten().topk(min(most, logits.numel()))
    limit = boxes.new_tensor([size[1], size[0]] * 2)
    found = torch.minimum(corners(boxes).clamp(min=0), limit)[index // logits.shape[1]]
    return dict(scores=scores, labels=index % logits.shape[1], boxes=found)


class Detector(nn.Module):
    """Images C H W of any sizes, normalised, in a list -> dict(scores, labels, boxes) of each, as `best` has them"""

    def __init__(self, backbone, head, layers):
        super().__init__()
        self.backbone, self.head, self.layers = backbone, head, layers

    @torch.no_grad()
    def forward(self, images):
        x, padding = batched(images)
        x = seen(x, lambda y: self.backbone.layers(y, self.layers), self.head.config.windows)
        last = self.head((x, padding)).layers[-1]
        return [best(*each, image.shape[1:]) for *each, image in zip(last.logits, last.boxes, images, strict=True)]


def outputs(c):
    """What the tensors of a file do not tell, in words: for its metadata, and to be read again"""
    return f"{c.n_classes} classes, {c.windows} windows a side, {c.queries} queries"


def read_config(path, shapes, said, windows):
    """
    The configuration of a file, by its tensors' shapes; raises ValueError if they are of no such decoder.

    said     `outputs` of our own files, or nothing: then half of the queries are those of the second branch
    windows  per side, whatever is said, or None; 3 if nothing is, as in the released file
    """
    need = dict(zip(("input_proj.0.0.weight", "query_embed.weight", "class_embed.0.weight",
                     "transformer.decoder.layers.0.cross_attn.cpb_mlp1.2.weight",
                     "transformer.decoder.layers.0.linear1.weight"), (4, 2, 2, 2, 2), strict=True))
    for name, n in need.items():
        if len(shapes.get(name, ())) != n:
            raise ValueError(f"{path}: {name} is {shapes.get(name, 'missing')}, wanted one of {n} dimensions")
    (d, width, *_), (queries, _), (n_classes, _), (heads, bias), (hidden, _) = (shapes[name] for name in need)
    depths = tuple(sum(name.startswith(f"transformer.{part}.layers.") and name.endswith(".norm1.weight")
                       for name in shapes) for part in ("encoder", "decoder"))
    if d % 32 or d % heads:
        raise ValueError(f"{path}: a width of {d} goes into no 32 groups and {heads} heads")
    known = re.search(r"(\d+) windows a side, (\d+) queries", said)
    windows, first = (windows or int(known[1]), int(known[2])) if known else (windows or 3, queries // 2)
    return DETRConfig(width, windows, d, heads, hidden, bias, depths, first, queries - first, n_classes)
