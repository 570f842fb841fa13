"""
The Met: which exhibit does a photo show, if any? Nearest images of the data base, whitened, and how sure that is.

    python evaluate.py --task met --weights runs/s --data MET      ground_truth/*.json, images/, each as large as it is

    whitened    PCA learnt on the data base
    nearest     the most similar images
    answers     the nearest exhibit, and a confidence
    run         val picks two settings; GAP of the test queries

paper: DINOv3 §6.2.2, App. D.8; Ypsilantis et al. 2021. Dimension letters: see model.py.
"""

import torch
import torch.nn.functional as F

from engine.metrics import global_average_precision
from engine.task import Task
from engine.views import fitted
from sets import rankings

NEIGHBOURS = 1, 2, 3, 5, 7, 10, 15, 20, 50                        # those tried; val picks
SHARPNESS = 0.01, 0.1, 1, 5, 10, 15, 20, 25, 30, 50, 100, 500     # factor of the cosines, the same
WHITE = 512                                                       # dimensions that are kept


def whitened(features):
    """[n D each], unit length -> the same after PCA of the first: 512 dimensions of equal variance, unit length."""
    mean = features[0].double().mean(0)
    x = features[0].double() - mean
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    kept = values > values.max() * 1e-9
    basis = (vectors[:, kept] / values[kept].sqrt())[:, -WHITE:]                               # D 512
    return [F.normalize((each.double() - mean) @ basis, dim=1) for each in features]


def nearest(queries, images):
    """n D, m D -> the 50 largest cosines and their rows, n k: once for all settings, as there are 397,000 images"""
    found = [(part @ images.T).topk(min(max(NEIGHBOURS), len(images))) for part in queries.split(256)]
    return [torch.cat(column) for column in zip(*found, strict=True)]


def answers(cosine, near, ids, n_neighbours, sharpness):
    """
    For each query the id of its nearest image, and how sure that is, among all C ids of the data base:

        s_c = largest cosine of the neighbours of id c;  sure = exp(t s_max) / (sum over c of exp(t s_c) + C - n),
        n ids among the neighbours, t sharpness

    cosine, near  of at least so many neighbours, as `nearest` has them
    returns  ids n, confidence n
    """
    ids = torch.as_tensor(ids)
    cosine, named = cosine[:, :n_neighbours], ids[near[:, :n_neighbours]]                      # n k, largest first
    again = (named[:, :, None] == named[:, None, :]).tril(-1).any(2)                           # its id came before
    weight = (sharpness * (cosine - cosine[:, :1])).exp().masked_fill(again, 0)                # over exp(t s_max)
    absent = (len(ids.unique()) - (~again).sum(1)) * (-sharpness * cosine[:, 0]).exp()
    return named[:, 0], 1 / (weight.sum(1) + absent)


def run(data, frozen, c):
    parts = []
    for name, (images, ids) in zip(("database", "val", "test"), data, strict=True):
        cls = frozen.tokens(name, images).cls
        if len(cls) < len(images):
            raise ValueError(f"--data: {len(images) - len(cls)} images of {name} cannot be read; ranks would be wrong")
        parts.append((F.normalize(cls, dim=1), rankings.shuffled(ids, c) if name == "database" else ids))
    return score(*parts)


def score(database, val, test):
    """
    Each (features n D, ids n; -1 = of no exhibit). Val picks neighbours and sharpness by GAP.

    returns  gap, gap_minus (without distractors) and accuracy of the exhibits' queries, percent
    """
    images, *queries = whitened([each[0] for each in (database, val, test)])
    tuned, asked = (nearest(each, images) for each in queries)

    def tried(near, truth, *settings):
        truth = torch.as_tensor(truth)
        found, sure = answers(*near, database[1], *settings)
        return sure, found == truth, truth >= 0

    grid = [(global_average_precision(*tried(tuned, val[1], k, t)), k, t) for k in NEIGHBOURS for t in SHARPNESS]
    _, k, t = max(grid, key=lambda row: row[0])
    sure, right, known = tried(asked, test[1], k, t)
    return dict(gap=100 * global_average_precision(sure, right, known),
                gap_minus=100 * global_average_precision(sure[known], right[known], known[known]),
                accuracy=100 * right[known].double().mean().item(), neighbours=k, sharpness=t,
                n_images=len(images), n_queries=len(known))


TASK = Task("met", "ground_truth/{MET_database,valset,testset}.json, or these alone, and images/", rankings.met, run,
            wants="tokens", metric="gap", view=fitted, sides=(0, 0), shapes=False)
