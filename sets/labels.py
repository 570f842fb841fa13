"""
Sets of images with a class for every pixel.

    ADE20k, CamVid and their like    images/{training,validation}/NAME.jpg, annotations/.../NAME.png
    Cityscapes                       leftImg8bit/, gtFine/: *_labelIds.png, as downloaded, or *_labelTrainIds.png
    VOC                              JPEGImages/, SegmentationClass/, SegmentationClassAug/, ImageSets/Segmentation/
    Pascal Context                   JPEGImages/, SegmentationClassContext/, ImageSets/SegmentationContext/
    COCO-Stuff                       {,images/}{train,val}2017/, {stuffthingmaps,annotations}/{train,val}2017/
    LoveDA                           {Train,Val}/{Urban,Rural}/images_png/, masks_png/: 2,522 and 1,669 images
    iSAID                            {train,val}/images/[images/]P*.png, {train,val}/Semantic_masks/[images/]P*_instance
                                     _color_RGB.png; in patches of 896 pixels: 33,978 and 11,644, trained on and
                                     scored one by one, as in public use: nothing is merged, overlaps count twice
    Hypersim                         ai_*/images/*_final_preview/*.tonemap.jpg, *_geometry_hdf5/*.semantic.hdf5, and
                                     metadata_images_split_scene_v1.csv, anywhere in the folder
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image

import shapes
from engine.features import reads
from engine.images import read_image
from engine.metrics import IGNORE
from engine.sliding import places
from engine.task import skip
from sets.pairs import (
    Pairs,
    alike,
    below,
    evenly,
    folders,
    generated,
    images_below,
    keyed,
    lines,
    paired,
    there,
    upright,
    verified,
)


@dataclass(frozen=True)
class Labels:
    n_classes: int = 0         # 0 = as many as the largest label says
    first: int = 0             # label of class 0; what lies below it is ignored
    void: int = IGNORE         # label that is ignored


SETS = dict(segmentation=Labels(), ade20k=Labels(150, first=1), cityscapes=Labels(19), voc=Labels(21),
            camvid=Labels(11, void=11), context=Labels(59, first=1), stuff=Labels(171), hypersim=Labels(40, first=1),
            loveda=Labels(7, first=1), isaid=Labels(16))

# Cityscapes' 19 classes by what labelIds calls them; all other ids are ignored
IDS = 7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33
# COCO-Stuff's 171 classes by what its maps call them: 182 numbers, of which some things were never labelled
STUFF = tuple(k for k in range(182) if k not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90))
HYPERSIM = "metadata_images_split_scene_v1.csv"
COLUMNS = "scene_name", "camera_name", "frame_id", "included_in_public_release", "split_partition_name"
# iSAID's background and 15 classes, by the colours of its maps
COLOURS = ((0, 0, 0), (0, 0, 63), (0, 63, 63), (0, 63, 0), (0, 63, 127), (0, 63, 191), (0, 63, 255), (0, 127, 63),
           (0, 127, 127), (0, 0, 127), (0, 0, 191), (0, 0, 255), (0, 191, 127), (0, 127, 191), (0, 127, 255),
           (0, 100, 155))
PATCH, STEP = 896, 512                  # pixels of iSAID's patches, which overlap by 384
WHOLE_LISTS = "trainaug", "train_aug"   # VOC's 10,582 images that people train on; or train and, beside it, aug


def read_labels(path, labels):
    """A file of class numbers, palette or grey, or HDF5 -> H W uint8, ignored ones 255"""
    truth = read_hdf5(path) if path.suffix == ".hdf5" else read_colours(path) if labels == SETS["isaid"] else \
        read_grey(path)
    ids = IDS if path.name.endswith("_labelIds.png") else STUFF if labels == SETS["stuff"] and not path.name.endswith(
        "_labelTrainIds.png") else ()
    if ids:
        truth = np.append(IGNORE, [ids.index(k) if k in ids else IGNORE for k in range(256)])[truth.clip(-1) + 1]
    out = (truth == labels.void) | (truth == IGNORE) | (truth < labels.first)
    top = int(truth[~out].max(initial=0))
    if labels.n_classes and top >= labels.first + labels.n_classes:
        raise ValueError(f"--data: {path} has label {top}; wanted {labels.n_classes} classes from {labels.first} on")
    return np.where(out, IGNORE, truth - labels.first).astype(np.uint8)


def read_grey(path):
    with Image.open(path) as file:
        if file.mode not in ("P", "L", "I", "I;16", "1"):
            raise ValueError(f"--data: {path} has mode {file.mode}; wanted class numbers: a grey, or a palette's index")
        return np.asarray(file).astype(np.int64)


def read_colours(path):
    """iSAID's maps: a colour for each class"""
    with Image.open(path) as file:
        x = np.asarray(file.convert("RGB")).astype(np.int64) @ (65536, 256, 1)
    codes = np.array(COLOURS) @ (65536, 256, 1)
    order = codes.argsort()
    at = np.searchsorted(codes, x, sorter=order).clip(max=len(codes) - 1)
    if (codes[order[at]] != x).any():
        odd = int(x[codes[order[at]] != x][0])
        raise ValueError(f"--data: {path} has the colour {odd >> 16},{odd >> 8 & 255},{odd & 255}; wanted one of "
                         "iSAID's classes")
    return order[at]


def read_hdf5(path):
    """Hypersim's: one array, which is called dataset"""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"--data: {path} wants h5py, which is not installed; pip install -e .[geo]") from error
    try:
        with h5py.File(path, "r") as file:
            return np.asarray(file["dataset"]).astype(np.int64)
    except (OSError, KeyError) as error:
        raise ValueError(f"--data: {path} cannot be read ({error}); wanted HDF5 with an array dataset") from error


def seen_classes(truth, size, path):
    """Which of 256 labels a truth has"""
    alike(truth, size, path)
    return np.bincount(truth.ravel(), minlength=256) > 0


def open_segmentation(c):
    """train, val, number of classes; raises ValueError if a truth is not what it should be"""
    labels = SETS[c.task]
    labels = labels if labels.void != IGNORE else replace(labels, void=c.ignore)
    if c.data == "shapes":
        return *generated(c, attrgetter("semantic")), len(shapes.CLASSES) + 1
    layout = LAYOUTS.get(c.task, label_pairs)
    read = partial(read_labels, labels=labels)
    splits, photo = (("training", "train"), ("validation", "val")), reads(c)
    form = Patches if c.task == "isaid" else Pairs
    train, val = (form(layout(c, *split), read, photo=photo) for split in splits)
    in_train, in_val = (np.any(verified(c, part, seen_classes), 0)[:IGNORE] for part in (train, val))
    if not (in_train.any() and in_val.any()):
        raise ValueError(f"--data: all labels of {c.data}, train or val, are ignored; wanted class numbers")
    strange = np.flatnonzero(in_val & ~in_train)
    if len(strange) and not (labels.n_classes or c.limit):
        raise ValueError(f"--data: val of {c.data} has label {strange[0]}, which no truth of train has; "
                         "wanted one numbering for both")
    return train, val, labels.n_classes or 1 + int(np.flatnonzero(in_train).max())


def open_val(c, kind):
    """Images to measure on with their truths, of one of SETS; and the largest label of any. Raises ValueError."""
    val = Pairs(LAYOUTS.get(kind, label_pairs)(c, "validation", "val"), partial(read_labels, labels=SETS[kind]))
    seen = np.flatnonzero(np.any(verified(c, val, seen_classes), 0)[:IGNORE])
    if not len(seen):
        raise ValueError(f"--data: all labels of {c.data} are ignored; wanted class numbers")
    return val, int(seen.max())


def label_pairs(c, *split):
    """images/training/NAME.jpg, annotations/training/NAME.png; train and val are understood too"""
    roots = [folders(c, *[f"{kind}/{name}" for name in split]) for kind in ("images", "annotations")]
    return paired(c, *(keyed(images_below(root), below(root)) for root in roots))


def cityscapes_pairs(c, _, split):
    """The two zips, unpacked side by side or each into a folder of its name; labelTrainIds are taken where they are."""
    for zip in "leftImg8bit_trainvaltest", "gtFine_trainvaltest":
        if Path(c.data, f"{zip}.zip").is_file() and not list(Path(c.data).glob(f"**/{zip.partition('_')[0]}")):
            raise ValueError(f"--data: {c.data} has {zip}.zip, not what is in it; unpack it there")
    images, truths = (folders(c, f"{kind}/{split}", f"{kind}_trainvaltest/{kind}/{split}")
                      for kind in ("leftImg8bit", "gtFine"))

    def found(root, end):
        return keyed(root.rglob(f"*{end}"), lambda path: str(path.relative_to(root)).removesuffix(end))

    ids, train_ids = (found(truths, f"_gtFine_label{kind}.png") for kind in ("Ids", "TrainIds"))
    return paired(c, found(images, "_leftImg8bit.png"), ids | train_ids)


def voc_pairs(c, _, split):
    """
    VOC's own masks, and for what has none SegmentationClassAug: of train alone, as val is scored by VOC's own. With
    that folder, train is the list trainaug.txt or train_aug.txt, or train.txt and aug.txt.
    """
    photos, own = (folders(c, name) for name in ("JPEGImages", "SegmentationClass"))
    more, lists = Path(c.data, "SegmentationClassAug"), folders(c, "ImageSets/Segmentation")
    listed, masks = [lists / f"{split}.txt"], [own]
    if split == "train" and more.is_dir():
        masks.append(more)
        known = {name: lists / f"{name}.txt" for name in (*WHOLE_LISTS, "aug")}
        whole = [known[name] for name in WHOLE_LISTS if known[name].is_file()]
        listed = whole[:1] or listed + [known["aug"]] * known["aug"].is_file()
    names = list(dict.fromkeys(Path(name.split()[0]).stem for path in listed for name in lines(path, "names")))
    both = set(names) & set(lines(lists / "val.txt", "names")) if split == "train" else ()
    if both:
        raise ValueError(f"--data: {listed[-1]} names {len(both)} images of val.txt; train may not see {min(both)}")
    names = evenly(names, c.limit)
    truths = [next((path for path in (folder / f"{name}.png" for folder in masks) if path.is_file()),
                   masks[-1] / f"{name}.png") for name in names]
    said = listed[-1]
    return list(zip(there([photos / f"{name}.jpg" for name in names], said), there(truths, said), strict=True))


def context_pairs(c, _, split):
    """As people keep them: a palette PNG a photo of VOC2010, 0 background, which is ignored, 59 classes from 1."""
    photos, truths = (folders(c, name) for name in ("JPEGImages", "SegmentationClassContext"))
    listed = folders(c, "ImageSets/SegmentationContext") / f"{split}.txt"
    names = evenly(lines(listed, "names"), c.limit)
    return list(zip(there([photos / f"{name}.jpg" for name in names], listed),
                    there([truths / f"{name}.png" for name in names], listed), strict=True))


def stuff_pairs(c, _, split):
    """stuffthingmaps, as downloaded, beside the photos; where others have numbered them anew, *_labelTrainIds.png"""
    photos = folders(c, f"images/{split}2017", f"{split}2017")
    kinds = "stuffthingmaps", "stuffthingmaps_trainval2017", "annotations"
    truths = folders(c, *(f"{kind}/{split}2017" for kind in kinds))
    found = keyed([path for path in images_below(truths) if path.name.endswith("_labelTrainIds.png")],
                  lambda path: path.name.removesuffix("_labelTrainIds.png"))
    maps = keyed([path for path in images_below(truths) if "_label" not in path.name], lambda path: path.stem)
    return paired(c, keyed(images_below(photos), lambda path: path.stem), maps or found)


def loveda_pairs(c, _, split):
    """Towns and countryside together; the test's masks are on a server"""
    roots = [folders(c, f"{split.capitalize()}/{place}/images_png") for place in ("Urban", "Rural")]
    images, truths = ({Path(root.parent.name, path.stem): path for root in roots for path in images_below(
        root.parent / kind)} for kind in ("images_png", "masks_png"))
    return paired(c, images, truths)


def isaid_pairs(c, _, split):
    images = folders(c, f"{split}/images/images", f"{split}/images")
    masks = folders(c, f"{split}/Semantic_masks/images", f"{split}/Semantic_masks")
    end = "_instance_color_RGB"
    return paired(c, *(keyed(images_below(root), lambda path: path.stem.removesuffix(end)) for root in (images, masks)))


class Patches(Pairs):
    """
    Squares of images, which overlap, the last ones shifted back to end with the image; a smaller image is one patch, on
    black, whose truth beside the image is ignored.
    """

    def __init__(self, paths, read, photo=read_image):
        places_of = [[(pair, place) for place in places([max(n, PATCH) for n in upright(pair[0])], PATCH, STEP)]
                     for pair in paths]
        super().__init__(paths, read, photo=photo)
        self.patches = [each for of_image in places_of for each in of_image]

    def __len__(self):
        return len(self.patches)

    def image(self, i):
        pair, (y, x) = self.patches[i]
        part = cached(self.photo, pair[0])[:, y : y + PATCH, x : x + PATCH]
        return F.pad(part, (0, PATCH - part.shape[2], 0, PATCH - part.shape[1]))

    def truth(self, i):
        pair, (y, x) = self.patches[i]
        part = cached(self.read, pair[1])[y : y + PATCH, x : x + PATCH]
        return np.pad(part, [(0, PATCH - n) for n in part.shape], constant_values=IGNORE)


@lru_cache(maxsize=4)
def cached(read, path):
    """Of an image whose patches are asked for one after the other"""
    return read(path)


def hypersim_pairs(c, _, split):
    """Of the public list those of a split whose previews and labels are there; the others are counted"""
    listed = next(Path(c.data).rglob(HYPERSIM), Path(c.data, HYPERSIM))
    rows = [line.split(",") for line in lines(listed, "scenes, cameras, frames and splits")]
    where = {name: k for k, name in enumerate(rows[0])}
    if lacking := [name for name in COLUMNS if name not in where]:
        raise ValueError(f"--data: {listed} has no column {lacking[0]}; wanted {', '.join(COLUMNS)}")
    paths = []
    for row in rows[1:]:
        scene, camera, frame, public, own = (row[where[name]] for name in COLUMNS)
        if own == split and public == "True":
            root, name = Path(c.data, scene, "images"), f"frame.{int(frame):04}"
            paths.append((root / f"scene_{camera}_final_preview/{name}.tonemap.jpg",
                          root / f"scene_{camera}_geometry_hdf5/{name}.semantic.hdf5"))
    found = [pair for pair in paths if pair[0].is_file() and pair[1].is_file()]
    if not found:
        raise ValueError(f"--data: of {len(paths)} frames of {split} that {listed} names none is in {c.data}; wanted "
                         "ai_*/images/ with previews and semantic.hdf5")
    if len(found) < len(paths):
        skip(f"{len(paths) - len(found)} frames of {split} that are not in {c.data}", len(paths) - len(found))
    return evenly(found, c.limit)


LAYOUTS = dict(cityscapes=cityscapes_pairs, voc=voc_pairs, context=context_pairs, stuff=stuff_pairs,
               hypersim=hypersim_pairs, loveda=loveda_pairs, isaid=isaid_pairs)
