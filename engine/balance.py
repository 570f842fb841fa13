"""
How many images each cluster of a hierarchy gives, and which: from the top down as evenly as their sizes let it be.

    pour       a total over sizes, all of one height but those that are full
    balanced   the rows that are kept

paper: DINOv3 §3.1, balanced sampling
"""

import numpy as np


def pour(sizes, total, rng):
    """
    What each of several gives, n int: the largest height x that does not exceed the total, its size where that is less,
    and one more for some, drawn among the higher ones.

    sizes    n int    raises  ValueError: fewer in all than the total
    """
    sizes = np.asarray(sizes)
    if sizes.sum() < total:
        raise ValueError(f"{total:,} of {sizes.sum():,} cannot be kept")
    low, high = 0, int(sizes.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() <= total else (low, middle - 1)
    found = np.minimum(sizes, low)
    left = total - found.sum()
    found[rng.choice(np.flatnonzero(sizes > low), left, replace=False) if left else []] += 1
    return found


def grouped(places, k):
    """[the rows of each of k clusters]"""
    return np.split(np.argsort(places, kind="stable"), np.cumsum(np.bincount(places, minlength=k))[:-1])


def sizes_of(levels):
    """[images beneath each cluster] of each level.    levels  [places], of images, of the clusters below"""
    found = []
    for places, k in levels:
        found.append(np.bincount(places, found[-1] if found else None, minlength=k).astype(np.int64))
    return found


def balanced(levels, total, seed):
    """
    levels   [(places, k)]: cluster of each image, of each cluster below
    returns  rows of images, rising, `total` of them
    """
    sizes = sizes_of(levels)
    give = pour(sizes[-1], total, np.random.default_rng([seed, len(levels)]))
    for at in range(len(levels) - 1, 0, -1):  # what the clusters of a level give is given by those below
        below = np.zeros(len(sizes[at - 1]), np.int64)
        for cluster, rows in enumerate(grouped(*levels[at])):
            below[rows] = pour(sizes[at - 1][rows], give[cluster], np.random.default_rng([seed, at, cluster]))
        give = below
    kept = [np.random.default_rng([seed, 0, cluster]).choice(rows, give[cluster], replace=False)
            for cluster, rows in enumerate(grouped(*levels[0]))]
    return np.sort(np.concatenate(kept))


def kl_to_uniform(counts):
    """Of clusters' or classes' shares, in nats: 0 = each has as many"""
    p = counts[counts > 0] / counts.sum()
    return float((p * np.log(p * len(counts))).sum())
