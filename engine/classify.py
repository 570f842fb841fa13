"""
What classifications of frozen class tokens have in common.

    classify      features of train and val, few shots, control, what is reported beside the score
    held, Part    features in memory if they fit, else where they are, on disk; some rows of them
    classifier    logistic regression by scikit-learn, and the penalties to try; logistic.py does it on the device
"""

import numpy as np
import torch

from engine.sources import Drawn
from engine.task import Option

TRIES = 5                      # draws of --shots
SHARE = 0.01                   # of each class of train, held out of the draws: picks what a task has to pick
PENALTIES = 10 ** np.linspace(-6, 5, 45)  # C of logistic regressions: those tried    paper: DINOv3 App. D.7
SHOTS = Option("shots", 0, f"images of each class to train on, drawn {TRIES} times; 0 = all, once")
ROOM = 4e9                     # bytes of features that the host keeps; a GPU half of what is free on it


class Part:
    """Some rows of x, a Table or a tensor, looked up when they are asked for"""

    def __init__(self, x, rows):
        self.x, self.rows, self.shape = x, torch.as_tensor(rows), (len(rows), x.shape[1])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, rows):
        return self.x[self.rows[rows]]

    def split(self, size):
        return (self.x[rows] for rows in self.rows.split(size))


def held(x, device):
    """n F, a Table or a Part of one -> a tensor on the device if there is room, else as it is."""
    room = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else ROOM
    return x[:].to(device) if 4 * x.shape[0] * x.shape[1] <= room else x


def batches(x, y, device, size=2048):
    """Rows and their labels, in order, so many at a time, on the device: x is read as it goes"""
    return ((part.to(device).float(), rows.to(device)) for part, rows in zip(x.split(size), y.split(size), strict=True))


def held_out(labels, share, seed):
    """n bool: of each class this share, and one at least, but never its only one; the rest trains."""
    order = np.random.default_rng(seed).permutation(len(labels))
    held = np.zeros(len(labels), bool)
    for rows in by_class(labels, order).values():
        held[rows[: max(int(len(rows) * share), 1) if len(rows) > 1 else 0]] = True
    return held


def by_class(labels, order):
    """{class: its rows}, in that order"""
    labels, order = np.asarray(labels), np.asarray(order)
    sort = np.argsort(labels[order], kind="stable")
    names, starts = np.unique(labels[order][sort], return_index=True)
    return dict(zip(names.tolist(), np.split(order[sort], starts[1:]), strict=True))


def few(labels, c):
    """Rows of `shots` images of each class, five times."""
    orders = (np.random.default_rng([c.seed, k]).permutation(len(labels)) for k in range(TRIES))
    return [np.concatenate([rows[: c.shots] for rows in by_class(labels, order).values()]) for order in orders]


def drawn(train, c, pick):
    """train -> the images that --shots needs, and of these the rows of each draw, and of the hold-out if `pick`"""
    labels = np.array([train.label(i) for i in range(len(train))])
    held = held_out(labels, SHARE, c.seed) if pick else np.zeros(len(labels), bool)
    free = np.flatnonzero(~held)
    draws = [free[rows] for rows in few(labels[free], c)] + [np.flatnonzero(held)]
    needed = np.unique(np.concatenate(draws))
    return Drawn(train, needed), [needed.searchsorted(rows) for rows in draws]


def classify(data, frozen, c, score, patches=False, pick=False, settings=()):
    """
    data      (train, val) as open_splits of sets/classes.py has them
    score     (train, val, held) -> {metric: number}, each (x n F, labels n):  x a tensor or a Table
    patches   the mean patch stands beside the class token in F
    pick      --shots: 1 % of each class of all of train is held out of the draws, for what `score` has to pick; else
              held is None
    settings  what of its metrics is no score: listed for each draw, not averaged
    returns   {metric: number, or mean over the draws of --shots},  tokens of val

    --control shuffles the labels of both, or tight classes could be guessed.
    """
    (train, val), names = data, ("cls", "patches") if patches else ("cls",)
    source, draws = drawn(train, c, pick) if c.shots else (train, None)
    name = f"train, {c.shots} shots, seed {c.seed}, {pick}" if c.shots else "train"
    tokens = [frozen.tokens(name, source), frozen.tokens("val", val)]
    rng, splits = np.random.default_rng(c.seed), []
    for each in tokens:
        shuffled = torch.from_numpy(rng.permutation(len(each.labels)))
        splits.append((each.table(*names), each.labels[shuffled] if c.control else each.labels))
    if draws:
        place = {row: k for k, row in enumerate(tokens[0].rows)}  # of what could be read
        parts = [torch.tensor([place[k] for k in rows.tolist() if k in place], dtype=torch.long) for rows in draws]
        *parts, rest = ((Part(splits[0][0], rows), splits[0][1][rows]) for rows in parts)
        found = [score(part, splits[1], rest if pick else None) for part in parts]
    else:
        parts = splits[:1]
        found = [score(*splits, None)]
    sizes = dict(chance=100 / len(train.classes), n_train=len(parts[-1][1]), n_val=len(splits[1][1]))
    return averaged(found, c, settings) | sizes, tokens[1]


def averaged(found, c, settings=()):
    """Metrics of each draw -> means, and std_ of each; settings as they are"""
    if not c.shots:
        return found[0]
    scores = {name: [each[name] for each in found] for name in found[0]}
    means = {name: each if name in settings else sum(each) / len(each) for name, each in scores.items()}
    return means | {f"std_{name}": float(np.std(each)) for name, each in scores.items() if name not in settings}


def classifier(C=1.0, warm_start=False):
    """min over w, b of  |w|^2 / 2 + C sum_i cross entropy_i, by scikit-learn;  a warm start: from the C before"""
    from sklearn.linear_model import LogisticRegression  # here, as few tasks need it
    return LogisticRegression(C=C, max_iter=1000, tol=1e-12, warm_start=warm_start)
