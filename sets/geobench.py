"""
GEO-Bench, version 1, as it unpacks: twelve sets of small satellite images, with a class, classes, or a class a pixel.

    {classification,segmentation}_v1.0/m-NAME/    SAMPLE.hdf5 each, default_partition.json: names of train, valid and
                                                  test, band_stats.json: least and most of each band

    open_geobench   the three splits of one of them
    Samples         load(i), image(i) -> C H W float32, from the least of each band, 0, to the most, 1; truth(i) -> what
                    is in it: a class, n_classes of 0 and 1, or H W
    unpickled       what a sample says beside its bands: nothing of a file is ever executed

A band is called "04 - Red", "Red", or that and a date. The label is a band of that name, or in the attribute `pickle`.
"""

import ast
import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.metrics import IGNORE
from sets.pairs import evenly

SPLITS = "train", "valid", "test"


@dataclass(frozen=True)
class Form:
    n_classes: int
    counts: tuple              # images of the splits, in the whole set
    kind: str = "class"        # classes: any number of them; pixels: one for each
    first: int = 0             # label of class 0; what lies below it is ignored


CLASSIFICATION = {
    "m-bigearthnet": Form(43, (20000, 1000, 1000), "classes"), "m-so2sat": Form(17, (19992, 986, 986)),
    "m-brick-kiln": Form(2, (15063, 999, 999)), "m-forestnet": Form(12, (6464, 989, 993)),
    "m-eurosat": Form(10, (2000, 1000, 1000)), "m-pv4ger": Form(2, (11814, 999, 999))}
SEGMENTATION = {name: Form(n, counts, "pixels", first) for name, n, counts, first in (
    ("m-pv4ger-seg", 2, (3000, 403, 403), 0), ("m-chesapeake", 7, (3000, 1000, 1000), 0),
    ("m-cashew-plant", 6, (1350, 400, 50), 1),  # seven, the first of which, background, does not count
    ("m-SA-crop-type", 10, (3000, 1000, 1000), 0), ("m-nz-cattle", 2, (524, 66, 65), 0),
    ("m-NeonTree", 2, (270, 94, 93), 0))}

# --------------------------------------------------------------------------------
# Pickles


class Opaque:
    """Stands for an object of a class that is not here: it is made, and nothing is done with it."""

    def __init__(self, *args, **more):
        pass

    def __setstate__(self, state):
        pass


class Restricted(pickle.Unpickler):
    """Arrays, numbers, dates; of the libraries that wrote the samples empty objects; anything else is refused."""
    plain = {("collections", "OrderedDict"), ("datetime", "date"), ("datetime", "datetime"), ("datetime", "timedelta"),
             ("datetime", "timezone"), ("builtins", "set"), ("builtins", "slice"), ("numpy", "ndarray"),
             ("numpy", "dtype")} | {(f"numpy.{core}.multiarray", name) for core in ("core", "_core")
                                    for name in ("_reconstruct", "scalar")} | {
             (f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
    foreign = "geobench", "ccb", "rasterio", "affine", "pyproj", "shapely"

    def find_class(self, module, name):
        if (module, name) in self.plain:
            return super().find_class(module, name)
        if module.partition(".")[0] in self.foreign:
            return Opaque
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no sample needs")


def unpickled(data):
    """bytes -> what they say. Raises ValueError for what is refused, or broken."""
    try:
        return Restricted(io.BytesIO(data)).load()
    except Exception as error:  # foreign bytes fail in many ways; all mean: unreadable
        raise ValueError(f"its pickle is refused: {error}") from error

# --------------------------------------------------------------------------------
# Samples


def plain_name(key):
    """"04 - Red_2017-06-13" -> "red\""""
    return key.partition("_")[0].rpartition(" - ")[2].strip().lower()


def bands_of(keys, wanted, path):
    """The keys of the bands that are called so. Raises ValueError for one that is not there, or is there twice."""
    found = [[key for key in keys if name.strip().lower() in (plain_name(key), key.partition("_")[0].lower())]
             for name in wanted]
    wrong = next((name for name, each in zip(wanted, found, strict=True) if len(each) != 1), None)
    if wrong is not None:
        raise ValueError(f"--data: {path} has no single band {wrong}; it has {', '.join(sorted(keys))}: --channels")
    return [key for (key,) in found]


class Samples:
    """
    paths   of HDF5 files    form  of the set    channels  names of bands
    ends    {name of a band: (least, most)}
    """

    def __init__(self, paths, form, channels, ends):
        self.paths, self.form, self.channels, self.ends = paths, form, channels, ends
        self.classes = [str(k) for k in range(form.n_classes)]

    def __len__(self):
        return len(self.paths)

    def opened(self, i):
        try:
            return library().File(self.paths[i], "r")
        except OSError as error:
            raise ValueError(f"--data: {self.paths[i]} cannot be read ({error}); wanted HDF5") from error

    def load(self, i):
        with self.opened(i) as file:
            keys = bands_of([key for key in file if plain_name(key) != "label"], self.channels, self.paths[i])
            x = np.stack([np.squeeze(file[key][()]).astype(np.float32) for key in keys])
        if x.ndim != 3 or not np.isfinite(x).all():
            raise ValueError(f"--data: {self.paths[i]} has bands {x.shape[1:]}, or values that are none; wanted "
                             "numbers, H W of each")
        low, top = (np.array([self.ends[name.strip().lower()][k] for name in self.channels], np.float32)[:, None, None]
                    for k in (0, 1))
        return torch.from_numpy(((x - low) / np.maximum(top - low, 1e-30)).clip(0, 1))

    image = load

    def stored(self, i):
        """The label, as it is kept"""
        with self.opened(i) as file:
            key = next((key for key in file if plain_name(key) == "label"), None)
            if key is not None:
                return np.squeeze(file[key][()])
            try:
                said = file.attrs["pickle"]
                said = said if isinstance(said, bytes) else ast.literal_eval(str(said))
                return np.asarray(unpickled(bytes(said))["label"])
            except (KeyError, TypeError, SyntaxError, ValueError) as error:
                raise ValueError(f"--data: {self.paths[i]} has no label that can be read: {error}") from error

    def truth(self, i):
        """int64, n_classes float32, or H W uint8, 255 where nothing counts. Raises ValueError for another form's."""
        found, n, first = self.stored(i), self.form.n_classes, self.form.first
        if self.form.kind == "pixels" and found.ndim == 2:
            out = (found < first) | (found == IGNORE)
            if found[~out].max(initial=0) < first + n:
                return np.where(out, IGNORE, found - first).astype(np.uint8)
        if self.form.kind == "class" and not found.ndim and 0 <= found < n:
            return found.astype(np.int64)
        if self.form.kind == "classes" and found.shape == (n,) and np.isin(found, (0, 1)).all():
            return found.astype(np.float32)
        wanted = dict(classes=f"{n} of 0 and 1", pixels=f"H W of {n} classes from {first} on").get(
            self.form.kind, f"one of {n} classes")
        raise ValueError(f"--data: {self.paths[i]} has a label {found.shape} up to {found.max(initial=0)}; wanted "
                         f"{wanted}")

    def label(self, i):
        """Its row: what is in it `truth` says"""
        return i

    def name(self, i):
        return str(self.paths[i])


def library():
    try:
        import h5py
    except ImportError as error:
        raise ValueError("--data: GEO-Bench wants h5py, which is not installed; pip install -e .[geo]") from error
    return h5py


def read_json(path, what):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--data: {path} cannot be read ({error}); wanted {what}") from error


def open_geobench(c, forms):
    """The name of the set, and its splits: Samples of train, valid and test. Raises ValueError."""
    library()
    root, name = Path(c.data), Path(c.data).name
    if name not in forms:
        raise ValueError(f"--data: {root} is called none of {', '.join(forms)}; name the folder of one of these sets")
    channels = c.channels.split(",")
    stats = read_json(root / "band_stats.json", "the least and the most of each band")
    keys = bands_of([key for key in stats if plain_name(key) != "label"], channels, root / "band_stats.json")
    try:
        ends = {each.strip().lower(): (float(stats[key]["min"]), float(stats[key]["max"]))
                for each, key in zip(channels, keys, strict=True)}
        named = {split: read_json(root / "default_partition.json", "names of train, valid and test")[split]
                 for split in SPLITS}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--data: {root}: its lists of bands or of splits have no {error}; wanted them as "
                         "downloaded") from error
    counts = tuple(len(each) for each in named.values())
    if counts != forms[name].counts:
        print(f"{root} has {counts} images to train on, to pick by, to measure on; the published {name} "
              f"{forms[name].counts}")
    return name, [Samples(there(root, evenly(named[split], c.limit), split), forms[name], channels, ends)
                  for split in SPLITS]


def there(root, names, split):
    """The files of a split. Raises ValueError if one is missing."""
    paths = [root / f"{str(name).removesuffix('.hdf5')}.hdf5" for name in names]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing or not paths:
        raise ValueError(f"--data: {missing or split} is missing in {root}; wanted all of default_partition.json")
    return paths
