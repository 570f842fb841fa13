"""sets/depths.py: folders and lists, crops, the pixels that count."""

import numpy as np
import pytest
from test_labels import photo, write

from sets import depths
from tasks import TASKS


@pytest.mark.parametrize("task, rows, cols", [("nyu", (45, 471), (41, 601)), ("depth", (0, 480), (0, 640))])
def test_scored_pixels(task, rows, cols):
    truth = np.full((480, 640), 3, np.float32)
    truth[100, 100], truth[101, 101] = 0, 10
    found = depths.scored_pixels(truth, depths.SETS[task]).numpy()
    exact = np.zeros((480, 640), bool)
    exact[slice(*rows), slice(*cols)] = True
    exact[100, 100] = exact[101, 101] = False
    np.testing.assert_array_equal(found, exact)


def test_folder_and_lists(tmp_path):
    folder, lists = tmp_path / "folder", tmp_path / "lists"
    for split in "train", "test":
        for i in 3, 1:
            write(folder / split / f"rgb_{i}.jpg", photo())
            write(folder / split / f"depth_{i}.png", np.full((40, 60), 1000 * i, np.uint16))
        write(lists / "input/day/0.jpg", photo(0, (400, 1300)))
        write(lists / "gt_depth/drive/0.png", np.full((400, 1300), 512, np.uint16))
        (lists / f"kitti_eigen_{split}.txt").write_text("day/0.jpg drive/0.png 721.5\nday/1.jpg None 721.5\n")
    train, val, form = depths.open_depth(TASKS["nyu"].config(data=str(folder)))
    assert [train.truth(i)[0, 0] for i in (0, 1)] == [1, 3] and len(val) == 2 and form.top == 10
    train, val, form = depths.open_depth(TASKS["kitti"].config(data=str(lists)))
    assert len(train) == len(val) == 1 and form.top == 80
    assert train.truth(0).shape == (352, 1216) and train.image(0).shape == (3, 352, 1216) and train.truth(0).max() == 2


def test_lower_middle_is_kittis_crop():
    array = np.arange(375 * 1242).reshape(375, 1242)
    np.testing.assert_array_equal(depths.lower_middle(array, (352, 1216)), array[23:, 13:1229])
