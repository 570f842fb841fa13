"""
From a pile of photos to a set worth training on.

    python curate.py PHOTOS --weights W --keep 100000 --out kept.txt       as evenly over what they show as can be
    python curate.py PHOTOS --weights W --like SEEDS --each 4 --out like.csv        the nearest to photos that one has
    python curate.py PHOTOS --weights W --dedup --out once.parquet                  one of each group of copies
    python curate.py PHOTOS --weights W --keep 100000 --dedup --against VAL --like SEEDS --out set.txt     all at once
    torchrun --nproc-per-node 8 curate.py PHOTOS --weights W --keep 100000 --out kept.txt --cache FEATURES

PHOTOS is whatever --data takes, and so is the list that comes out: names in .txt, with cluster and distance in .csv and
.parquet. Beside it stands a page, LIST.html, of what was kept and what was not. With --like and --keep, a mixture, too,
LIST.json: the clustered part, the retrieved one, and the seeds alone in a tenth of the steps.

Every stage is kept in --cache and found again; without one, until the command has succeeded.

paper: DINOv3 §3.1. Dimension letters: see the top of model.py; N images of the pile.
"""

import hashlib
import json
import os
import signal
import sys
import timeit
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine import config as command_line
from engine.balance import balanced
from engine.channels import Channels, of_run
from engine.chunks import Keyed, OnDisk, index, kept, read, serve, turn, write
from engine.features import Frozen, describe, load, reads, whole_patches
from engine.images import ImageConfig
from engine.kmeans import Clusters, Part, choose_levels, hierarchy, products, with_resampling
from engine.names import LISTS, place_of, write_list
from engine.near import ALL, CELL, alike, calibrate, components, groups_of, nearest, try_copies
from engine.pile import page
from engine.ranks import choose_precision, count_workers, leading, linked, start_ranks
from engine.shards import Entry, write_tensors
from engine.sources import Unlabelled, archive_of, open_source
from engine.task import Task
from engine.views import middle

TASK = Task("curate", layout="", open=None, run=None, wants="tokens", metric="", view=middle)
PURE = 0.1           # of the steps: of the seeds alone, as the paper has of ImageNet-1k
ROWS = 1 << 14       # vectors at a time


@dataclass(frozen=True)
class CurateConfig(ImageConfig):
    data: str = "?"            # PHOTOS: what --data of train.py takes
    weights: str = ""          # a run's folder, a weights file, or untrained:SIZE: what the photos are compared by
    out: str = ""              # the list: .txt, .csv or .parquet
    keep: int = 0              # [0, inf): images that are kept, evenly over clusters; 0 = all that are left
    levels: str = ""           # clusters of each level, as in 12500,500; empty = as --keep suggests
    like: str = ""             # photos of the kind that is wanted: the nearest of the pile to each are kept, too
    each: int = 4              # [1, 1e6]: images that a photo of --like brings
    dedup: bool = False        # of copies of one picture one alone is kept
    threshold: float = 0.0     # [0, 1]: cosine from which on two are copies; 0 = measured on copies made of the pile
    against: str = ""          # photos to be tested on: what is a copy of one, or of its copies, is dropped
    overwrite: bool = False    # a list that exists is replaced
    plan: bool = False         # say what it takes, and start nothing
    resolution: int = 224      # [1, 16384]: pixels of the square that the network sees
    batch: int = 64            # [1, 1e6]: images at a time
    device: str = "auto"       # auto, cpu, cuda, mps
    workers: int = -1          # [-1, 256]: processes that read images, for each rank; -1 = as the machine allows
    precision: str = "auto"    # of the network: bf16, fp32; auto = bf16 where the hardware multiplies it
    seed: int = 0              # [0, 4294967295]: of all that is drawn
    cache: str = ""            # folder that keeps features and clusters; empty = TMPDIR, until the list is there
    limit, control = 0, False  # of a task; a pile has neither

# --------------------------------------------------------------------------------
# Vectors


class Pile:
    """
    Photos and what the network says of them, in an order that their own features set: the same photos in another order
    are the same pile.

    vectors  N D float16, of length 1: the class tokens    rows  N, of the source
    """

    def __init__(self, path, c, network, ranks):
        self.c = replace(c, data=path)
        self.source = open_source(path, seed=c.seed, read=reads(c))
        self.frozen = Frozen(network, TASK, self.c, ranks)
        tokens = self.frozen.tokens("photos", Unlabelled(self.source))
        self.folder = Keyed(self.frozen.about | dict(what="pile", photos=self.source.digest()), self.c)
        place = self.folder.path / "vectors.safetensors"
        if not place.is_file():
            self.sort(tokens, place)
        found = index(place)
        self.vectors, self.rows = OnDisk(found["vectors"]), read(*found["rows"])

    def __len__(self):
        return len(self.rows)

    def sort(self, tokens, path):
        """Writes both. Raises ValueError for numbers that are not finite, photos that are all the same."""
        table, rows = tokens.table("cls"), np.array(tokens.rows)
        marks = np.random.default_rng(0).integers(1 << 63, size=table.shape[1], dtype=np.uint64) | np.uint64(1)
        keys, vectors = np.empty(len(table), np.uint64), np.empty(table.shape, np.float16)
        for first in tqdm(range(0, len(table), ROWS), "vectors", leave=False, disable=None):
            part = table[first : first + ROWS]
            bad = (~torch.isfinite(part).all(1) | ~part.any(1)).nonzero().flatten().tolist()
            if bad:
                raise ValueError(f"{self.source.name(rows[first + bad[0]])}: {self.c.weights} says nothing of it that "
                                 "is finite and not 0; name other weights, or --precision fp32")
            vectors[first : first + ROWS] = torch.nn.functional.normalize(part, dim=1).half().numpy()
            keys[first : first + ROWS] = (vectors[first : first + ROWS].view(np.uint16) * marks).sum(1, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(np.diff(keys[order]) == 0)
        for run in np.split(same, np.flatnonzero(np.diff(same) > 1) + 1) if len(same) else ():
            at = slice(run[0], run[-1] + 2)                        # of one vector: by their names
            order[at] = sorted(order[at], key=lambda i: self.source.name(rows[i]))
        if len(rows) > 1 and keys[order[0]] == keys[order[-1]]:
            raise ValueError(f"{self.c.weights} sees no difference between any two of {len(rows):,} photos of "
                             f"{self.c.data}; name other weights, or other photos")
        entries = dict(vectors=Entry(vectors.shape, torch.float16, lambda: (
            torch.from_numpy(vectors[order[first : first + ROWS]]) for first in range(0, len(order), ROWS))),
                       rows=Entry(rows.shape, torch.int64, lambda: iter([torch.from_numpy(rows[order])])))
        new = path.with_suffix(f".{os.getpid()}")
        try:
            write_tensors(new, entries, {})
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)

    def stage(self, name, make, **about):
        """{name: array} of what `make` returns, kept under all that it depends on"""
        path = Keyed(dict(pile=str(self.folder.path.name), stage=name) | about, self.c).path / "stage.safetensors"
        if not path.is_file():
            write(path, make())
        return {key: read(*place) for key, place in index(path).items()}

    def name(self, i):
        return self.source.name(self.rows[i])

    def load(self, i):
        return self.source.load(self.rows[i])

# --------------------------------------------------------------------------------
# Stages


def calibrated(pile):
    """What copies of some photos of the pile look like to the network, beside the nearest other photo: Calibration"""
    def embed(images):
        return pile.frozen.tokens_of([pile.frozen.view(image)[0] for image in images])[0]

    def made():
        found, others = try_copies(pile.vectors, pile.load, embed, pile.c.seed, pile.frozen.device)
        return found | {" others": others}
    found = pile.stage("copies", made, seed=pile.c.seed)
    others = found.pop(" others")
    return calibrate(found, others)


def of_copies(pile, threshold):
    """The lowest row that each of N hangs together with"""
    def made():
        def bar(parts):
            return tqdm(parts, "comparing", leave=False, disable=None)
        return dict(pairs=alike(pile.vectors, threshold, pile.c.seed, pile.frozen.device, bar))
    return components(len(pile), pile.stage("alike", made, threshold=threshold, seed=pile.c.seed)["pairs"])


def on_all_ranks(work, frozen):
    return work(ranks=linked(frozen.ranks))


def clusters_of(pile, left, levels):
    """[Clusters] of each level, of the rows that are left"""
    digest = hashlib.sha1(left.tobytes()).hexdigest()

    def run(at, work):
        found = pile.stage(f"level {at + 1}", lambda: pile.frozen.together(partial(on_all_ranks, work))._asdict(),
                           levels=levels[: at + 1], left=digest, seed=pile.c.seed)
        return Clusters(**found)
    vectors = pile.vectors if len(left) == len(pile) else Part(pile.vectors, left)
    return hierarchy(vectors, levels, pile.c.seed, run)

# --------------------------------------------------------------------------------
# The list


@dataclass
class Curation:
    """What became of a pile: rows in the order of its vectors"""
    pile: Pile
    left: np.ndarray           # rows that are no copies
    kept: np.ndarray           # rows of the list
    groups: list               # [rows of one picture, the one that stays first]
    tested: np.ndarray         # rows that are copies of photos to be tested on, or of their copies
    clusters: list             # [Clusters] of `left`; none without --keep
    clustered: np.ndarray      # rows that clusters gave
    retrieved: np.ndarray      # rows that seeds brought
    near: tuple                # (pile of seeds, rows n k, cosines n k), or nothing
    calibration: object        # of copies, or None


def curate(c, network, ranks):
    pile = Pile(c.data, c, network, ranks)
    if c.keep > len(pile):
        raise ValueError(f"--keep {c.keep}: {c.data} has {len(pile):,} photos that can be read; keep fewer")
    everything, calibration, groups, dropped, near = np.arange(len(pile)), None, [], [], ()
    tested = everything[:0]
    if c.dedup or c.against:
        calibration = None if c.threshold else calibrated(pile)
        threshold = c.threshold or calibration.threshold
        label = of_copies(pile, threshold)
        if c.against:
            seen = Pile(c.against, c, network, ranks)
            _, cosines = nearest(pile.vectors[:], seen.vectors[:], 1, ranks.device)
            tested = np.flatnonzero(np.isin(label, label[cosines[:, 0] > threshold]))
        if c.dedup:
            groups = groups_of(pile.vectors, label)
            dropped = [rows[1:] for rows in groups]
    left = np.setdiff1d(everything, np.concatenate([tested, *dropped]))
    if c.keep > len(left):
        raise ValueError(f"--keep {c.keep}: {len(left):,} of {len(pile):,} photos are left without copies; keep fewer")
    clusters, clustered, retrieved = [], left if not c.like else left[:0], left[:0]
    if c.keep:
        levels = read_levels(c, len(left))
        clusters = clusters_of(pile, left, levels)
        clustered = left[balanced([(each.places, k) for each, (k, _) in zip(clusters, levels, strict=True)],
                                  c.keep, c.seed)]
    if c.like:
        seeds = Pile(c.like, c, network, ranks)
        rows, cosines = nearest(seeds.vectors[:], pile.vectors[left], min(c.each, len(left)), ranks.device)
        near, retrieved = (seeds, left[rows], cosines), np.unique(left[rows])
    return Curation(pile, left, np.union1d(clustered, retrieved), groups, tested, clusters, clustered, retrieved, near,
                    calibration)


def read_levels(c, n):
    """--levels -> [(clusters, r)] for n images. Raises ValueError for numbers that do not fall."""
    if not c.levels:
        return choose_levels(n, c.keep)
    words = c.levels.split(",")
    ks = [int(word) for word in words if word.isdecimal()]
    if len(ks) != len(words) or any(a <= b for a, b in zip([n + 1, *ks], [*ks, 0], strict=True)):
        raise ValueError(f"--levels {c.levels}: write numbers of clusters that fall, as in 1000,250,50, of {n:,} "
                         "photos at most")
    return with_resampling(n, ks)


def list_rows(path, found, rows):
    """Names relative to the list's folder where they lie below it; in a table their cluster and distance, too."""
    pile, folder = found.pile, os.path.realpath(path.parent)
    names = [place_of(pile.name(i), folder) for i in rows]
    at = np.searchsorted(found.left, rows)
    cluster = found.clusters[0].places[at] if found.clusters else np.full(len(rows), -1)
    distance = np.sqrt(found.clusters[0].distances[at]) if found.clusters else np.full(len(rows), np.nan)
    origin = ["clustered" if a else "retrieved" for a in np.isin(rows, found.clustered)]
    write_list(path, dict(path=names, cluster=cluster.tolist(), distance=[round(float(x), 4) for x in distance],
                          origin=origin))


def report(c, found):
    """Writes the list, the mixture, the page -> the line of JSON, as a dict"""
    path = Path(c.out)
    list_rows(path, found, found.kept)
    if c.keep and c.like:
        parts = dict(clustered=found.clustered, retrieved=found.retrieved)
        for name, rows in parts.items():
            list_rows(path.with_suffix(f".{name}{path.suffix}"), found, rows)
        total = sum(map(len, parts.values()))
        mixture = [dict(path=path.with_suffix(f".{name}{path.suffix}").name, share=len(rows) / total)
                   for name, rows in parts.items()]
        mixture.append(dict(path=os.path.abspath(c.like), share=PURE, pure=True))
        path.with_suffix(".json").write_text(json.dumps(mixture, indent=1))
    said, html = page(c, found)
    path.with_suffix(".html").write_text(html, encoding="utf-8")
    return dict(photos=c.data, weights=c.weights, out=c.out, n=len(found.pile.source),
                unreadable=len(found.pile.source) - len(found.pile), copies=len(found.pile) - len(found.left), **said,
                kept=len(found.kept))

# --------------------------------------------------------------------------------
# The command


def plan(c, device):
    """What it takes: lines. The speed is that of one product here, now; features are planned when they begin."""
    n, width = len(open_source(c.data, seed=c.seed, read=reads(c))), describe(c.weights).width
    lines = [f"{n:,} photos, vectors of {width}: {2 * n * width / 1e9:.3g} GB on disk, and once in memory, of one rank"]
    if c.keep:
        levels = read_levels(c, n)
        count, x = products(n, width, levels), torch.randn(ROWS, width, device=device)
        centroids = torch.randn(width, 256, device=device)
        seconds = min(timeit.repeat(lambda: (x @ centroids)[0, 0].item(), number=1, repeat=5))
        hours = count / (ROWS * width * 256) * seconds / 3600
        lines.append("clusters " + ", ".join(f"{k:,}" + f" (again, of the {r} nearest)" * (r > 1) for k, r in levels)
                     + f": {2 * count / 1e12:.3g} TFLOP at most, {hours:.2g} hours of this machine's {device.type}")
    if c.dedup or c.against:
        cells = n * n / 2 if n <= ALL else 2 * n * CELL / 2
        lines.append(f"copies: {2 * cells * width / 1e12:.3g} TFLOP")
    return lines


def configure(argv):
    values, words = command_line.read_words(argv, command_line.types(CurateConfig()))
    if len(words) > 1:
        raise ValueError(f"{words[1]!r} is not an option; write --field value")
    seen = {name: text for name, text in of_run(values.get("weights", "")).items() if name in vars(CurateConfig())}
    c = command_line.apply(CurateConfig(), seen | values | (dict(data=words[0]) if words else {}))
    if c.data == "?":
        raise ValueError("which photos? python curate.py PHOTOS --weights W --keep N --out LIST")
    path = Path(c.out)
    if path.suffix not in LISTS:
        raise ValueError(f"--out {c.out or '(none)'}: name a list, {', '.join(sorted(LISTS))}")
    command_line.writable(c.out, folder=False)
    if path.exists() and not c.overwrite:
        raise ValueError(f"--out {c.out} exists; name another, or --overwrite")
    if not (c.keep or c.like or c.dedup or c.against):
        raise ValueError("nothing to choose by: --keep N, --like PHOTOS, --dedup or --against PHOTOS")
    if c.threshold and not (c.dedup or c.against):
        raise ValueError(f"--threshold {c.threshold}: of copies; with --dedup or --against")
    if (c.dedup or c.against) and not c.threshold and isinstance(reads(c), Channels):
        raise ValueError("--threshold is measured on JPEGs made of photos; of images of other channels name it")
    if c.levels and not c.keep:
        raise ValueError(f"--levels {c.levels}: of clusters, which --keep N chooses from")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ValueError(f"--out {c.out}: pyarrow is not installed; pip install -e .[data]") from error
    whole_patches(c, describe(c.weights))
    source = open_source(c.data, seed=c.seed, read=reads(c))
    if len(source) < 2:
        raise ValueError(f"{c.data} has one photo; there is nothing to choose")
    if not (os.path.isfile(source.name(0)) or archive_of(source.name(0))):
        raise ValueError(f"{source.name(0)} is no file, and a list cannot name it; write the images into a folder")
    return replace(c, workers=count_workers(c.workers))


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip() + "\n\n" + command_line.describe(CurateConfig()))
        return
    c = configure(argv)
    ranks = start_ranks(c.device, talk=True)
    c = replace(c, precision=choose_precision(c.precision, ranks.device))
    if c.plan:
        print(*plan(c, ranks.device) if ranks.main else (), sep="\n", end="\n" * ranks.main)
        return
    if ranks.rank:
        with redirect_stdout(None), turn("reading"):
            network = load(c.weights, precision=c.precision)
        serve(Frozen(network, TASK, c, ranks), c, ranks)
        return
    with leading(ranks), kept(c) as c:
        with turn("reading"):
            network = load(c.weights, precision=c.precision)
        said = report(c, curate(c, network, ranks))
    command_line.show(said)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # torchrun's, too: temporary folders go as after Ctrl-C
    command_line.run(main)
