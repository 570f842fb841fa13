"""engine/keys.py: what code features depend on; weights and files: test_features.py."""

import importlib
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from engine import keys
from engine.views import fitted
from model import SIZES, ViT
from sets.pairs import Scenes


def test_cache_knows_the_code(tmp_path, monkeypatch):
    """Another constant in what makes an image is another file; another comment is not."""
    (tmp_path / "made_by_test.py").write_text("SIDE = 32\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(keys, "ROOT", tmp_path)
    module = importlib.import_module("made_by_test")
    digests = []
    for text in "SIDE = 32\n", "SIDE = 32  # pixels\n", "SIDE = 33\n":
        Path(module.__file__).write_text(text)
        keys.parsed.cache_clear()
        digests.append(keys.code_of(SimpleNamespace(__module__="made_by_test")))
    assert digests[0] == digests[1] != digests[2]


def test_a_photo_of_a_list_may_lie_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/train.csv").write_text("path,label\n../a.jpg,a\n")
    (tmp_path / "lists/val.csv").write_text("of another kind\n")
    c, digests = SimpleNamespace(data=str(tmp_path / "lists"), cache=""), []
    for text in "a photo", "a photo", "another photo":
        (tmp_path / "a.jpg").write_text(text)
        os.utime(tmp_path / "a.jpg", (1e9, 1e9))
        digests.append(keys.files_of(c))
    assert digests[0] == digests[1] != digests[2]


def test_what_is_imported_when_it_is_needed_counts_before_it_is(tmp_path, monkeypatch):
    (tmp_path / "made_now.py").write_text("def f():\n    from made_later import SIDE\n    return SIDE\n")
    (tmp_path / "made_later.py").write_text("SIDE = 32\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(keys, "ROOT", tmp_path)
    module = importlib.import_module("made_now")
    before = keys.code_of(module.f)
    assert module.f() == 32 and keys.code_of(module.f) == before
    (tmp_path / "made_later.py").write_text("SIDE = 33\n")
    keys.parsed.cache_clear()
    assert keys.code_of(module.f) != before


def test_the_code_of_features_is_that_of_images_views_and_networks(monkeypatch):
    seen, parsed = [], keys.parsed
    monkeypatch.setattr(keys, "parsed", lambda path, time: seen.append(Path(path).name) or parsed(path, time))
    keys.code_of(partial(fitted, side=3), Scenes(range(1), 0, 32, None), ViT(SIZES["tiny"]))
    assert {"views.py", "pairs.py", "shapes.py", "data.py", "model.py", "ops.py"} <= set(seen)
