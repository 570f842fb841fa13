"""
Logistic regression on class tokens, to its optimum: small sets, and sets of fine classes.

    python evaluate.py --task logreg --weights runs/s --data PHOTOS           PHOTOS/train/CLASS, PHOTOS/val/CLASS
    python evaluate.py --task logreg --weights runs/s --data pets:DOWNLOADS   or cub, cars, ...: sets/finegrained.py

paper: DINOv3 App. D.7; Fine-S of Tab. 8. Dimension letters: see model.py.
"""

from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from engine.classify import PENALTIES, SHOTS, Part, classify, held, held_out
from engine.logistic import answers, fit
from engine.task import IMAGES, Task
from engine.views import middle
from sets.classes import LAYOUT, open_splits


def run(data, frozen, c):
    score = partial(regress, n_classes=len(data[0].classes), c=c, device=frozen.device)
    return classify(data, frozen, c, score, pick=True, settings=("C",))[0]


def regress(train, val, rest, n_classes, c, device):
    """
    Logistic regression on cls as it is. A tenth of each class of train picks C, then all of train is fitted.

    train, val  (cls n D, labels n)
    rest        of --shots: what picks C instead; the fit that it picks is the one that is scored
    returns     top-1 and the mean over classes, in percent, and C, of equals the smallest

    paper:   DINOv3 App. D.7; by convention mean_per_class for Aircraft, Pets, Caltech-101 and Flowers, else top1
    """
    (x, y), out = (held(train[0], device), train[1]), rest
    if rest is None:
        out = held_out(y, 0.1, c.seed)
        rows, others = (torch.from_numpy(np.flatnonzero(part)) for part in (~out, out))
        (x, y), out = (Part(x, rows), y[rows]), (Part(x, others), y[others])
    best, value = (-1.0, 0.0, None), None
    for C in tqdm(PENALTIES, desc="logreg", unit="C", leave=False, disable=None):
        value = fit(x, y, n_classes, C, device, value)
        right = (answers(out[0], value, device) == out[1]).double().mean().item()
        best = max(best, (right, C, value), key=lambda each: each[0])  # of equals the first
    _, C, value = best
    if rest is None:
        value = fit(held(train[0], device), train[1], n_classes, C, device, value)
    guess, truth = answers(val[0], value, device), val[1]
    each = [100 * (guess == k)[truth == k].double().mean().item() for k in range(n_classes) if (truth == k).any()]
    return dict(top1=100 * (guess == truth).double().mean().item(), mean_per_class=float(np.mean(each)), C=float(C))


TASK = Task("logreg", LAYOUT, open_splits, run, wants="tokens", metric="top1", view=middle, options=(SHOTS, *IMAGES))
