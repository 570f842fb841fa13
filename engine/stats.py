"""
What a set of images holds, before anything is trained on it.

    python data.py stats PHOTOS                             every image, decoded by worker processes
    python data.py stats PHOTOS --limit 10000               so many of a huge set, drawn at random
    python data.py stats PHOTOS --size s --stage highres    compared with the crops of this recipe: train.py's options

    measure      one image -> what is known of it
    collect      all of them, by worker processes; goes on where an interrupted call ended
    summarize    those -> one object, which is the last line of the output
    table        the object, for people

An image that cannot be read is counted and named, and left out of all else.
"""

import hashlib
import io
import json
import math
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import islice

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm import tqdm

from data import draw_crops, loader, read_resolutions
from engine import config as command_line
from engine.channels import reader
from engine.images import UPRIGHT, ImageConfig
from engine.names import cache_folder
from engine.order import SHARES as SAMPLES
from engine.order import STEPS
from engine.ranks import count_workers
from engine.sources import open_source
from recipes import TrainConfig, configure

CHUNK = 16                               # images that a worker measures before it hands them over
SHARES = 0, 5, 25, 50, 75, 95, 100       # percentiles of sides
DRAWN = 2000                             # images whose crops are drawn
MISSING = dict(bytes=-1, hash="", format="", mode="", turned=False, label=-1)  # of an image without file or label
SHOWN, LISTED = 3, 1000                  # names in the table, of each kind; in the line of JSON


@dataclass(frozen=True)
class StatsConfig:
    limit: int = 0             # [0, 1e10]: images that are looked at, drawn at random; 0 = all

# --------------------------------------------------------------------------------
# One image


def measure(source, i):
    """
    What is known of image i: plain numbers and words, for JSON.

        bytes, hash, format, mode, turned   of its file, if the source has files; turned: by its EXIF tag
        width, height                       upright, as the network gets it
        sum, square                         of each channel's values in 0..1; of whole levels the sums are exact; what
                                            --nodata says was not measured counts as much as the mean of what was
        label                               if the source has labels
        error                               instead of all that, where it cannot be read
    """
    found = dict(i=i)
    part, row = source.at(i) if hasattr(source, "sources") else (source, i)               # of a mixture
    try:
        data = part.raw(row)[0] if hasattr(part, "raw") else None
        image = source.load(i)
    except OSError as error:
        return found | dict(error=str(error))
    if data is not None:
        found |= dict(bytes=len(data), hash=hashlib.blake2b(data, digest_size=16).hexdigest()) | header(data)
    try:
        found["label"] = source.label(i)
    except ValueError:
        pass  # it has none: nothing here wants one
    levels = image.permute(1, 2, 0).flatten(0, 1).double()                                      # (H W) C
    top = 1 if image.is_floating_point() else torch.iinfo(image.dtype).max
    more = len(levels) / (~levels.isnan()).sum(0)                                               # C, infinite of none
    return found | dict(width=image.shape[2], height=image.shape[1], sum=(levels.nansum(0) / top * more).tolist(),
                        square=(levels.square().nansum(0) / top**2 * more).tolist())


def header(data):
    """What a file says of itself, before any pixel of it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return dict(format=image.format, mode=image.mode, turned=image.getexif().get(0x0112) in UPRIGHT)
    except UnidentifiedImageError:  # read by other means than Pillow
        return dict(format="other", mode="other", turned=False)

# --------------------------------------------------------------------------------
# All of them


class Chunks(Dataset):
    """chunks[k] -> the k-th CHUNK rows of a source, each measured: lines of JSON."""

    def __init__(self, source, rows):
        self.source, self.rows = source, rows

    def __len__(self):
        return -(-len(self.rows) // CHUNK)

    def __getitem__(self, k):
        return [json.dumps(measure(self.source, i)) for i in self.rows[k * CHUNK : (k + 1) * CHUNK]]


def collect(source, rows, memory, workers=0):
    """
    Measures of these rows, one by one, in order. Each goes to the file `memory` at once; what stands there is not done
    again, and at the end the file is deleted: images may change, and the next call is to see it.
    """
    done, wanted = recall(memory), rows if isinstance(rows, range) else set(rows)
    done = {i: line for i, line in done.items() if i in wanted}  # lines: a sixth of what they say takes in memory
    chunks = Chunks(source, [i for i in rows if i not in done])
    if done:
        print(f"going on after {len(done):,} of {len(rows):,} images, which an interrupted call has measured")
    with opened(memory) as file, tqdm(total=len(rows), initial=len(done), unit="img", leave=False,
                                      disable=None) as bar:
        try:
            for lines in loader(chunks, range(len(chunks)), workers):
                file.write("".join(line + "\n" for line in lines))
                file.flush()
                done |= {json.loads(line)["i"]: line for line in lines}
                bar.update(len(lines))
        except KeyboardInterrupt:
            tqdm.write(f"stopped after {len(done):,} of {len(rows):,} images; the same command goes on from there")
            raise
    if memory.is_file():
        memory.unlink()
    return (json.loads(done[i]) for i in rows)


def recall(memory):
    """{i: line} of an interrupted call; a line that was cut short is left out."""
    found = {}
    try:
        lines = memory.read_text().splitlines()
    except (OSError, ValueError):
        return found
    for line in lines:
        try:
            found[json.loads(line)["i"]] = line
        except (ValueError, KeyError, TypeError):
            pass
    return found


def opened(memory):
    """The file to append to; where none can be written, nothing is remembered."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        return open(memory, "a")
    except OSError:
        return open(os.devnull, "a")


def memory_of(path, source, limit):
    """Where measures of this set are kept while a call is at work: beside the lists of folders."""
    folder = cache_folder()
    where = os.path.abspath(path) if os.path.exists(path) else path
    return folder / f"stats-{hashlib.sha1(f'{where} {source.digest()} {limit}'.encode()).hexdigest()[:16]}.jsonl"

# --------------------------------------------------------------------------------
# What they say together


def columns(measures):
    """{name: an array} of all images that could be read, and what is wrong with the others."""
    parts, errors, measures = [], [], iter(measures)
    while some := list(islice(measures, 10_000)):
        good = [MISSING | found for found in some if "error" not in found]
        errors += [found["error"] for found in some if "error" in found]
        if good:
            parts.append({name: np.array([found[name] for found in good]) for name in good[0]})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}, errors


def summarize(measures, source, c):
    """
    Measures of a source, and a recipe -> one object.

    mean, std   over the pixels of all images, where one image weighs as much as another whatever its size: each gives
                as many crops as the next; of a mixture as often as its part is seen. Of values in 0..1; --mean and
                --std are these numbers
    crops       of the recipe: see `enlarged`; to enlarge adds no detail
    """
    good, errors = columns(measures)
    if not good:
        raise ValueError(f"--data: none of {len(errors)} images can be read; the first: {errors[0]}")
    width, height = good["width"], good["height"]
    often = frequency(source, good["i"])
    mean, square = (average(good[name] / (width * height)[:, None], often) for name in ("sum", "square"))
    std = np.sqrt((square - mean**2).clip(0))
    result = dict(data=str(c.data), images=len(width), unreadable=len(errors), of=len(source))
    result |= dict(mean=mean.tolist(), std=std.tolist(), width=percentiles(width), height=percentiles(height),
                   short_side=percentiles(np.minimum(width, height)), ratio=percentiles(width / height))
    files = {name: good[name][good["bytes"] >= 0] for name in ("i", *MISSING)}
    if len(files["i"]):
        result |= dict(bytes=int(files["bytes"].sum()), file_bytes=percentiles(files["bytes"]),
                       formats=counts(files["format"]), modes=counts(files["mode"]), turned=int(files["turned"].sum()))
        result |= copies(files["i"], files["hash"], source)
    if (good["label"] >= 0).any():
        sizes = np.bincount(good["label"][good["label"] >= 0], minlength=len(source.classes)).tolist()
        result["classes"] = dict(zip(source.classes, sizes, strict=True))
    result["unreadable_names"] = errors[:LISTED]
    return result | dict(crops=enlarged(width, height, c))


def frequency(source, rows):
    """How often training sees each of these images, beside one another: in a mixture a part's share is its images'."""
    if not hasattr(source, "sources"):
        return np.ones(len(rows))
    part = np.searchsorted(source.starts, rows, "right") - 1
    mixed = STEPS - sum(each.pure for each in source.parts)
    shares = np.array([each.pure + mixed * each.share / SAMPLES for each in source.parts])
    return (shares / np.bincount(part, minlength=len(shares)).clip(1))[part]


def average(x, weights):
    """n C -> C; nan, of a channel in which nothing was measured, does not count"""
    there = ~np.isnan(x)
    return weights @ np.where(there, x, 0) / (weights @ there)


def percentiles(values):
    """{percentile: value}; each is the value of some image"""
    return dict(zip(map(str, SHARES), np.percentile(values, SHARES, method="inverted_cdf").tolist(), strict=True))


def counts(values):
    return dict(Counter(values.tolist()).most_common())


def copies(rows, hashes, source):
    """Images that are another one byte for byte: how many too many, and names of those that are the same."""
    order = hashes.argsort(kind="stable")
    groups = np.split(order, np.flatnonzero(hashes[order][1:] != hashes[order][:-1]) + 1)
    same = sorted(rows[group].tolist() for group in groups if len(group) > 1)
    return dict(duplicates=len(rows) - len(groups),
                duplicate_names=[[source.name(i) for i in group[:LISTED]] for group in same[:LISTED]])


def enlarged(width, height, c):
    """
    For each kind of the recipe's crops, the largest of --resolutions: how many images have a side shorter than theirs,
    and the share of these crops that is cut from fewer pixels than it has, of DRAWN images at most.
    """
    triples = [sides for sides, _ in read_resolutions(c.resolutions)] if c.resolutions else \
        [(c.global_size, c.local_size, c.gram_size)]
    some, rng = np.linspace(0, len(width) - 1, min(len(width), DRAWN)).astype(int), np.random.default_rng(c.seed)
    boxes = np.stack([draw_crops(rng, c, *size)[0] for size in zip(height[some], width[some], strict=True)])  # n G+L 4
    areas, found = boxes[..., 2] * boxes[..., 3], []
    cut = dict(global_=areas[:, :2], local=areas[:, 2:], gram=areas[:, :2] if c.gram_teacher else areas[:, :0])
    for (kind, area), side in zip(cut.items(), np.max(triples, axis=0).tolist(), strict=True):
        if area.size:
            found.append(dict(kind=kind.strip("_"), side=side, smaller=int((np.minimum(width, height) < side).sum()),
                              enlarged=float((area < side**2).mean())))
    return found

# --------------------------------------------------------------------------------
# For people


def table(found, c, limit):
    """Lines of text."""
    n, asked = found["images"], found["images"] + found["unreadable"]
    sample = f", a sample of {asked:,} of its {found['of']:,} images" if limit and asked < found["of"] else ""
    yield f"{found['data']}{sample}: {n:,} images" + (f", {amount(found['bytes'])}" if "bytes" in found else "")
    yield from named("unreadable", found["unreadable"], found["unreadable_names"])
    if "bytes" in found:
        yield from named("duplicates", found["duplicates"], [" = ".join(same) for same in found["duplicate_names"]])
        yield row("formats", listed(found["formats"]))
        turned = f"; {found['turned']:,} turned upright, as their EXIF tag says" if found["turned"] else ""
        yield row("stored as", listed(found["modes"]) + turned)
    if "classes" in found:
        sizes = sorted(found["classes"].items(), key=lambda item: -item[1])
        few = sizes if len(sizes) <= 2 * SHOWN else sizes[:SHOWN] + [("...", None)] + sizes[-SHOWN:]
        yield row("classes", f"{len(sizes):,}: " + listed(dict(few)))
    yield ""
    yield row("", "".join(f"{word:>11}" for word in ("least", *(f"{q} %" for q in SHARES[1:-1]), "most")))
    for name, words in dict(width="width", height="height", short_side="short side", file_bytes="bytes").items():
        if name in found:
            yield row(words, "".join(f"{value:11,}" for value in found[name].values()))
    yield row("width / height", "".join(f"{value:11.2f}" for value in found["ratio"].values()))
    yield ""
    mean, std = (",".join(f"{value:.3f}" for value in found[name]) for name in ("mean", "std"))
    yield row("mean, std", f"--mean {mean} --std {std}")
    yield row("", f"the recipe has {','.join(f'{v:.3f}' for v in c.mean)} and {','.join(f'{v:.3f}' for v in c.std)}")
    for crop in found["crops"]:
        yield row(f"{crop['kind']} crops", f"{crop['side']} px: {crop['smaller']:,} images are smaller; "
                  f"{100 * crop['enlarged']:.0f} % of these crops are enlarged")


def row(name, text):
    return f"  {name:16}{text}"


def named(what, count, names):
    yield row(what, f"{count:,}")
    for name in names[:SHOWN] + ["..."] * (len(names) > SHOWN):
        yield row("", name.encode(errors="backslashreplace").decode())  # bytes of a name that are no text


def listed(numbers):
    return ", ".join(name if count is None else f"{name} {count:,}" for name, count in numbers.items())


def amount(n):
    """Bytes, in three digits"""
    for unit in "bytes", "kB", "MB", "GB", "TB":
        if n < 1000 or unit == "TB":
            return f"{n:.3g} {unit}"
        n /= 1000

# --------------------------------------------------------------------------------


def read_line(argv, own):
    """PATH, options of a command of data.py, those of train.py -> its own config, and the recipe with PATH in it"""
    known = command_line.types(own)
    values, words = command_line.read_words(argv, command_line.types(TrainConfig()) | known)
    if len(words) != 1 or "data" in values:
        raise ValueError(f"PATH: {' '.join(words) or 'none'}; name one set of images, as --data of train.py takes it, "
                         "and then options")
    rest = [f"--{name}={text}" for name, text in values.items() if name not in known]
    c = configure([*rest, f"--data={words[0]}"], starts=False)
    return command_line.apply(own, {name: text for name, text in values.items() if name in known}), c


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip(), command_line.describe(StatsConfig()), sep="\n\n")
        return
    own, c = read_line(argv, StatsConfig())
    holes = replace(c, mean=(math.nan,) * c.in_chans)  # what was not measured is not to count
    source, start = open_source(c.data, c.n_shapes, c.seed, reader(c, holes)), time.perf_counter()
    n = len(source)
    rows = sorted(random.Random(c.seed).sample(range(n), own.limit)) if 0 < own.limit < n else range(n)
    read = [getattr(c, field.name) for field in fields(ImageConfig)]
    memory = memory_of(c.data, source, f"{own.limit} {c.seed} {read}")
    found = summarize(collect(source, rows, memory, count_workers(c.workers)), source, c)
    found["seconds"] = time.perf_counter() - start
    print(*table(found, c, own.limit), json.dumps(found), sep="\n")
