"""
Logistic regression on class tokens, to its optimum: small sets, and sets of fine classes.

    python evaluate.py --task logreg --weights runs/s --data PHOTOS           PHOTOS/train/CLASS, PHOTOS/val/CLASS
    python evaluate.py --task logreg --weights runs/s --data pets:DOWNLOADS   or cub, cars, ...: sets/finegrained.py

paper: DINOv3 App. D.7; Fine-S of Tab. 8. Dimension letters: see model.py.
"""

import warnings
from functools import partial

import numpy as np
from tqdm import tqdm

from engine.classify import PENALTIES, SHOTS, classifier, classify, splits
from engine.task import Task
from engine.views import middle
from sets.classes import LAYOUT, open_splits


def run(data, frozen, c):
    n_classes = len(data[0].classes)
    return classify(*splits(data, frozen), n_classes, c, partial(regress, n_classes=n_classes, c=c))


def regress(train, val, n_classes, c):
    """
    Logistic regression on cls as it is. A tenth of each class of train picks C, then all of train is fitted.

    train, val  (cls n D, labels n)
    returns     top-1 and the mean over classes, in percent, and C

    paper:   DINOv3 App. D.7; by convention mean_per_class for Aircraft, Pets, Caltech-101 and Flowers, else top1
    """
    (x, y), (x_val, y_val) = ((cls.double().numpy(), labels.numpy()) for cls, labels in (train, val))
    shuffled, held = np.random.default_rng(c.seed).permutation(len(y)), np.zeros(len(y), bool)
    for k in range(n_classes):
        mine = shuffled[y[shuffled] == k]
        held[mine[: max(len(mine) // 10, 1) if len(mine) > 1 else 0]] = True
    best, C = -1.0, 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 1000 iterations need not reach 1e-12
        model = classifier(warm_start=True)
        for candidate in tqdm(PENALTIES, desc="logreg", unit="C", leave=False, disable=None):
            score = model.set_params(C=candidate).fit(x[~held], y[~held]).score(x[held], y[held])
            best, C = max((best, C), (score, candidate), key=lambda pair: pair[0])  # of equals the first
        guess = classifier(C).fit(x, y).predict(x_val)
    each = [100 * float((guess == k)[y_val == k].mean()) for k in range(n_classes) if (y_val == k).any()]
    return dict(top1=100 * float((guess == y_val).mean()), mean_per_class=float(np.mean(each)), C=float(C))


TASK = Task("logreg", LAYOUT, open_splits, run, wants="tokens", metric="top1", view=middle, options=(SHOTS,),
            needs=("sklearn",))
