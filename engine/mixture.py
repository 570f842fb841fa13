"""
Several sources as one, in shares.

    read_mixture   --data 'A*0.7,B*0.3' -> its parts
    apportion      shares in whole numbers, by the largest remainders
    Mixture        the source; which part a sample is of, engine/order.py deals

    'A*0.7,B*0.3'            seven samples in ten are of A, in every batch about
    'A*0.1!,B*0.7,C*0.3'     every tenth step is of A alone; the samples of the others are of B and C, seven to three
    mixture.json             [{"path": "A", "share": 0.1, "pure": true}, ...]: the same, for paths with a comma in them

paper: DINOv3 §3.1: a tenth of the batches are of ImageNet-1k alone, the others mixed
"""

import hashlib
import json
import math
import re
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from engine.order import SHARES, STEPS, Part

FORM = "write A*0.7,B*0.3, or A*0.1!,B*0.7,C*0.3, where ! is a share of the steps"


def read_mixture(path):
    """
    [(path, samples in 65,536 of a mixed step, pure steps in 1000)] of each part of a mixture; None if that is none.

    path    as above, of a .json relative to its folder; what exists under such a name is no mixture
    raises  ValueError: a part without a path or a share; shares that leave a part, or some steps, with nothing
    """
    text, file = str(path), Path(path).expanduser()
    if file.suffix.lower() == ".json" and file.is_file():
        parts = read_json(file)
        if parts is None:
            return None
    elif "*" in text and not file.exists():
        parts = [read_part(part) for part in text.split(",")]
    else:
        return None
    for part, share, _ in parts:
        if not part:
            raise ValueError(f"--data {text}: a part has no path; {FORM}")
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"--data {text}: {part} has the share {share:g}; it must be a number from 0 on")
    return [(path, *counts) for (path, _, _), counts in zip(parts, portions(parts), strict=True)]


def read_part(text):
    found = re.fullmatch(r"(.*)\*([^*/!]+)(!?)", text.strip())
    try:
        return found[1], float(found[2]), bool(found[3])
    except (TypeError, ValueError):
        raise ValueError(f"--data: {text or 'a part'!r} of the mixture has no share; {FORM}") from None


def read_json(path):
    """[(path, share, pure)]; None for a file of another kind. Raises ValueError."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(held, list):
            return None
        parts = [(str(part["path"]), float(part["share"]), bool(part.get("pure", False))) for part in held]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"--data: {path} is no mixture ({error!r}); write "
                         '[{"path": "A", "share": 0.1, "pure": true}, ...]') from error
    return [(part if part in ("", "shapes") else str(path.parent / Path(part).expanduser()), share, pure)
            for part, share, pure in parts]


def apportion(shares, total):
    """Whole numbers that add up to `total`, as near to the shares as can be: the largest remainders are rounded up."""
    exact = [share / math.fsum(shares) * total for share in shares]
    found = [math.floor(x) for x in exact]
    for k in sorted(range(len(exact)), key=lambda k: found[k] - exact[k])[: total - sum(found)]:
        found[k] += 1
    return found


def portions(said):
    """[(samples in 65,536 of a mixed step, pure steps in 1000)] of each part. Raises ValueError."""
    shown = ", ".join(f"{path}*{share:g}{'!' * pure}" for path, share, pure in said)
    left = 1 - math.fsum(share for _, share, pure in said if pure)
    mixed = [0.0 if pure else share for _, share, pure in said]
    if left < -1e-9:
        raise ValueError(f"--data: the pure shares of {shown} add up to {1 - left:g}; at most 1, all steps")
    steps = apportion([*(share if pure else 0.0 for _, share, pure in said), max(left, 0.0)], STEPS)
    if bool(sum(mixed)) != bool(steps[-1]):
        raise ValueError(f"--data: {steps[-1]} steps in {STEPS} of {shown} are mixed, and the shares in them add up "
                         f"to {sum(mixed):g}; {FORM}")
    samples = apportion(mixed, SHARES) if sum(mixed) else [0] * len(said)
    for (path, share, _), *counts in zip(said, samples, steps[:-1], strict=True):
        if not any(counts):
            raise ValueError(f"--data: the share of {path} in {shown}, {share:g}, is nothing: at least one sample in "
                             f"{SHARES:,}, or one step in {STEPS:,}; leave it out, or give it more")
    return list(zip(samples, steps[:-1], strict=True))


class Mixture:
    """
    Parts one after the other: image i of part k is image starts[k] + i. They have no classes in common.

    sources  of the parts    counts  of each, the two that read_mixture has
    """
    classes = ()

    def __init__(self, sources, counts):
        self.sources = sources
        self.parts = [Part(len(source), *each) for source, each in zip(sources, counts, strict=True)]
        self.starts = [0, *accumulate(part.size for part in self.parts[:-1])]

    def __len__(self):
        return sum(part.size for part in self.parts)

    def at(self, i):
        """The part's source, and the row in it"""
        k = bisect_right(self.starts, i) - 1
        return self.sources[k], i - self.starts[k]

    def load(self, i):
        source, row = self.at(i)
        return source.load(row)

    def name(self, i):
        source, row = self.at(i)
        return source.name(row)

    def label(self, i):
        raise ValueError(f"--data: a mixture has no labels, asked for {self.name(i)}; name one of its parts")

    def digest(self):
        """Of the parts and their shares, which decide the order."""
        lines = (f"{source.digest()} {part.share} {part.pure}\n"
                 for source, part in zip(self.sources, self.parts, strict=True))
        return hashlib.sha1("".join(lines).encode()).hexdigest()
