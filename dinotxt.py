"""
dino.txt: words and images in one space. A text tower, and blocks on a frozen backbone.

    TowerConfig           sizes
    VisionHead            Features of the backbone -> Features whose [cls ; mean patch] is the image's vector
    TextTower             ids -> the vector of their end                             CLIP
    Towers                both, and the scale of their cosines: what training changes, under the released names
    DinoTxt               with the backbone: encode_image, encode_patches, encode_text, encode_words
    load_dinotxt          the released file, or what text.py has left -> DinoTxt;  save_towers
    ask, best_name        classes as sentences -> vectors; scores of names -> of classes

A text's vector is 2D wide: its first half meets the class token, its second the mean of the patches, so that each patch
can be asked by the second. Dimension letters: see the top of model.py; t is the width of the text tower.

paper: DINOv3 §5.3, which refers to dino.txt (Jose et al. 2024)
"""

import json
import math
import zlib
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from engine.bpe import Tokenizer
from engine.shards import Entry, write_tensors
from model import MLP, Block, Features, Packing, ViTConfig, build, set_std
from weights import File, commit, open_pth, open_safetensors, take

FILE = "text.safetensors"
HEAD_WIDTH = 64                # E of the text tower's heads
SCALE = math.log(1 / 0.07)     # of the cosines, at the start: its logarithm
BACKBONE = "visual_model.backbone."


@dataclass(frozen=True)
class TowerConfig:
    depth: int                 # blocks
    width: int                 # t
    context: int               # tokens of a text, start and end among them
    vocabulary: int            # ids
    head_blocks: int = 2       # of the vision head; 0 = its norm alone

    @property
    def heads(self):
        return self.width // HEAD_WIDTH

# --------------------------------------------------------------------------------
# Images


class VisionHead(nn.Module):
    """
    Blocks without RoPE over all tokens of the backbone's last layer, then a norm.

    config  of the backbone: D, A, R    head(features, noise) -> Features; noise: model.Noise, or what it has drawn
    """
    def __init__(self, config, n_blocks):
        super().__init__()
        D = config.width
        self.config = ViTConfig(n_blocks, D, config.heads, hidden_width(D), "swiglu", qkv_bias=False,
                                n_registers=config.n_registers)
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(n_blocks))
        self.ln_final = nn.LayerNorm(D, eps=self.config.norm_eps)
        set_std(self, self.config.init_std)

    def forward(self, features, noise=None):
        x = torch.cat([features.cls[:, None], features.registers, features.patches], 1).float()    # B N D
        still = x.new_full((x.shape[2] // self.config.heads // 4,), math.inf)  # a period so long that nothing turns
        packing = Packing(self.config, still, [features.grid], [len(x)], noise)
        y = x.flatten(0, 1)                                                                        # (B N) D
        for block, rope, subsets in zip(self.blocks, packing.rope, packing.subsets, strict=True):
            y = block(y, rope, subsets)
        y = self.ln_final(y).view_as(x)                                                            # B N D
        cls, registers, patches = y.split([1, self.config.n_registers, features.patches.shape[1]], 1)
        return Features(cls[:, 0], registers, patches, features.grid)


def hidden_width(D):
    """F of SwiGLU: two thirds of 4D, in whole 64s"""
    return -(-int(4 * D * 2 / 3) // 64) * 64


def image_vector(features):
    return torch.cat([features.cls, features.patches.mean(1)], 1)                                  # B 2D

# --------------------------------------------------------------------------------
# Words


class CausalAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        t = config.width
        self.heads = config.heads
        self.qkv, self.proj = nn.Linear(t, 3 * t, bias=False), nn.Linear(t, t)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)             # 3 of B A N E
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        t, L = config.width, config.depth
        self.attention_norm, self.ffn_norm = nn.LayerNorm(t, eps=1e-5), nn.LayerNorm(t, eps=1e-5)
        self.attention = CausalAttention(config)
        self.feed_forward = MLP(ViTConfig(L, t, config.heads, 4 * t))
        self.attention.qkv.std, self.feed_forward.fc1.std = t ** -0.5, (2 * t) ** -0.5
        self.attention.proj.std = self.feed_forward.fc2.std = t ** -0.5 * (2 * L) ** -0.5  # what joins the residual

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))                                             # B N t
        return x + self.feed_forward(self.ffn_norm(x))


class TextTower(nn.Module):
    """ids  B N int64, N up to the context, zeros after the end -> B t: the end's vector, which saw all before it"""

    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.ln_final = nn.LayerNorm(config.width, eps=1e-5)
        self.token_embedding.std = 0.02

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]                  # B N t
        for block in self.blocks:
            x = block(x)
        ends = ids.argmax(1)  # the largest id, where it comes first
        return self.ln_final(x[torch.arange(len(x), device=x.device), ends])                       # B t


class Towers(nn.Module):
    """All that is trained:  see(features, noise) -> Features;  read(ids) -> B 2D;  logit_scale, a logarithm"""

    def __init__(self, vit, config):
        super().__init__()
        self.config = config
        projection = nn.Linear(config.width, 2 * vit.width, bias=False)
        projection.std = config.width ** -0.5
        self.visual_model = nn.ModuleDict(dict(head=VisionHead(vit, config.head_blocks)))
        self.text_model = nn.ModuleDict(dict(backbone=TextTower(config),
                                             head=nn.ModuleDict(dict(linear_projection=projection))))
        self.logit_scale = nn.Parameter(torch.empty(1))

    def see(self, features, noise=None):
        return self.visual_model["head"](features, noise)

    def read(self, ids):
        return self.text_model["head"]["linear_projection"](self.text_model["backbone"](ids))


def new_towers(vit, config, device="cpu", seed=0):
    """Start values as a function of (seed, name); vit: the backbone's config"""
    towers = build(lambda: Towers(vit, config), device, seed)
    own = torch.Generator().manual_seed(zlib.crc32(f"{seed} positional_embedding".encode()))
    with torch.no_grad():
        place = towers.text_model["backbone"].positional_embedding
        place.copy_(torch.empty(place.shape).normal_(std=0.01, generator=own))
        towers.logit_scale.fill_(SCALE)
    return towers

# --------------------------------------------------------------------------------
# All of it


class DinoTxt(nn.Module):
    """
    images  B 3 H W, normalised float32    ids  B N int64 -> vectors, neither of them of unit length

    model(images) -> Features behind the vision head; so it can stand where a backbone does
    """
    def __init__(self, backbone, towers, merges):
        """merges  of the tokenizer; None = CLIP's"""
        super().__init__()
        self.backbone, self.towers, self.merges, self.config = backbone, towers, merges, backbone.config

    def forward(self, images):
        return self.towers.see(self.backbone(images))

    def encode_image(self, images):
        return image_vector(self(images))                                                          # B 2D

    def encode_patches(self, images):
        return self(images).patches                                                                # B P D

    def encode_text(self, ids):
        return self.towers.read(ids)                                                               # B 2D

    @property
    def logit_scale(self):
        return self.towers.logit_scale

    @cached_property
    def tokenizer(self):
        return Tokenizer(self.merges)

    @torch.no_grad()
    def encode_words(self, texts, batch=256):
        """Texts -> n 2D float32, on the model's device"""
        found, device = [], self.logit_scale.device
        for start in range(0, len(texts), batch):
            ids, _ = self.tokenizer(texts[start : start + batch], self.towers.config.context)
            found.append(self.encode_text(ids.to(device)).float())
        return torch.cat(found)


def ask(model, names, sentences, half=slice(None)):
    """
    A vector for each name: the mean over sentences of unit vectors, of unit length again.

    names    of each class, one or several    half  of a text's 2D: all, or the second, which asks patches
    returns  names 2D (or D) float32, on the host;  the class of each
    """
    each = [name for several in names for name in several]
    texts = model.encode_words([sentence.replace("{}", name) for name in each for sentence in sentences])
    unit = F.normalize(texts[:, half], dim=1).unflatten(0, (len(each), len(sentences)))            # names sentences 2D
    classes = torch.tensor([k for k, several in enumerate(names) for _ in several])
    return F.normalize(unit.mean(1), dim=1).cpu(), classes


def best_name(scores, classes, n):
    """Of scores for each name those of the n classes: the best of its names'.    ... names -> ... n"""
    out = scores.new_full((*scores.shape[:-1], n), -math.inf)
    return out.scatter_reduce_(-1, classes.to(scores.device).expand(scores.shape), scores, "amax")


def with_words(backbone, c):
    """A task's network: the backbone and the towers of --text, or of the folder that --weights names"""
    return load_dinotxt(c.text or c.weights, backbone)


def read_config(path, shapes, vit):
    """Shapes of the towers' tensors -> TowerConfig. Raises ValueError if they are not of this backbone."""
    def shape(name, n):
        if len(shapes.get(name, ())) != n:
            raise ValueError(f"{path} has {shapes.get(name, 'no')} {name}; wanted the towers of dino.txt, as text.py "
                             "and the released file have them")
        return shapes[name]

    def count(prefix):
        places = {name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)}
        return len(places)
    (D,), (context, t) = (shape(name, n) for name, n in (("visual_model.head.ln_final.weight", 1),
                                                         ("text_model.backbone.positional_embedding", 2)))
    if D != vit.width or not hasattr(vit, "heads"):
        raise ValueError(f"{path} is for a ViT of width {D}, the weights are {vit.width} wide; name those it was "
                         "trained on")
    words = shape("text_model.backbone.token_embedding.weight", 2)[0]
    return TowerConfig(count("text_model.backbone.blocks."), t, context, words, count("visual_model.head.blocks."))


def load_dinotxt(path, backbone):
    """
    path      text.safetensors, the folder of a run of text.py, or the released .pth, which has no backbone either
    backbone  a ViT of weights.load_backbone
    returns   DinoTxt in eval mode, its towers float32;  raises ValueError: tensors that are missing or misshapen, by
              name. Prints one line for those that are not known: the released loader skips them, too
    """
    path, stored = Path(path), {}
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist; name the folder of a run of text.py, or the released file")
    metadata = (open_safetensors if file.suffix == ".safetensors" else open_pth)(file, stored)
    shapes = {name: x.shape for name, x in stored.items()}
    with torch.device("meta"):
        towers = Towers(backbone.config, read_config(file, shapes, backbone.config))
    stored = {name: x for name, x in stored.items() if not name.startswith(BACKBONE)}
    take(towers, File(file, "dinotxt", backbone.config, stored, []), strange=print)
    merges = [tuple(pair) for pair in json.loads(metadata["merges"])] if "merges" in metadata else None
    return DinoTxt(backbone, towers, merges).eval()


def save_towers(path, towers, merges, **notes):
    """Whole or not at all; merges: of the tokenizer, kept in the file; None = CLIP's"""
    path, new = Path(path), Path(f"{path}.new")
    about = {name: str(value) for name, value in notes.items()} | dict(commit=commit(), format="pt")
    if merges is not None:
        about["merges"] = json.dumps(merges)
    write_tensors(new, {name: Entry(tuple(x.shape), x.dtype, partial(iter, [x]))
                        for name, x in towers.state_dict().items()}, about)
    new.replace(path)
