"""
k-NN on class tokens: each val image is what its nearest training images say.

    python evaluate.py --task knn --weights runs/tiny                     on the generated `shapes`
    python evaluate.py --task knn --weights runs/s --data PHOTOS          PHOTOS/train/CLASS, PHOTOS/val/CLASS

paper: DINOv3 Tab. 1; Wu et al. 2018. Dimension letters: see the top of model.py.
"""

from functools import partial

import torch.nn.functional as F

from engine.classify import SHOTS, classify, splits
from engine.task import Task
from engine.views import centre_crop
from sets.classes import LAYOUT, open_splits


def run(data, frozen, c):
    n_classes = len(data[0].classes)
    return classify(*splits(data, frozen), n_classes, c, partial(vote, n_classes=n_classes, device=frozen.device))


def vote(train, val, n_classes, device, ks=(10, 20, 100, 200), temperature=0.07):
    """
    Each val image is what its nearest training images say, each voting with exp(cosine / temperature).

    train, val  (class tokens n D, labels n)
    returns     top-1 and, from 5 classes up, top-5 for every k, in percent of the val images

    paper:   DINOv3 Tab. 1; the votes are normalised over the largest k, which changes no ranking
    """
    bank, labels = F.normalize(train[0], dim=-1).to(device), train[1].to(device)
    ks = sorted({min(k, len(bank)) for k in ks})
    right, tops = {}, [1, 5] if n_classes >= 5 else [1]
    for cls, truth in zip(val[0].split(256), val[1].to(device).split(256), strict=True):
        similar, near = (F.normalize(cls, dim=-1).to(device) @ bank.T).topk(ks[-1])            # B k
        votes = (similar / temperature).softmax(-1)[..., None] * F.one_hot(labels[near], n_classes)
        votes = votes.cumsum(1)                                                                # B k classes
        for k in ks:
            ranked = votes[:, k - 1].argsort(dim=-1, descending=True, stable=True) == truth[:, None]  # B classes
            for top in tops:
                name = f"top{top}_k{k}"
                right[name] = right.get(name, 0) + ranked[:, :top].sum().item()
    return {name: 100 * count / len(val[0]) for name, count in right.items()}


TASK = Task("knn", LAYOUT, open_splits, run, wants="tokens", metric="top1_k20", view=centre_crop, options=(SHOTS,))
