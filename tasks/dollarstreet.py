"""
Fairness: is a thing recognised as well in a poor home as in a rich one, and in every part of the world? Dollar Street.

    python evaluate.py --task dollarstreet --weights runs/l --data STREET --head HEAD.safetensors --topics MAP.json

A photo is a hit if one of the five likeliest labels of a classifier is among those that --topics has for its topic.

    --head    of evaluate.py --task linear --out, or a released linear head: class token and mean patch -> labels
    --topics  JSON, {topic: [numbers of labels]}: which of the classifier's labels mean a topic

paper:   DINOv3 App. D (7B: 69.6, 85.7, 90.9 by income; 76.7, 83.0, 88.0, 90.7 by region), after Goyal et al. 2022
differs: their classifier, of ImageNet-22k, and their map of 108 labels are not released: no number stands beside ours
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from decoders import read
from engine.features import describe
from engine.task import Option, Task
from engine.views import centre_crop, middle
from sets.dollarstreet import INCOMES, REGIONS, open_street

LIKELIEST = 5


def classifier(path, width):
    """weight n 2D, bias n, of a file. Raises ValueError if it is of no such classifier."""
    stored, _ = read(Path(path))
    before = "linear." if "linear.weight" in stored else ""
    names = f"{before}weight", f"{before}bias"
    if not stored.keys() >= {*names} or stored[names[0]].shape[1:] != (2 * width,):
        raise ValueError(f"--head {path} is no classifier of {2 * width} features, class token and mean patch; wanted "
                         "head.safetensors of --task linear, or a released linear head for this backbone")
    return [stored[name].read().float() for name in names]


def opened(c):
    weight, bias = classifier(c.head, describe(c.weights).width)
    street, n = open_street(c), len(bias)
    if (top := max(max(photo.labels) for photo in street.photos)) >= n:
        raise ValueError(f"--topics {c.topics} has label {top}; the classifier of --head has {n}, from 0")
    return street, weight, bias


@torch.no_grad()
def likeliest(x, weight, bias, device):
    """Rows of features, a Table -> n LIKELIEST"""
    weight, bias = weight.to(device), bias.to(device)
    found = [F.linear(part.to(device).float(), weight, bias).topk(min(LIKELIEST, len(bias))).indices.cpu()
             for part in x.split(2048)]
    return torch.cat(found).tolist()


def run(data, frozen, c):
    street, weight, bias = data
    tokens = frozen.tokens("val", street)
    found = likeliest(tokens.table("cls", "patches"), weight, bias, frozen.device)
    photos = [street.photos[row] for row in tokens.rows]
    hits = np.array([not photo.labels.isdisjoint(said) for photo, said in zip(photos, found, strict=True)])
    groups = [("income", name, [photo.income == name for photo in photos]) for name in INCOMES]
    groups += [("region", name, [photo.region == name for photo in photos]) for name in REGIONS.values()]
    groups = [(f"{kind}_{name}", np.array(there)) for kind, name, there in groups if any(there)]
    rates = {name: float(100 * hits[there].mean()) for name, there in groups}
    return dict(hit_rate=float(100 * hits.mean()), **rates,
                **{f"n_{name}": int(there.sum()) for name, there in groups}, n_val=len(photos))


TASK = Task("dollarstreet", "images_v2.csv, or one list, and its photos", opened, run, wants="tokens",
            metric="hit_rate", heads="top1", view=centre_crop, wide=middle, shapes=False, trains=False,
            decoders=("linear",), released=("linear",),
            options=(Option("topics", "", "JSON, {topic: [numbers of the classifier's labels]}"),))
