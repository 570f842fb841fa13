"""sets/panoptics.py: COCO as downloaded, and files that are not it."""

import json

import numpy as np
import pytest
from PIL import Image

from sets import panoptics
from tasks import TASKS

CATEGORIES = [dict(id=7, name="cat", isthing=1), dict(id=90, name="sky", isthing=0), dict(id=3, name="dog", isthing=1)]


def coco(root, change=lambda split, notes: None, size=(6, 8)):
    """Two images a split: the upper half sky, below a dog, a cat, another cat, a crowd of cats, and void"""
    for split in "train", "val":
        for folder in f"{split}2017", f"panoptic_{split}2017", "annotations":
            (root / folder).mkdir(parents=True, exist_ok=True)
        notes = dict(categories=CATEGORIES, images=[], annotations=[])
        for i in range(2):
            Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(root / f"{split}2017/{i}.jpg")
            numbers = np.zeros(size, np.int64)
            numbers[:3] = 70000
            for k, number in enumerate((5, 300, 301, 302)):
                numbers[3:, k] = number
            rgb = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], 2).astype(np.uint8)
            Image.fromarray(rgb).save(root / f"panoptic_{split}2017/{i}.png")
            notes["images"].append(dict(id=i, file_name=f"{i}.jpg"))
            notes["annotations"].append(dict(image_id=i, file_name=f"{i}.png", segments_info=[
                dict(id=number, category_id=category, iscrowd=crowd) for number, category, crowd in
                ((70000, 90, 0), (5, 3, 0), (300, 7, 0), (301, 7, 0), (302, 7, 1))]))
        change(split, notes)
        (root / f"annotations/panoptic_{split}2017.json").write_text(json.dumps(notes))
    return TASKS["panoptic"].config(data=str(root), workers=0)


def test_coco(tmp_path):
    train, val, form = panoptics.open_panoptic(coco(tmp_path))
    assert form.names == ("dog", "cat", "sky") and form.stuff == {2} and len(train) == len(val) == 2
    assert train.truth(0)[0].tolist() == [2000] * 8
    assert train.truth(1)[4].tolist() == [0, 1000, 1001, 1999] + [255000] * 4


def test_shapes():
    c = TASKS["panoptic"].config(limit=2, resolution=64)
    train, _, form = panoptics.open_panoptic(c)
    truth = train.truth(0)
    assert truth.shape == (64, 64) and len(form.names) == 13 and form.stuff == {0}
    numbers = {code % 1000: code // 1000 for code in np.unique(truth).tolist()}
    assert numbers[0] == 0 and len(numbers) > 1 and all(0 < label < 13 for k, label in numbers.items() if k)


def without_the_dog(split, notes):
    for each in notes["annotations"]:
        del each["segments_info"][1]


def other_names(split, notes):
    notes["categories"] = [each | dict(name=each["name"] + split) for each in CATEGORIES]


def nothing(split, notes):
    for each in notes["annotations"]:
        each["segments_info"] = [part | dict(category_id=1000) for part in each["segments_info"]]


@pytest.mark.parametrize("change, says", [
    (without_the_dog, r"0.png has a segment 5 that its annotation does not list"),
    (other_names, "train and val of .* list other categories"),
    (nothing, "panoptic_train2017.json is not COCO's: KeyError 1000"),
    (lambda split, notes: notes.pop("images"), "is not COCO's: KeyError 'images'"),
    (lambda split, notes: notes.update(categories=CATEGORIES * 2), "has 6 categories; wanted at most 254, an id each"),
    (lambda split, notes: notes["images"][0].update(file_name="9.jpg"), "names 1 of 2 files that are not there"),
])
def test_files_that_are_not_coco_s(tmp_path, change, says):
    with pytest.raises(ValueError, match=says) as error:
        panoptics.open_panoptic(coco(tmp_path, change))
    assert "\n" not in str(error.value)


def test_masks_of_another_size_mode_or_void_alone(tmp_path):
    with pytest.raises(ValueError, match="0.png has 10x6 pixels, its image 8x6"):
        panoptics.open_panoptic(coco(tmp_path / "a", size=(6, 10)))
    c = coco(tmp_path / "b")
    for split in "train", "val":
        for i in range(2):
            Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / f"b/panoptic_{split}2017/{i}.png")
    with pytest.raises(ValueError, match="no segment of .*0.png and the others is known"):
        panoptics.open_panoptic(c)
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / "b/panoptic_train2017/0.png")
    with pytest.raises(ValueError, match="0.png has mode L; wanted RGB, numbers of segments"):
        panoptics.open_panoptic(c)
    with pytest.raises(ValueError, match="has no folder train2017 or images/train2017"):
        panoptics.open_panoptic(TASKS["panoptic"].config(data=str(tmp_path), workers=0))
