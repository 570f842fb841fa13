"""sets/detections.py: COCO, VOC, COCO-O and shapes as they lie on disk, and what is wrong with them in one line."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from test_labels import photo, write

import shapes
from engine import task as tasking
from sets.detections import DOMAINS, open_detections
from tasks import TASKS


def note(image, box, label=3, **more):
    return dict(image_id=image, bbox=box, category_id=label, **more)


def coco(root, split="train", notes=(), n=2, categories=(3, 7), size=(40, 60), folder="{}2017",
         file="instances_{}2017"):
    images = [dict(id=10 + i, file_name=f"{i}.jpg", height=size[0], width=size[1]) for i in range(n)]
    for i in range(n):
        write(root / folder.format(split) / f"{i}.jpg", photo())
    path = root / f"annotations/{file.format(split)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(images=images, annotations=list(notes),
                                    categories=[dict(id=k, name=f"kind {k}") for k in categories])))
    return path


GOOD = [note(10, [5, 6, 20, 10], area=77.0), note(11, [0, 0, 9.5, 40], 7)]


def opened(root, task="detection", **more):
    tasking.SKIPPED.clear()
    return open_detections(TASKS[task].config(data=str(root), workers=0, **more))


def test_coco(tmp_path):
    more = [note(10, [1, 1, 4, 4], 7, iscrowd=1), note(10, [70, 1, 4, 4]), note(10, [5, 5, 0, 3]),
            note(11, [-3, -2, 10, 10]), note(11, [float("nan"), 0, 1, 1])]
    coco(tmp_path, "train", GOOD + more)
    coco(tmp_path, "val", GOOD[:1])
    data = opened(tmp_path)
    assert data.names == {3: "kind 3", 7: "kind 7"} and data.n_classes == 8
    truth = data.train.truth(0)
    assert truth.boxes.tolist() == [[5, 6, 25, 16], [1, 1, 5, 5]] and truth.labels.tolist() == [3, 7]
    assert truth.crowds.tolist() == [False, True] and truth.areas.tolist() == [77, 16]
    assert (truth.size, truth.dropped) == ((40, 60), 2) and data.train.image(0).shape == (3, 40, 60)
    assert data.train.truth(1).boxes.tolist() == [[0, 0, 9.5, 40], [-3, -2, 7, 8]]  # partly outside: stays
    assert [(line.split()[0], n) for line, n in tasking.SKIPPED.items()] == [("3", 3)]
    (val,) = data.vals.values()
    assert len(val) == 2 and not len(val.truth(1).labels)  # an image without a box is measured


@pytest.mark.parametrize("folder, file", [("{}", "{}"), ("images/{}2017", "instances_{}2017"),
                                          ("images/{}", "instances_{}")])
def test_other_names(tmp_path, folder, file):
    for split in "train", "val":
        coco(tmp_path, split, GOOD, folder=folder, file=file)
    assert len(opened(tmp_path).train) == 2 and len(opened(tmp_path, limit=1).train) == 1


def test_images_without_a_box_are_not_learned_from(tmp_path):
    coco(tmp_path, "train", [GOOD[0], note(11, [1, 1, 5, 5], iscrowd=1)])
    coco(tmp_path, "val", GOOD)
    assert len(opened(tmp_path).train) == 1 and "1 images of train without a box to learn from" in tasking.SKIPPED


@pytest.mark.parametrize("train, says", [
    (dict(notes=[]), "has 0 boxes of category ids 3 to 7; wanted some"),
    (dict(notes=GOOD, categories=(3, 7, 20_000)), "category ids 3 to 20000; wanted some, of ids from 0 to 10000"),
    (dict(notes=GOOD, categories=(-1, 3, 7)), "category ids -1 to 7; wanted some, of ids from 0 to 10000"),
    (dict(notes=[note(99, [1, 1, 2, 2])]), "of image 99 and category 3, one of which it does not list"),
    (dict(notes=[note(10, [1, 1, 2, 2], 4)]), "of image 10 and category 4, one of which it does not list"),
    (dict(notes=[note(10, [1, 1, 2])]), "one of which it does not list"),
    (dict(notes=[dict(image_id=10, category_id=3)]), "is not COCO's: KeyError 'bbox'"),
    (dict(notes=[note(10, None)]), "is not COCO's: TypeError"),
    (dict(notes=GOOD, size=(60, 40)), r"0.jpg is annotated as 40x60 pixels and has 60x40; wanted the annotations of"),
    (dict(notes=[note(10, [1, 1, 0, 9])]), "no image of .*instances_train2017.json has a box"),
    (dict(notes=[GOOD[0]], categories=(3,)), "val of .* calls category 7 kind 7, train has none of that id; wanted"),
])
def test_wrong_annotations(tmp_path, train, says):
    coco(tmp_path, "train", **train)
    coco(tmp_path, "val", GOOD)
    with pytest.raises(ValueError, match=says):
        opened(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match="has no annotations/instances_train2017.json or .*; wanted COCO"):
        opened(tmp_path)
    path = coco(tmp_path, "train", GOOD, n=3)
    (tmp_path / "train2017/2.jpg").unlink()
    with pytest.raises(ValueError, match="names 1 of 3 files that are not there; the first: .*2.jpg"):
        opened(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not COCO's: JSONDecodeError"):
        opened(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="is not COCO's: TypeError"):
        opened(tmp_path)


def test_one_numbering_for_both(tmp_path):
    coco(tmp_path, "train", GOOD)
    path = coco(tmp_path, "val", GOOD)
    path.write_text(path.read_text().replace("kind 7", "horse"))
    with pytest.raises(ValueError, match="val of .* calls category 7 horse, train kind 7"):
        opened(tmp_path)


def test_coco_o(tmp_path):
    for name in DOMAINS:
        coco(tmp_path / name, "val", GOOD)
    data = opened(tmp_path, "coco_o")
    assert data.train is None and list(data.vals) == list(DOMAINS) and all(len(val) == 2 for val in data.vals.values())


def voc(root, name, things, size=(60, 40)):
    write(root / f"JPEGImages/{name}.jpg", photo())
    rows = "".join(f"<object><name>{kind}</name><part><bndbox/></part><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
                   f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>" for kind, a, b, c, d in things)
    path = root / f"Annotations/{name}.xml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"<a><size><width>{size[0]}</width><height>{size[1]}</height></size>{rows}</a>")
    return path


def dior(root, boxes="Annotations/Horizontal Bounding Boxes", lists="ImageSets/Main"):
    """As its archives unpack: photos of two folders, annotations of both in one, train and val apart"""
    for name, part, listed in ("00001", "trainval", "train"), ("00002", "trainval", "val"), ("11726", "test", "test"):
        voc(root, name, [("airplane", 3, 4, 10, 20), ("windmill", 5, 5, 30, 30)])
        (root / f"JPEGImages-{part}").mkdir(exist_ok=True)
        (root / f"JPEGImages/{name}.jpg").rename(root / f"JPEGImages-{part}/{name}.jpg")
        (root / boxes).mkdir(parents=True, exist_ok=True)
        (root / f"Annotations/{name}.xml").rename(root / boxes / f"{name}.xml")
        (root / lists).mkdir(parents=True, exist_ok=True)
        (root / lists / f"{listed}.txt").write_text(f"{name}\n")
    (root / "JPEGImages").rmdir()
    return root


@pytest.mark.parametrize("boxes, lists", [("Annotations/Horizontal Bounding Boxes", "ImageSets/Main"),
                                          ("Annotations", "Main")])
def test_dior(tmp_path, boxes, lists):
    data = opened(dior(tmp_path, boxes, lists), "dior")
    assert len(data.train) == 2 and len(data.vals["val"]) == 1 and data.names == {1: "airplane", 2: "windmill"}
    assert data.train.truth(1).boxes.tolist() == [[2, 3, 10, 20], [4, 4, 30, 30]]
    (tmp_path / lists / "val.txt").unlink()
    with pytest.raises(ValueError, match="has no ImageSets/Main/val.txt or Main/val.txt; wanted DIOR's lists"):
        opened(tmp_path, "dior")


def test_voc(tmp_path):
    voc(tmp_path, "a", [("dog", 3, 4, 10, 20), ("cat", 1, 1, 60, 40), ("cat", 5, 5, 4, 5)])
    voc(tmp_path, "b", [("cat", 2, 2, 8, 8)])
    lists = tmp_path / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "trainval.txt").write_text("a\n")
    (lists / "test.txt").write_text("b\n")
    data = opened(tmp_path)
    assert data.names == {1: "cat", 2: "dog"}
    assert data.train.truth(0).boxes.tolist() == [[2, 3, 10, 20], [0, 0, 60, 40]]
    assert data.train.truth(0).labels.tolist() == [2, 1] and data.train.truth(0).dropped == 1
    (tmp_path / "Annotations/b.xml").write_text("<a><object><name>cat</name></object></a>")
    with pytest.raises(ValueError, match="b.xml is not VOC's: .*; wanted size, and objects with name and bndbox"):
        opened(tmp_path)


def test_boxes_of_shapes():
    scene = shapes.scene(5, 96, 3)
    boxes, labels, areas, slivers = shapes.boxes(5, 96, 3)
    shown = [int((scene.instances == k).sum()) for k in np.unique(scene.instances[scene.instances > 0])]
    assert areas.tolist() == [n for n in shown if n >= 20] and slivers == sum(n < 20 for n in shown)
    assert len(boxes) == len(labels) > 0
    for (x, y, w, h), label, area in zip(boxes.astype(int), labels, areas, strict=True):
        inside = scene.instances[y : y + h, x : x + w]
        k = next(k for k in range(1, 9) if (scene.instances == k).sum() == area)
        assert (inside == k).sum() == area and all((edge == k).any() for edge in
                                                   (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        assert set(scene.semantic[scene.instances == k]) == {label + 1}


def test_twenty_pixels_are_no_sliver():
    instances = np.zeros((12, 12), np.uint8)
    instances[2:6, 1:6], instances[8:12, 6:11] = 1, 4
    instances[11, 10] = 0
    boxes, labels, areas, slivers = shapes.boxes_of(SimpleNamespace(instances=instances, semantic=instances + 5))
    assert (boxes.tolist(), labels.tolist(), areas.tolist(), slivers) == ([[1, 2, 5, 4]], [5], [20], 1)


def test_slivers_are_counted():
    found = [shapes.boxes(i, 48) for i in range(40)]
    assert sum(each[3] for each in found) > 0 and min(each[2].min() for each in found) >= 20
    data = opened("shapes", limit=3, resolution=64)
    assert data.n_classes == 12 and data.names[0] == "star" and len(data.train) == 3
    truth = data.train.truth(0)
    assert truth.size == (64, 64) and (truth.boxes[:, 2:] > truth.boxes[:, :2]).all() and truth.boxes.max() <= 64
