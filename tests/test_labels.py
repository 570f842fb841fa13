"""sets/labels.py: the layouts that people have, and files that are no labels."""

import numpy as np
import pytest
from PIL import Image

from engine.metrics import IGNORE
from sets import labels
from tasks import TASKS


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def photo(seed=0, size=(40, 60)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize("task, ignore, wanted", [
    ("ade20k", 255, [IGNORE, 0, 2, IGNORE]), ("segmentation", 255, [0, 1, 3, IGNORE]),
    ("segmentation", 3, [0, 1, IGNORE, IGNORE]), ("camvid", 255, [0, 1, 3, IGNORE])])
def test_images_and_annotations(task, ignore, wanted, tmp_path):
    for split in "training", "validation":
        for name in "b", "a":
            write(tmp_path / f"images/{split}/{name}.jpg", photo())
            truth = np.repeat(np.array([0, 1, 3, 255], np.uint8), 15)[None].repeat(40, 0)
            write(tmp_path / f"annotations/{split}/{name}.png", truth)
    write(tmp_path / "images/training/alone.jpg", photo())
    train, val, n = labels.open_segmentation(TASKS[task].config(data=str(tmp_path), ignore=ignore))
    assert len(train) == len(val) == 2 and train.truth(0)[0, ::15].tolist() == wanted
    assert n == dict(ade20k=150, camvid=11).get(task, 2 if ignore == 3 else 4)


def test_cityscapes_and_voc(tmp_path):
    grey = np.zeros((40, 60), np.uint8)
    for split in "train", "val":
        write(tmp_path / f"leftImg8bit/{split}/ulm/ulm_1_leftImg8bit.png", photo())
        write(tmp_path / f"gtFine/{split}/ulm/ulm_1_gtFine_labelTrainIds.png", grey + 18)
        write(tmp_path / f"JPEGImages/{split}1.jpg", photo())
        write(tmp_path / f"SegmentationClass/{split}1.png", grey + 20)
        (tmp_path / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"ImageSets/Segmentation/{split}.txt").write_text(f"{split}1\n")
    for task, n, largest in ("cityscapes", 19, 18), ("voc", 21, 20):
        train, val, found = labels.open_segmentation(TASKS[task].config(data=str(tmp_path)))
        assert (len(train), len(val), found, train.truth(0).max()) == (1, 1, n, largest)


@pytest.mark.parametrize("task, says", [("ade20k", "has no folder images/training or images/train; ade20k wants one"),
                                        ("voc", "has no folder SegmentationClassAug or SegmentationClass"),
                                        ("nyu", "has no folder train; nyu wants one"),
                                        ("discovery", "has no folder JPEGImages/480p or JPEGImages")])
def test_other_folders_are_named(task, says, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        TASKS[task].open(TASKS[task].config(data=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_photo_is_no_annotation(tmp_path):
    write(tmp_path / "a.png", photo())
    with pytest.raises(ValueError, match="a.png has mode RGB; wanted class numbers"):
        labels.read_labels(tmp_path / "a.png", labels.Labels())
    write(tmp_path / "b.png", np.full((4, 5), 150, np.uint8))
    assert labels.read_labels(tmp_path / "b.png", labels.Labels(150, first=1)).max() == 149
    with pytest.raises(ValueError, match="b.png has label 150; wanted 150 classes from 0 on"):
        labels.read_labels(tmp_path / "b.png", labels.Labels(150))
