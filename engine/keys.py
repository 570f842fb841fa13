"""
What files of features are named after: all that they depend on, hashed. A photo that is replaced, another network,
another version of the code: other files. What is not in the key is never on disk: labels of classes.

    weights_of   every bit of the parameters        files_of   paths, sizes and times of what --data and lists name
    code_of      the modules that something is made with, their constants included
"""

import ast
import hashlib
import os
import sys
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import torch

from engine.names import read_list

ROOT = Path(__file__).parents[1]
PART = 1 << 26       # bytes that leave the device at a time


def weights_of(model):
    """Streamed: 64 MiB are on the host at a time."""
    digest = hashlib.sha256(repr(getattr(model, "config", "")).encode())
    for name, x in model.state_dict().items():
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        for part in x.detach().contiguous().flatten().view(torch.uint8).split(PART):
            digest.update(part.cpu().numpy())
    return digest.hexdigest()


def files_of(c):
    """Of every file below --data and --tests its path, size and time; not of what lies in --cache or --out."""
    digest = hashlib.sha256()
    written = {os.path.realpath(path) for path in (c.cache, getattr(c, "out", "")) if path}
    tests = getattr(c, "tests", "")
    for root in [c.data, *(tests.split(",") if tests else [])]:
        root = root if os.path.exists(root) else root.partition(":")[2]                        # pets:DOWNLOADS
        if os.path.isfile(root):
            digest.update(line_of(root, root))
        for folder, below, files in os.walk(root, followlinks=True) if root else ():
            below[:] = sorted(name for name in below if os.path.realpath(os.path.join(folder, name)) not in written)
            for name in sorted(files):
                path = os.path.join(folder, name)
                digest.update(line_of(path, os.path.relpath(path, root)))
        for path in (Path(root, split + suffix) for split in ("train", "val") for suffix in (".csv", ".parquet")):
            with suppress(ValueError):  # a table of another kind, that is no list of images
                for name in read_list(path) if root and path.is_file() else ():
                    digest.update(line_of(path.parent / name, name))
    return digest.hexdigest()


def line_of(path, name):
    if not os.path.exists(path):
        return f"{name} is a link to nothing\n".encode()
    found = os.stat(path)
    return f"{name} {found.st_size} {found.st_mtime_ns}\n".encode()


def code_of(*things):
    """Of the files that functions, objects' types lie in, and of all of ours that these import; comments are free."""
    modules = (sys.modules.get(module_of(thing)) for thing in things)
    seen, waiting = {}, {Path(file) for module in modules if (file := getattr(module, "__file__", None))}
    while waiting:
        path = waiting.pop()
        if path not in seen and ROOT in path.parents and path.suffix == ".py" and "site-packages" not in path.parts:
            seen[path], imported = parsed(path, os.stat(path).st_mtime_ns)
            waiting |= imported
    found = sorted((str(path.relative_to(ROOT)), digest) for path, digest in seen.items())
    return hashlib.sha256(repr(found).encode()).hexdigest()


def module_of(thing):
    while isinstance(thing, partial):
        thing = thing.func
    return getattr(thing, "__module__", None) or type(thing).__module__


@lru_cache
def parsed(path, time):
    """A file's digest, and our files that it imports, at its top or when it needs them."""
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {ROOT.joinpath(*name.split("."), *end).with_suffix(".py") for name in names for end in ((), ("__init__",))}
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), {file for file in files if file.is_file()}
