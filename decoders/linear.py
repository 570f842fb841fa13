"""
The linear decoder: BatchNorm, then one linear layer on every patch.

    windows, stride    what it sees of an image: windows two thirds of their side apart, 512: 341
    Head               predict: maps of views -> an answer for each patch
    fit                AdamW on random batches of stored maps

paper: DINOv3 App. D.1, D.2. Dimension letters: see the top of model.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from engine import sliding

BATCH = 16              # views of a step
FEW = 5000              # steps: fewer need a larger rate to get anywhere


@dataclass(frozen=True)
class Recipe:
    lr: float                  # peak
    weight_decay: float
    beta2: float
    warmup: float              # share of the steps
    clip: float                # largest gradient norm
    dropout: float = 0.0


RECIPES = dict(segmentation=Recipe(lr=1e-3, weight_decay=1e-3, beta2=0.999, warmup=1500 / 40000, clip=math.inf,
                                   dropout=0.1),
               depth=Recipe(lr=3e-4, weight_decay=1e-4, beta2=0.99, warmup=1 / 3, clip=35))


def stride(side):
    return max(round(side * 2 / 3), 1)


def windows(image, side):
    """C H W -> square views that cover it, its short side being theirs; row by row"""
    return sliding.windows(image, side, stride(side))


class Head(nn.Module):
    """list of h w D -> list of n_out h w"""

    def __init__(self, width, n_out, dropout=0.0, norm=True):
        super().__init__()
        self.width, self.dropout = width, dropout
        self.norm, self.linear = nn.BatchNorm1d(width) if norm else nn.Identity(), nn.Linear(width, n_out)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, maps):
        grids = [m.shape[:2] for m in maps]
        if self.training and self.dropout:  # of whole channels, drawn for each view
            maps = [m * F.dropout(m.new_ones(m.shape[2]), self.dropout) for m in maps]
        x = self.linear(self.norm(torch.cat([m.flatten(0, 1) for m in maps])))                 # (views P) n_out
        return [part.T.unflatten(1, grid) for part, grid in zip(x.split([h * w for h, w in grids]), grids, strict=True)]

    @torch.no_grad()
    def predict(self, views):
        """Stored maps of an image's views, h w D float16 each -> n_out h w each, on the head's device"""
        device = self.linear.weight.device
        return self([torch.from_numpy(m).to(device).float() for m in views])


def peak(kind, c):
    return c.lr or RECIPES[kind].lr * (10 if c.iterations < FEW else 1)


def fit(kind, maps, truths, n_out, loss_of, c, device, make=Head):
    """
    A head, trained on random batches of views.

    kind     of RECIPES
    maps     h w D float16 each    truths  H W each: of both only a batch is in memory
    loss_of  (list of n_out h w, list of H W) -> scalars, whose sum is the loss; one at a time is in memory
    make     Head, or one with more in it: (width, n_out, dropout) -> a module

    differs: there every step sees new crops, flips and colours of the images and three learning rates are tried; here
             the features are computed once, from the images as they are
    """
    recipe = RECIPES[kind]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(c.seed)
        head, lr = make(maps[0].shape[2], n_out, recipe.dropout).to(device), peak(kind, c)
        optimizer = torch.optim.AdamW(head.parameters(), lr, (0.9, recipe.beta2), weight_decay=recipe.weight_decay)
        order, warmup = [], max(round(recipe.warmup * c.iterations), 1)
        for step in tqdm(range(c.iterations), desc="head", unit="it", leave=False, disable=None):
            while len(order) < min(BATCH, len(maps)):
                order += torch.randperm(len(maps)).tolist()
            rows, order = order[:BATCH], order[BATCH:]
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / warmup, 1) * (1 + math.cos(math.pi * step / c.iterations)) / 2
            out = head([torch.from_numpy(maps[i]).to(device).float() for i in rows])
            leaves = [logits.detach().requires_grad_() for logits in out]
            for part in loss_of(leaves, [torch.from_numpy(truths[i]).to(device) for i in rows]):
                part.backward()
            optimizer.zero_grad()
            torch.autograd.backward(out, [leaf.grad for leaf in leaves])
            nn.utils.clip_grad_norm_(head.parameters(), recipe.clip)
            optimizer.step()
    return head.eval()

# --------------------------------------------------------------------------------
# Of a file, on a backbone

THEIRS = {"batchnorm_layer": "norm", "conv": "linear", "conv_depth": "linear"}  # names in files of the released code


def renamed(file):
    """A file of a linear head with our names, and (n_out, width) of it"""
    stored = {}
    for name, x in file.stored.items():
        part, dot, rest = name.partition(".")
        stored[THEIRS.get(part, part) + dot + rest] = x if len(x.shape) != 4 else \
            x._replace(shape=x.shape[:2], read=lambda x=x: x.read().flatten(1))                # n D 1 1
    return file._replace(stored=stored), stored["linear.weight"].shape


class OfFeatures(nn.Module):
    """A head that sees Features:  list of them, one for each block -> B n h w"""

    def __init__(self, head, class_token):
        super().__init__()
        self.head, self.class_token = head, class_token

    def forward(self, features):
        grid, maps = features[0].grid, []
        for f in features:  # of one backbone, all have one grid
            maps += [f.patches, f.cls[:, None].expand_as(f.patches)][: 1 + self.class_token]   # B P D
        maps = torch.cat(maps, dim=2).unflatten(1, grid)                                       # B h w ND
        return torch.stack(self.head(list(maps)))


class OfImages(nn.Module):
    """images B 3 H W, normalised, of whole patches -> logits B n h w"""

    def __init__(self, backbone, head, layers):
        super().__init__()
        self.backbone, self.head, self.layers = backbone, head, layers
        self.n_out = head.head.linear.out_features

    @torch.no_grad()
    def forward(self, images):
        return self.head(self.backbone.layers(images, self.layers))


class Classifier(nn.Module):
    """images B 3 H W, normalised -> logits B n, of the class token and the mean patch"""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    @torch.no_grad()
    def forward(self, images):
        features = self.backbone(images)
        return self.head(torch.cat([features.cls, features.patches.mean(1)], dim=1))
