"""
Which image a sample is: a function of (seed, step, sample), never of the rank or of the past, and without memory of the
source's size.

    permutation   a shuffled range, by a key: a table if it is short, else a Feistel network
    windows       the same, 64 neighbours at a time                    --order windows
    deal          the n-th of an endless deal of kinds, in exact shares
    Part          how many images a part of a mixture has, and how often they come
    Order         step, sample -> its image, then those that stand in for it
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

TABLE = 65_536   # images: so many are shuffled as a table; six rounds of a network are not uniform for a handful
WINDOW = 64      # neighbours that are read one after the other
TRIES = 64       # images in a row that cannot be read, before the disk is taken for gone
STEPS = 1000     # among so many, pure steps are dealt: their shares are in thousandths
SHARES = 65_536  # the same of the samples of mixed steps
ORDERS = "random", "windows"
WORD = 2**64 - 1

# --------------------------------------------------------------------------------
# Permutations


@lru_cache(maxsize=64)
def permutation(size, *key):
    """
    A shuffled range(size): a function of an index, or of an int64 array of them; another key, another order.

    Above TABLE it holds six keys and no table: a Feistel network on the next square, and where that leads out of the
    range, once more from there (cycle walking).
    """
    if size <= TABLE:
        return np.random.default_rng(key).permutation(size).__getitem__
    side = math.isqrt(size - 1) + 1
    keys = np.random.SeedSequence(key).generate_state(6, np.uint64).tolist()
    return partial(walk, partial(feistel, side=side, keys=keys), size)


def feistel(i, side, keys):
    """
    A bijection of range(side^2), of an int or of uint64.

        i = L side + R; six times L, R <- R, L + floor(side h / 2^32) mod side, h the upper half of mix(R xor key)
    """
    left, right = divmod(i, side)
    for key in keys:
        left, right = right, (left + ((mix(right ^ key) >> 32) * side >> 32)) % side
    return left * side + right


def mix(z):
    """SplitMix64's last lines: each bit of 64 on each bit, mod 2^64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
    return z ^ (z >> 31)


def walk(bijection, size, i):
    """A bijection of a longer range -> of range(size): from an end outside once more, until it is inside."""
    if not isinstance(i, np.ndarray):
        i = bijection(int(i))
        while i >= size:
            i = bijection(i)
        return i
    found = bijection(i.astype(np.uint64))
    while len(outside := np.flatnonzero(found >= size)):
        found[outside] = bijection(found[outside])
    return found.astype(np.int64)


def windows(size, *key):
    """
    A shuffled range(size), of an index: windows of 64 neighbours in random order, and in each its own order. A disk
    that turns, or one far away, reads them in one go; where neighbours are alike, as in folders of classes, so are
    those of a batch.
    """
    outer = permutation(-(-size // WINDOW), *key)

    def padded(i):
        window, place = divmod(i, WINDOW)
        window = int(outer(window))
        return window * WINDOW + int(permutation(WINDOW, *key, window)(place))
    return partial(walk, padded, size)

# --------------------------------------------------------------------------------
# Mixtures


def deal(n, counts, *key):
    """
    The n-th of an endless deal of kinds: in each block of sum(counts), kind k comes counts[k] times, in random order.

    returns  its kind, and how many of that kind came before: no rank and no past is asked, and none is left out
    """
    block, place = divmod(n, sum(counts))
    kinds, before = dealt(tuple(counts), block, *key)
    kind = int(kinds[place])
    return kind, block * counts[kind] + int(before[place])


@lru_cache(maxsize=4)
def dealt(counts, block, *key):
    """A block of `deal`: the kind of each, and how many of that kind are before it in the block."""
    sorted_kinds = np.repeat(np.arange(len(counts)), counts)
    kinds = np.random.default_rng([*key, block]).permutation(sorted_kinds)
    starts = np.cumsum(counts) - counts
    before = np.empty_like(kinds)
    before[kinds.argsort(kind="stable")] = np.arange(len(kinds)) - starts[sorted_kinds]
    return kinds, before


@dataclass(frozen=True)
class Part:
    size: int             # images
    share: int = SHARES   # of the samples of a mixed step, in 1/65,536
    pure: int = 0         # steps in 1000 that are of this part alone


class Order:
    """
    order(step, i) -> indices of the source for the i-th sample of a step: its image, then those that stand in for it
    if it cannot be read, the next in its part's order, 64 in all at most.

    source  one part, or several with source.parts, one after the other in its indices
    name    random, or windows

    Each part is an endless series of shuffled epochs; a source that is one part goes through them sample by sample.
    """
    def __init__(self, source, seed, batch, name="random"):
        self.seed, self.batch, self.shuffled = seed, batch, windows if name == "windows" else permutation
        self.parts = getattr(source, "parts", None) or [Part(len(source))]
        self.starts = np.cumsum([0] + [part.size for part in self.parts]).tolist()
        self.shares = [part.share for part in self.parts]
        self.pure = [part.pure for part in self.parts]
        self.pure.append(STEPS - sum(self.pure))  # the last kind of step: mixed

    def __call__(self, step, i):
        k, before = deal(step, self.pure, self.seed, 11)
        n = before * self.batch + i
        if k == len(self.parts):
            k, n = deal(n, self.shares, self.seed, 12)
        size = self.parts[k].size
        epoch, place = divmod(n, size)
        order = self.shuffled(size, self.seed, 5, epoch, k)
        for ahead in range(min(size, TRIES)):
            yield self.starts[k] + int(order((place + ahead) % size))
