"""
Adapting released weights to other photos: what is kept of them, what is gained, and which step is the best.

    apart        a source -> what is trained on, and the photos that are held out
    Regression   looks before the first step and at every checkpoint; keeps OUT/best.safetensors
    best         which look is the best one, from the rows alone

Nothing here needs a label. *Kept* is how much of the released weights' similarities of patches is left, *gained* how
much more often crops of one photo find each other, recoloured as in training; k-NN is said besides where folders name
classes. best.safetensors begins as the released weights, and they are what a run hands back that has gained nothing.

No one publishes such a measure: it is ours, and LOG.md has how often it was right. Dimension letters: see model.py.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import augment, cut, draw_crops
from engine.checkpoint import publish, replace_text, saved
from engine.meters import effective_rank
from engine.sources import Drawn
from engine.stages import normalised_for
from engine.views import centre_crop
from weights import inflate, load_backbone, save_backbone

HELD = 256            # photos held out, at most, and at most a tenth of all
DRAWS = 4             # of two crops, of each of them: with 2, gains of 1.5 points in 16 are within the noise
NEIGHBOURS = 5        # of k-NN, each held-out photo among the others
KEPT = 95.0           # percent of the released weights' similarities that the best step must have kept
SURE = 2.0            # standard errors by which it must have gained


def apart(source, c):
    """source -> the part that is trained on, the part that is held out; None but in stage adapt."""
    if c.stage != "adapt":
        return source, None
    n = min(HELD, len(source) // 10)
    if n < 2:
        raise ValueError(f"--data holds {len(source)} images; a tenth is held out, to measure what is gained, and it "
                         "takes two to tell them apart: at least 20")
    rows = np.random.default_rng([c.seed, 9]).permutation(len(source))
    return Drawn(source, np.sort(rows[n:]).tolist()), Drawn(source, np.sort(rows[:n]).tolist())


class Regression:
    """
    What is kept and what is gained, of the weights that adapting began with.

    held      the photos that are held out
    released  the network, as it was
    start     the step that this run begins at: rows of OUT/adapt.jsonl above it are of one that was cut short

    look(step, backbone)  a row of OUT/adapt.jsonl, and a line; what was the best so far is kept
    conclude(done)        says which step that is, or that nothing was gained
    """

    def __init__(self, c, ranks, held, released, start):
        self.c, self.ranks, self.held, self.released = c, ranks, held, released
        self.path = Path(c.out, "adapt.jsonl")
        if held is None:
            return
        rows = map(json.loads, self.path.read_text().splitlines()) if start and self.path.exists() else []
        self.rows = [row for row in rows if row["step"] <= start]
        if not self.rows:
            self.rows = [dict(step=0) | self.measure(released)]
            if ranks.main:
                first = load_backbone(c.init)
                first = first if first.config.in_chans == c.in_chans else inflate(first, c.in_chans)
                save_backbone(first, Path(c.out, "best.safetensors"), "nano", dict(size=c.size, step=0))
                print(f"{len(held)} photos are held out; {said(self.rows[0], self.rows[0])}", flush=True)

    def look(self, step, backbone):
        if self.held is None:
            return
        self.keep()
        self.rows.append(dict(step=step) | self.measure(backbone))
        if self.ranks.main:
            replace_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
            print(f"step {step:,}: {said(self.rows[0], self.rows[-1])}", flush=True)

    @torch.no_grad()
    def measure(self, backbone):
        """A row: kept, retrieval and k-NN in percent, effective rank; of each photo, how many of its crops find it."""
        c, device = self.c, self.ranks.device
        wholes, crops, kept, labels = [], [], [], []
        for views, pairs, known in held_views(c, self.held):
            views, pairs = views.to(device), pairs.flatten(0, 1).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=c.precision != "fp32"):
                whole, cls = backbone(views), backbone(pairs).cls.float()
                before = self.released(normalised_for(self.released, c, views))
            wholes.append(whole.cls.float())
            kept.append((similarities(whole.patches) * similarities(before.patches)).sum(-1))
            crops.append(F.normalize(cls, dim=-1).unflatten(0, (-1, 2 * DRAWS)))
            labels += known
        cls, crops = torch.cat(wholes), torch.cat(crops)                              # N D, N V D
        hits = found(crops)
        row = dict(kept=100 * torch.cat(kept).mean().item(), retrieval=100 * hits.mean().item())
        row |= dict(rank=effective_rank(cls).item())
        row |= dict(knn=neighbours(cls, labels)) if len(set(labels)) > 1 else {}
        return row | dict(hits=[round(x, 4) for x in hits.tolist()])

    def keep(self):
        """best.safetensors is that of the best look, once its checkpoint is there."""
        step = best(self.rows)["step"]
        folder = dict(saved(self.c.out)).get(step)
        if self.ranks.main and step and folder is not None:
            publish(folder, self.c.out, "best.safetensors")

    def conclude(self, done):
        if self.held is None or not done:
            return
        self.keep()
        first, row = self.rows[0], best(self.rows)
        if self.ranks.main and row is first:
            print(f"nothing was gained in {self.rows[-1]['step']:,} steps, or too little was kept: "
                  f"{self.c.out}/best.safetensors are the released weights; more steps or photos, or another --lr, may "
                  "do better", flush=True)
        elif self.ranks.main:
            print(f"best at step {row['step']:,}, {said(first, row)}: {self.c.out}/best.safetensors", flush=True)


def best(rows):
    """
    The row with the highest retrieval among those that kept enough, and gained for sure: by SURE standard errors of the
    mean over photos; else the first one, which is of the released weights.
    """
    first = np.array(rows[0]["hits"])

    def sure(row):
        gained = np.array(row["hits"]) - first
        return row["kept"] >= KEPT and gained.mean() > SURE * gained.std(ddof=1) / math.sqrt(len(gained))
    return max([rows[0], *filter(sure, rows[1:])], key=lambda row: row["retrieval"])


def said(first, row):
    """One line on a look beside the first."""
    gained = [f"{name} {first[key]:.1f} -> {row[key]:.1f}" for name, key in (
        ("retrieval@1 of crops", "retrieval"), ("rank", "rank"), ("k-NN", "knn")) if key in row]
    return f"kept {row['kept']:.1f} % of similarities; gained {', '.join(gained)}"


def held_views(c, held, size=32):
    """
    The photos, `size` at a time, normalised: their middles, n C H W; crops as training cuts and colours its global
    ones, n V C H W; labels, None without one. The same in every look. What cannot be read is left out.
    """
    c = replace(c, n_local=0)
    for first in range(0, len(held), size):
        views, cuts, colours, labels = [], [], [], []
        for i in range(first, min(first + size, len(held))):
            try:
                image = held.load(i)
            except OSError:
                continue  # training names it
            views += centre_crop(image, c.global_size, c.patch_size)
            for k in range(DRAWS):
                boxes, flips, colour = draw_crops(np.random.default_rng([c.seed, 10, i, k]), c, *image.shape[1:])
                cuts += [cut(image, *each, c.global_size) for each in zip(boxes.tolist(), flips, strict=True)]
                colours.append(colour)
            labels.append(label_of(held, i))
        if views:
            plain = torch.zeros(len(views), 12)
            yield (augment(torch.stack(views), plain, c.mean, c.std),
                   augment(torch.stack(cuts), torch.from_numpy(np.concatenate(colours)), c.mean,
                           c.std).unflatten(0, (-1, 2 * DRAWS)), labels)


def label_of(held, i):
    try:
        return held.label(i)
    except ValueError:  # it lies in no class folder
        return None


def similarities(patches):
    """B P D -> B (P P), of unit length: cosines of two patches of an image, less their mean; 0 of one with itself"""
    x = F.normalize(patches.float(), dim=-1)
    x = x @ x.mT
    others = 1 - torch.eye(x.shape[1], device=x.device)
    x = (x - (x * others).sum((1, 2), keepdim=True) / others.sum()) * others
    return F.normalize(x.flatten(1), dim=-1)


def found(crops):
    """
    Retrieval@1 of each photo, N: how many of its pairs of crops are nearest, the first among all photos' second ones.

    crops  N V D, of unit length
    """
    own = torch.arange(len(crops), device=crops.device)
    views = crops.unbind(1)
    hits = [((a @ b.mT).argmax(1) == own).float() for a in views for b in views if a is not b]
    return torch.stack(hits).mean(0)


def neighbours(cls, labels):
    """k-NN top-1 in percent, each photo among the others; no vote for one that has no label.    cls  N D"""
    x = F.normalize(cls.float(), dim=-1)
    near = (x @ x.mT).fill_diagonal_(-2).topk(min(NEIGHBOURS, len(x) - 1)).indices.tolist()
    right = [max((votes := [labels[j] for j in row]), key=votes.count) == labels[i] for i, row in enumerate(near)]
    return 100 * sum(right) / len(right)
