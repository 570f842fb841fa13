"""sets/pairs.py: files whose names agree, generated scenes, and a list's evenly spaced part."""

import numpy as np
import pytest
from PIL import Image

from sets.pairs import Pairs, Scenes, evenly, folders, images_below, others, paired
from tasks import TASKS


@pytest.mark.parametrize("n, limit, wanted", [
    (4, 0, [0, 1, 2, 3]), (4, 4, [0, 1, 2, 3]), (4, 9, [0, 1, 2, 3]), (10, 5, [0, 2, 4, 6, 8]), (10, 3, [0, 3, 6]),
    (10, 1, [0]), (7, 6, [0, 1, 2, 3, 4, 5]),
])
def test_evenly(n, limit, wanted):
    assert evenly(range(n), limit) == wanted


def test_scenes():
    scenes = Scenes(range(2), 1, 32, lambda scene: scene.semantic)
    assert scenes.image(0).shape == (3, 32, 32) and scenes.truth(1).shape == (32, 32) and len(scenes) == 2


def test_pairs_of_files(tmp_path):
    for i in range(3):
        for kind in "images", "truths"[: 6 * (i < 2)]:
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(np.full((4, 6), i, np.uint8)).save(tmp_path / kind / f"{i}.png")
    c = TASKS["depth"].config(data=str(tmp_path))
    paths = paired(c, images_below(tmp_path / "images"), images_below(folders(c, "none", "truths")), lambda p: p.stem)
    pairs = Pairs(paths, lambda path: np.asarray(Image.open(path)), crop=lambda x: x[..., 1:3, :2])
    assert [pairs.truth(i).tolist() for i in range(len(pairs))] == [[[i] * 2] * 2 for i in range(2)]
    assert pairs.image(1).shape == (3, 2, 2)
    for wrong, says in ((lambda: folders(c, "x", "y"), "has no folder x or y; depth wants one"),
                        (lambda: paired(c, [tmp_path / "a.png"], [], str), "has no image with a truth of the same")):
        with pytest.raises(ValueError, match=says):
            wrong()


def test_the_control_trains_with_anothers_truth():
    c = TASKS["depth"].config
    assert others(9, c()).tolist() == list(range(9)) != others(9, c(control=True)).tolist()
    assert sorted(others(9, c(control=True))) == list(range(9))
