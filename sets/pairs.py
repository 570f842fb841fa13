"""
Images with their truth, the form that all sets of dense tasks take: len, image(i) -> C H W uint8, truth(i) -> array.

    Pairs     files: lists and folders of images and truths
    Scenes    the generated `shapes`

and what finds files: evenly, folders, lines, keyed, paired, there, images_below; verified looks into all of them.
"""

from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import shapes
from data import loader
from engine.chunks import Computed
from engine.images import EXTENSIONS, read_image, tiff_tags
from engine.task import skip

GENERATED = 400, 100    # shapes: scenes to train on, scenes to measure on
FEW = 200               # files that are looked into by this process: to start others takes longer


class Pairs:
    """Files: (image, truth) paths, and what reads a truth.    photo  what makes an image of a file"""

    def __init__(self, paths, read, crop=None, photo=read_image):
        self.paths, self.read, self.crop, self.photo = paths, read, crop, photo

    def __len__(self):
        return len(self.paths)

    def image(self, i):
        return self.cut(self.photo(self.paths[i][0]))

    def truth(self, i):
        return self.cut(self.read(self.paths[i][1]))

    def cut(self, array):
        return self.crop(array) if self.crop else array


class Scenes:
    """Generated scenes of one seed, by their numbers, and which part of each is the truth."""

    def __init__(self, numbers, seed, side, read):
        self.numbers, self.seed, self.side, self.read = numbers, seed, side, read

    def __len__(self):
        return len(self.numbers)

    def image(self, i):
        return torch.from_numpy(scene(self.numbers[i], self.side, self.seed).image).permute(2, 0, 1)

    def truth(self, i):
        return self.read(scene(self.numbers[i], self.side, self.seed))


@lru_cache(maxsize=64)
def scene(i, side, seed):
    return shapes.scene(i, side, seed)


def generated(c, read):
    """Scenes to train on and scenes to measure on, as large as the network sees them."""
    counts = (c.limit, c.limit) if c.limit else GENERATED
    return [Scenes(range(n), seed, c.resolution, read) for n, seed in zip(counts, (1000, 1001), strict=True)]


def evenly(items, limit):
    """All of a list, or `limit` of them, evenly spaced, so that what is sorted by class stays balanced."""
    n = len(items)
    return list(items) if not limit or limit >= n else [items[i * n // limit] for i in range(limit)]


def folders(c, *names):
    """The first of the sub-folders that is there; otherwise says which were looked for."""
    found = [Path(c.data, name) for name in names if Path(c.data, name).is_dir()]
    if not found:
        raise ValueError(f"--data: {c.data} has no folder {' or '.join(names)}; {c.task} wants one")
    return found[0]


def lines(path, what):
    """The lines of a list, without empty ones; raises ValueError if it cannot be read, or has none."""
    try:
        found = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data: {path} cannot be read ({error}); wanted lines of {what}") from error
    if not found:
        raise ValueError(f"--data: {path} is empty; wanted lines of {what}")
    return found


def below(root):
    """The key of files of a folder: where they lie in it, without the suffix."""
    return lambda path: path.relative_to(root).with_suffix("")


def keyed(paths, key):
    """{key: path}; raises ValueError for two of one key: either could be meant."""
    found = {}
    for path in sorted(paths):
        if found.setdefault(key(path), path) != path:
            raise ValueError(f"--data: {found[key(path)]} and {path} have one name; leave one of them out")
    return found


def paired(c, images, truths):
    """{name: path} twice -> (image, truth) of each name that both have; the others are skipped. Raises ValueError."""
    paths = [(images[name], truths[name]) for name in sorted(images) if name in truths]
    if not paths:
        raise ValueError(f"--data: {c.data} has no image with a truth of the same name; {c.task} wants pairs of files")
    for one, other, what in (images, truths, "images without a truth"), (truths, images, "truths without an image"):
        if alone := sorted(str(one[name]) for name in one if name not in other):
            skip(f"{len(alone)} {what}; the first: {alone[0]}", len(alone))
    return evenly(paths, c.limit)


def there(paths, listed):
    """The paths, all of which are files; raises ValueError.    listed  what names them"""
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise ValueError(f"--data: {listed} names {len(missing)} of {len(paths)} files that are not there; the first: "
                         f"{missing[0]}" if missing else f"--data: {listed} names no file")
    return paths


def upright(path):
    """H W of an image as `read_image` has it, off its header; of a TIFF of any channels"""
    with open(path, "rb") as file:
        tags = tiff_tags(file)
    if {256, 257} <= tags.keys():
        return (tags[256], tags[257]) if tags.get(274, 1) > 4 else (tags[257], tags[256])
    with Image.open(path) as file:
        width, height = file.size
        return (width, height) if file.getexif().get(0x0112, 1) > 4 else (height, width)  # the EXIF tag Orientation


def looked_into(paths, read, note):
    """What to note of a truth. Raises ValueError if it cannot be read, or is not as large as its image."""
    image, path = paths
    try:
        truth, size = read(path), upright(image)
    except (OSError, SyntaxError) as error:  # the latter is Pillow's word for a broken PNG
        raise ValueError(f"--data: {image} or {path} cannot be read: {error}") from error
    return note(truth, size, path)


def alike(truth, size, path):
    if truth.shape != size:
        (H, W), (h, w) = size, truth.shape
        raise ValueError(f"--data: {path} has {w}x{h} pixels, its image {W}x{H}; wanted the image's, turned as it is")


def verified(c, pairs, note):
    """
    What to note of all truths, each of which is looked into before any weights are loaded: the first that is wrong
    raises ValueError.    note  (truth, H W of its image, path) -> what to note; raises ValueError
    """
    look = Computed(partial(looked_into, read=pairs.read, note=note))
    stream, noted = loader(look, pairs.paths, c.workers if len(pairs) > FEW else 0), []
    for found in tqdm(stream, "looking into", len(pairs), unit="img", leave=False, disable=None):
        if isinstance(found, Exception):
            raise ValueError(str(found)) from found
        noted.append(found)
    return noted


def images_below(folder):
    return [path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS]


def others(n, c):
    """Whose truth each of n images is trained with: its own, or under --control another's."""
    return np.random.default_rng(c.seed).permutation(n) if c.control else np.arange(n)
