"""sets/boxes.py: VOC's and DAVIS's boxes, and the scenes whose objects are small."""

import json

import numpy as np
import pytest
from test_labels import photo, write

import evaluate
from engine.metrics import box_overlap
from sets import boxes
from tasks import TASKS


def test_boxes_of_voc_and_davis(tmp_path):
    voc, davis = tmp_path / "voc", tmp_path / "davis"
    write(voc / "JPEGImages/1.jpg", photo())
    (voc / "Annotations").mkdir()
    box = "".join(f"<{name}>{x}</{name}>" for name, x in (("xmin", 3), ("ymin", 4), ("xmax", 10), ("ymax", 20)))
    (voc / "Annotations/1.xml").write_text(f"<a><object><bndbox>{box}</bndbox></object></a>")
    found = boxes.open_discovery(TASKS["discovery"].config(data=str(voc)))
    assert len(found) == 1 and found.truth(0).tolist() == [[2, 3, 10, 20]]
    mask = np.zeros((40, 60), np.uint8)
    mask[3:20, 2:10], mask[39, 59] = 1, 2
    write(davis / "JPEGImages/480p/dog/00000.jpg", photo())
    write(davis / "Annotations/480p/dog/00000.png", mask)
    found = boxes.open_discovery(TASKS["discovery"].config(data=str(davis)))
    assert found.truth(0).tolist() == [[2, 3, 10, 20], [59, 39, 60, 40]]


def test_the_whole_image_finds_no_object_of_shapes():
    source = boxes.open_discovery(TASKS["discovery"].config(resolution=96, limit=4))
    assert len(source) == 4 and source.image(0).shape == (3, 96, 96)
    for i in range(4):
        found = source.truth(i)
        assert len(found) and box_overlap((0, 0, 96, 96), found).max() < 0.5


def bndbox(*corners):
    return "<bndbox>" + "".join(f"<{name}>{x}</{name}>" for name, x in zip(
        ("xmin", "ymin", "xmax", "ymax"), corners, strict=True)) + "</bndbox>"


def voc(root, *objects, name="1"):
    write(root / f"JPEGImages/{name}.jpg", photo())
    (root / "Annotations").mkdir(exist_ok=True)
    text = "".join(f"<object>{each}</object>" for each in objects)
    (root / f"Annotations/{name}.xml").write_text(f"<annotation>{text}</annotation>")
    return TASKS["discovery"].config(data=str(root))


def test_a_part_is_no_object(tmp_path):
    """VOC's persons have a head and hands with boxes of their own."""
    part = f"<part><name>head</name>{bndbox(5, 5, 8, 8)}</part>"
    c = voc(tmp_path, part + bndbox(3, 4, 10, 20) + part, bndbox(30, 4, 40, 20))
    assert boxes.open_discovery(c).truth(0).tolist() == [[2, 3, 10, 20], [29, 3, 40, 20]]


def test_coco_20k_as_downloaded(tmp_path):
    """Crowds are no objects; what the list does not name is not looked at; a photo without an object has no box."""
    names = [f"COCO_train2014_{i:012}.jpg" for i in range(3)]
    for name in names:
        write(tmp_path / f"images/train2014/{name}", photo())
    notes = [dict(image_id=0, bbox=[2, 3, 8, 17.5], iscrowd=0), dict(image_id=0, bbox=[0, 0, 9, 9], iscrowd=1),
             dict(image_id=1, bbox=[0, 0, 9, 9], iscrowd=0)]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2014.json").write_text(json.dumps(dict(
        images=[dict(id=i, file_name=name) for i, name in enumerate(names)], annotations=notes)))
    (tmp_path / "coco_20k_filenames.txt").write_text(f"train2014/{names[0]}\ntrain2014/{names[2]}\n")
    c = TASKS["discovery"].config(data=str(tmp_path))
    found = boxes.open_discovery(c)
    assert [found.truth(i).tolist() for i in range(len(found))] == [[[2, 3, 10, 20.5]], []]
    (tmp_path / f"images/train2014/{names[2]}").unlink()
    with pytest.raises(ValueError, match="coco_20k_filenames.txt names 1 of 2 files that are not there; .*000002.jpg"):
        boxes.open_discovery(c)
    (tmp_path / "annotations/instances_train2014.json").write_text("{}")
    with pytest.raises(ValueError, match="instances_train2014.json is not COCO's: KeyError 'images'"):
        boxes.open_discovery(c)


@pytest.mark.parametrize("objects, says", [
    (["<name>cat</name>"], "1.xml is not VOC's: .*; wanted object/bndbox with xmin"),
    ([bndbox(3, 4, 38, 58)], "1.xml has a box that does not lie in its image of 60x40 pixels"),
    ([bndbox(9, 4, 3, 9)], "1.xml has a box that does not lie in its image")])
def test_wrong_boxes_are_named_before_weights_are_loaded(objects, says, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *words: 1 / 0)
    voc(tmp_path, *objects)
    with pytest.raises(ValueError, match=says):
        evaluate.main(["--task", "discovery", "--weights", "pixels", "--data", str(tmp_path), "--device", "cpu"])


def test_vocs_list_names_what_is_there(tmp_path):
    c = voc(tmp_path, bndbox(3, 4, 10, 20))
    voc(tmp_path, bndbox(3, 4, 10, 20), name="2")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/trainval.txt").write_text("2\n")
    assert [path.name for path, _ in boxes.open_discovery(c).paths] == ["2.jpg"]
    (tmp_path / "ImageSets/Main/trainval.txt").write_text("2\n3\n")
    with pytest.raises(ValueError, match="trainval.txt names 1 of 2 files that are not there; the first: .*3.jpg"):
        boxes.open_discovery(c)
