"""
Mask2Former: queries, each of which becomes a class and a mask, on the maps of an adapter.

    Mask2FormerConfig   sizes
    PixelDecoder        four maps -> three that know of one another, and features for masks of stride 4
    Predictor           queries look where their last mask was, nine times -> ten answers
    Mask2Former         Features of four blocks, and the images -> Answers
    OfImages            on its backbone: images -> classes and masks, or scores of all classes for each pixel
    blocks              which four
    sized               the sizes for a backbone; STAGES, recipe
    trained             a head from images and truths; begin: from another one; planned
    check               options

Names of parameters are those of the released file. Losses and what becomes of the answers: masks.py.

paper: DINOv3 §6.3.2, App. D.10. Cheng et al. 2022. Dimension letters: see the top of model.py; besides
    d width of the decoder   Q queries   n classes   L layers, whose answers and the first are L+1
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from decoders.adapter import COARSEST, PLACES, Adapter, DeformableAttention, centres
from decoders.fit import Recipe, fit, plan, untrained
from decoders.masks import CLASS, POINTS, masks_loss, sample, semantic
from engine.crops import SCALES

LEVELS = 3        # maps that queries look at: strides 32, 16, 8
GROUPS = 32       # of a GroupNorm
UNDECAYED = "level_e", "query_"   # embeddings
SMALL = 384       # width of a backbone below which the decoder is one that a laptop can train
NEAR = (0.8, 1.25), 30.0   # its crops' scales, and weight of the classes: with the others' it finds no class for long

resized = partial(F.interpolate, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Mask2FormerConfig:
    width: int               # D
    n_out: int = 150         # classes
    decoder: int = 2048      # d
    hidden: int = 4096       # of its networks
    queries: int = 100       # Q
    encoder_layers: int = 6
    layers: int = 9          # L
    stem: int = 64           # channels of the adapter's first convolutions
    drop: float = 0.3        # how often a sample does without a ConvFFN of the adapter
    heads: int = 16          # of every attention


@dataclass(frozen=True)
class Stage:
    """One of the paper's trainings: its data is --task's of that name"""
    resolution: int          # pixels
    iterations: int
    lr: float                # peak
    warmup: int              # steps


# paper: App. D.10; ade20k, cityscapes and voc each begin from hypersim, and that from stuff. 0: not given
STAGES = dict(stuff=Stage(1280, 80000, 1.5e-5, 6000), hypersim=Stage(896, 10000, 2.5e-5, 1500),
              ade20k=Stage(896, 20000, 3e-5, 1500), cityscapes=Stage(1280, 0, 1.5e-5, 1500),
              voc=Stage(1024, 0, 1e-5, 1500))


def recipe(task, width):
    """
    Wide decoders have one image at a time: two of 896 pixels take more than 80 GB beside the 7B backbone.

    differs: the paper is silent on weight decay, and on what is not decayed: ViT-Adapter's; and on clipping: none is.
             For a set that it does not train on the rate is Mask2Former's, for a small decoder ten times that; their
             warm-up and clipping are ours
    """
    if task in STAGES and width >= SMALL:
        stage = STAGES[task]
        return Recipe(stage.lr, 0.05, 16, 1, warmup=stage.warmup / (stage.iterations or 20000), undecayed=UNDECAYED)
    return Recipe(1e-4, 0.05, 16, 1, warmup=0.075, clip=1.0, undecayed=UNDECAYED) if width >= SMALL else \
        Recipe(1e-3, 0.05, 4, warmup=0.075, clip=1.0, undecayed=UNDECAYED)


def sized(width):
    """As released for 7B, and the paper's baselines' 1024 from there on; below, chosen so that a laptop can train it"""
    if width < SMALL:
        return Mask2FormerConfig(width, decoder=64, hidden=256, queries=24, encoder_layers=2, layers=3, stem=16, drop=0,
                                 heads=4)
    decoder, hidden = (2048, 4096) if width >= 4096 else (1024, 4096) if width >= 1024 else (256, 1024)
    return Mask2FormerConfig(width, decoder=decoder, hidden=hidden)


class Answers(NamedTuple):
    """Of all L+1 predictions, the last one last"""
    logits: tuple    # B Q n+1 each: the last class is none of them
    masks: tuple     # B Q H/4 W/4 each: logits

# --------------------------------------------------------------------------------
# Pixel decoder


def positions(size, d, device):
    """Sines and cosines of the cells of a map: hw d, of rows first, then of columns"""
    k = torch.arange(d // 2, device=device)
    periods = 10000 ** (2 * (k // 2) / (d / 2))
    found = []
    for n in size:
        angles = torch.arange(1, n + 1, device=device)[:, None] / (n + 1e-6) * 2 * math.pi / periods
        found.append(torch.where(k % 2 == 0, angles.sin(), angles.cos()))                      # n d/2
    rows, columns = found
    return torch.cat([rows[:, None].expand(-1, size[1], -1), columns[None].expand(size[0], -1, -1)], 2).flatten(0, 1)


class EncoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn = DeformableAttention(c.decoder, c.decoder, LEVELS, c.heads)
        self.norm1, self.norm2 = nn.LayerNorm(c.decoder), nn.LayerNorm(c.decoder)
        self.linear1, self.linear2 = nn.Linear(c.decoder, c.hidden), nn.Linear(c.hidden, c.decoder)

    def forward(self, y, position, places, sizes):
        y = self.norm1(y + self.self_attn(y + position, places, y, sizes))
        return self.norm2(y + self.linear2(self.linear1(y).relu()))


class Layers(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(c) for _ in range(c.encoder_layers))


class Encoder(nn.Module):
    """B d h w, of three maps, coarse first -> the same"""

    def __init__(self, c):
        super().__init__()
        self.level_encoding = nn.Parameter(torch.randn(LEVELS, c.decoder))
        self.encoder = Layers(c)

    def forward(self, maps):
        sizes = [tuple(m.shape[2:]) for m in maps]
        y = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)                         # B S d
        position = torch.cat([positions(size, y.shape[2], y.device) + level
                              for size, level in zip(sizes, self.level_encoding, strict=True)])
        for layer in self.encoder.layers:
            y = layer(y, position, centres(sizes, y.device), sizes)
        parts = y.split([h * w for h, w in sizes], 1)
        return [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]


class NormedConv(nn.Conv2d):
    """Convolution without bias, then GroupNorm"""

    def __init__(self, n_in, n_out, side):
        super().__init__(n_in, n_out, side, padding=side // 2, bias=False)
        self.norm = nn.GroupNorm(GROUPS, n_out)

    def forward(self, x):
        return self.norm(super().forward(x))


class PixelDecoder(nn.Module):
    """Maps B D . of strides 4, 8, 16, 32 -> B d . of strides 32, 16, 8; features of masks B d H/4 W/4"""

    def __init__(self, c):
        super().__init__()
        d = c.decoder
        self.input_convs = nn.ModuleList(nn.Sequential(nn.Conv2d(c.width, d, 1), nn.GroupNorm(GROUPS, d))
                                         for _ in range(LEVELS))
        self.encoder = Encoder(c)
        self.lateral_convs = nn.ModuleList([NormedConv(c.width, d, 1)])
        self.output_convs = nn.ModuleList([NormedConv(d, d, 3)])
        self.mask_feature = nn.Conv2d(d, d, 1)

    def forward(self, maps):
        finest, *others = maps
        found = self.encoder([change(m) for change, m in zip(self.input_convs, others[::-1], strict=True)])
        x = self.lateral_convs[0](finest) + resized(found[-1], finest.shape[2:])
        return found, self.mask_feature(self.output_convs[0](x).relu())

# --------------------------------------------------------------------------------
# Queries


class Attention(nn.Module):
    """That of nn.MultiheadAttention, its names too; the mask is one for all heads"""

    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.empty(3 * d, d)), nn.Parameter(torch.zeros(3 * d))
        self.out_proj = nn.Linear(d, d)

    def forward(self, q, k, v, allowed=None):
        """q B Q d    k, v  B N d    allowed  B Q N bool"""
        thirds = zip((q, k, v), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (F.linear(x, *third).unflatten(2, (self.heads, -1)).transpose(1, 2) for x, *third in thirds)
        found = F.scaled_dot_product_attention(q, k, v, None if allowed is None else allowed[:, None])
        return self.out_proj(found.transpose(1, 2).flatten(2))


class CrossLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.multihead_attn, self.norm = Attention(c.decoder, c.heads), nn.LayerNorm(c.decoder)

    def forward(self, x, own, keys, values, allowed):
        return self.norm(x + self.multihead_attn(x + own, keys, values, allowed))


class SelfLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.norm = Attention(c.decoder, c.heads), nn.LayerNorm(c.decoder)

    def forward(self, x, own):
        return self.norm(x + self.self_attn(x + own, x + own, x))


class NetworkLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(c.decoder, c.hidden), nn.Linear(c.hidden, c.decoder)
        self.norm = nn.LayerNorm(c.decoder)

    def forward(self, x):
        return self.norm(x + self.linear2(self.linear1(x).relu()))


class MaskEmbed(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(3))

    def forward(self, x):
        return self.layers[2](self.layers[1](self.layers[0](x).relu()).relu())


class Predictor(nn.Module):
    """Maps of strides 32, 16, 8 and features of masks -> Answers"""

    def __init__(self, c):
        super().__init__()
        d = c.decoder
        self.query_feat, self.query_embed = nn.Embedding(c.queries, d), nn.Embedding(c.queries, d)
        self.level_embed = nn.Embedding(LEVELS, d)
        self.transformer_cross_attention_layers = nn.ModuleList(CrossLayer(c) for _ in range(c.layers))
        self.transformer_self_attention_layers = nn.ModuleList(SelfLayer(c) for _ in range(c.layers))
        self.transformer_ffn_layers = nn.ModuleList(NetworkLayer(c) for _ in range(c.layers))
        self.post_norm, self.class_embed, self.mask_embed = nn.LayerNorm(d), nn.Linear(d, c.n_out + 1), MaskEmbed(d)

    def forward(self, maps, mask_features):
        sizes = [m.shape[2:] for m in maps]
        values = [m.flatten(2).transpose(1, 2) + e for m, e in zip(maps, self.level_embed.weight, strict=True)]
        keys = [v + positions(size, v.shape[2], v.device) for v, size in zip(values, sizes, strict=True)]  # B N d
        x, own = (each.weight.expand(len(maps[0]), -1, -1) for each in (self.query_feat, self.query_embed))
        found = [self.predict(x, mask_features)]
        layers = zip(self.transformer_cross_attention_layers, self.transformer_self_attention_layers,
                     self.transformer_ffn_layers, strict=True)
        for i, (look, confer, think) in enumerate(layers):
            level = i % LEVELS
            x = look(x, own, keys[level], values[level], allowed(found[-1][1], sizes[level]))
            x = think(confer(x, own))
            found.append(self.predict(x, mask_features))
        return Answers(*zip(*found, strict=True))

    def predict(self, x, mask_features):
        z = self.post_norm(x)
        return self.class_embed(z), torch.einsum("bqd,bdhw->bqhw", self.mask_embed(z), mask_features)


@torch.no_grad()
def allowed(found, size):
    """Masks B Q . -> where queries may look, B Q N: inside of their mask, or everywhere if that is empty"""
    inside = resized(found, size).sigmoid().flatten(2) >= 0.5
    return inside | ~inside.any(2, keepdim=True)

# --------------------------------------------------------------------------------
# All of it


class Segmenter(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.pixel_decoder, self.predictor = PixelDecoder(c), Predictor(c)
        for name, x in self.named_parameters():
            if x.dim() > 1 and "sampling_offsets" not in name and "attention_weights" not in name \
                    and "level" not in name and "query_" not in name:
                nn.init.xavier_uniform_(x)

    def forward(self, maps):
        return self.predictor(*self.pixel_decoder(maps))


class Mask2Former(nn.Module):
    """(Features of four blocks, shallow first, the images B 3 H W that they are of, normalised) -> Answers"""

    def __init__(self, c):
        super().__init__()
        self.width = c.width
        self.segmentation_model = nn.ModuleList([Adapter(c.width, c.stem, c.drop, c.heads), Segmenter(c)])

    def see(self, frozen, images):
        """What forward takes, of C H W uint8 each"""
        x = frozen.network_input(images)
        return frozen.network(x, frozen.layers), x

    def forward(self, seen):
        adapter, segmenter = self.segmentation_model
        return segmenter(adapter(*seen))


class OfImages(nn.Module):
    """images B 3 H W, normalised, sides multiples of 32 -> dict(logits=B Q n+1, masks=B Q H/4 W/4)"""

    def __init__(self, backbone, head, layers):
        super().__init__()
        self.backbone, self.head, self.layers = backbone, head, layers
        self.n_out = head.segmentation_model[1].predictor.class_embed.out_features - 1

    @torch.no_grad()
    def forward(self, images):
        found = self.head((self.backbone.layers(images, self.layers), images))
        return dict(logits=found.logits[-1], masks=found.masks[-1])

    def semantic(self, images):
        """-> B n H W, sums of the queries' scores: no probabilities"""
        return semantic(**self(images), size=images.shape[2:])


def Head(width, n_out):
    """The Mask2Former for a backbone of that width"""
    c = sized(width)
    return Mask2Former(Mask2FormerConfig(**(vars(c) | dict(n_out=n_out))))


def stride(side):
    """Windows of this side lie so far apart: 896, 596"""
    return round(side * 596 / 896)


def blocks(depth):
    """The four blocks, 0-based, of a backbone of that depth, as released"""
    return [4, 11, 17, 23] if depth == 24 else [i * depth // 4 - 1 for i in (1, 2, 3, 4)]


def trained(source, order, n_classes, per, frozen, ranks):
    """A head of images and truths, as masks.sample takes them, and what is known of it; see fit.py"""
    c, D = frozen.c, frozen.model.config.width
    head = untrained(partial(Head, D, n_classes), c)
    if c.init:
        begin(head, c.init)
    stage = STAGES.get(c.task)
    if stage and ranks.main and (c.resolution, c.iterations) != (stage.resolution, stage.iterations or c.iterations):
        print(f"mask2former: the paper trains {c.task} at {stage.resolution} pixels"
              + f", for {stage.iterations:,} steps" * bool(stage.iterations))
    scales, of_class = NEAR if D < SMALL else (SCALES, CLASS)
    seen = partial(sample, source=source, order=order, side=c.resolution, per=per, scales=scales)
    loss = partial(masks_loss, n_points=min(POINTS, max(c.resolution**2 // 16, 256)), of_class=of_class)
    return head, fit(head, seen, len(source), loss, recipe(c.task, D), c, frozen, ranks)


def planned(c, config, n_classes):
    """What --plan says, of crops; see fit.py"""
    with torch.device("meta"):
        head = Head(config.width, n_classes)
    return plan(head, recipe(c.task, config.width), c, config, blocks(config.depth), (3, c.resolution, c.resolution))


def check(c, config):
    """The options of a task, for a backbone of this config. Raises ValueError."""
    if hasattr(config, "dims"):
        raise ValueError("mask2former sees four blocks of one width and grid; a ConvNeXt has stages of several: name a "
                         "ViT")
    heads = sized(config.width).heads
    if config.depth < 4 or config.width % (2 * heads):
        raise ValueError(f"mask2former wants a backbone of at least 4 blocks whose width is a multiple of {2 * heads}; "
                         f"{c.weights} has {config.depth} of width {config.width}")
    if c.resolution % COARSEST:
        raise ValueError(f"--resolution {c.resolution}: mask2former wants a multiple of {COARSEST}")
    if c.layers and c.layers.count(",") != 3:
        raise ValueError(f"--layers {c.layers}: mask2former sees four blocks; name four, or leave out --layers")
    if c.init and c.head:
        raise ValueError("--init and --head: one is trained further, with the other nothing is; name one")


def begin(head, path):
    """With the parameters of evaluate.py's --out; without the classes', if there are others. Raises ValueError."""
    own = head.state_dict()
    try:
        with safe_open(path, "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--init {path} cannot be read ({error}); wanted head.safetensors of an --out") from error
    wrong = [name for name in own if name not in stored or
             stored[name].shape != own[name].shape and "class_embed" not in name]
    if wrong:
        found = tuple(stored[wrong[0]].shape) if wrong[0] in stored else "missing"
        raise ValueError(f"--init {path}: {wrong[0]} is {found}, wanted {tuple(own[wrong[0]].shape)}; name a head of "
                         "this decoder, for a backbone of this width")
    new = [name for name in own if stored[name].shape != own[name].shape]
    head.load_state_dict({name: own[name] if name in new else stored[name] for name in own})
    print(f"--init {path}: " + ("classes are others, and begin anew" if new else "classes too, they are as many"))


def read_config(path, shapes):
    """The configuration of a file, by names and shapes of its tensors. Raises ValueError if they are of none."""
    adapter, head = "segmentation_model.0.", "segmentation_model.1."
    need = dict(looks=f"{adapter}interactions.0.extractor.attn.sampling_offsets.weight",
                level_embed=f"{adapter}level_embed", stem=f"{adapter}spm.stem.0.weight",
                classes=f"{head}predictor.class_embed.weight", queries=f"{head}predictor.query_feat.weight",
                hidden=f"{head}predictor.transformer_ffn_layers.0.linear1.weight")
    for name in need.values():
        if len(shapes.get(name, ())) < 2:
            raise ValueError(f"{path}: {name} is {shapes.get(name, 'missing')}, wanted one of 2 dimensions or more")
    found = {key: shapes[name] for key, name in need.items()}
    counts = [len({name.removeprefix(part).partition(".")[0] for name in shapes if name.startswith(part)})
              for part in (f"{head}pixel_decoder.encoder.encoder.layers.", f"{head}predictor.transformer_ffn_layers.")]
    return Mask2FormerConfig(found["level_embed"][1], found["classes"][0] - 1, found["classes"][1],
                             found["hidden"][0], found["queries"][0], *counts, found["stem"][0],
                             heads=found["looks"][0] // (2 * PLACES))
