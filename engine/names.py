"""
Names of images in a file: read one at a time, by all processes from one page cache, so that none of them holds any. It
is made once, in the cache folder, and again when what it was made of has changed.

    Names        names[i] -> str; names.label(i), names.classes, names.digest
    scan         Names of the images below a folder
    read_list    Names of a list: text, csv or parquet                              LISTS
    write_list   such a list;  place_of: what it calls a file

The file holds the names, one after the other; where each begins, and the last ends, int64; a class each, int32, -1 for
none; JSON of all else; the length of that, int64.
"""

import csv
import hashlib
import json
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from shutil import copyfileobj
from tempfile import NamedTemporaryFile, TemporaryFile
from weakref import finalize

import numpy as np
from tqdm import tqdm

from engine.config import whole
from engine.images import EXTENSIONS
from engine.system import locked, read_at

LISTS = {".txt", ".csv", ".parquet"}
FORMAT = 1           # of the file
MANY = 65_536        # names that are in memory at once, while the file is made or walked

# --------------------------------------------------------------------------------
# The file


class Names(Sequence):
    """
    names[i] -> str of the file at path.

    classes  names of the classes, in the order that they came in    digest  sha1 over the names, a line each
    raises   OSError, ValueError, KeyError, TypeError: no such file, or a damaged one
    """
    def __init__(self, path, digest=None):
        self.path, self.file = Path(path), open(path, "rb", buffering=0)
        notes, end = self.notes()
        self.n, self.classes, self.digest = (notes[key] for key in ("n", "classes", "digest"))
        self.starts = end - 4 * self.n - 8 * (self.n + 1)
        if notes["format"] != FORMAT or self.starts != notes["starts"] or digest not in (None, self.digest):
            raise ValueError(f"--data: {path} does not hold the names that it held; start again")

    def notes(self):
        """What the names were made of, and where in the file that begins. They may be long, and are not kept."""
        size = os.fstat(self.file.fileno()).st_size
        length = int.from_bytes(self.read(size - 8, 8), "little")
        return json.loads(self.read(size - 8 - length, length)), size - 8 - length

    def read(self, at, n):
        found = read_at(self.file.fileno(), n, at) if at >= 0 else b""
        if len(found) != n:
            raise OSError(f"{self.path}: cut short")
        return found

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(self.n))]
        start, end = struct.unpack("<qq", self.read(self.starts + 8 * self.place(i), 16))
        return os.fsdecode(self.read(start, end - start))

    def __iter__(self):
        for first in range(0, self.n, MANY):
            n = min(MANY, self.n - first)
            starts = np.frombuffer(self.read(self.starts + 8 * first, 8 * (n + 1)), "<i8")
            names = self.read(int(starts[0]), int(starts[-1] - starts[0]))
            for start, end in zip(starts[:-1] - starts[0], starts[1:] - starts[0], strict=True):
                yield os.fsdecode(names[start:end])

    def label(self, i):
        """Its row in `classes`, or -1"""
        return struct.unpack("<i", self.read(self.starts + 8 * (self.n + 1) + 4 * self.place(i), 4))[0]

    def place(self, i):
        if not -self.n <= i < self.n:
            raise IndexError(f"{i} of {self.n} names")
        return int(i) % self.n

    def __reduce__(self):  # for a worker that is not forked: it opens the same file
        return Names, (self.path, self.digest)


def write(file, chunks, notes, what):
    """
    Makes the file.    chunks  of ([name, as bytes], [class of each, a str; None = none], or None for no class at all)

    notes  JSON's; read when all chunks are there    what  is being read, in words
    """
    n, digest, classes = 0, hashlib.sha1(), {}
    with TemporaryFile(dir=Path(file.name).parent) as starts, TemporaryFile(dir=Path(file.name).parent) as labels:
        starts.write(struct.pack("<q", 0))
        with tqdm(desc=f"reading {what}", unit=" images", leave=False, disable=None) as bar:
            for names, of in chunks:
                ends = file.tell() + np.cumsum(np.fromiter(map(len, names), np.int64, len(names)))
                starts.write(ends.astype("<i8").tobytes())
                file.write(b"".join(names))
                digest.update(b"\n" * bool(n and names) + b"\n".join(names))
                ids = [-1 if c is None else classes.setdefault(c, len(classes)) for c in of or ()]
                labels.write(np.array(ids or [-1] * len(names), "<i4").tobytes())
                n += len(names)
                bar.update(len(names))
        known = dict(format=FORMAT, n=n, starts=file.tell(), classes=list(classes), digest=digest.hexdigest())
        for column in starts, labels:
            column.seek(0)
            copyfileobj(column, file)
    text = json.dumps(notes | known).encode()
    file.write(text + struct.pack("<q", len(text)))
    file.flush()


def cache_folder():
    """Where what is known of a set of images is remembered."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanodino"


def remembered(root, chunks, fresh):
    """
    The Names of what is at a path: those of last time, if they are fresh; else new ones, that the next run will find.

    chunks  notes -> what `write` wants; it fills the notes    fresh  notes -> whether nothing has changed since
    raises  ValueError: no disk has room for them
    """
    place = cache_folder()
    place /= hashlib.sha1(str(root.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16] + ".names"
    if found := known(place, fresh):
        return found
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place.with_suffix(".lock"), "w") as lock:
            with suppress(OSError):  # of a file system without locks: each rank makes them, and one stays
                locked(lock)
            if found := known(place, fresh):
                return found  # another rank has made them
            new, notes = place.with_suffix(f".{os.getpid()}"), {}
            try:
                with open(new, "wb") as file:
                    write(file, chunks(notes), notes, root)
                new.replace(place)
            finally:
                new.unlink(missing_ok=True)
            return Names(place)
    except OSError:
        pass  # nowhere to remember them: the next run looks again
    try:
        with NamedTemporaryFile(suffix=".names", delete=False) as file:
            drop, notes = partial(dropped, file.name, os.getpid()), {}
            try:
                write(file, chunks(notes), notes, root)
                names = Names(file.name)
            except BaseException:
                drop()
                raise
    except OSError as error:
        raise ValueError(f"--data: no room for the names of {root} ({error.strerror}); set XDG_CACHE_HOME to a folder "
                         "on a larger disk") from error
    finalize(names, drop)
    return names


def dropped(path, maker):
    """Removes a file, in the process that made it: readers are forked with all that it has."""
    if os.getpid() == maker:
        Path(path).unlink(missing_ok=True)


def known(place, fresh):
    try:
        found = Names(place)
        return found if fresh(found.notes()[0]) else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None  # none yet, or stale, or damaged: look again

# --------------------------------------------------------------------------------
# A folder


def scan(root, extensions=EXTENSIONS):
    """
    Names of all images below a folder, relative to it, with / between: its own by name, then those of each folder in
    it. Links are followed; the first folder is the class.

    extensions  of the files, lower case, with their dots
    """
    def fresh(notes):
        unchanged = (os.stat(root / folder).st_mtime_ns == time for folder, time in notes["folders"].items())
        return notes["extensions"] == sorted(extensions) and all(unchanged)
    return remembered(root, partial(walk, root, extensions), fresh)


def walk(root, extensions, notes):
    notes.update(folders={}, extensions=sorted(extensions))
    seen, folders = set(), notes["folders"]
    for folder, below, files in os.walk(root, followlinks=True):
        below.sort()
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            below.clear()  # a link to a folder above it
            continue
        seen.add((stat.st_dev, stat.st_ino))
        here = os.path.relpath(folder, root)
        folders[here] = stat.st_mtime_ns
        above = "" if here == os.curdir else here.replace(os.sep, "/") + "/"
        images = [file for file in sorted(files) if os.path.splitext(file)[1].lower() in extensions]
        label = above.split("/")[0] or None
        yield [os.fsencode(above + image) for image in images], [label] * len(images)

# --------------------------------------------------------------------------------
# Lists


def read_list(path):
    """
    Names as a list has them, in its order; and classes, from a column `label`.

    path    .txt: a name a line, UTF-8    .csv: with a header, `path` in it    .parquet: with a column `path`, or one of
            images in it, a struct of bytes and path, as Hugging Face writes them; where that has no path, the row
    raises  ValueError: no such column, not UTF-8, damaged, empty
    """
    stat = os.stat(path)
    stamp = dict(size=stat.st_size, time=stat.st_mtime_ns)
    columns = {".txt": lines, ".csv": rows, ".parquet": records}[path.suffix.lower()]

    def chunks(notes):
        notes.update(stamp)
        try:
            yield from columns(path)
        except OSError as error:
            raise ValueError(f"--data: {path} cannot be read: {error}; name another list") from error
    names = remembered(path, chunks, lambda notes: all(notes[key] == value for key, value in stamp.items()))
    if not names:
        raise ValueError(f"--data: {path} names no image; write one a line" if path.suffix.lower() == ".txt" else
                         f"--data: {path} has no rows; name a list with images in it")
    return names


def lines(path):
    """Of a text; empty ones are none."""
    count = 0
    with open(path, "rb") as file:
        while found := file.readlines(MANY * 64):
            found = [line.rstrip(b"\r\n") for line in found]
            found[0] = found[0] if count else found[0].removeprefix(b"\xef\xbb\xbf")
            try:
                b"\n".join(found).decode()
            except UnicodeDecodeError as error:
                number = count + error.object[: error.start].count(b"\n") + 1
                raise ValueError(f"--data: {path}: line {number} is not UTF-8; write paths, one a line") from None
            count += len(found)
            yield [line for line in found if line], None


def rows(path):
    """Of a csv; columns but `path` and `label` are skipped."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        table = csv.reader(file)
        try:
            header = [name.strip() for name in next(table, [])]
            if "path" not in header:
                raise ValueError(f"--data: {path} has no column path; its first line is {','.join(header)[:80]!r}, and "
                                 "must name the columns, path and maybe label")
            at, label = header.index("path"), header.index("label") if "label" in header else None
            while part := list(islice(table, MANY)):
                part = [row for row in part if row]
                if short := next((row for row in part if len(row) != len(header)), None):
                    raise ValueError(f"--data: {path}: {','.join(short)[:80]!r} has {len(short)} columns, the first "
                                     f"line {len(header)}; quote what holds a comma")
                yield ([os.fsencode(row[at]) for row in part],
                       None if label is None else [row[label] or None for row in part])
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"--data: {path} is no csv in UTF-8: {error}; name another") from error


def records(path):
    """Of a parquet file"""
    file, column = open_parquet(path)
    own, label, first = column == "path", "label" in file.schema_arrow.names, 0
    for part in file.iter_batches(MANY, columns=[column if own else f"{column}.path", *["label"] * label]):
        found = part[column].to_pylist()
        names = [name if own else (name or {}).get("path") for name in found]
        yield ([os.fsencode(str(first + i if name is None else name)) for i, name in enumerate(names)],
               [None if x is None else str(x) for x in part["label"].to_pylist()] if label else None)
        first += len(names)


def open_parquet(path):
    """The file, and its column of paths, else of images. Raises ValueError: pyarrow is not there, neither column is."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"--data: pyarrow is not installed, to read {path}; pip install -e .[data]") from error
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"--data: {path} is no parquet file: {error}; name another") from error
    schema = file.schema_arrow
    images = [field.name for field in schema
              if pyarrow.types.is_struct(field.type) and {"bytes", "path"} <= {part.name for part in field.type}]
    column = "path" if "path" in schema.names else images[0] if images else None
    if column is None:
        raise ValueError(f"--data: {path} has no column path, and none of images, a struct of bytes and path; it has "
                         f"{', '.join(schema.names)}")
    return file, column


def write_list(path, columns):
    """
    Whole or not at all.    columns  {name: list}, the first one path; a .txt has that alone

    raises  ValueError: it cannot be written
    """
    with whole(path) as new:
        if path.suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet
            parquet.write_table(pyarrow.table(columns), new)
        else:
            with open(new, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                table = csv.writer(file, lineterminator="\n")
                if path.suffix == ".csv":
                    table.writerow(columns)
                    table.writerows(zip(*columns.values(), strict=True))
                else:
                    file.writelines(f"{name}\n" for name in columns["path"])


def place_of(name, folder):
    """Relative to the folder, a real path, if it lies below"""
    path = os.path.abspath(name)
    return os.path.relpath(path, folder) if path.startswith(folder + os.sep) else path
