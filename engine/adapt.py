"""
Adapting released weights to other photos: what is kept of them, what is gained, and which step is the best.

    apart        a source -> what is trained on, and the photos that are held out
    Regression   looks before the first step and at every checkpoint; keeps OUT/best.safetensors
    best         which look is the best one, from the rows alone

Nothing here needs a label. *Kept* is how much of the released weights' similarities of patches is left, *gained* how
much better crops of one photo find each other; k-NN is said besides where folders name classes. best.safetensors begins
as the released weights, and they are what a run hands back that has gained nothing.

No one publishes such a measure: all of it is ours, and LOG.md has how often it was right.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import Drawn, cut, draw_crops
from engine.checkpoint import publish, replace_text, saved
from engine.meters import effective_rank
from engine.views import centre_crop

HELD = 256            # photos held out, at most, and at most a tenth of all
NEIGHBOURS = 5        # of k-NN, each held-out photo among the others
KEPT = 98.0           # percent of the released weights' similarities that the best step must have kept
SURE = 2.0            # standard errors by which it must have gained


def apart(source, seed):
    """source -> the part that is trained on, the part that is held out.    raises ValueError below 20 images"""
    n = min(HELD, len(source) // 10)
    if n < 2:
        raise ValueError(f"--data holds {len(source)} images; a tenth is held out, to measure what is gained, and it "
                         "takes two to tell them apart: at least 20")
    rows = np.random.default_rng([seed, 9]).permutation(len(source))
    return Drawn(source, np.sort(rows[n:]).tolist()), Drawn(source, np.sort(rows[:n]).tolist())


class Regression:
    """
    What is kept and what is gained, of the weights that adapting began with.

    held      the photos that are held out
    released  the network, as it was
    start     the step that this run begins at: rows of OUT/adapt.jsonl above it are of one that was cut short

    look(step, backbone)  a row of OUT/adapt.jsonl, and a line; what was the best so far is kept
    conclude()            says which step that is, or that nothing was gained
    """

    def __init__(self, c, ranks, held, released, start):
        self.c, self.ranks, self.path = c, ranks, Path(c.out, "adapt.jsonl")
        self.views, self.crops, self.labels = prepare(c, held)
        self.reference = similarities(see(c, released, self.views).patches)
        rows = map(json.loads, self.path.read_text().splitlines()) if start and self.path.exists() else []
        self.rows = [row for row in rows if row["step"] <= start]
        if not self.rows:
            self.look(start, released)

    def look(self, step, backbone):
        self.keep()
        self.rows.append(dict(step=step) | self.measure(backbone))
        if self.ranks.main:
            replace_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
            print(f"step {step:,}: {said(self.rows[0], self.rows[-1])}", flush=True)

    @torch.no_grad()
    def measure(self, backbone):
        backbone = backbone.eval()
        whole = see(self.c, backbone, self.views)
        found = [F.normalize(see(self.c, backbone, crops).cls.float(), dim=-1) for crops in self.crops]
        kept = (similarities(whole.patches) * self.reference).sum(-1).mean()
        row = dict(kept=100 * kept.item(), retrieval=retrieval(*found), rank=effective_rank(whole.cls).item())
        return row | (dict(knn=neighbours(whole.cls, self.labels)) if len(set(self.labels)) > 1 else {})

    def keep(self):
        """best.safetensors is that of the best look, once its checkpoint is there."""
        step = best(self.rows, len(self.views))["step"] if self.rows else 0
        folder = dict(saved(self.c.out)).get(step)
        if self.ranks.main and step and folder is not None:
            publish(folder, self.c.out, "best.safetensors")

    def conclude(self):
        self.keep()
        first, found = self.rows[0], best(self.rows, len(self.views))
        if self.ranks.main and found is first:
            print(f"nothing was gained in {self.rows[-1]['step']:,} steps, or too little was kept: "
                  f"{self.c.out}/best.safetensors are the released weights; more steps or photos, or another --lr, may "
                  "do better", flush=True)
        elif self.ranks.main:
            print(f"best at step {found['step']:,}, {said(first, found)}: {self.c.out}/best.safetensors", flush=True)


def best(rows, n):
    """
    The row with the highest retrieval among those that have kept enough and gained for sure; else the first one, which
    is of the released weights.    n  photos held out
    """
    p = rows[0]["retrieval"] / 100

    def sure(row):
        q = row["retrieval"] / 100
        return q - p > SURE * math.sqrt((p * (1 - p) + q * (1 - q)) / n) and row["kept"] >= KEPT
    return max([rows[0], *filter(sure, rows[1:])], key=lambda row: row["retrieval"])


def said(first, row):
    """One line on a look beside the first."""
    gained = [f"{name} {first[key]:.1f} -> {row[key]:.1f}" for name, key in (
        ("retrieval@1 of crops", "retrieval"), ("rank", "rank"), ("k-NN", "knn")) if key in row]
    return f"kept {row['kept']:.1f} % of similarities; gained {', '.join(gained)}"


def prepare(c, held):
    """Of each photo: its middle, N C H W; two crops that show most of it, 2 of N C H W; its label, None without one."""
    views, crops, labels = [], [], []
    c = replace(c, n_local=0)
    for i in range(len(held)):
        try:
            image = held.load(i)
        except OSError:
            continue  # training names what cannot be read
        boxes, flips, _ = draw_crops(np.random.default_rng([c.seed, 10, i]), c, *image.shape[1:])
        views += centre_crop(image, c.global_size, c.patch_size)
        crops.append([cut(image, box, flip, c.global_size) for box, flip in zip(boxes.tolist(), flips, strict=True)])
        try:
            labels.append(held.label(i))
        except ValueError:
            labels.append(None)
    return torch.stack(views), [torch.stack(each) for each in zip(*crops, strict=True)], labels


def see(c, backbone, images, size=64):
    """Features of N C H W uint8 images, `size` of them at a time."""
    device = next(backbone.parameters()).device
    mean, std = (torch.tensor(each, device=device)[:, None, None] for each in (c.mean, c.std))
    with torch.no_grad():
        parts = [backbone((part.to(device).float() / 255 - mean) / std) for part in images.split(size)]
    cls, registers, patches = (torch.cat([getattr(part, name) for part in parts])
                               for name in ("cls", "registers", "patches"))
    return replace(parts[0], cls=cls, registers=registers, patches=patches)


def similarities(patches):
    """B P D -> B (P P), of unit length: cosines of two patches of an image, less their mean; 0 of one with itself"""
    x = F.normalize(patches.float(), dim=-1)
    x = x @ x.mT
    others = 1 - torch.eye(x.shape[1], device=x.device)
    x = (x - (x * others).sum((1, 2), keepdim=True) / others.sum()) * others
    return F.normalize(x.flatten(1), dim=-1)


def retrieval(a, b):
    """Percent of crops whose nearest among the other crops is of the same photo; both ways.    a, b  N D"""
    cosine = a @ b.mT
    own = torch.arange(len(a), device=a.device)
    return 50 * sum((each.argmax(1) == own).float().mean().item() for each in (cosine, cosine.mT))


def neighbours(cls, labels):
    """k-NN top-1 in percent, each photo among the others; no vote for one that has no label.    cls  N D"""
    x = F.normalize(cls.float(), dim=-1)
    near = (x @ x.mT).fill_diagonal_(-2).topk(min(NEIGHBOURS, len(x) - 1)).indices.tolist()
    right = [max((votes := [labels[j] for j in row]), key=votes.count) == labels[i] for i, row in enumerate(near)]
    return 100 * sum(right) / len(right)
