"""The page's pieces; what it shows of a whole curation: test_curate.py."""

from types import SimpleNamespace

import torch

from engine import pile


def load(i):
    if i == 1:
        raise OSError("gone")
    return torch.zeros(3, 20, 40, dtype=torch.uint8)


def test_a_thumbnail_says_its_name_and_whether_it_was_kept():
    some = SimpleNamespace(load=load, name=lambda i: f'"{i}"<.png')
    kept, not_kept, gone = pile.thumbnail(some, 0, True), pile.thumbnail(some, 0, False), pile.thumbnail(some, 1, True)
    assert "class=kept" in kept and "class=kept" not in not_kept and "&quot;0&quot;&lt;.png" in kept
    assert gone == "<small>&quot;1&quot;&lt;.png</small>"
