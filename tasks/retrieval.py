"""
Instance retrieval: images ranked by the cosine of their class tokens.

    python evaluate.py --task retrieval --weights runs/s --data ROXFORD             gnd_*.pkl, jpg/
    python evaluate.py --task retrieval --weights runs/s --data AMSTERTIME          new/, old/
    python evaluate.py --task retrieval --weights runs/s --data PHOTOS              folders of classes, or shapes

    levels       revisited Oxford and Paris: easy, medium, hard, without junk    DINOv3 §6.2.2; Radenovic et al. 2018
    same_class   AmsterTime's pairs, both ways; any folders of classes           DINOv3 App. D.8

The layout of the folder says which set it is. Dimension letters: see model.py.

paper:  DINOv3 §6.2.2, App. D.8; whether it crops Oxford's queries to their boxes, it does not say: not done here
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from engine.metrics import LEVELS, average_precision
from engine.sources import open_source
from engine.task import Task
from engine.views import centre_crop, letterbox
from sets import rankings
from sets.classes import limited, stray


def open_set(c):
    """What ranks the set that the folder holds:  frozen -> {metric: number}.  Raises ValueError."""
    root = Path(c.data)
    if c.data == "shapes":
        return partial(rank_classes, limited(open_source("shapes", c.limit or 500, seed=1001), 0))
    if rankings.met_lists(root):
        raise ValueError(f"--data: {c.data} is Met, which has a task of its own; write --task met")
    if list(root.glob("gnd_*.pkl")):
        return partial(rank_levels, *rankings.revisited(root))
    if (root / "new").is_dir() and (root / "old").is_dir():
        return partial(rank_pairs, *rankings.amstertime(root))
    whole = open_source(root / "val" if (root / "val").is_dir() else root)
    if len(whole.classes) < 2 or stray(whole):
        raise ValueError(f"--data: {root} has {len(whole.classes)} folders of images, in which there should be all; "
                         f"retrieval wants at least 2 classes, or {TASK.layout}")
    source = limited(whole, c.limit)
    if len({source.label(i) for i in range(len(source))}) == len(source):
        raise ValueError(f"--data: no image of {root} has another one of its class; wanted folders of classes")
    return partial(rank_classes, source)


def run(rank, frozen, c):
    return rank(frozen=frozen, c=c)


def unit(frozen, name, images, view=None):
    """Class tokens of all images, of unit length:  n D. Raises ValueError if one cannot be read."""
    cls = frozen.tokens(name, images, view and frozen.seen(view)).cls
    if len(cls) < len(images):
        raise ValueError(f"--data: {len(images) - len(cls)} images of {name} cannot be read; ranks would be wrong")
    return F.normalize(cls, dim=1)


def rank_levels(queries, images, truths, frozen, c):
    features = (unit(frozen, *each, letterbox) for each in (("queries", queries), ("images", images)))
    return levels(*features, rankings.shuffled(truths, c))


def rank_pairs(new, old, frozen, c):
    a, b, ids = unit(frozen, "new", new), unit(frozen, "old", old), range(len(new))
    ways = [same_class(*pair, rankings.shuffled(ids, c), ids) for pair in ((a, b), (b, a))]
    return dict(map=(ways[0] + ways[1]) / 2, map_new_to_old=ways[0], map_old_to_new=ways[1], n_queries=len(new))


def rank_classes(source, frozen, c):
    tokens = frozen.tokens("images", source)
    features, labels = F.normalize(tokens.cls, dim=1), rankings.shuffled(tokens.labels.tolist(), c)
    chance = np.mean([(labels.count(k) - 1) / max(len(labels) - 1, 1) for k in labels])
    score = same_class(features, features, labels, labels, oneself=True)
    return dict(map=score, chance=100 * float(chance), n_queries=len(features))


def levels(queries, images, truths):
    """queries n D, images m D, of unit length; truths, n dicts of lists of images -> mAP of the three levels"""
    ranked = (queries @ images.T).argsort(dim=1, descending=True).tolist()
    found = {}
    for level, groups in LEVELS.items():
        precisions = []
        for ranks, truth in zip(ranked, truths, strict=True):
            positive, ignored = (np.concatenate([np.ravel(truth[name]) for name in names]) for names in groups)
            precisions.append(average_precision(ranks, positive, ignored))
        precisions = [p for p in precisions if p is not None]
        found[f"map_{level}"] = 100 * float(np.mean(precisions)) if precisions else 0.0
    return dict(**found, n_queries=len(queries), n_images=len(images))


def same_class(queries, images, query_labels, labels, oneself=False):
    """
    Mean over the queries of their average precision: the mean of the precisions at the ranks of the images of the
    query's label, in percent; queries that have none are left out.    oneself  image i is query i: not to be found
    """
    labels, precisions = torch.as_tensor(list(labels)), []
    for i, (query, k) in enumerate(zip(queries, query_labels, strict=True)):
        cosine, same = images @ query, labels == k
        if oneself:
            cosine, same = (torch.cat([x[:i], x[i + 1 :]]) for x in (cosine, same))
        hits = same[cosine.argsort(descending=True)].double()
        if hits.any():
            precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
            precisions.append(((precision * hits).sum() / hits.sum()).item())
    if not precisions:
        raise ValueError("retrieval: no image has another one of its class; wanted folders of classes")
    return 100 * float(np.mean(precisions))


TASK = Task("retrieval", "gnd_*.pkl, jpg/: revisited Oxford, Paris; new/, old/: AmsterTime; or folders of classes",
            open_set, run, wants="tokens", metric="map", view=centre_crop)
