"""
K-means of very many vectors, and k-means of its centroids, level upon level: what curate.py counts images by.

    start       k-means++, greedily                       lloyd    centroids from given ones
    kmeans      both; of many clusters in two steps, coarse cells and their parts
    hierarchy   kmeans of vectors, of its centroids, of theirs, ..., each level made again of what lies nearest them

Vectors are rows of float16 of length 1 at most: a float64 sum of fewer than 2^29 of them is exact in any order, so
chunks and ranks change no centroid. Distances are float32, of centred vectors.

paper: DINOv3 §3.1, hierarchical k-means with resampling.    N vectors, D numbers each, k clusters
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from engine.ranks import Ranks, add_up

STEPS = 50         # of Lloyd at most
SETTLED = 5e-3     # share of the vectors that change their cluster, below which it ends
SAMPLE = 64        # vectors for each cluster, at most, of which k-means++ chooses
DIRECT = 1 << 26   # vectors times clusters: of more, clusters are made in two steps
FEW = 100          # clusters that are made directly of any number of vectors
AGAIN = 10         # times that a level is made again
ROWS, DISTANCES = 1 << 14, 1 << 24  # at a time


class Clusters(NamedTuple):
    centroids: np.ndarray      # k D float16: the vectors of the next level
    places: np.ndarray         # N int32: the cluster of each vector
    distances: np.ndarray      # N float32: to its centroid, squared


class Part:
    """Some rows of an array; [slice] as of an array"""

    def __init__(self, rows, at):
        self.rows, self.at, self.shape = rows, at, (len(at), rows.shape[1])

    def __len__(self):
        return len(self.at)

    def __getitem__(self, which):
        return self.rows[self.at[which]]


def chunks(n, k):
    """Slices of n vectors, of a length that k alone sets: no rank's products are of another shape."""
    size = max(min(ROWS, DISTANCES // k), 256)
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def mean_of(vectors, ranks):
    """N D -> D, float32"""
    total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=ranks.device)
    for part in chunks(len(vectors), 1)[ranks.rank :: ranks.count]:
        total += torch.from_numpy(vectors[part]).to(ranks.device).double().sum(0)
    add_up([total], ranks)
    return (total / len(vectors)).float()

# --------------------------------------------------------------------------------
# One level


def start(vectors, k, rng, device):
    """
    k of some vectors, far from each other: each is the best of a few that are drawn by their squared distance to the
    nearest one so far, best for the sum of all these.

    vectors  n D float16    returns  k D float32
    """
    x = torch.from_numpy(vectors).to(device).float()
    x -= x.mean(0)
    lengths, rows = x.square().sum(1), [int(rng.integers(len(x)))]
    nearest = distances_to(x, lengths, rows)[:, 0]
    for _ in range(1, k):
        sums = nearest.double().cumsum(0)
        drawn = torch.from_numpy(rng.random(2 + int(np.log(k)))).to(device) * sums[-1]
        found = torch.searchsorted(sums, drawn, right=True).clamp(max=len(x) - 1)
        each = torch.minimum(distances_to(x, lengths, found), nearest[:, None])                # n tries
        best = each.double().sum(0).argmin()
        nearest = each[:, best].clone()
        rows.append(int(found[best]))
    return torch.from_numpy(vectors[rows]).float()


def distances_to(x, lengths, rows):
    """n D, n -> n m, squared, from the m rows; 0 from themselves"""
    found = (lengths[:, None] + lengths[rows] - 2 * x @ x[rows].T).clamp_(min=0)
    found[rows, range(len(rows))] = 0
    return found


def lloyd(vectors, centroids, ranks, steps=STEPS, bar=None):
    """
    vectors   N D float16: every rank has all of them and looks at a share    centroids  k D float32
    returns   Clusters, all of them on each rank; an empty one keeps its centroid
    """
    n, (k, width), device = len(vectors), centroids.shape, ranks.device
    mean, mine = mean_of(vectors, ranks), chunks(n, k)[ranks.rank :: ranks.count]
    size = mine[0].stop - mine[0].start if mine else 0
    x, wide = torch.empty(size, width, device=device), torch.empty(size, width, dtype=torch.float64, device=device)
    scores, centroids = torch.empty(size, k, device=device), centroids.to(device)
    places, distances = torch.full((n,), -1, dtype=torch.int32), torch.zeros(n)
    for step in range(steps + 1):
        sums = torch.zeros(k, width, dtype=torch.float64, device=device)
        counts, moved = torch.zeros(k, dtype=torch.float64, device=device), torch.zeros(1, dtype=torch.float64)
        centred = centroids - mean
        half = centred.square().sum(1) / 2
        for part in mine:
            rows = torch.from_numpy(vectors[part])
            near, exact = x[: len(rows)].copy_(rows).sub_(mean), wide[: len(rows)].copy_(rows)
            best, place = torch.addmm(half, near, centred.T, beta=-1, out=scores[: len(rows)]).max(1)  # x c - c c / 2
            sums.index_add_(0, place, exact)
            counts += torch.bincount(place, minlength=k)
            here = place.int().cpu()
            moved += (here != places[part]).sum()
            places[part], distances[part] = here, (near.square().sum(1) - 2 * best).clamp_(min=0).cpu()
        add_up([sums, counts, moved], ranks)
        if bar is not None:
            bar.set_postfix_str(f"step {step}, {moved.item() / n:.1%} change their cluster")
        if step == steps or moved.item() <= SETTLED * n:
            break
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids.double()).float()
    if ranks.count > 1:
        others = torch.ones(n, dtype=torch.bool)
        for part in mine:
            others[part] = False
        places[others] = distances[others] = 0
        add_up([places, distances], ranks)
    return Clusters(centroids.half().cpu().numpy(), places.numpy(), distances.numpy())


def kmeans(vectors, k, seed, ranks, bar=None):
    """k clusters of N vectors, k <= N.    seed  numbers    returns  Clusters"""
    if not direct(len(vectors), k):
        return in_two_steps(vectors, k, seed, ranks, bar)
    rng = np.random.default_rng(seed)
    some = np.sort(rng.choice(len(vectors), min(SAMPLE * k, len(vectors)), replace=False))
    return lloyd(vectors, start(vectors[some], k, rng, ranks.device), ranks, bar=bar)


def direct(n, k):
    """Whether each of n vectors is compared with each of k clusters: quick, or no other way."""
    return k <= FEW or n * k <= DIRECT


def compared(n, k):
    """Clusters that each of n vectors is compared with in a step"""
    coarse = round(k**0.5)
    return k if direct(n, k) else compared(n, coarse) + compared(n / coarse, k / coarse)


def in_two_steps(vectors, k, seed, ranks, bar):
    """Coarse cells, as many as each of them has clusters then; cells are dealt to the ranks"""
    coarse = kmeans(vectors, round(k**0.5), [*seed, 0], ranks, bar)
    order, sizes = np.argsort(coarse.places, kind="stable"), np.bincount(coarse.places, minlength=len(coarse.centroids))
    cells, counts, alone = np.split(order, np.cumsum(sizes)[:-1]), shares(sizes, k), Ranks(device=ranks.device)
    firsts = np.cumsum(counts) - counts
    centroids = torch.zeros(k, vectors.shape[1])
    places, distances = torch.zeros(len(vectors), dtype=torch.int32), torch.zeros(len(vectors))
    for cell in range(ranks.rank, len(cells), ranks.count):
        if counts[cell]:
            found = kmeans(Part(vectors, cells[cell]), int(counts[cell]), [*seed, 1, cell], alone)
            centroids[firsts[cell] : firsts[cell] + counts[cell]] = torch.from_numpy(found.centroids).float()
            places[cells[cell]] = torch.from_numpy(found.places + np.int32(firsts[cell]))
            distances[cells[cell]] = torch.from_numpy(found.distances)
        if bar is not None:
            bar.set_postfix_str(f"cell {cell + 1} of {len(cells)}")
    add_up([centroids, places, distances], ranks)
    return Clusters(centroids.half().numpy(), places.numpy(), distances.numpy())


def shares(sizes, total):
    """Of `total` what each has in proportion to its size: one at least, of what is not empty, and its size at most."""
    exact = sizes * (total / sizes.sum())
    found = np.clip(np.floor(exact).astype(int), np.minimum(sizes, 1), sizes)
    order = np.argsort(found - exact, kind="stable")                       # those that lack most first
    while found.sum() != total:
        change = np.sign(total - found.sum())
        for i in order[:: change]:
            if found.sum() != total and np.minimum(sizes, 1)[i] <= found[i] + change <= sizes[i]:
                found[i] += change
    return found

# --------------------------------------------------------------------------------
# Levels


def again(vectors, clusters, r, seed, ranks, bar=None):
    """
    As many clusters, made of the r members nearest each centroid alone: where vectors are few they weigh as much as
    where they are many. Then of all vectors, to which of these they belong.
    """
    order = np.lexsort((clusters.distances, clusters.places))
    sizes = np.bincount(clusters.places, minlength=len(clusters.centroids))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    near = Part(vectors, np.sort(order[rank < r]))
    centroids = kmeans(near, len(clusters.centroids), seed, ranks, bar).centroids
    return lloyd(vectors, torch.from_numpy(centroids).float(), ranks, 0)


def level(vectors, k, r, seed, ranks):
    """
    Clusters of one level, on all ranks.

    r  vectors nearest each centroid, of which they are made again; 1: they are not
    """
    with tqdm(total=1 + AGAIN * (r > 1), desc=f"{k:,} clusters", leave=False, disable=ranks.rank > 0 or None) as bar:
        found = kmeans(vectors, k, [*seed, 0], ranks, bar)
        bar.update()
        for turn in range(AGAIN if r > 1 else 0):
            found = again(vectors, found, r, [*seed, 1 + turn], ranks, bar)
            bar.update()
    return found


def hierarchy(vectors, levels, seed, run):
    """
    vectors  N D float16    levels  [(k, r)], k falling
    run      (which level, work) -> what work(ranks) returns on all ranks; or what it has returned before
    returns  [Clusters] of each level: of the vectors, of the centroids below
    """
    found = []
    for at, (k, r) in enumerate(levels):
        found.append(run(at, partial(level, vectors, k, r, [seed, at])))
        vectors = found[-1].centroids
    return found


def products(n, width, levels):
    """Multiplications that the distances of all levels take, if no level settles before its last step"""
    total = 0
    for k, r in levels:
        near = min(r * k, n)
        total += (STEPS + 1) * n * compared(n, k)
        total += AGAIN * ((STEPS + 1) * near * compared(near, k) + n * k) * (r > 1)
        n = k
    return round(total * width)


def choose_levels(n, keep):
    """
    [(k, r)] for n images of which `keep` stay: k = keep / 8, then a 25th, a 10th, an 8th, a 4th of those below, while
    that is 100 or more
    """
    ks = [max(min(keep // 8, n), 1)]
    for less in (25, 10, 8, 4):
        if ks[-1] // less < 100:
            break
        ks.append(ks[-1] // less)
    return with_resampling(n, ks)


def with_resampling(n, ks):
    """r is half a cluster's mean size; 1 where clusters are so many that each vector is compared with few."""
    return [(k, max(below // k // 2, 1) if direct(below, k) else 1) for below, k in zip([n, *ks[:-1]], ks, strict=True)]
