"""
k-NN on class tokens: each val image is what its nearest training images say.

    python evaluate.py --task knn --weights runs/tiny                     on the generated `shapes`
    python evaluate.py --task knn --weights runs/s --data PHOTOS          PHOTOS/train/CLASS, PHOTOS/val/CLASS

paper: DINOv3 Tab. 1; Wu et al. 2018. Dimension letters: see the top of model.py.
"""

from functools import partial

import torch
import torch.nn.functional as F

from engine.classify import SHOTS, batches, classify
from engine.task import IMAGES, LAYERS, Task
from engine.views import centre_crop
from sets.classes import LAYOUT, open_splits

ASKED = 65536        # val images that the bank is read for: 1 GB of 4096 features


def run(data, frozen, c):
    return classify(data, frozen, c, partial(vote, n_classes=len(data[0].classes), device=frozen.device))[0]


def vote(train, val, rest, n_classes, device, ks=(10, 20, 100, 200), temperature=0.07):
    """
    Each val image is what its nearest training images say, each voting with exp(cosine / temperature).

    train, val  (class tokens n D, a tensor or a Table; labels n)    rest  None: there is nothing to pick
    returns     top-1 and, from 5 classes up, top-5 for every k, in percent of the val images

    paper:   DINOv3 Tab. 1; the votes are normalised over the largest k, which changes no ranking
    """
    ks = sorted({min(k, len(train[1])) for k in ks})
    right, tops = {}, [1, 5] if n_classes >= 5 else [1]
    for cls, truth in batches(*val, device, ASKED):
        similar, near = nearest(F.normalize(cls, dim=-1), *train, ks[-1], device)              # B k
        for weight, labels, answer in zip((similar / temperature).softmax(-1).split(256), near.split(256),
                                          truth.split(256), strict=True):
            for k in ks:
                votes = weight.new_zeros(len(weight), n_classes).scatter_add_(1, labels[:, :k], weight[:, :k])
                for top in tops:
                    ranked = votes.argsort(dim=-1, descending=True, stable=True)[:, :top]
                    name = f"top{top}_k{k}"
                    right[name] = right.get(name, 0) + (ranked == answer[:, None]).sum().item()
    return {name: 100 * count / len(val[1]) for name, count in right.items()}


def nearest(asked, bank, labels, k, device):
    """B D, of unit length -> the k largest cosines, their labels, B k; the bank goes by once, 2048 rows at a time."""
    similar, near = asked.new_zeros(len(asked), 0), labels.new_zeros(len(asked), 0).to(device)
    for part, truth in batches(bank, labels, device):
        part, found = F.normalize(part, dim=-1), []
        for rows, old, known in zip(asked.split(1024), similar.split(1024), near.split(1024), strict=True):
            cosine = torch.cat([old, rows @ part.T], 1)
            best, places = cosine.topk(min(k, cosine.shape[1]))
            found.append((best, torch.cat([known, truth.expand(len(rows), -1)], 1).gather(1, places)))
        similar, near = map(torch.cat, zip(*found, strict=True))
    return similar, near


TASK = Task("knn", LAYOUT, open_splits, run, wants="tokens", metric="top1_k20", view=centre_crop,
            options=(SHOTS, LAYERS, *IMAGES))
