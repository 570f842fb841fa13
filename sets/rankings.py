"""
Sets of instances to rank: which image is another's, as the sets are downloaded.

    revisited     Oxford, Paris: gnd_*.pkl, jpg/                     Radenovic et al. 2018
    amstertime    new/, old/: pairs of the same stem
    met           ground_truth/{MET_database,valset,testset}.json, images/    Ypsilantis et al. 2021
"""

import json
import pickle
from pathlib import Path

import numpy as np

from engine.task import skip
from sets.classes import Files
from sets.pairs import below, evenly, images_below, keyed, there

# --------------------------------------------------------------------------------
# A pickle from elsewhere: stand-ins for all that it may name, so that nothing is run and no memory is forged


class Kind:
    """numpy.dtype, of plain numbers alone"""
    def __init__(self, code, *_):
        if code not in ("i4", "i8", "f4", "f8"):
            raise ValueError(f"holds an array of {str(code)[:20]!r}; it should hold numbers alone: i4, i8, f4, f8")
        self.code = code

    def __setstate__(self, state):
        self.code = {">": ">"}.get(state[1], "<") + self.code

    def numbers(self, data, shape, order="C"):
        data = data.encode("latin1") if isinstance(data, str) else bytes(data)
        return np.frombuffer(data, self.code).reshape(shape, order="F" if order == "F" else "C")


class Array:
    """numpy.ndarray; its values once its state has come"""
    values = None

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        _, shape, kind, fortran, data = state
        self.values = kind.numbers(data, shape, "F" if fortran else "C")

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


GROUPS = "easy", "hard", "junk"
STAND_INS = dict(ndarray=Array, dtype=Kind, _reconstruct=Array, scalar=lambda kind, data: kind.numbers(data, ())[()],
                 _frombuffer=lambda data, kind, shape, order: kind.numbers(data, shape, order))


class Plain(pickle.Unpickler):
    """Reads lists, numbers and arrays of numbers, and runs nothing."""

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in STAND_INS:
            return STAND_INS[name]
        if (module, name) == ("_codecs", "encode"):
            return lambda text, codec: text.encode("latin1")
        if (module, name) == ("__builtin__", "bytes"):  # an empty array's, of protocol 2
            return lambda: b""
        raise ValueError(f"wants to run {module}.{name}; it should hold lists and numbers alone")


def revisited(root):
    """queries, images: Files;  truths: for each query {easy, hard, junk: images}.  Raises ValueError."""
    files = sorted(root.glob("gnd_*.pkl"))
    if len(files) > 1:
        raise ValueError(f"--data: {root} has {files[0].name} and {files[1].name}; give each set a folder of its own")
    try:
        with files[0].open("rb") as file:
            found = Plain(file, encoding="latin1").load()
        queries, images = ([str(name) for name in found[key]] for key in ("qimlist", "imlist"))
        truths = [{name: np.ravel(each[name]).astype(int) for name in GROUPS} for each in found["gnd"]]
    except Exception as error:  # forged bytes fail in any way; all mean: not to be used
        raise ValueError(f"--data: {files[0]} cannot be used: {type(error).__name__} {error}; wanted qimlist, imlist, "
                         "and gnd with easy, hard and junk") from error
    n, named = len(images), np.concatenate([k for each in truths for k in each.values()])
    if len(truths) != len(queries) or (named < 0).any() or (named >= n).any():
        raise ValueError(f"--data: {files[0]} has {len(queries)} queries, {len(truths)} truths and {n} images; wanted "
                         "a truth for each query, which names images by their place in imlist")
    if not any(len(each["easy"]) + len(each["hard"]) for each in truths):
        raise ValueError(f"--data: {files[0]} has no easy or hard image of any query; wanted what is to be found")
    paths = ([root / "jpg" / f"{name}.jpg" for name in names] for names in (queries, images))
    return *(Files(there(each, files[0])) for each in paths), truths

# --------------------------------------------------------------------------------
# Folders and lists


def amstertime(root):
    """new, old: Files, pair by pair"""
    new, old = (keyed(images_below(root / name), below(root / name)) for name in ("new", "old"))
    pairs = list(zip(*((new[name], old[name]) for name in sorted(new) if name in old), strict=True))
    if not pairs:
        raise ValueError(f"--data: new/ and old/ of {root} have no two images of one name; wanted AmsterTime's pairs")
    if alone := sorted(str(new.get(name, old.get(name))) for name in new.keys() ^ old.keys()):
        skip(f"{len(alone)} images that are in one of new/ and old/ only; the first: {alone[0]}", len(alone))
    return [Files(list(paths)) for paths in pairs]


def met_lists(root):
    """The folder of Met's lists, as it is downloaded ground_truth/ beside images/; None if it is not Met's"""
    folders = Path(root), Path(root, "ground_truth")
    return next((folder for folder in folders if (folder / "MET_database.json").is_file()), None)


def met(c):
    """database, val, test: each Files and the exhibits' numbers, -1 = of no exhibit.  Raises ValueError."""
    root, found = met_lists(c.data), []
    if not root:
        raise ValueError(f"--data: {c.data} has no MET_database.json, nor has its ground_truth/; {c.task} wants it, "
                         "valset.json, testset.json and images/")
    for name in ("MET_database", "valset", "testset"):
        path = root / f"{name}.json"
        try:
            rows = evenly(json.loads(path.read_text()), c.limit)
            ids = [row.get("MET_id", row.get("id")) for row in rows]
            ids, images = [-1 if k is None else int(k) for k in ids], [row["path"] for row in rows]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--data: {path} cannot be used: {type(error).__name__} {error}; wanted a list of objects "
                             "with path, and id or MET_id") from error
        found.append((Files(there([Path(c.data, "images", image) for image in images], path)), ids))
    if not any(k >= 0 for k in found[2][1]):
        raise ValueError(f"--data: testset.json of {c.data} has no query of an exhibit; wanted some with MET_id")
    return found


def shuffled(items, c):
    """A list as it is, or under --control in another order."""
    items = list(items)
    return [items[i] for i in np.random.default_rng(c.seed).permutation(len(items))] if c.control else items
