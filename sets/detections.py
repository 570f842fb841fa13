"""
Sets of images with boxes and classes of their objects: truth(i) -> engine.coco.Objects, pixels of the image.

    COCO       annotations/instances_{train,val}2017.json, or {train,val}.json; {train,val}2017/, {train,val}/, images/
    VOC        JPEGImages/, Annotations/*.xml, ImageSets/Main/{trainval,train}.txt and {test,val}.txt
    DIOR       JPEGImages-{trainval,test}/, Annotations/[Horizontal Bounding Boxes/]*.xml, [ImageSets/]Main/{train,val,
               test}.txt: 5,862 + 5,863 images to train on, 11,738 to measure on, of 800 x 800 pixels, 20 classes
    COCO-O     cartoon/, weather/, ...: six folders, each as COCO with a val alone
    shapes     the visible part of each object

Labels are the files' category ids, gaps and all, as the released head has them; VOC's are numbered from 1, by name.
Boxes without an area, or outside of their images, are dropped, and counted.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

import shapes
from engine.coco import Objects
from engine.task import skip
from sets.pairs import Pairs, evenly, generated, lines, there, verified

DOMAINS = "cartoon", "handmake", "painting", "sketch", "tattoo", "weather"  # of COCO-O
MOST = 10_000          # the largest category id: a head has an output for each
CORNERS = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # left, top, width, height -> corners


@dataclass(frozen=True)
class Detections:
    train: object          # None: there is none, and nothing can be trained
    vals: dict             # {name: images to measure on}; COCO-O has six, others one
    names: dict            # {label: name}

    @property
    def n_classes(self):
        return 1 + max(self.names)


def open_detections(c):
    """Detections. Raises ValueError."""
    if c.data == "shapes":
        train, val = generated(c, shown)
        return Detections(train, {"val": val}, dict(enumerate(shapes.CLASSES)))
    root = Path(c.data)
    if all((root / name).is_dir() for name in DOMAINS):
        found = {name: coco(c, root / name, "val") for name in DOMAINS}
        return Detections(None, {name: val for name, (val, _) in found.items()}, found[DOMAINS[0]][1])
    layout = dior if (root / "JPEGImages-trainval").is_dir() else voc if (root / "JPEGImages").is_dir() else coco
    train, names = layout(c, root, "train")
    val, others = layout(c, root, "val")
    strange = {label: name for label, name in others.items() if names.get(label, name) != name or label not in names}
    if strange:
        label = min(strange)
        raise ValueError(f"--data: val of {root} calls category {label} {strange[label]}, train "
                         f"{names.get(label, 'has none of that id')}; wanted one numbering for both")
    boxed = [i for i in range(len(train)) if (~train.truth(i).crowds).any()]
    if len(boxed) < len(train):
        skip(f"{len(train) - len(boxed)} images of train without a box to learn from", len(train) - len(boxed))
    train.paths = [train.paths[i] for i in boxed]
    return Detections(train, {"val": val}, names)


def shown(scene):
    boxes, labels, areas, slivers = shapes.boxes_of(scene)
    return Objects(boxes @ CORNERS, labels, np.zeros(len(boxes), bool), areas, scene.depth.shape, slivers)


def of_the_image(truth, size, name):
    """Raises ValueError for an image of another size than its annotations are of"""
    if truth.size != size:
        (H, W), (h, w) = size, truth.size
        raise ValueError(f"--data: {name} is annotated as {w}x{h} pixels and has {W}x{H}; wanted the annotations of "
                         "these images")


def usable(boxes, size):
    """n bool: boxes left, top, right, bottom that have an area, in the image, and are no nan"""
    inside = boxes.clip(0, (size[1], size[0]) * 2)
    return (np.isfinite(boxes).all(1)) & ((boxes[:, 2:] > boxes[:, :2]) & (inside[:, 2:] > inside[:, :2])).all(1)

# --------------------------------------------------------------------------------
# COCO


def first(root, paths, what):
    found = [root / path for path in paths if (root / path).exists()]
    if not found:
        raise ValueError(f"--data: {root} has no {' or '.join(map(str, paths))}; wanted {what}")
    return found[0]


def coco(c, root, split):
    """-> Pairs; {category id: name}"""
    path = first(root, [f"annotations/{name}.json" for name in (f"instances_{split}2017", f"instances_{split}", split)],
                 "COCO's annotations")
    folder = first(root, [f"{split}2017", f"images/{split}2017", split, f"images/{split}", "images"], "its images")
    try:
        notes = json.loads(path.read_text())
        names = {int(each["id"]): str(each["name"]) for each in notes["categories"]}
        images = {each["id"]: (str(each["file_name"]), (int(each["height"]), int(each["width"])))
                  for each in notes["images"]}
        rows = [(each["image_id"], [float(x) for x in each["bbox"]], int(each["category_id"]),
                 bool(each.get("iscrowd")), float(each.get("area") or -1)) for each in notes["annotations"]]
        odd = next((row for row in rows if row[0] not in images or row[2] not in names or len(row[1]) != 4), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--data: {path} is not COCO's: {type(error).__name__} {error}; wanted images, annotations "
                         "and categories") from error
    if odd:
        raise ValueError(f"--data: {path} has a box {odd[1]} of image {odd[0]} and category {odd[2]}, one of which it "
                         "does not list; wanted the images and categories of its own annotations")
    if not rows or not 0 <= min(names) or max(names) > MOST:
        raise ValueError(f"--data: {path} has {len(rows)} boxes of category ids {min(names)} to {max(names)}; wanted "
                         f"some, of ids from 0 to {MOST}" if names else f"--data: {path} has no category")
    by_image = {key: [] for key in images}
    for key, *row in rows:
        by_image[key].append(row)
    truths = {name: objects(by_image[key], size) for key, (name, size) in images.items()}
    return pairs(c, folder, truths, path), names


def objects(rows, size):
    """[(left, top, width, height), label, crowd, area] of an image -> Objects of those that are usable"""
    boxes = np.array([row[0] for row in rows], float).reshape(-1, 4) @ CORNERS
    labels, crowds, areas = (np.array([row[k] for row in rows], kind) for k, kind in ((1, int), (2, bool), (3, float)))
    areas = np.where(areas > 0, areas, (boxes[:, 2:] - boxes[:, :2]).prod(1))
    fine = usable(boxes, size)
    return Objects(boxes[fine], labels[fine], crowds[fine], areas[fine], size, int((~fine).sum()))


def pairs(c, folder, truths, listed):
    """`limit` of the images, all of which must be there, as large as their annotations say, with a box in some"""
    names = evenly(list(truths), c.limit)
    found = Pairs(list(zip(there([folder / name for name in names], listed), names, strict=True)), truths.__getitem__)
    verified(c, found, of_the_image)
    truths = [truths[name] for name in names]
    if not any((~truth.crowds).any() for truth in truths):
        raise ValueError(f"--data: no image of {listed} has a box; wanted objects that are marked")
    if dropped := sum(truth.dropped for truth in truths):
        skip(f"{dropped} boxes of {listed}, of no area or outside of their images", dropped)
    return found

# --------------------------------------------------------------------------------
# VOC


def voc(c, root, split):
    """-> Pairs; {number from 1: name}, of all classes that any annotation has, by name"""
    lists = ["trainval", "train"] if split == "train" else ["test", "val"]
    listed = first(root, [f"ImageSets/Main/{name}.txt" for name in lists], "VOC's lists")
    return of_xml(c, root / "Annotations", root / "JPEGImages", [listed])


def dior(c, root, split):
    """As voc; the lists of train and of val are both trained on"""
    names, part = (("train", "val"), "trainval") if split == "train" else (("test",), "test")
    listed = [first(root, [f"ImageSets/Main/{name}.txt", f"Main/{name}.txt"], "DIOR's lists") for name in names]
    notes = first(root, ["Annotations/Horizontal Bounding Boxes", "Annotations"], "boxes as VOC has them")
    return of_xml(c, notes, root / f"JPEGImages-{part}", listed)


def of_xml(c, notes, photos, lists):
    """Folders of annotations and of photos, lists of names -> Pairs; {number from 1: name}"""
    parsed = {path.stem: read_xml(path) for path in sorted(notes.glob("*.xml"))}
    number = {name: k + 1 for k, name in enumerate(sorted({row[1] for rows, _ in parsed.values() for row in rows}))}
    wanted = [line.split()[0] for listed in lists for line in lines(listed, "names")]
    there([notes / f"{name}.xml" for name in wanted], lists[0])
    truths = {f"{name}.jpg": objects([[box, number[kind], False, -1] for box, kind in rows], size)
              for name, (rows, size) in ((name, parsed[name]) for name in wanted)}
    return pairs(c, photos, truths, lists[0]), {k: name for name, k in number.items()}


def read_xml(path):
    """-> [(left, top, width, height), name] of each object; H W.  VOC counts pixels from 1, both ends inside"""
    try:
        tree = ElementTree.parse(path)
        corners = [[float(thing.find("bndbox").find(name).text) for name in ("xmin", "ymin", "xmax", "ymax")]
                   for thing in tree.findall("object")]
        kinds = [thing.find("name").text.strip() for thing in tree.findall("object")]
        size = tuple(int(tree.find("size").find(name).text) for name in ("height", "width"))
    except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--data: {path} is not VOC's: {error}; wanted size, and objects with name and "
                         "bndbox") from error
    return [[(left - 1, top - 1, right - left + 1, bottom - top + 1), kind]
            for (left, top, right, bottom), kind in zip(corners, kinds, strict=True)], size
