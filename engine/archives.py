"""
Photos in tars and zips, read where they lie: nothing is unpacked.

    python data.py index PATH     makes the index of PATH, or checks it, and says what there is

    Archives    x.tar, x.zip, a folder of them, `a-{000..012}.tar`, or a JSON of wids                    --data PATH
    shards_of   the files that such a PATH means
    main        the command

A sample is what webdataset calls one: consecutive members whose names agree up to the first dot after the last slash.
The first that has the suffix of an image is its image. Its label stands in .cls, or under "label" or "cls" in .json,
or is the first folder of its name. Order: shards by name, or as they are listed; in a shard by name, as a folder is
searched, in whichever order the archive was written: so the same photos, packed, give the same batches.
"""

import hashlib
import io
import itertools
import json
import os
import re
import time
from pathlib import Path

from engine.images import EXTENSIONS, read_image
from engine.index import descriptors, open_index
from engine.members import contents, name_at, shown

SUFFIXES = ".tar", ".zip"
COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4|lzma|Z))$", re.I)
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
WAITS = 0.1, 1.0, None         # seconds after each failure of the system; None: give up

# --------------------------------------------------------------------------------
# What --data names


def is_archive(path):
    """Whether --data names shards: by its name; a folder does if it holds shards, and neither images nor folders."""
    path = Path(path).expanduser()
    if path.is_dir():
        return holds_shards(path)
    return is_shard(path.name) or is_wids(path)


def is_shard(name):
    return name.lower().endswith(SUFFIXES) or bool(COMPRESSED.search(name))


def holds_shards(folder):
    found = False
    with os.scandir(folder) as entries:
        for entry in entries:
            if Path(entry.name).suffix.lower() in EXTENSIONS or entry.is_dir() and not entry.name.startswith("."):
                return False
            found |= is_shard(entry.name)
    return found


def is_wids(path):
    try:
        with open(path, "rb") as file:
            return path.suffix == ".json" and b'"wids_version"' in file.read(4096)
    except OSError:
        return False


def shards_of(path):
    """The files, in order. Raises ValueError: compressed, not there (the first five), none."""
    path = Path(path).expanduser()
    if path.is_dir():
        found = sorted(each for each in path.iterdir() if is_shard(each.name))
    else:
        found = read_wids(path) if path.suffix == ".json" else spelt_out(path)
    compressed = [each for each in found if COMPRESSED.search(each.name)]
    if compressed:
        raise ValueError(f"--data: {compressed[0]} is compressed as a whole, so that no image in it can be read by its "
                         "place, and images hardly shrink: unpack it to a .tar")
    missing = [str(each) for each in found if not each.is_file()]
    if missing:
        raise ValueError(f"--data: {len(missing)} of {len(found)} shards of {path} are not there: "
                         f"{', '.join(missing[:5])}{', ...' * (len(missing) > 5)}")
    return found


def spelt_out(path):
    """a-{000..012}.tar -> a-000.tar to a-012.tar; several braces: all that they give together"""
    parts, ranges = BRACES.split(str(path))[::3], []
    for first, last in BRACES.findall(str(path)):
        if not 0 <= int(last) - int(first) < 10**7:
            raise ValueError(f"--data: {path} counts from {first} to {last}; wanted the first number, then the last")
        ranges.append([f"{k:0{len(first)}}" for k in range(int(first), int(last) + 1)])
    return [Path("".join(itertools.chain(*itertools.zip_longest(parts, numbers, fillvalue=""))))
            for numbers in itertools.product(*ranges)]


def read_wids(path):
    """The shards that a JSON of wids lists, relative to it or to its `base`. Raises ValueError."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        root = path.parent / held.get("base", "")
        found = [root / shard["url"] for shard in held["shardlist"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"--data: {path} is no list of shards ({error!r}); wanted the JSON of wids: wids_version, and "
                         "in shardlist the url of each") from error
    if not found:
        raise ValueError(f"--data: {path} lists no shard")
    return found

# --------------------------------------------------------------------------------
# The images in them


class Archives:
    """
    The images in some shards: a source as those of engine/sources.py, with raw(i) -> the bytes of its file, its name.

    raises  ValueError: shards that cannot be used; no image in them
    """
    def __init__(self, path, read=read_image):
        self.path, self.read = Path(path).expanduser(), read
        self.shards = shards_of(path)
        root = self.path if self.path.is_dir() else self.path.parent
        self.names = [os.path.relpath(shard, root) for shard in self.shards]
        beside = root / ("all.index" if self.path.is_dir() else f"{self.path.name}.index")
        self.index, self.open = open_index(self.path, beside, self.names, self.shards), descriptors()
        self.classes = self.index.classes or []
        if not len(self.index):
            raise ValueError(f"--data: no image in {path}; looked in {len(self.shards)} shards for samples with "
                             f"{' '.join(sorted(EXTENSIONS))}")
        if self.index.made:
            for line in self.told():
                print(f"{path}: {line}", flush=True)

    def __len__(self):
        return len(self.index)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "open"}

    def __setstate__(self, state):
        vars(self).update(state, open=descriptors())

    def raw(self, i):
        """(bytes, name). Raises OSError, of the system's failures after three tries."""
        for wait in WAITS:
            try:
                shard, member, _ = self.index.row(i)
                file = self.file(shard)  # held, so that it stays open while it is read
                return contents(file.number, member), self.name(i)
            except OSError as error:
                self.open.cache_clear()  # a stale handle, as of NFS, stays so until the file is opened anew
                if error.errno is None or wait is None:
                    raise OSError(f"{self.name(i)}: {error.strerror or error}") from error
                time.sleep(wait)

    def file(self, shard):
        return self.open(self.shards[shard], self.index.stamps[shard])

    def load(self, i):
        data, name = self.raw(i)
        return self.read(io.BytesIO(data), name)

    def label(self, i):
        """Raises ValueError for an image that has none."""
        _, _, label = self.index.row(i)
        if label is not None and self.classes:
            return label
        why = ("has no label: neither a .cls or .json beside it nor a folder names its class" if self.index.classes is
               not None else "is of more than 65,535 classes")
        raise ValueError(f"--data: {self.name(i)} {why}")

    def name(self, i):
        """SHARD/MEMBER; where the shard cannot be read, the number of the sample in it stands for the member."""
        shard, member, _ = self.index.row(i)
        try:
            file = self.file(shard)
            name = name_at(file.number, member)
        except (OSError, ValueError):
            name = f"image {i - self.index.ends[shard] + self.index.counts[shard]}"
        return shown(f"{self.shards[shard]}/{name}")

    def digest(self):
        """Of the shards' names, sizes and counts of images: the folder may move."""
        lines = zip(self.names, self.index.counts.tolist(), self.index.stamps, strict=True)
        return hashlib.sha256("\n".join(f"{name} {n} {size}" for name, n, (size, _) in lines).encode(
            "utf-8", "surrogateescape")).hexdigest()

    def told(self):
        """What is not as one would wish, a line each."""
        cut, others, bare = self.index.cut, self.index.others, self.index.unlabelled
        if cut:
            shard, why, n = cut[0]
            yield (f"{len(cut)} of {len(self.shards)} shards are cut short; their whole images are kept; the first, "
                   f"{shard}, is {why}, after {n:,} images")
        if others:
            yield (f"{others:,} images are passed over: their samples have one already, as a sample's name ends at its "
                   "first dot")
        if bare and self.classes:
            yield f"{bare:,} of {len(self):,} images have no label"


def main(argv):
    """index PATH"""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ValueError(f"data.py index {' '.join(argv)}: wanted one PATH, of tars or zips")
    if not is_archive(argv[0]):
        raise ValueError(f"data.py index {argv[0]}: wanted a tar, a zip, a folder of them, a-{{000..012}}.tar, or a "
                         "JSON of wids; folders of images need no index")
    begin = time.perf_counter()
    source = Archives(argv[0])
    index, seconds = source.index, time.perf_counter() - begin
    size = sum(size for size, _ in index.stamps)
    print(f"{argv[0]}: {'made' if index.made else 'checked'} in {seconds:.1f} s: {len(source):,} images of "
          f"{index.n_bytes:,} bytes in {len(source.shards):,} shards of {size:,}; {len(source.classes):,} classes; the "
          f"first is {source.name(0)}")
    if not index.made:
        for line in source.told():
            print(f"{argv[0]}: {line}")
    print(json.dumps(dict(shards=len(source.shards), images=len(source), bytes=index.n_bytes, shard_bytes=size,
                          classes=len(source.classes), unlabelled=index.unlabelled, cut=len(index.cut),
                          others=index.others, made=index.made, seconds=round(seconds, 3), digest=source.digest())))
