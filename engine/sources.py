"""
Where images come from: len(source), source.load(i) -> C H W, source.name(i), source.digest(); for probes source.classes
and source.label(i); where there are files, source.raw(i) -> the bytes of one, its name.

    open_source  what --data names; the forms are those of its docstring
    Shapes       the generated images of shapes.py
    Files        images by their names: of a list; below a Folder; within a Parquet file
    Archives     images in tars and zips: engine/archives.py        Mixture    several sources, in shares: mixture.py
    Drawn        some images of another source;  Unlabelled: all of them
    read_named   the image at a path, in an archive, too
"""

import hashlib
import re
from bisect import bisect_right
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

import shapes
from engine import mixture
from engine.archives import Archives, is_archive
from engine.channels import Channels
from engine.images import EXTENSIONS, read_image
from engine.index import Descriptor
from engine.members import CutShort, contents, members
from engine.names import LISTS, open_parquet, read_list, scan

MEMBER = re.compile(r"(.+?\.(?:tar|zip))/(.+)", re.I | re.S)


def open_source(path, n_shapes=4096, seed=0, read=read_image):
    """
    path      shapes: the generated set
              a folder of images, searched recursively; the first folder below it names the class
              shards of images, tar or zip: see engine/archives.py
              a list: .txt, .csv or .parquet, see read_list; names are relative to its folder, and may be ones in an
              archive, x.tar/member.jpg; .parquet may hold the images
              A*0.7,B*0.3 or A*0.1!,B*0.7,C*0.3 or a .json: a mixture of these, see read_mixture
    n_shapes  images of `shapes`; another seed gives other images
    read      what makes an image of a file
    raises    ValueError: not there, no image in it, no such list or mixture
    """
    said = None if is_archive(path) else mixture.read_mixture(path)
    if said is None:
        return open_part(path, n_shapes, seed, read)
    paths, *counts = zip(*said, strict=True)
    return mixture.Mixture([open_part(part, n_shapes, seed, read) for part in paths], zip(*counts, strict=True))


def open_part(path, n_shapes, seed, read):
    """One source, that is no mixture."""
    if str(path) == "shapes" and isinstance(read, Channels):
        raise ValueError("--data shapes are RGB pictures; --in_chans 3, without --bands")
    if str(path) == "shapes":
        return Shapes(n_shapes, seed)
    if is_archive(path):
        return Archives(path, read)
    path = Path(path).expanduser()
    if path.suffix.lower() not in LISTS or not path.is_file():
        return Folder(path, read)
    if path.suffix.lower() == ".parquet" and open_parquet(path)[1] != "path":
        return Parquet(path, read)
    return Files(path.parent, read_list(path), read, path)


class Shapes:
    """The generated images of shapes.py, each rendered once: memory that all workers share keeps them."""
    SIDE = 96  # pixels

    def __init__(self, n, seed=0):
        self.seed, self.classes = seed, list(shapes.CLASSES)
        self.images = torch.zeros(n, self.SIDE, self.SIDE, 3, dtype=torch.uint8).share_memory_()
        self.labels = torch.full((n,), -1).share_memory_()  # -1: not yet rendered

    def __len__(self):
        return len(self.images)

    def load(self, i):
        if self.labels[i] < 0:
            scene = shapes.scene(int(i), self.SIDE, self.seed)
            self.images[i] = torch.from_numpy(scene.image)
            self.labels[i] = scene.label  # last: the image is there when the label is
        return self.images[i].permute(2, 0, 1)

    def label(self, i):
        self.load(i)
        return int(self.labels[i])

    def name(self, i):
        return f"shapes {i}"

    def digest(self):
        return f"shapes {len(self)} {self.seed}"


class Files:
    """Images by their names, relative to a root.    paths  these Names    listed  the list that has them"""

    def __init__(self, root, paths, read=read_image, listed=None):
        self.root, self.paths, self.read, self.listed = Path(root), paths, read, listed
        self.classes = sorted(paths.classes)
        place = {name: k for k, name in enumerate(self.classes)}
        self.ranks = [place[name] for name in paths.classes]

    def __len__(self):
        return len(self.paths)

    def load(self, i):
        return read_named(self.root / self.paths[i], self.read)

    def raw(self, i):
        """(bytes, name) of its file. Raises OSError."""
        return read_bytes(self.root / self.paths[i]), self.name(i)

    def label(self, i):
        """Raises ValueError for an image that has none."""
        k = self.paths.label(i)
        if k < 0:
            raise ValueError(f"--data: {self.name(i)} " + (
                f"has no label in {self.listed}; a csv or parquet list has them in a column label" if self.listed else
                "lies in no class folder; folders name the classes"))
        return self.ranks[k]

    def name(self, i):
        return str(self.root / self.paths[i])

    def digest(self):
        """Of the images' names and order, not of their pixels: the folder may move."""
        return self.paths.digest


def read_named(path, read):
    """What `read` makes of a file, or of a member of an archive. Raises OSError."""
    return read(path) if archive_of(path) is None else read(BytesIO(read_bytes(path)), str(path))


def archive_of(path):
    """(archive, member) of ARCHIVE.tar/MEMBER; None of a file, in a folder of such a name too"""
    found = MEMBER.fullmatch(str(path))
    return found.groups() if found and Path(found[1]).is_file() else None


def read_bytes(path):
    """Of a file, or of a member of an archive. Raises OSError that names it."""
    within = archive_of(path)
    try:
        if within is None:
            return Path(path).read_bytes()
        file, found = members_of(within[0])
        if within[1] not in found:
            raise OSError("there is no such member")
        return contents(file.number, found[within[1]])
    except (OSError, ValueError) as error:
        raise OSError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


@lru_cache(maxsize=64)
def members_of(archive):
    """The open archive, and {name: member} of all its files. Raises OSError, ValueError."""
    file, found = Descriptor(archive), {}
    try:
        for member in members(archive, file.number):
            found[member.name] = member
    except CutShort:
        pass  # those that are whole can be read
    return file, found


class Folder(Files):
    """All images below a folder; the first folder below it names the class."""

    def __init__(self, root, read=read_image):
        root = Path(root).expanduser()
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise ValueError(f"--data: {root} {what}; name a folder of images, a list of them, a tar or zip, or write "
                             "shapes for the generated set")
        extensions = getattr(read, "extensions", EXTENSIONS)
        super().__init__(root, scan(root, extensions), read)
        if not self.paths:
            raise ValueError(f"--data: no image in {root} or below it; looked for {' '.join(sorted(extensions))}")


class Parquet(Files):
    """
    Images within a parquet file, in a column of structs of bytes and path; without bytes, the file at that path.

    A group of rows, often a hundred, is read for each image: at random that is slow; --order windows reads neighbours.
    """

    def __init__(self, path, read=read_image):
        super().__init__(path.parent, read_list(path), read, path)
        file, self.column = open_parquet(path)
        sizes = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
        self.starts = np.cumsum([0, *sizes[:-1]]).tolist()

    def data(self, i):
        group = bisect_right(self.starts, i) - 1
        return images_of(self.listed, self.column, group)[int(i) - self.starts[group]]

    def load(self, i):
        data = self.data(i)
        return self.read(BytesIO(data), self.name(i)) if data is not None else super().load(i)

    def raw(self, i):
        data = self.data(i)
        return (data, self.name(i)) if data is not None else super().raw(i)

    def name(self, i):
        return f"{self.listed}/{self.paths[i]}"


@lru_cache(maxsize=2)
def images_of(path, column, group):
    """[bytes or None] of a group of rows. Raises OSError."""
    from pyarrow import ArrowException
    try:
        found = open_parquet(path)[0].read_row_group(group, [f"{column}.bytes"], use_threads=False)[column]
        return [(image or {}).get("bytes") for image in found.to_pylist()]
    except (ArrowException, ValueError) as error:
        raise OSError(f"{path}, row group {group}: {error}") from error


class Drawn:
    """Some images of a source, by their rows: an array, which workers share, where they would copy a list."""

    def __init__(self, source, rows):
        self.source, self.rows = source, np.asarray(rows, np.int64)

    def __len__(self):
        return len(self.rows)

    def load(self, i):
        return self.source.load(self.rows[i])

    def label(self, i):
        return self.source.label(self.rows[i])

    def name(self, i):
        return self.source.name(self.rows[i])

    @property
    def parts(self):
        """Of a mixture: with as many images as are left of each; the rows are in order. None of a plain source."""
        parts = getattr(self.source, "parts", None)
        if parts is None:
            return None
        ends = np.cumsum([0] + [part.size for part in parts])
        sizes = np.diff(np.searchsorted(self.rows, ends)).tolist()
        if not all(sizes):
            raise ValueError(f"--data: part {sizes.index(0) + 1} of the mixture has no image left when some are held "
                             "out; give it more, or leave it out")
        return [replace(part, size=size) for part, size in zip(parts, sizes, strict=True)]

    def digest(self):
        return hashlib.sha1(f"{self.source.digest()} {self.rows.tolist()}".encode()).hexdigest()


class Unlabelled:
    def __init__(self, source):
        self.source, self.load = source, source.load

    def __len__(self):
        return len(self.source)

    def label(self, i):
        return -1
