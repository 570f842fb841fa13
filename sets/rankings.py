"""
Sets of instances to rank: which image is another's, as the sets are downloaded.

    revisited     Oxford, Paris: gnd_*.pkl, jpg/                     Radenovic et al. 2018
    amstertime    new/, old/: pairs of the same stem
    met           MET_database.json, valset.json, testset.json, images/       Ypsilantis et al. 2021
"""

import json
import pickle
from pathlib import Path

import numpy as np

from sets.classes import Files
from sets.pairs import evenly, images_below


class Plain(pickle.Unpickler):
    """Reads lists, numbers and arrays, and runs nothing: a gnd_*.pkl comes from elsewhere."""

    def find_class(self, module, name):
        array = name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")
        if array and module.split(".")[0] == "numpy" or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise ValueError(f"--data: gnd_*.pkl wants to run {module}.{name}; it should hold lists and numbers alone")


def revisited(root):
    """queries, images: Files;  truths: for each query {easy, hard, junk: images}"""
    with sorted(root.glob("gnd_*.pkl"))[0].open("rb") as file:
        truth = Plain(file, encoding="latin1").load()
    names = [[root / "jpg" / f"{name}.jpg" for name in truth[key]] for key in ("qimlist", "imlist")]
    return *map(Files, names), truth["gnd"]


def amstertime(root):
    """new, old: Files, pair by pair"""
    old = {path.stem: path for path in images_below(root / "old")}
    new = {path.stem: path for path in images_below(root / "new") if path.stem in old}
    return [Files([files[name] for name in sorted(new)]) for files in (new, old)]


def is_met(root):
    return (Path(root) / "MET_database.json").is_file()


def met(c):
    """database, val, test: each Files and the exhibits' numbers, -1 = of no exhibit"""
    root, found = Path(c.data), []
    if not is_met(root):
        raise ValueError(f"--data: {root} has no MET_database.json; {c.task} wants it, valset.json, testset.json and "
                         "images/")
    for name in ("MET_database", "valset", "testset"):
        rows = evenly(json.loads((root / f"{name}.json").read_text()), c.limit)
        ids = [row.get("MET_id", row.get("id", -1)) for row in rows]
        ids = [-1 if k is None else int(k) for k in ids]
        found.append((Files([root / "images" / row["path"] for row in rows]), ids))
    return found


def shuffled(items, c):
    """A list as it is, or under --control in another order."""
    items = list(items)
    return [items[i] for i in np.random.default_rng(c.seed).permutation(len(items))] if c.control else items
