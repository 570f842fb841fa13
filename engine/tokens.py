"""
What a frozen backbone says of images that never change: all tokens of each, once, in one file that all ranks share.

    keep      a source of images -> Kept, the same images as their tokens, computed by all ranks
    Kept      load(i) -> N D: class token, registers, patches; an image that could not be read raises OSError here too

The file lies in a run's folder, and an interrupted run goes on with it. Dimension letters: see the top of model.py.
"""

import hashlib
import math
import os
import shutil
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data import loader
from engine.chunks import Computed
from model import Features


class Kept:
    """The source's names and captions, and in the place of its pixels N D from the file, in the dtype it was kept in"""

    def __init__(self, source, path, shape, dtype):
        self.source, self.path, self.shape, self.dtype = source, path, shape, dtype
        self.size = math.prod(shape) * dtype.itemsize

    def __len__(self):
        return len(self.source)

    def name(self, i):
        return self.source.name(i)

    def captions(self, i):
        return self.source.captions(i)

    def load(self, i):
        data = bytearray(self.size)
        with open(self.path, "rb") as file:
            file.seek(int(i) * self.size)
            read = file.readinto(data)
        tokens = torch.frombuffer(data, dtype=self.dtype).view(self.shape)
        if read < self.size or tokens[0, 0].isnan():
            raise OSError(f"{self.name(i)}: it could not be read when its tokens were computed")
        return tokens


def split(tokens, n_registers, grid):
    """B N D -> Features"""
    cls, registers, patches = tokens.split([1, n_registers, math.prod(grid)], 1)
    return Features(cls[:, 0], registers, patches, grid)


def keep(c, ranks, source, view, see, shape, dtype, about):
    """
    view     index in the source -> C H W uint8, of one size; raises OSError
    see      B C H W uint8, on the host -> B N D
    shape    N, D    about  what else they depend on: another run in this folder has another file
    returns  Kept, of OUT/tokens-DIGEST; the file is there whole or not at all.  raises ValueError if the disk is full
    """
    digest = hashlib.sha1(repr((source.digest(), about, shape, dtype)).encode()).hexdigest()[:16]
    path = Path(c.out, f"tokens-{digest}")
    kept, new = Kept(source, path, shape, dtype), path.with_suffix(".new")

    def make_room():
        free = shutil.disk_usage(path.parent).free
        if kept.size * len(source) > free:
            raise ValueError(f"--out {c.out}: tokens of {len(source):,} images take {kept.size * len(source):,} bytes, "
                             f"{free:,} are free; make room, or take --augment true, which keeps none")
        with open(new, "wb") as file:
            file.truncate(kept.size * len(source))

    if all(ranks.together(path.exists)):
        return kept
    ranks.together(lambda: ranks.main and make_room())
    ranks.together(partial(write_share, c, ranks, kept, new, view, see))
    ranks.together(lambda: ranks.main and new.replace(path))
    return kept


def write_share(c, ranks, kept, path, view, see, batch=64):
    """The rows of every S-th image; those of one that cannot be read are not a number."""
    mine = list(range(ranks.rank, len(kept), ranks.count))
    stream = loader(Computed(view), mine, c.workers)
    with open(path, "r+b") as file, tqdm(total=len(mine), desc="tokens", unit="img", leave=False,
                                         disable=ranks.rank > 0 or None) as bar:
        for start in range(0, len(mine), batch):
            rows = mine[start : start + batch]
            views = [next(stream) for _ in rows]
            read = [k for k, x in enumerate(views) if isinstance(x, torch.Tensor)]
            tokens = torch.full((len(rows), *kept.shape), math.nan, dtype=kept.dtype)
            if read:
                tokens[read] = see(torch.stack([views[k] for k in read])).to("cpu", kept.dtype)
            for row, data in zip(rows, tokens, strict=True):
                os.pwrite(file.fileno(), data.view(torch.uint8).numpy().tobytes(), row * kept.size)
            bar.update(len(rows))
