"""sets/things.py: what a folder without pairs is told; each image once."""

import pytest
from test_keypoints import spair

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
    pairs, things = open_pairs(c)
    assert len(pairs) == 2 and things.names == sorted({f"cat/{x}{k}.png" for x in "ab" for k in range(2)})
    assert len(things) == 4 and things.image(0).shape == (3, 40, 60) and pairs[0]["box"] == 59


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
