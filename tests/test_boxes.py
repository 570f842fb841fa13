"""sets/boxes.py: VOC's and DAVIS's boxes, and the scenes whose objects are small."""

import numpy as np
from test_labels import photo, write

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
