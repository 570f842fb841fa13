"""
The vectors of many images in one file, as embed.py leaves them: .npz, .safetensors or .parquet.

    write      tables of vectors, a part at a time -> the file, whole or not at all
    Vectors    the file: columns that are read when they are asked for, names, pictures, what it was made of
    Unit       some of its columns, side by side, each row of length 1

    cls            N D float32: class tokens           patches_mean   N D float32: means of patches; of pixels none
    paths          N: relative to the file's folder    rows           N int64: of the source
                   where they lie below it

np.load(FILE)["cls"], and so on, or a column of the table. In .safetensors paths are N L bytes: UTF-8, then zeros.
Beside them is `about`, JSON: the network, the view, the source. Dimension letters: see the top of model.py; N images.
"""

import json
import os
import struct
import zipfile
from dataclasses import fields
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

from engine.channels import reader
from engine.chunks import OnDisk, index
from engine.config import whole
from engine.images import ImageConfig, shown
from engine.shards import Entry, write_tensors
from engine.sources import archive_of, open_source, read_named

FORMAT = 1
ROWS = 1 << 14       # of a part; and of a group of rows in .parquet

# --------------------------------------------------------------------------------
# Writing


def write(path, about, columns, name):
    """
    columns  {name: N ..., of what [first:end] gives}    name(i) -> path of row i    about  fit for JSON

    raises   ValueError: no room, a name that the file cannot hold
    """
    n = len(columns["cls"])
    columns = {key: (tuple(x.shape), np.asarray(x[:0]).dtype, partial(in_parts, x)) for key, x in columns.items()
               if 0 not in x.shape[1:]}
    with whole(path) as new:
        WRITERS[path.suffix](new, json.dumps(about | dict(format=FORMAT)), columns, n, name)


def in_parts(x):
    return (np.asarray(x[first : first + ROWS]) for first in range(0, x.shape[0], ROWS))


def names_in_parts(n, name, array):
    """array(list of names) of each part"""
    return (array([name(i) for i in range(first, min(first + ROWS, n))]) for first in range(0, n, ROWS))


def write_npz(file, about, columns, n, name):
    longest = max(len(name(i)) for i in range(n))
    text = np.dtype(f"U{longest}")
    columns = columns | dict(paths=((n,), text, partial(names_in_parts, n, name, partial(np.array, dtype=text))),
                             about=((), np.dtype(f"U{len(about)}"), lambda: [np.array(about)]))
    with zipfile.ZipFile(file, "w") as archive:  # stored as they are: rows are read where they lie
        for key, (shape, dtype, make) in columns.items():
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, dict(
                    descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False, shape=shape))
                for part in make():
                    entry.write(np.ascontiguousarray(part).tobytes())


def write_safetensors(file, about, columns, n, name):
    longest = max(len(os.fsencode(name(i))) for i in range(n))

    def padded(names):
        text = np.array([os.fsencode(each) for each in names], f"S{longest}")
        return torch.from_numpy(text.view(np.uint8).reshape(len(names), longest))

    def tensors(make):
        return map(torch.from_numpy, make())
    entries = {key: Entry(shape, torch.from_numpy(np.empty(0, dtype)).dtype, partial(tensors, make))
               for key, (shape, dtype, make) in columns.items()}
    entries["paths"] = Entry((n, longest), torch.uint8, lambda: names_in_parts(n, name, padded))
    write_tensors(file, entries, dict(about=about, format="pt"))


def write_parquet(file, about, columns, n, name):
    import pyarrow
    from pyarrow import parquet

    def column(x):
        return pyarrow.array(x) if x.ndim == 1 else pyarrow.FixedSizeListArray.from_arrays(x.ravel(), x.shape[1])

    def texts(names):
        try:
            return pyarrow.array(names, pyarrow.string())
        except UnicodeEncodeError as error:
            raise ValueError(f"{error.object!r} is no UTF-8, which .parquet wants of names; write .npz") from error
    made = {key: map(column, make()) for key, (_, _, make) in columns.items()}
    made["paths"] = names_in_parts(n, name, texts)
    writer = None
    for part in zip(*made.values(), strict=True):
        table = pyarrow.table(dict(zip(made, part, strict=True)))
        if writer is None:
            writer = parquet.ParquetWriter(file, table.schema.with_metadata({"about": about}))
        writer.write_table(table.replace_schema_metadata({"about": about}))
    writer.close()


WRITERS = {".npz": write_npz, ".safetensors": write_safetensors, ".parquet": write_parquet}

# --------------------------------------------------------------------------------
# Reading


def open_npz(path):
    columns = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed")
            raw.seek(info.header_offset)
            head = raw.read(30)                                     # of a member; its name and more of it follow
            raw.seek(sum(struct.unpack("<HH", head[26:30])), os.SEEK_CUR)
            np.lib.format.read_magic(raw)
            shape, _, dtype = np.lib.format.read_array_header_1_0(raw)
            columns[info.filename.removesuffix(".npy")] = OnDisk((path, dtype, shape or (1,), raw.tell()))
    return str(columns.pop("about")[:][0]), columns


def open_safetensors(path):
    with safe_open(path, "np") as file:
        about = file.metadata()["about"]
    return about, {name: OnDisk(place) for name, place in index(path).items()}


def open_parquet(path):
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("pyarrow is not installed; pip install -e .[data]") from error
    file = parquet.ParquetFile(path)
    return file.schema_arrow.metadata[b"about"].decode(), {name: InGroups(file, name)
                                                           for name in file.schema_arrow.names}


OPENERS = {".npz": open_npz, ".safetensors": open_safetensors, ".parquet": open_parquet}


class InGroups:
    """Rows of a column of a .parquet, as OnDisk has them; all groups but the last are of ROWS rows"""

    def __init__(self, file, name):
        self.file, self.name, self.last = file, name, None
        self.shape = file.metadata.num_rows, *self.group(0).shape[1:]

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        out = np.empty((len(rows), *self.shape[1:]), self.group(0 if self.last is None else self.last).dtype)
        for k in np.unique(rows // ROWS).tolist():
            here = rows // ROWS == k
            out[here] = self.group(k)[rows[here] % ROWS]
        return out

    def group(self, k):
        if self.last != k:
            column = self.file.read_row_group(k, [self.name])[self.name].combine_chunks()
            width = getattr(column.type, "list_size", 0)
            flat = (column.flatten() if width else column).to_numpy(zero_copy_only=False)
            self.last, self.rows = k, flat.reshape(-1, width) if width else flat
        return self.rows


class Vectors:
    """
    path     what `write` wrote
    columns  {name: rows on disk}    about  dict    raises  ValueError: another file
    """
    def __init__(self, path):
        self.path = Path(path)
        if self.path.suffix not in OPENERS:
            raise ValueError(f"{path}: name a file that embed.py has left, {', '.join(OPENERS)}")
        if not self.path.is_file():
            raise ValueError(f"{path} does not exist; python embed.py PHOTOS --weights W --out {path}")
        try:
            about, self.columns = OPENERS[self.path.suffix](self.path)
            self.about = dict(json.loads(about))
            if self.about["format"] != FORMAT or len({len(x) for x in self.columns.values()}) != 1:
                raise ValueError("of another version, or cut short")
            self.columns["cls"], self.columns["paths"]
        except Exception as error:  # whatever three readers say of foreign bytes
            raise ValueError(f"{path} is no file of vectors that embed.py left ({error}); make it again") from error

    def __len__(self):
        return len(self.columns["cls"])

    def name(self, i):
        """As it can be opened from here"""
        said = self.columns["paths"][[i]][0]
        said = os.fsdecode(said.tobytes().rstrip(b"\0")) if isinstance(said, np.ndarray) else str(said)
        below = self.path.parent / said
        return str(below) if os.path.isfile(below) or archive_of(below) else said

    @cached_property
    def read(self):
        """What makes an image of a file, as when the vectors were made"""
        options, mean = self.about["options"], self.about["mean"]
        c = ImageConfig(**{field.name: type(field.default)(options[field.name]) for field in fields(ImageConfig)})
        return reader(c, SimpleNamespace(in_chans=len(mean), mean=mean))

    @cached_property
    def source(self):
        """What the images came from, if it is what it was, else None"""
        options = self.about["options"]
        try:
            found = open_source(options["data"], seed=options["seed"], read=self.read)
        except ValueError:
            return None
        return found if found.digest() == self.about["digest"] else None

    def image(self, i):
        """Of row i, C H W as the network got it. Raises OSError."""
        name = self.name(i)
        if os.path.isfile(name) or archive_of(name):
            return read_named(name, self.read)
        if self.source is None:
            raise OSError(f"{name} is no longer there")
        return self.source.load(int(self.columns["rows"][[i]][0]))

    def load(self, i):
        """The same, C H W uint8, to be looked at"""
        return shown(self.image(i))


class Unit:
    """
    [first:end] -> n D float32: rows of columns, side by side, of length 1

    raises  ValueError for one that has no direction, by name
    """
    def __init__(self, file, *names):
        self.file, self.columns = file, [file.columns[name] for name in names]
        self.shape = len(file), sum(x.shape[1] for x in self.columns)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        x = torch.from_numpy(np.concatenate([column[rows] for column in self.columns], 1))
        bad = (~torch.isfinite(x).all(1) | ~x.any(1)).nonzero().flatten().tolist()
        if bad:
            name = self.file.name(rows.indices(len(self))[0] + bad[0])
            raise ValueError(f"{self.file.path}: the vector of {name} is not finite, or 0, and near to nothing; embed "
                             "again, with other weights or --precision fp32")
        return F.normalize(x, dim=1).numpy()
