"""
Where images come from: len(source), source.load(i) -> C H W uint8, source.name(i), source.digest(); for probes
source.classes and source.label(i).

    open_source  a folder of photos, tars or zips of them, or the generated `shapes`     --data PATH
    Drawn        some images of another source
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from tqdm import tqdm

import shapes
from engine.archives import Archives, is_archive
from engine.images import EXTENSIONS, read_image


def open_source(path, n_shapes=4096, seed=0, read=read_image):
    """
    path      "shapes", a folder of images, searched recursively, or shards: see engine/archives.py
    n_shapes  images of `shapes`; another seed gives other images
    read      what makes an image of a file
    raises    ValueError: not a folder, or no image in it
    """
    if str(path) == "shapes":
        return Shapes(n_shapes, seed)
    if is_archive(path):
        return Archives(path, read)
    return Folder(path, read)


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


class Folder:
    """All images below a folder; the first folder below it names the class."""

    def __init__(self, root, read=read_image):
        self.root, self.read = Path(root).expanduser(), read
        if not self.root.is_dir():
            what = "is a file" if self.root.exists() else "does not exist"
            raise ValueError(f"--data: {root} {what}; name a folder of images, or write shapes for the generated set")
        extensions = getattr(read, "extensions", EXTENSIONS)
        self.paths = scan(self.root, extensions)
        if not self.paths:
            raise ValueError(f"--data: no image in {root} or below it; looked for {' '.join(sorted(extensions))}")
        self.classes = sorted({path.split("/")[0] for path in self.paths if "/" in path})

    def __len__(self):
        return len(self.paths)

    def load(self, i):
        return self.read(self.root / self.paths[i])

    def raw(self, i):
        """(bytes, name) of its file. Raises OSError."""
        try:
            return (self.root / self.paths[i]).read_bytes(), self.name(i)
        except OSError as error:
            raise OSError(f"{self.name(i)}: {error.strerror}") from error

    def label(self, i):
        """Raises ValueError for an image that lies in no class folder."""
        folder, slash, _ = self.paths[i].partition("/")
        if not slash:
            raise ValueError(f"--data: {self.root / folder} lies in no class folder; folders name the classes")
        return self.classes.index(folder)

    def name(self, i):
        return str(self.root / self.paths[i])

    def digest(self):
        """Of the images' names and order, not of their pixels: the folder may move."""
        return hashlib.sha1("\n".join(self.paths).encode("utf-8", "surrogateescape")).hexdigest()


class Drawn:
    """Some images of a source, by their rows."""

    def __init__(self, source, rows):
        self.source, self.rows = source, rows

    def __len__(self):
        return len(self.rows)

    def load(self, i):
        return self.source.load(self.rows[i])

    def label(self, i):
        return self.source.label(self.rows[i])

    def name(self, i):
        return self.source.name(self.rows[i])

    def digest(self):
        return hashlib.sha1(f"{self.source.digest()} {self.rows}".encode()).hexdigest()


def scan(root, extensions=EXTENSIONS):
    """Paths of all images below root, in a fixed order; remembered until a folder changes: restarts are quick."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanodino"
    kinds = "" if extensions == EXTENSIONS else " ".join(sorted(extensions))
    cache /= hashlib.sha1((str(root.resolve()) + kinds).encode()).hexdigest()[:16] + ".json"
    try:
        index = json.loads(cache.read_text())
        if all(os.stat(root / folder).st_mtime_ns == time for folder, time in index["folders"].items()):
            return index["paths"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no index yet, or a stale or damaged one: look again
    folders, paths, seen = {}, [], set()
    with tqdm(desc=f"scanning {root}", unit=" images", leave=False, disable=None) as bar:
        for folder, below, files in os.walk(root, followlinks=True):
            below.sort()
            stat = os.stat(folder)
            if (stat.st_dev, stat.st_ino) in seen:
                below.clear()  # a link to a folder above it
                continue
            seen.add((stat.st_dev, stat.st_ino))
            folders[os.path.relpath(folder, root)] = stat.st_mtime_ns
            images = [file for file in sorted(files) if Path(file).suffix.lower() in extensions]
            paths += [os.path.relpath(os.path.join(folder, image), root).replace(os.sep, "/") for image in images]
            bar.update(len(images))
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        new = cache.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(dict(folders=folders, paths=paths)))
        new.replace(cache)
    except OSError:
        pass  # nowhere to remember it: the next run scans again
    return paths
