"""
Images with sentences: len, load(i) -> C H W uint8, captions(i) -> list of texts, name(i), label(i): its row.

    open_captions   shapes, or by what lies at the path:
        FOLDER of images, NAME.txt beside NAME.jpg: a caption a line     FOLDER/captions.json: [{image, captions}]
        FILE.json    COCO's: images, annotations                         FILE.csv, .parquet: a path, captions in columns
        FILE.tar or .zip: NAME.jpg and NAME.txt, as webdataset; or a     FILE.txt: image,caption; Flickr's image#0<tab>
                     folder of them, or what else engine/archives.py takes
    Captioned       files on disk    Packed    members of tars and zips    Described    the generated `shapes`

Images are looked for beside the file that names them, and in the folders that COCO and Flickr have for them. Blank
captions, images without any and images that are not there are left out, named and counted.
"""

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import torch

import shapes
from engine.archives import is_archive, shards_of
from engine.images import EXTENSIONS, read_image
from engine.index import Descriptor
from engine.members import CutShort, Member, contents, images_of, members, samples, shown
from engine.sources import Shapes
from engine.task import skip
from sets.pairs import evenly

IMAGE = "image", "path", "filepath", "file_name", "filename", "image_path", "image_name"   # names of columns
TEXT = "caption", "captions", "text", "raw", "comment"


class Captioned:
    """Images on disk, by their paths."""

    def __init__(self, items):
        """items  [(where the image is, its captions)]"""
        self.items = items

    def __len__(self):
        return len(self.items)

    def captions(self, i):
        return self.items[i][1]

    def label(self, i):
        return i

    def load(self, i):
        return read_image(self.items[i][0])

    def name(self, i):
        return str(self.items[i][0])

    def digest(self):
        """Of names and captions, not of pixels."""
        return hashlib.sha1(repr([(Path(self.name(i)).name, self.captions(i)) for i in range(len(self))]).encode()
                            ).hexdigest()


class Packed(Captioned):
    """Images in tars and zips, each by its Place: read without unpacking."""

    def load(self, i):
        path, member = self.items[i][0]
        file = Descriptor(path)
        try:
            data = contents(file.number, member)
        except OSError as error:
            raise OSError(f"{self.name(i)}: {error}") from error
        return read_image(io.BytesIO(data), self.name(i))


class Place(NamedTuple):
    shard: Path
    member: Member

    def __str__(self):
        return shown(f"{self.shard}/{self.member.name}")


class Described(Shapes):
    """The generated scenes, each with the sentence that says what can be seen."""

    def __init__(self, n, seed):
        super().__init__(n, seed)
        self.said = {}

    def captions(self, i):
        if i not in self.said:
            scene = shapes.scene(int(i), self.SIDE, self.seed)
            self.images[i], self.labels[i] = torch.from_numpy(scene.image), scene.label
            self.said[i] = [scene.caption]
        return self.said[i]

    def load(self, i):
        self.captions(i)  # both come of one rendering
        return super().load(i)


def open_captions(path, limit=0, n_shapes=2000, seed=0):
    """
    path     see above    limit  images, evenly spaced; 0 = all    n_shapes, seed  of shapes
    raises   ValueError: nothing there, no image with a caption, a column that is missing
    """
    if str(path) == "shapes":
        return Described(limit or n_shapes, seed)
    path = Path(path).expanduser()
    if is_archive(path):
        return Packed(whole(path, (item for shard in shards_of(path) for item in read_shard(shard)), limit))
    if not path.exists():
        raise ValueError(f"--data: {path} does not exist; name captions as in sets/captions.py, or shapes")
    listed = path / "captions.json"
    if path.is_dir() and not listed.is_file():
        return Captioned(whole(path, read_folder(path), limit))
    file = listed if path.is_dir() else path
    if file.suffix not in READERS:
        raise ValueError(f"--data: {file} is none of {', '.join([*READERS, '.tar', '.zip'])}; nor a folder of images "
                         "and .txt")
    grouped = {}
    for image, captions in READERS[file.suffix](file):
        grouped.setdefault(image, []).extend(captions)
    return Captioned(whole(file, found(file, grouped), limit))


def whole(path, items, limit):
    """The images that have captions, blank ones dropped. Raises ValueError if there is none."""
    kept, blank, bare = [], 0, []
    for where, captions in items:
        texts = [text.strip() for text in captions if text.strip()]
        blank += len(captions) - len(texts)
        kept += [(where, texts)] if texts else []
        bare += [where] if not texts else []
    if blank:
        skip(f"{blank} empty captions of {path}", blank)
    if bare:
        skip(f"{len(bare)} images of {path} without a caption; the first: {bare[0]}", len(bare))
    if not kept:
        raise ValueError(f"--data: {path} has no image with a caption; wanted one of the layouts of sets/captions.py")
    return evenly(kept, limit)

# --------------------------------------------------------------------------------
# Layouts


def read_folder(root):
    """NAME.jpg with NAME.txt beside it"""
    for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS):
        text = path.with_suffix(".txt")
        yield path, read_text(text).splitlines() if text.is_file() else []


def read_shard(path):
    """Samples of a tar or zip: an image, and .txt with a caption a line"""
    file = Descriptor(path)
    try:
        for _, group in samples(members(path, file.number)):
            text = contents(file.number, group["txt"]).decode("utf-8", "replace") if "txt" in group else ""
            for image in images_of(group)[:1]:
                yield Place(path, image), text.splitlines()
    except CutShort as error:
        skip(f"the end of {path}, which is {error}", 1)
    except (ValueError, OSError) as error:
        raise ValueError(f"--data: {path} cannot be read: {error}; wanted a tar or a zip of NAME.jpg and NAME.txt"
                         ) from error


def read_json(path):
    """COCO's images and annotations, or a list of objects: an image, and its captions"""
    try:
        held = json.loads(read_text(path))
        if isinstance(held, list):
            return [(row[column(path, row, IMAGE)], listed(row[column(path, row, TEXT)])) for row in held]
        names = {row["id"]: row["file_name"] for row in held["images"]}
        rows = [(names[row["image_id"]], [row["caption"]]) for row in held["annotations"]]
        return [(name, []) for name in names.values()] + rows
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"--data: {path} has no captions that are understood ({error!r}); wanted COCO's images and "
                         "annotations, or a list of {image, captions}") from error


def listed(captions):
    return [captions] if isinstance(captions, str) else list(captions)


def column(path, row, names):
    """Which of a row's names is meant. Raises ValueError."""
    for name in row:
        if name.lower() in names:
            return name
    raise ValueError(f"--data: {path} has columns {', '.join(map(str, row))}; wanted one of {', '.join(names)}")


def read_table(path):
    """Commas, or tabs, below a line of names; Flickr's has none: image#0<tab>caption"""
    text = read_text(path)
    first = text.partition("\n")[0]
    if "#" in first.partition("\t")[0] and "\t" in first:
        rows = [line.partition("\t") for line in text.splitlines() if line.strip()]
        return [(name.rpartition("#")[0], [caption]) for name, _, caption in rows]
    rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if "\t" in first else "|" if "|" in first else ",",
                               skipinitialspace=True))
    return tabled(path, rows)


def tabled(path, rows):
    if not rows:
        return []
    image, text = (column(path, [name for name in rows[0] if name], names) for names in (IMAGE, TEXT))
    return [(row[image], listed(row[text] or "")) for row in rows]


def read_parquet(path):
    try:
        from pyarrow import ArrowException, parquet  # here, as few have such files
    except ImportError as error:
        raise ValueError(f"--data: pyarrow is not installed, to read {path}; pip install pyarrow") from error
    try:
        return tabled(path, parquet.read_table(path).to_pylist())
    except (ArrowException, OSError) as error:
        raise ValueError(f"--data: {path} cannot be read: {error}") from error


def read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data: {path} cannot be read: {error}; wanted captions in UTF-8") from error


READERS = {".json": read_json, ".csv": read_table, ".tsv": read_table, ".txt": read_table, ".token": read_table,
           ".parquet": read_parquet}


def found(file, grouped):
    """(path, captions) of the images that are there. Raises ValueError if none is."""
    split = file.stem.rpartition("_")[2]  # captions_val2017.json
    roots = [file.parent, *(root / name for root in (file.parent, file.parent.parent) for name in (
        split, f"images/{split}", "images", "Images", "flickr30k_images", "flickr30k-images"))]
    first = next(iter(grouped), "")
    root = next((root for root in roots if (root / first).is_file()), file.parent)
    missing = [name for name in grouped if not (root / name).is_file()]
    if missing:
        skip(f"{len(missing)} images that {file} names and that are not there; the first: {root / missing[0]}",
             len(missing))
    return [(root / name, captions) for name, captions in grouped.items() if (root / name).is_file()]
