"""sets/things.py: what a folder without pairs is told; each image once."""

import shutil
from collections import Counter

import pytest
from test_keypoints import spair

from sets import things
from sets.things import open_pairs
from tasks import TASKS


def test_no_pairs(tmp_path):
    for name in "PairAnnotation/test", "JPEGImages":
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="has no pair of images with keypoints; see sets/things.py"):
        open_pairs(TASKS["spair"].config(data=str(tmp_path)))


def test_images_are_seen_once(tmp_path):
    point = [[10.0, 10.0]]
    c = spair(tmp_path, [("cat", (60, 40), (60, 40), [0, 0, 59, 39], point, point)] * 2)
    pairs, seen = open_pairs(c)
    assert len(pairs) == 2 and seen.names == sorted({f"cat/{x}{k}.png" for x in "ab" for k in range(2)})
    assert len(seen) == 4 and seen.image(0).shape == (3, 40, 60) and pairs[0]["box"] == 59


def test_two_hundred_pairs_of_a_class_are_drawn(tmp_path):
    """Of 203 pairs of cats and 2 of oxen; not the first, and others with another seed."""
    point = [[10.0, 10.0]]
    c = spair(tmp_path, [(kind, (60, 40), (60, 40), [0, 0, 59, 39], point, point) for kind in ("cat", "ox")])
    for path in (tmp_path / "PairAnnotation/test").glob("*.json"):
        for k in range(202 if path.stem.endswith("cat") else 1):
            shutil.copyfile(path, path.with_name(f"{k + 2:06}-{path.name[7:]}"))
    assert Counter(pair["kind"] for pair in open_pairs(c)[0]) == dict(cat=200, ox=2)


def test_sixty_videos_of_shapes(monkeypatch):
    """As many as are asked for, else 60, each by its number; what they show is left out here."""
    asked, moving = [], things.moving
    monkeypatch.setattr(things, "moving", lambda i, *args: asked.append(i) or moving(0, *args))
    for limit, wanted in (0, range(60)), (3, range(3)):
        asked.clear()
        things.shapes_pairs(TASKS["keypoints"].config(resolution=32, limit=limit))
        assert asked == list(wanted)


def test_odd_pairs_are_named(tmp_path):
    point = [[10.0, 10.0]]
    c = spair(tmp_path, [("cat", (60, 40), (60, 40), [0, 0, 59, 39], point, point)])
    (tmp_path / "JPEGImages/cat/b0.png").unlink()
    with pytest.raises(ValueError, match="PairAnnotation/test names 1 of 2 files that are not there; .*b0.png"):
        open_pairs(c)
    (path,) = (tmp_path / "PairAnnotation/test").glob("*.json")
    for text, says in ('{"category": "cat"}', "has no src_imname; wanted"), ("[", "no object of JSON: "):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            open_pairs(c)
