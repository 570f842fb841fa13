"""
Where each image of some tars and zips lies: 12 bytes an image, in a file that is made once.

    open_index   the index of these shards, read, or made by as many processes as there are cores
    rows_of      one shard -> its rows
    Index        what open_index gives: row(i), classes, what is to be told

    NAME.index        a line of JSON for each shard, written when it is done: size, time, where its rows are; at the
                      end one for all of them. What was cut off goes on; a shard that has changed is done again
    NAME.index.rows   the rows of ROW, as they came. In a tar data begin at 512 block, their first header `head` blocks
                      before; in a zip the member's own header begins at block + 2^32 head, and tells how long it is

It stands beside the shards, or, where nobody may write, in the cache folder of this user. Every process that opens the
same shards may call this: the first one locks NAME.index.rows and makes it, the others wait for the lock and find it
made; if the first one dies, the next goes on. No process group is needed, and torchrun's ranks are nothing special.
"""

import errno
import hashlib
import json
import os
import signal
import struct
import zlib
from array import array
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from engine.members import BLOCK, TAR, CutShort, Member, contents, images_of, members, read, samples, shown
from engine.names import cache_folder
from engine.ranks import cores
from engine.system import locked, read_at

ROW = np.dtype([("block", "<u4"), ("size", "<u4"), ("label", "<u2"), ("head", "u1"), ("kind", "u1")])
PACK = struct.Struct("<IIHBB")  # the same
NONE = 65535                   # the label of a sample that has none; so many classes at most
VERSION = 1                    # of both files
OPEN = 64                      # files that a process holds open at once
LONGEST = 1 << 20              # bytes of a .json in which a label is looked for
CHUNK = 1 << 20                # bytes that are read at once to find the last line
ELSEWHERE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENOLCK, errno.ENOTSUP}

# --------------------------------------------------------------------------------
# Open files


class Descriptor:
    """
    A file that is open to read until nobody holds this: no thread closes what another one reads. So hold it, and not
    its number alone, while you read.
    """
    number = None

    def __init__(self, path, stamp=None):
        """stamp  size and time that it must still have. Raises OSError."""
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        if stamp and stamp != stamp_of(os.fstat(self.number)):
            raise OSError("it has changed since its index was made; start again, and it is indexed again")

    def __del__(self):
        if self.number is not None:
            os.close(self.number)


def descriptors():
    """(path, stamp) -> Descriptor, of which the 64 that were asked for last stay open."""
    return lru_cache(OPEN)(Descriptor)


def stamp_of(stat):
    return stat.st_size, stat.st_mtime_ns

# --------------------------------------------------------------------------------
# The rows of one shard


def rows_of(path):
    """
    One shard -> rows in the order of names, as bytes; labels, whose places are in the rows; what is to be told:

        n, bytes  images    unlabelled  of these    others  images that are not the first of their sample
        cut       why it is cut short, "" if it is not
    raises  ValueError that names the shard: damaged, locked, compressed, unreadable
    """
    keyed, labels, notes = [], {}, dict(n=0, bytes=0, unlabelled=0, others=0, cut="")
    try:
        file = Descriptor(path)
        for _, group in samples(members(path, file.number)):
            if images := images_of(group):
                label = label_of(file.number, group, images[0].name)
                place = NONE if label is None else min(labels.setdefault(label, len(labels)), NONE)
                keyed.append((as_searched(images[0].name), pack(images[0], place)))
                notes["bytes"] += images[0].size
                notes["unlabelled"] += label is None
                notes["others"] += len(images) - 1
    except CutShort as error:
        notes["cut"] = str(error)
    except (ValueError, OSError) as error:
        raise ValueError(shown(f"{path}: {getattr(error, 'strerror', None) or error}")) from error
    keyed.sort(key=lambda pair: pair[0])
    return b"".join(row for _, row in keyed), list(labels), notes | dict(n=len(keyed))


def as_searched(name):
    """A key by which names sort as a folder is searched: in each folder first its files, then what is below it."""
    folder, _, base = name.rpartition("/")
    return folder.replace("/", "\0\1") + "\0\0" + base


def pack(member, label):
    """A row. Raises ValueError for what 32 or 40 bits do not hold."""
    block, head = (member.start // BLOCK, min(member.head, 255)) if member.kind == TAR else (
        member.start & 0xffffffff, member.start >> 32)
    if max(block, member.size) > 0xffffffff or head > 255:
        raise ValueError(f"{member.name} has {member.size:,} bytes, at byte {member.start:,}: more than an index holds")
    return PACK.pack(block, member.size, label, head, member.kind)


def unpack(row):
    """-> Member without its name, label"""
    block, size, label, head, kind = PACK.unpack(row)
    return (Member("", block * BLOCK, size, kind, head) if kind == TAR else
            Member("", block | head << 32, size, kind)), label


def label_of(fd, group, name):
    """What .cls says, or .json under "label" or "cls", or the first folder of the name; None if nothing does."""
    for suffix in "cls", "json":
        if suffix in group and group[suffix].size <= LONGEST:
            try:
                said = contents(fd, group[suffix]).decode("utf-8", "replace").strip()
            except OSError as error:
                raise ValueError(f"{group[suffix].name}: {error}") from error
            if suffix == "json":
                said = said_in(said)
            if said:
                return said
    folder, slash, _ = name.partition("/")
    return folder if slash else None


def said_in(text):
    try:
        held = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    found = [held[key] for key in ("label", "cls") if key in held] if isinstance(held, dict) else []
    return str(found[0]) if found and type(found[0]) in (int, str) else ""

# --------------------------------------------------------------------------------
# The index of all shards


class Index:
    """
    len(index) images; index.row(i) -> number of the shard, Member without its name, number of its class or None

    said     the last line of NAME.index. It has, for each shard: size, time, row, n: its images; of all of them: bytes,
             unlabelled, others, cut: [[shard, why, images]], classes: names of labels in order, None: they are too many
    made     whether this process has made or completed it
    """
    def __init__(self, base, said, made=False):
        self.rows, self.classes, self.made = str(rows_file(base)), said["classes"], made
        self.sizes, self.times, self.places = (array("q", said[key]) for key in ("size", "time", "row"))
        self.ends = array("q", accumulate(said["n"]))
        self.n_bytes, self.unlabelled, self.others, self.cut = (
            said[key] for key in ("bytes", "unlabelled", "others", "cut"))
        self.number = {place: k for k, place in enumerate(said["places"])}
        self.open = descriptors()

    def __len__(self):
        return self.ends[-1]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "open"}

    def __setstate__(self, state):
        vars(self).update(state, open=descriptors())

    def first(self, shard):
        """The number of its first image."""
        return self.ends[shard - 1] if shard else 0

    def row(self, i):
        """Read, not mapped: what a mapped file has shown would count as this process's memory."""
        shard = bisect_right(self.ends, i)
        place = self.places[shard] + i - self.first(shard)
        file = self.open(self.rows)
        member, label = unpack(read(file.number, PACK.size, PACK.size * place))
        return shard, member, self.number.get(label)


def open_index(path, beside, root, names, stamps):
    """
    path    what --data is    beside  NAME.index, beside the shards
    names   of the shards, below root    stamps  size and time of each
    raises  ValueError: shards that cannot be used, nowhere to write
    """
    bases = beside, cached(path)
    for base in bases:
        if said := read_index(base, names, stamps):
            return Index(base, said)
    refused = ""
    for base in bases:
        try:
            if base != beside:
                base.parent.mkdir(parents=True, exist_ok=True)
            with open(rows_file(base), "a+b") as rows:
                locked(rows, records=True)
                said = read_index(base, names, stamps)
                return Index(base, said or make(path, base, rows, root, names, stamps), made=not said)
        except OSError as error:
            if error.errno not in ELSEWHERE:
                raise ValueError(f"--data: {base}: {error.strerror}; what is done of the index is kept") from error
            refused = f"{refused}{base}: {error.strerror}; "
    raise ValueError(f"--data: the index of {path} can be written nowhere: {refused}name another cache: XDG_CACHE_HOME")


def rows_file(base):
    return base.with_name(base.name + ".rows")


def cached(path):
    cache = cache_folder()
    return cache / (hashlib.sha1(os.fsencode(Path(path).expanduser().resolve())).hexdigest()[:16] + ".index")


def read_index(base, names, stamps):
    """The last line of a whole index of these shards, as they are; else None."""
    try:
        with open(base, "rb") as file:
            said = json.loads(last_line(file))
        size = rows_file(base).stat().st_size
        fresh = said["version"] == VERSION and said["of"] == digest_of(names) and said["size"] == [
            size for size, _ in stamps] and said["time"] == [time for _, time in stamps]
        whole = size >= PACK.size * max(map(sum, zip(said["row"], said["n"], strict=True)))
        return said if fresh and whole else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # there is none, it is not done, or damaged


def last_line(file):
    """Of a file that ends in a new line; otherwise nothing."""
    end, found = file.seek(0, 2), b""
    while end > 0 and b"\n" not in found[:-1]:
        end, n = max(0, end - CHUNK), min(end, CHUNK)
        file.seek(end)
        found = file.read(n) + found
    return found[found.rfind(b"\n", 0, -1) + 1 :] if found.endswith(b"\n") else b""


def digest_of(names):
    return hashlib.sha1("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def read_lines(base):
    """{shard: its line}, labels in the order in which they came. Damaged: as if there were none."""
    lines, labels = {}, []
    try:
        for line in map(json.loads, base.read_bytes().split(b"\n")[:-1]):  # what follows may be torn
            if "of" in line:
                continue
            if line["version"] != VERSION or line["known"] != len(labels):  # a line before it is lost
                return {}, []
            labels += line["labels"]
            lines[line["shard"]] = line
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}, []
    return lines, labels


def make(path, base, rows, root, names, stamps):
    """
    Walks the shards of which there is no sound line; adds their rows and lines, and the line for all, which it returns.

    rows    NAME.index.rows, open to add and to read, and locked
    raises  ValueError if shards cannot be used: after all others, which are kept
    """
    lines, labels = read_lines(base)
    with open(base, "a+b") as journal:
        journal.truncate(base.read_bytes().rfind(b"\n") + 1 if lines else 0)
    rows.truncate(os.fstat(rows.fileno()).st_size // PACK.size * PACK.size if lines else 0)
    number, used = {label: k for k, label in enumerate(labels)}, np.zeros(NONE + 1, bool)
    done, todo, failed = {}, [], []
    for k, (name, stamp) in enumerate(zip(names, stamps, strict=True)):
        line = lines.get(name)
        kept = read_at(rows.fileno(), PACK.size * line["n"], PACK.size * line["row"]) if line else b""
        if line and (line["size"], line["time"]) == stamp and zlib.crc32(kept) == line["crc"]:
            done[name] = line
            used[np.frombuffer(kept, ROW)["label"]] = True
        else:
            todo.append(k)
    for k, found in tqdm(zip(todo, walked([Path(root, names[k]) for k in todo]), strict=True),
                         f"indexing {path}", len(todo), unit=" shards", leave=False, disable=None):
        if isinstance(found, str):
            failed.append(found)
            continue
        data, own, notes = found
        known = len(number)
        data = renumbered(data, own, number)
        used[data["label"]] = True
        size, time = stamps[k]
        line = dict(version=VERSION, shard=names[k], size=size, time=time, row=rows.seek(0, 2) // PACK.size,
                    crc=zlib.crc32(data.tobytes()), known=known, labels=list(number)[known:], **notes)
        rows.write(data.tobytes())
        rows.flush()  # before the line that tells of them
        append(base, line)
        done[names[k]] = line
    if failed:
        raise ValueError(f"--data: {failed[0]}" + f"; so are {len(failed) - 1} more" * (len(failed) > 1))
    os.fsync(rows.fileno())
    said = total([done[name] for name in names], list(number), np.flatnonzero(used[:NONE]).tolist())
    append(base, dict(version=VERSION, of=digest_of(names)) | said)
    return said


def renumbered(data, own, number):
    """Rows of a shard, their labels as places in `number`, to which what is new of its own labels is added."""
    rows, table = np.frombuffer(data, ROW).copy(), np.full(NONE + 1, NONE, np.uint16)
    for k, label in enumerate(own):
        if len(number) <= NONE:  # one more than there is room for tells that there are too many
            number.setdefault(label, len(number))
        if k < NONE:
            table[k] = min(number.get(label, NONE), NONE)
    rows["label"] = table[rows["label"]]
    return rows


def total(lines, labels, used):
    """What the line for all says, but for which they are. Labels that are all numbers are in their order."""
    numbers = all(labels[k].isdecimal() for k in used)
    order = sorted(used, key=lambda k: int(labels[k]) if numbers else labels[k])
    columns = {key: [line[key] for line in lines] for key in ("size", "time", "row", "n")}
    sums = {key: sum(line[key] for line in lines) for key in ("bytes", "unlabelled", "others")}
    cut = [[line["shard"], line["cut"], line["n"]] for line in lines if line["cut"]]
    return dict(places=order, classes=[labels[k] for k in order] if len(labels) <= NONE else None, cut=cut, **sums,
                **columns)


def append(base, line):
    with open(base, "a") as journal:
        journal.write(json.dumps(line) + "\n")


class Walks(Dataset):
    """walks[k] -> rows_of a shard, or, as text, why it has none"""

    def __init__(self, shards):
        self.shards = shards

    def __len__(self):
        return len(self.shards)

    def __getitem__(self, k):
        try:
            return rows_of(self.shards[k])
        except ValueError as error:
            return str(error)


def walked(shards):
    """rows_of each, in order, by a process for each core. Raises ValueError if one of them was killed."""
    workers = min(int(cores()), len(shards)) if len(shards) > 1 else 0
    try:
        yield from DataLoader(Walks(shards), batch_size=None, collate_fn=lambda found: found, num_workers=workers,
                              worker_init_fn=ignore_interrupts)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ValueError(f"--data: {str(error).partition(chr(10))[0]}; what is done of the index is kept") from error


def ignore_interrupts(worker):
    """Ctrl-C is for the main process, at whose end this one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
