"""
Which vectors lie near which: neighbours, and pictures that are one picture.

    nearest      of each query its nearest vectors
    alike        all pairs whose cosine is above a threshold: each with each, or within coarse cells
    components   what hangs together by such pairs; groups_of, as rows
    copies       a picture as others hand it on;  try_copies: how near some are to it
    calibrate    the threshold at which copies are told from other pictures

Vectors are of length 1, N D float16; a cosine is a float32 product of two.
"""

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from engine.kmeans import kmeans
from engine.ranks import Ranks

BLOCK = 2048         # rows and columns of cosines at a time
ALL = 1 << 16        # vectors: of so many each is compared with each
CELL = 8192          # vectors of a coarse cell, about; each is in the two nearest
TRIED = 256          # pictures of which copies are made
SURE = 0.1           # share of copies that a threshold must find for it to tell how many are real
WRONG = 10           # copies that stay are as bad as one picture that goes and is none


def nearest(queries, vectors, k, device):
    """
    queries  n D float16    vectors  N D float16
    returns  (rows of the k nearest of each query, n k; their cosines): nearest first, of equal ones the first row
    """
    rows, cosines = [], []
    for q in torch.from_numpy(queries).split(BLOCK):
        q = q.to(device).float()
        best = q.new_full((len(q), 0), 0.0)
        at = torch.empty(len(q), 0, dtype=torch.int64, device=device)
        for first in range(0, len(vectors), 8 * BLOCK):
            part = torch.from_numpy(vectors[first : first + 8 * BLOCK]).to(device).float()
            here = torch.arange(first, first + len(part), device=device).expand(len(q), -1)
            best, at = torch.cat([best, q @ part.T], 1), torch.cat([at, here], 1)
            best, order = best.sort(dim=1, descending=True, stable=True)
            best, at = best[:, :k], at.gather(1, order[:, :k])
        rows.append(at.cpu())
        cosines.append(best.cpu())
    return torch.cat(rows).numpy(), torch.cat(cosines).numpy()


def alike(vectors, threshold, seed, device, bar=lambda parts: parts):
    """
    Pairs i < j, n 2, whose cosine is above the threshold, in order.

    Of more than ALL vectors those alone that share a coarse cell, of the two nearest to each.
    """
    n = len(vectors)
    cells = [np.arange(n)] if n <= ALL else cells_of(vectors, -(-2 * n // CELL), seed, device)
    found = [np.empty((0, 2), np.int64)]
    for cell in bar(cells):
        for first in range(0, len(cell), BLOCK):
            left = cell[first : first + BLOCK]
            x = torch.from_numpy(vectors[left]).to(device).float()
            for second in range(first, len(cell), BLOCK):
                right = cell[second : second + BLOCK]
                y = x if first == second else torch.from_numpy(vectors[right]).to(device).float()
                hits = (x @ y.T > threshold).nonzero().cpu().numpy()
                pairs = np.stack([left[hits[:, 0]], right[hits[:, 1]]], axis=1)
                found.append(pairs[pairs[:, 0] < pairs[:, 1]])
    return np.unique(np.concatenate(found), axis=0)


def cells_of(vectors, k, seed, device):
    """[the rows, rising, of which each of k centroids is among the two nearest]"""
    centroids = kmeans(vectors, k, [seed, 0], Ranks(device=device)).centroids
    x = torch.from_numpy(centroids).to(device).float()
    half, two = x.square().sum(1) / 2, []
    for first in range(0, len(vectors), BLOCK):
        part = torch.from_numpy(vectors[first : first + BLOCK]).to(device).float()
        two.append(torch.addmm(half, part, x.T, beta=-1).topk(min(2, k), dim=1).indices.cpu())
    two = torch.cat(two).numpy()
    order = np.argsort(two.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(two.ravel(), minlength=k))[:-1]
    return [rows // two.shape[1] for rows in np.split(order, ends)]


def components(n, pairs):
    """The lowest row that each of n hangs together with, by pairs"""
    label = np.arange(n)
    while len(pairs):
        before, (a, b) = label.copy(), label[pairs.T]
        np.minimum.at(label, a, np.minimum(a, b))
        np.minimum.at(label, b, np.minimum(a, b))
        label = label[label]
        if (label == before).all():
            break
    return label


def groups_of(vectors, label):
    """[rows] of each component of several, the one that is nearest their mean first, then as they come"""
    found, sizes = [], np.bincount(label, minlength=len(label))
    order = np.argsort(label, kind="stable")
    order = order[sizes[label[order]] > 1]
    for rows in np.split(order, np.flatnonzero(np.diff(label[order])) + 1) if len(order) else ():
        x = vectors[rows].astype(np.float64)
        middle = (x @ x.mean(0)).round(6).argmax()
        found.append(np.concatenate([rows[middle : middle + 1], np.delete(rows, middle)]))
    return found

# --------------------------------------------------------------------------------
# How near is a copy


def copies(rng, image):
    """{what was done: the picture after it}.    image  H W 3 uint8, array"""
    picture = Image.fromarray(image)
    w, h = picture.size
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=30)
    left, top = int(rng.integers(w - round(0.8 * w) + 1)), int(rng.integers(h - round(0.8 * h) + 1))
    small = picture.resize((max(w // 2, 1), max(h // 2, 1)), Image.Resampling.BICUBIC)
    table = np.clip(np.arange(256) * rng.uniform(0.7, 1.3) + rng.uniform(-30, 30), 0, 255).astype(np.uint8)
    done = dict(jpeg=Image.open(file), cropped=picture.crop((left, top, left + round(0.8 * w), top + round(0.8 * h))),
                halved=small, mirrored=picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
                recoloured=Image.fromarray(table[image]))
    return {kind: np.asarray(each.convert("RGB")) for kind, each in done.items()}


def try_copies(vectors, load, embed, seed, device):
    """
    vectors  N D float16    load(i) -> C H W uint8    embed(images) -> n D
    returns  {kind: cosines of some pictures and their copies},  cosine of each of them to the nearest other picture
    """
    rng, found = np.random.default_rng([seed, 1]), {}
    rows = np.sort(rng.choice(len(vectors), min(TRIED, len(vectors)), replace=False))
    for i in tqdm(rows, "copies", unit="img", leave=False, disable=None):
        made = copies(rng, load(i).permute(1, 2, 0).numpy())
        said = embed([torch.from_numpy(each.copy()).permute(2, 0, 1) for each in made.values()])
        own = vectors[[i]][0].astype(np.float32)
        for kind, x in zip(made, said, strict=True):
            found.setdefault(kind, []).append(own @ x / np.linalg.norm(x))
    _, cosines = nearest(vectors[rows], vectors, 2, device)
    return {kind: np.array(each, np.float32) for kind, each in found.items()}, cosines[:, 1]


class Calibration(NamedTuple):
    threshold: float
    recall: dict               # {kind of copy: share of copies that are above}
    others: float              # share of pictures to which another one of the pile is above
    wrong: float               # of these, as estimated, those that are no copies


def calibrate(same, others):
    """
    The threshold above which most copies lie, less WRONG times the other pictures that do.

    same    {kind: cosines of a picture and its copy}    others  cosine of each picture to the nearest other of the pile

    Real copies in the pile are among the others: as many, at most, as at every threshold the share of copies that are
    found lets there be. That is too few where few are seen: then less is dropped than could be.
    """
    cosines = np.concatenate([*same.values()])
    tried = np.unique(np.concatenate([cosines, others])) - 1e-6
    found = np.mean([(each[:, None] > tried).mean(0) for each in same.values()], axis=0)
    above = (others[:, None] > tried).mean(0)
    real = (above / found.clip(1e-9))[found >= SURE].min()
    wrong = (above - real * found).clip(0)
    best = (found - WRONG * wrong).argmax()
    return Calibration(float(tried[best]), {kind: float((each > tried[best]).mean()) for kind, each in same.items()},
                       float(above[best]), float(wrong[best]))
