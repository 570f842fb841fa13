"""
What classifications of frozen class tokens have in common.

    splits        features and labels of train and val; columns: of any images
    classify      control, few shots, what is reported beside the score
    classifier    logistic regression to its optimum, and the penalties to try
"""

import numpy as np
import torch

from engine.task import Option

TRIES = 5                      # draws of --shots
PENALTIES = 10 ** np.linspace(-6, 5, 45)  # C of `classifier`: those tried    paper: DINOv3 App. D.7
SHOTS = Option("shots", 0, f"images of each class to train on, drawn {TRIES} times; 0 = all, once")


def columns(tokens, patches=False):
    """Tokens -> (x n F, labels n):  F the class token, and the mean patch beside it if asked for"""
    return torch.cat([tokens.cls, tokens.patches], dim=1) if patches else tokens.cls, tokens.labels


def splits(sources, frozen, patches=False):
    """Columns of train and of val.    sources  as open_splits of sets/classes.py has them"""
    train, val = sources
    return [columns(frozen.tokens(name, source), patches) for name, source in (("train", train), ("val", val))]


def classify(train, val, n_classes, c, score):
    """
    train, val  (x n F, labels n)    score  (train, val) -> {metric: number}, or their means over the draws of --shots

    --control shuffles the labels of both, or tight classes could be guessed.
    """
    if c.control:
        rng = np.random.default_rng(c.seed)
        train, val = ((x, y[torch.from_numpy(rng.permutation(len(y)))]) for x, y in (train, val))
    found = []
    for rows in few(train[1], c) if c.shots else [slice(None)]:
        part = [column[rows] for column in train]
        found.append(score(part, val))
    metrics = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
    spread = {f"std_{name}": float(np.std([each[name] for each in found])) for name in metrics} if c.shots else {}
    return dict(**metrics, **spread, chance=100 / n_classes, n_train=len(part[1]), n_val=len(val[1]))


def few(labels, c):
    """Rows of `shots` images of each class, five times."""
    for k in range(TRIES):
        order = torch.from_numpy(np.random.default_rng([c.seed, k]).permutation(len(labels)))
        yield torch.cat([order[labels[order] == label][: c.shots] for label in labels.unique()])


def classifier(C=1.0, warm_start=False):
    """min over w, b of  |w|^2 / 2 + C sum_i cross entropy_i, by scikit-learn;  a warm start: from the C before"""
    from sklearn.linear_model import LogisticRegression  # here, as few tasks need it
    return LogisticRegression(C=C, max_iter=1000, tol=1e-12, warm_start=warm_start)
