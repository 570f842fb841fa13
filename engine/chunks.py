"""
What many images are turned into, on disk and not in memory: in files of some images each, made by one process or many.

    Job, make      files that are wanted; those that are not there are dealt out to the ranks
    serve          ranks other than 0: they make their share of all that rank 0 asks for
    everywhere     the same function on all ranks at once, of what no file could hold
    Stored, Table  the arrays of each image, the rows of all: read when they are asked for;  OnDisk: rows of one array
    Keyed, kept    the folder that files lie in, named after all that they depend on; where, without --cache

Rank 0 alone runs a task; the others wait until it wants files, make theirs, and leave when it is done. So the files
are those that one process would have made, and so is the score. They are safetensors, each whole or not there: what
was cut short goes on. Dimension letters: see the top of model.py.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch.utils.data import Dataset
from tqdm import tqdm

from data import loader
from engine.ranks import exchange
from engine.system import locked, user

FORMAT = 3       # of the files, and of what features.py does: a cache of another one is not read
PATIENCE = 90    # seconds: an NFS client may remember for 60 that a file was not there
DTYPES = dict(F16=np.float16, F32=np.float32, F64=np.float64, I32=np.int32, I64=np.int64, U8=np.uint8)
SHARED = "ranks of several machines need a --cache on a disk that all of them see"

# --------------------------------------------------------------------------------
# Files


class Computed(Dataset):
    """[i] -> function(i), or the error if that cannot be read: in a worker process it would come as many lines."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, i):
        try:
            return self.function(i)
        except (OSError, ValueError) as error:
            return error


class Several(Dataset):
    def __init__(self, datasets):
        self.datasets = datasets

    def __getitem__(self, place):
        return self.datasets[place[0]][place[1]]


@contextmanager
def turn(name):
    """One process of this user and machine after the other"""
    with open(own_folder(name), "w") as lock:
        locked(lock)
        yield


def own_folder(name):
    return Path(tempfile.gettempdir(), f"nanodino-{user()}-{name}")


@contextmanager
def kept(c):
    """
    c with a --cache, if it has none of its own in TMPDIR: what is cut short, the same command goes on with; after
    success it is gone. Of two that run at once, each has its own.
    """
    if c.cache:
        yield c
        return
    digest = hashlib.sha256(repr(c).encode()).hexdigest()[:12]
    with ExitStack() as stack:
        for k in count():
            folder = own_folder(f"{digest}-{k}")
            folder.mkdir(mode=0o700, exist_ok=True)
            lock = stack.enter_context(open(folder / "lock", "w"))
            try:
                locked(lock, wait=False)
                break
            except BlockingIOError:
                continue  # the same command is running
        try:
            yield replace(c, cache=str(folder))
        except BaseException:
            if any(folder.glob("*/*.safetensors")):
                print(f"{folder} has the features so far; the same command goes on with them", file=sys.stderr)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def lent(folder):
    """Whether it is one of `kept`, which will be gone"""
    return folder.parent == Path(tempfile.gettempdir()) and (folder / "lock").is_file()


class Keyed:
    """Where files are kept: in --cache one for all that they depend on; else one that is gone with this object."""

    def __init__(self, about, c):
        """about  what they depend on, fit for JSON: see keys.py"""
        if not c.cache:
            self.path = Path(tempfile.mkdtemp(prefix="nanodino-"))
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)  # when Python ends, at the latest
            return
        about = json.dumps(about | dict(format=FORMAT), sort_keys=True)
        self.path = Path(c.cache, hashlib.sha256(about.encode()).hexdigest()[:16])
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--cache {c.cache}: {error.strerror}; name a folder that can be written") from error

    def chunks(self, items, size):
        """{file: the items that lie in it}"""
        return {self.path / f"{k:08}.safetensors": items[k : k + size] for k in range(0, len(items), size)}


class Job(NamedTuple):
    """The files of one source."""
    folder: Keyed
    name: str
    dataset: Dataset
    chunks: dict               # {file: its images}
    compute: Callable          # (worker, what dataset has of each image of a chunk) -> {name: array}


def make(jobs, worker, c, ranks):
    """
    Rank 0: makes the files that are not there, together with the ranks that `serve`.

    worker  the object that each rank's `compute` runs on
    raises  ValueError: an image cannot be read, the disk is full, another rank's files do not arrive
    """
    jobs = [job._replace(chunks={path: items for path, items in job.chunks.items() if not path.is_file()})
            for job in jobs]
    if not any(job.chunks for job in jobs):
        return
    if ranks.count == 1:
        return share(jobs, worker, c, ranks)
    exchange(ranks, dist.broadcast_object_list, [jobs])
    failures = attempt(jobs, worker, c, ranks)
    if failures:
        raise ValueError(failures[0])
    end = time.monotonic() + PATIENCE
    while missing := [path for job in jobs for path in job.chunks if not path.is_file()]:
        if time.monotonic() > end:
            raise ValueError(f"{missing[0]} has not arrived from the rank that made it: {SHARED}")
        time.sleep(0.1)


def everywhere(function, worker, ranks):
    """Rank 0: what function(worker) returns here; the ranks that `serve` run it too, and may exchange tensors in it."""
    if ranks.count > 1:
        exchange(ranks, dist.broadcast_object_list, [function])
    return function(worker)


def serve(worker, c, ranks):
    """Ranks other than 0: their share of every list of jobs, and what runs everywhere, until rank 0 is done."""
    while True:
        asked = [None]
        exchange(ranks, dist.broadcast_object_list, asked)
        if asked[0] is None:
            return
        if callable(asked[0]):
            asked[0](worker)
        else:
            attempt(asked[0], worker, c, ranks)


def attempt(jobs, worker, c, ranks):
    """This rank's share, and then a line for each rank that failed, on all of them: none waits for one that has."""
    said, everyone = "", [None] * ranks.count
    try:
        share(jobs, worker, c, ranks)
    except ValueError as error:
        said = f"rank {ranks.rank}: {error}"
    exchange(ranks, dist.all_gather_object, everyone, said)
    return [each for each in everyone if each]


def share(jobs, worker, c, ranks):
    """Every S-th file, the largest first so that shares are alike."""
    chunks = [(k, path, items) for k, job in enumerate(jobs) for path, items in job.chunks.items()]
    mine = sorted(chunks, key=lambda chunk: -len(chunk[2]))[ranks.rank :: ranks.count]
    places = [(k, i) for k, _, items in mine for i in items]
    for folder in {path.parent for _, path, _ in mine}:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not there: {SHARED}")
    workers = 0 if all(isinstance(job.dataset, range) for job in jobs) else c.workers  # numbers need no reader
    ahead = dict(prefetch_factor=max(c.batch // workers, 2)) if workers else {}
    stream = loader(Several([job.dataset for job in jobs]), places, workers, **ahead) if mine else []
    bar = tqdm(stream, jobs[0].name, len(places), unit="img", leave=False, disable=ranks.rank > 0 or None)
    with bar, unhurried() as checked:
        stream = map(checked, bar)
        for k, path, items in mine:
            write(path, jobs[k].compute(worker, islice(stream, len(items))))


@contextmanager
def unhurried():
    """
    checked(item) -> item; KeyboardInterrupt if Ctrl-C came since the last: it waits for that, as amid a queue of
    DataLoader it would leave a lock that the queue's own end waits for. A second one does not wait.
    """
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    def checked(item):
        if asked:
            raise KeyboardInterrupt
        return item
    own = threading.current_thread() is threading.main_thread()
    old = signal.signal(signal.SIGINT, ask) if own and signal.getsignal(signal.SIGINT) != signal.SIG_IGN else None
    try:
        yield checked
    finally:
        if old:
            signal.signal(signal.SIGINT, old)


def write(path, arrays):
    """{name: array} -> a file, whole or not at all: the next run trusts it."""
    new = path.with_suffix(f".{os.getpid()}")
    try:
        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, new)
        new.replace(path)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        raise ValueError(f"{path.parent} cannot be written: {error}; name a folder with room, --cache DIR") from error


def index(path):
    """{name: what `read` wants} of a file, in the order of the names"""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")  # of the header, which comes next
        header = json.loads(file.read(size))
    return {name: (path, DTYPES[x["dtype"]], x["shape"], 8 + size + x["data_offsets"][0])
            for name, x in sorted(header.items()) if name != "__metadata__"}


def read(path, dtype, shape, offset):
    """Reads, and does not map: mapped pages would count as memory of the process."""
    return np.fromfile(path, dtype, math.prod(shape), offset=offset).reshape(shape)

# --------------------------------------------------------------------------------
# Reading


class Stored:
    """
    stored[i] -> the arrays of image i;  len, iteration;  row: those of all images, one after the other

    job  whose files are there, their tensors named by `named`; its images are 0, 1, 2, ...
    """
    def __init__(self, job):
        self.items = [[] for items in job.chunks.values() for _ in items]
        for path, items in job.chunks.items():
            for name, place in index(path).items():
                self.items[items[int(name.partition(".")[0])]].append(place)
        self.row = Row([place for places in self.items for place in places], job.folder)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return [read(*place) for place in self.items[i]]


class Row:
    """row[k] -> one array;  len, iteration, shapes"""

    def __init__(self, places, folder):
        self.places, self.folder = places, folder  # a folder of its own stays as long as this does
        self.shapes = [shape for _, _, shape, _ in places]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, k):
        return read(*self.places[k])


class OnDisk:
    """
    Rows of an array in a file; read, and not mapped, where they are neighbours: mapped pages count as memory. Another
    process opens the file, too.    place  what `read` wants
    """

    def __init__(self, place):
        self.place, self.shape = place, tuple(place[2])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        path, dtype, (n, *rest), offset = self.place
        if isinstance(rows, slice):
            first, end, _ = rows.indices(n)
            width = math.prod(rest) * np.dtype(dtype).itemsize
            return read(path, dtype, (max(end - first, 0), *rest), offset + width * first)
        return np.memmap(path, dtype, "r", offset, (n, *rest))[rows]

    def __reduce__(self):
        return OnDisk, (self.place,)


class Table:
    """
    n rows of F float32 that lie in files, read when they are asked for, as of a tensor: len, shape, split, [rows]

    files  {name: what `read` wants, n F'} each    names  columns, side by side in F
    """
    def __init__(self, files, names, folder=None):
        self.places, self.folder = [[file[name] for name in names] for file in files], folder
        self.starts = np.cumsum([0, *(place[0][2][0] for place in self.places)])
        self.shape = int(self.starts[-1]), sum(shape[1] for _, _, shape, _ in self.places[0])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """Rows in any order, each run of neighbours in one piece;  slice or n -> n F, on the host"""
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        out, order = np.empty((len(rows), self.shape[1]), np.float32), np.argsort(rows, kind="stable")
        file = np.searchsorted(self.starts, rows[order], "right") - 1
        ends = np.flatnonzero((np.diff(rows[order]) != 1) | (np.diff(file) != 0)) + 1
        for run in np.split(order, ends) if len(rows) else ():
            k = int(np.searchsorted(self.starts, rows[run[0]], "right")) - 1
            first, left = int(rows[run[0]] - self.starts[k]), 0
            for path, dtype, (_, width), offset in self.places[k]:
                skipped = first * width * np.dtype(dtype).itemsize
                out[run, left : left + width] = read(path, dtype, (len(run), width), offset + skipped)
                left += width
        return torch.from_numpy(out)

    def split(self, size):
        """Parts of so many rows, one after the other, each read when it is its turn"""
        return (self[start : start + size] for start in range(0, len(self), size))


def named(images):
    """The arrays of each image of a chunk -> (name in the file, array), one by one. Raises ValueError for an error."""
    for i, arrays in enumerate(images):
        if isinstance(arrays, ValueError):
            raise arrays
        if isinstance(arrays, OSError):
            raise ValueError(f"unreadable {arrays}; this task needs all images of its list: mend it, or leave it out")
        for k, x in enumerate(arrays):
            yield f"{i:04}.{k:04}", x
