"""
Instance retrieval: images ranked by the cosine of their class tokens. evaluate.py is the command.

    python evaluate.py --task retrieval --weights runs/s --data ROXFORD             gnd_*.pkl, jpg/
    python evaluate.py --task retrieval --weights runs/s --data AMSTERTIME          new/, old/
    python evaluate.py --task retrieval --weights runs/s --data MET --resolution 512  MET_database.json, testset.json
    python evaluate.py --task retrieval --weights runs/s --data PHOTOS              folders of classes, or shapes

    revisited    Oxford and Paris: easy, medium, hard, without junk              DINOv3 §6.2.2; Radenovic et al. 2018
    met          the Met's exhibits among distractors; GAP                    DINOv3 App. D.8; Ypsilantis et al. 2021
    same_class   AmsterTime's pairs, both ways; any folders of classes

embed(name, source, chosen, view) -> (cls n D, labels n) comes from evaluate.py. Dimension letters: see model.py.
"""

import json
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import open_source, read_image, resize
from engine.features import evenly, images_below
from engine.metrics import LEVELS, average_precision, global_average_precision

NEIGHBOURS = 1, 2, 3, 5, 7, 10, 15, 20, 50                        # Met: those tried; val picks
SHARPNESS = 0.01, 0.1, 1, 5, 10, 15, 20, 25, 30, 50, 100, 500     # factor of the cosines, the same
WHITE = 512                                                       # dimensions that are kept

# --------------------------------------------------------------------------------
# Images


class Plain(pickle.Unpickler):
    """Reads lists, numbers and arrays, and runs nothing: a gnd_*.pkl comes from elsewhere."""

    def find_class(self, module, name):
        array = name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")
        if array and module.split(".")[0] == "numpy" or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise ValueError(f"--data: gnd_*.pkl wants to run {module}.{name}; it should hold lists and numbers alone")


class Listed:
    """Images by their paths, of no class."""

    def __init__(self, paths):
        self.paths = paths

    def load(self, i):
        return read_image(self.paths[i])

    def label(self, i):
        return 0


def letterbox(image, side):
    """C H W uint8 -> C side side: the long side becomes `side`, black lies on both sides of the short one."""
    scale = side / max(image.shape[1:])
    image = resize(image, *(max(1, round(x * scale)) for x in image.shape[1:]))
    top, left = (side - image.shape[1]) // 2, (side - image.shape[2]) // 2
    return F.pad(image, (left, side - image.shape[2] - left, top, side - image.shape[1] - top))

# --------------------------------------------------------------------------------
# Rankings


def retrieval(embed, c):
    """
    The layout of the folder says which set it is; percent.

    paper:  DINOv3 §6.2.2, App. D.8; whether it crops Oxford's queries to their boxes, it does not say: not done here
    """
    root = Path(c.data)
    pickles = sorted(root.glob("gnd_*.pkl"))

    def unit(name, paths, view):
        cls, _ = embed(name, Listed(paths), range(len(paths)), view)
        if len(cls) < len(paths):
            raise ValueError(f"--data: {len(paths) - len(cls)} images of {c.data} cannot be read; ranks would be wrong")
        return F.normalize(cls, dim=1)

    if pickles:
        with pickles[0].open("rb") as file:
            truth = Plain(file, encoding="latin1").load()
        names = [[root / "jpg" / f"{name}.jpg" for name in truth[key]] for key in ("qimlist", "imlist")]
        queries, images = (unit(*each, letterbox) for each in zip(("queries", "images"), names, strict=True))
        return revisited(queries, images, control(truth["gnd"], c))
    if (root / "MET_database.json").is_file():
        lists = [json.loads((root / f"{name}.json").read_text()) for name in ("MET_database", "valset", "testset")]
        lists = [evenly(rows, c.limit) for rows in lists]
        ids = [[row.get("MET_id", row.get("id", -1)) for row in rows] for rows in lists]
        ids = [[-1 if k is None else int(k) for k in each] for each in ids]
        paths = [[root / "images" / row["path"] for row in rows] for rows in lists]
        features = [unit(*each, letterbox) for each in zip(("database", "val", "test"), paths, strict=True)]
        return met(*zip(features, (control(ids[0], c), *ids[1:]), strict=True))
    if (root / "new").is_dir() and (root / "old").is_dir():
        old = {path.stem: path for path in images_below(root / "old")}
        new = {path.stem: path for path in images_below(root / "new") if path.stem in old}
        names = sorted(new)
        a, b = (unit(name, [files[k] for k in names], None) for name, files in (("new", new), ("old", old)))
        ids = range(len(names))
        ways = [same_class(*pair, control(ids, c), ids) for pair in ((a, b), (b, a))]
        return dict(map=(ways[0] + ways[1]) / 2, map_new_to_old=ways[0], map_old_to_new=ways[1], n_queries=len(names))
    source = open_source("shapes", c.limit or 500, seed=1001) if c.data == "shapes" else \
        open_source(root / "val" if (root / "val").is_dir() else root)
    cls, labels = embed("images", source, evenly(range(len(source)), c.limit), None)
    unit, labels = F.normalize(cls, dim=1), control(labels.tolist(), c)
    chance = np.mean([(labels.count(k) - 1) / max(len(labels) - 1, 1) for k in labels])
    score = same_class(unit, unit, labels, labels, oneself=True)
    return dict(map=score, chance=100 * float(chance), n_queries=len(unit))


def control(items, c):
    """A list as it is, or under --control in another order."""
    items = list(items)
    return [items[i] for i in np.random.default_rng(c.seed).permutation(len(items))] if c.control else items


def revisited(queries, images, truths):
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

# --------------------------------------------------------------------------------
# Met


def whitened(features):
    """[n D each], unit length -> the same after PCA of the first: 512 dimensions of equal variance, unit length."""
    mean = features[0].double().mean(0)
    x = features[0].double() - mean
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    kept = values > values.max() * 1e-9
    basis = (vectors[:, kept] / values[kept].sqrt())[:, -WHITE:]                               # D 512
    return [F.normalize((each.double() - mean) @ basis, dim=1) for each in features]


def answers(queries, images, ids, n_neighbours, sharpness):
    """
    For each query the id of its nearest image, and how sure that is, among all C ids of the data base:

        s_c = largest cosine of the neighbours of id c;  sure = exp(t s_max) / (sum over c of exp(t s_c) + C - n),
        n ids among the neighbours, t sharpness

    returns  ids n, confidence n
    """
    ids = torch.as_tensor(ids)
    n_ids, sure, found = len(ids.unique()), [], []
    for part in queries.split(256):
        cosine, near = (part @ images.T).topk(min(n_neighbours, len(images)))                  # B k, largest first
        named = ids[near]
        again = (named[:, :, None] == named[:, None, :]).tril(-1).any(2)                       # its id came before
        weight = (sharpness * (cosine - cosine[:, :1])).exp().masked_fill(again, 0)            # over exp(t s_max)
        absent = (n_ids - (~again).sum(1)) * (-sharpness * cosine[:, 0]).exp()
        sure.append(1 / (weight.sum(1) + absent))
        found.append(named[:, 0])
    return torch.cat(found), torch.cat(sure)


def met(database, val, test):
    """
    Each (features n D, ids n; -1 = of no exhibit). Val picks neighbours and sharpness by GAP.

    returns  gap, gap_minus (without distractors) and accuracy of the exhibits' queries, percent
    """
    images, tuned, asked = whitened([each[0] for each in (database, val, test)])

    def score(queries, truth, *settings):
        truth = torch.as_tensor(truth)
        found, sure = answers(queries, images, database[1], *settings)
        return sure, found == truth, truth >= 0

    tried = [(global_average_precision(*score(tuned, val[1], k, t)), k, t) for k in NEIGHBOURS for t in SHARPNESS]
    _, k, t = max(tried, key=lambda row: row[0])
    sure, right, known = score(asked, test[1], k, t)
    return dict(gap=100 * global_average_precision(sure, right, known),
                gap_minus=100 * global_average_precision(sure[known], right[known], known[known]),
                accuracy=100 * right[known].double().mean().item(), neighbours=k, sharpness=t,
                n_images=len(images), n_queries=len(known))
