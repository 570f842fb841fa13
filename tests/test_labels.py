"""sets/labels.py: the layouts that people have, and files that are no labels."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from sets import labels
from sets.prompts import LABELS
from tasks import TASKS
from tasks.segmentation import tallied


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def photo(seed=0, size=(40, 60)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize("task, ignore, wanted", [
    ("ade20k", 255, [255, 0, 2, 255]), ("segmentation", 255, [0, 1, 3, 255]),
    ("segmentation", 3, [0, 1, 255, 255]), ("camvid", 255, [0, 1, 3, 255])])
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


def grey(value, size=(40, 60)):
    return np.full(size, value, np.uint8)


def test_labels_of_one_name_in_two_folders_are_two(tmp_path):
    """Of train/a/1.jpg and train/b/1.jpg each has its own labels."""
    for split in "training", "validation":
        for k, room in enumerate("ab"):
            write(tmp_path / f"images/{split}/{room}/1.jpg", photo(k))
            write(tmp_path / f"annotations/{split}/{room}/1.png", grey(k))
    train, val, n = labels.open_segmentation(TASKS["segmentation"].config(data=str(tmp_path)))
    assert n == 2 and [[part.truth(i).max() for i in range(len(part))] for part in (train, val)] == [[0, 1]] * 2


@pytest.mark.parametrize("unpacked", ["", "in folders"])
def test_cityscapes_as_downloaded(unpacked, tmp_path):
    """labelIds of 0 to 33 are its 19 classes, all others are ignored; labelTrainIds are used where they are."""
    roots = [tmp_path / f"{zip}_trainvaltest" if unpacked else tmp_path for zip in ("leftImg8bit", "gtFine")]
    ids = np.resize(np.arange(35, dtype=np.uint8), (40, 60))
    for split in "train", "val":
        write(roots[0] / f"leftImg8bit/{split}/ulm/ulm_000000_000019_leftImg8bit.png", photo())
        truth = roots[1] / f"gtFine/{split}/ulm/ulm_000000_000019_gtFine_labelIds.png"
        write(truth, ids)
        write(truth.with_name("ulm_000000_000019_gtFine_color.png"), photo())
        write(truth.with_name("ulm_000000_000019_gtFine_instanceIds.png"), grey(9))
        truth.with_name("ulm_000000_000019_gtFine_polygons.json").write_text("{}")
    c = TASKS["cityscapes"].config(data=str(tmp_path))
    train, val, n = labels.open_segmentation(c)
    assert (len(train), len(val), n) == (1, 1, 19)
    out = 255
    assert train.truth(0).ravel()[:35].tolist() == [out] * 7 + [
        0, 1, out, out, 2, 3, 4, out, out, out, 5, out, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, out, out, 16, 17, 18, out]
    write(roots[1] / "gtFine/val/ulm/ulm_000000_000019_gtFine_labelTrainIds.png", grey(18))
    assert labels.open_segmentation(c)[1].truth(0).max() == 18


def test_cityscapes_zips_want_to_be_unpacked(tmp_path):
    (tmp_path / "gtFine_trainvaltest.zip").touch()
    with pytest.raises(ValueError, match="has gtFine_trainvaltest.zip, not what is in it; unpack it there"):
        labels.open_segmentation(TASKS["cityscapes"].config(data=str(tmp_path)))


def write_voc(root, lists):
    """Masks of VOC's own for a to d, 1 everywhere, and for all of them and e to f those of Aug, 2 everywhere."""
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for name in "abcdef":
        write(root / f"JPEGImages/{name}.jpg", photo())
        write(root / f"SegmentationClassAug/{name}.png", grey(2))
        if name in "abcd":
            write(root / f"SegmentationClass/{name}.png", grey(1))
    for name, text in lists.items():
        (root / f"ImageSets/Segmentation/{name}.txt").write_text(text)
    return TASKS["voc"].config(data=str(root))


def open_words(tmp_path, kind):
    return labels.open_val(TASKS["openvocab"].config(data=str(tmp_path), set=kind), kind)


def test_coco_stuff_as_downloaded(tmp_path):
    write(tmp_path / "val2017/000000000139.jpg", photo(size=(2, 183)))
    write(tmp_path / "stuffthingmaps/val2017/000000000139.png",
          np.append(np.arange(182), 255).astype(np.uint8)[None].repeat(2, 0))
    val, top = open_words(tmp_path, "stuff")
    found = val.truth(0)[0].tolist()
    assert top == 170 and [k for k in found if k != 255] == list(range(171)) and found[-1] == 255
    # person, stop sign, parking meter, toothbrush, banner, wood: categories 1, 13, 14, 90, 92, 182
    names = [LABELS["stuff"][found[k - 1]] for k in (1, 13, 14, 90, 92, 182)]
    assert names == ["person", "stop sign", "parking meter", "toothbrush", "banner", "wood"]
    assert [found[k - 1] for k in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)] == [255] * 11  # never labelled


def test_coco_stuff_numbered_anew(tmp_path):
    for kind, image in (("images", photo()), ("annotations", grey(90))):
        end = ".jpg" if kind == "images" else "_labelTrainIds.png"
        write(tmp_path / f"{kind}/val2017/1{end}", image)
    assert open_words(tmp_path, "stuff")[0].truth(0).max() == 90


def test_pascal_context(tmp_path):
    (tmp_path / "ImageSets/SegmentationContext").mkdir(parents=True)
    (tmp_path / "ImageSets/SegmentationContext/val.txt").write_text("a\nb\n")
    for name, value in (("a", 0), ("b", 59)):
        write(tmp_path / f"JPEGImages/{name}.jpg", photo())
        write(tmp_path / f"SegmentationClassContext/{name}.png", grey(value))
    val, top = open_words(tmp_path, "context")
    assert len(val) == 2 and top == 58 and (val.truth(0) == 255).all() and (val.truth(1) == 58).all()
    assert LABELS["context"][58] == "wood" and len(LABELS["context"]) == 59


@pytest.mark.parametrize("lists", [
    dict(aug="e\nf\n"), dict(train_aug="/JPEGImages/a.jpg /SegmentationClassAug/a.png\nb\ne\nf\n"),
    dict(trainaug="a\nb\ne\nf\n")])
def test_vocs_own_masks_come_first_and_score_alone(lists, tmp_path):
    c = write_voc(tmp_path, dict(train="a\nb\n", val="c\nd\n") | lists)
    train, val, n = labels.open_segmentation(c)
    assert [train.truth(i).max() for i in range(len(train))] == [1, 1, 2, 2] and n == 21
    assert [val.truth(i).max() for i in range(len(val))] == [1, 1]


def test_voc_mistakes(tmp_path):
    c = write_voc(tmp_path, dict(train="a\n", val="c\ne\n"))
    with pytest.raises(ValueError, match="val.txt names 1 of 2 files that are not there; .*SegmentationClass/e.png"):
        labels.open_segmentation(c)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("c\nd\n")
    (tmp_path / "ImageSets/Segmentation/aug.txt").write_text("d\ne\n")
    with pytest.raises(ValueError, match="aug.txt names 1 images of val.txt; train may not see d"):
        labels.open_segmentation(c)


@pytest.mark.parametrize("truth, says", [
    (grey(1, (60, 40)), "b.png has 40x60 pixels, its image 60x40; wanted the image's"),
    (grey(1, (20, 30)), "b.png has 30x20 pixels, its image 60x40"),
    (photo(), "b.png has mode RGB; wanted class numbers"),
    (grey(151), "b.png has label 151; wanted 150 classes from 1"),
    (grey(0), "all labels of .*, train or val, are ignored")])
def test_wrong_truths_of_val_are_named_before_weights_are_loaded(truth, says, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *words: 1 / 0)
    for split in "training", "validation":
        write(tmp_path / f"images/{split}/b.jpg", photo())
        write(tmp_path / f"annotations/{split}/b.png", truth if split == "validation" else grey(1))
    with pytest.raises(ValueError, match=says) as error:
        evaluate.main(["--task", "ade20k", "--weights", "pixels", "--data", str(tmp_path), "--device", "cpu"])
    assert "\n" not in str(error.value)


def test_val_has_no_class_of_its_own(tmp_path):
    for k, split in enumerate(("training", "validation")):
        write(tmp_path / f"images/{split}/b.jpg", photo())
        write(tmp_path / f"annotations/{split}/b.png", grey(k))
    with pytest.raises(ValueError, match="val of .* has label 1, which no truth of train has; wanted one numbering"):
        labels.open_segmentation(TASKS["segmentation"].config(data=str(tmp_path)))


@pytest.mark.parametrize("task, says", [("ade20k", "has no folder images/training or images/train; ade20k wants one"),
                                        ("voc", "has no folder JPEGImages; voc wants one"),
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


def test_loveda(tmp_path):
    """As its zips unpack: two places a split, whose files may have one name; 0 is not labelled"""
    for split, counts in ("Train", (2, 1)), ("Val", (1, 1)):
        for place, n in zip(("Urban", "Rural"), counts, strict=True):
            for k in range(n):
                write(tmp_path / f"{split}/{place}/images_png/{k}.png", photo(k))
                write(tmp_path / f"{split}/{place}/masks_png/{k}.png", np.repeat(np.arange(8, dtype=np.uint8), 5)[
                    :, None].repeat(60, 1))
    train, val, n = labels.open_segmentation(TASKS["loveda"].config(data=str(tmp_path), workers=0))
    assert (len(train), len(val), n) == (3, 2, 7) and train.truth(0)[::5, 0].tolist() == [255, 0, 1, 2, 3, 4, 5, 6]
    write(tmp_path / "Val/Rural/masks_png/0.png", np.full((40, 60), 8, np.uint8))
    with pytest.raises(ValueError, match="0.png has label 8; wanted 7 classes from 1 on"):
        labels.open_segmentation(TASKS["loveda"].config(data=str(tmp_path), workers=0))
    (tmp_path / "Val/Urban").rename(tmp_path / "Val/urban")
    with pytest.raises(ValueError, match="has no folder Val/Urban/images_png; loveda wants one"):
        labels.open_segmentation(TASKS["loveda"].config(data=str(tmp_path), workers=0))


def isaid(root, sizes):
    for split in "train", "val":
        for k, size in enumerate(sizes):
            write(root / f"{split}/images/P{k:04}.png", photo(k, size))
            numbers = np.arange(size[0] * size[1]).reshape(size) // 7 % 16
            write(root / f"{split}/Semantic_masks/P{k:04}_instance_color_RGB.png",
                  np.array(labels.COLOURS, np.uint8)[numbers])
    return TASKS["isaid"].config(data=str(root), workers=0)


def test_isaid_in_patches(tmp_path):
    """Of 896, each 512 after the last one, which ends with the image; smaller ones on black, what is beside is void"""
    sizes = (900, 1500), (40, 60)
    train, val, n = labels.open_segmentation(isaid(tmp_path, sizes))
    assert n == 16 and len(train) == len(val) == 2 * 3 + 1
    whole = photo(0, sizes[0])
    for i, (y, x) in enumerate([(0, 0), (0, 512), (0, 604), (4, 0), (4, 512), (4, 604)]):
        assert np.array_equal(train.image(i).permute(1, 2, 0), whole[y : y + 896, x : x + 896])
        numbers = np.arange(900 * 1500).reshape(900, 1500) // 7 % 16
        assert np.array_equal(train.truth(i), numbers[y : y + 896, x : x + 896])
    assert train.image(6).shape == (3, 896, 896) and (train.image(6)[:, 40:] == 0).all()
    assert (train.truth(6)[40:] == 255).all() and (train.truth(6)[:, 60:] == 255).all()
    assert train.truth(6)[0, :9].tolist() == [0] * 7 + [1] * 2


def test_isaid_is_scored_patch_by_patch(tmp_path, monkeypatch):
    """As published numbers are, of 11,644 patches: a pixel in the overlap of two counts twice"""
    monkeypatch.setattr(labels, "PATCH", 32)
    monkeypatch.setattr(labels, "STEP", 20)
    c = isaid(tmp_path, [(40, 60)])
    _, val, n = data = labels.open_segmentation(c)
    right = ((i, F.one_hot(torch.from_numpy(val.truth(i)).long(), n).permute(2, 0, 1)) for i in range(len(val)))
    counts, _ = tallied(right, data, c)
    assert len(val) == 2 * 3 and counts.sum() == counts.trace() == 6 * 32 * 32 > 40 * 60


def test_isaids_colours(tmp_path):
    c = isaid(tmp_path, [(40, 60)])
    assert len(set(labels.COLOURS)) == 16
    colours = np.zeros((40, 60, 3), np.uint8)
    colours[7, 9] = 0, 63, 62  # of one pixel
    write(tmp_path / "val/Semantic_masks/P0000_instance_color_RGB.png", colours)
    with pytest.raises(ValueError, match="_instance_color_RGB.png has the colour 0,63,62; wanted one of iSAID"):
        labels.open_segmentation(c)


class HDF5:
    """Stands for h5py.File: an array that numpy has saved"""

    def __init__(self, path, mode):
        try:
            self.array = np.load(path.open("rb"))
        except ValueError as error:
            raise OSError("no such signature") from error

    def __enter__(self):
        return dict(dataset=self.array)

    def __exit__(self, *_):
        pass


def hypersim(root, columns="scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,"
                           "split_partition_name"):
    rows = []
    for split, scene in ("train", "ai_001_001"), ("val", "ai_002_003"):
        for frame in 0, 7, 12:
            rows.append(f"{scene},cam_00,{frame},{frame != 7},,{split}")
            labels = np.repeat(np.array([-1, 1, 40, 0], np.int16), 15)[None].repeat(40, 0)
            write(root / f"{scene}/images/scene_cam_00_final_preview/frame.{frame:04}.tonemap.jpg", photo())
            path = root / f"{scene}/images/scene_cam_00_geometry_hdf5/frame.{frame:04}.semantic.hdf5"
            path.parent.mkdir(exist_ok=True)
            np.save(path.open("wb"), labels)
    rows.append("ai_002_003,cam_00,99,True,,val")
    (root / "metadata_images_split_scene_v1.csv").write_text("\n".join([columns, *rows]))
    return TASKS["hypersim"].config(data=str(root), workers=0)


def test_hypersim(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=HDF5))
    train, val, n = labels.open_segmentation(hypersim(tmp_path))
    assert len(train) == len(val) == 2 and n == 40
    assert train.truth(0)[0, ::15].tolist() == [255, 0, 39, 255]
    assert "skipped 1 frames of val that are not in" in capsys.readouterr().out


def test_hypersim_that_cannot_be_read(tmp_path, monkeypatch):
    c = hypersim(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="wants h5py, which is not installed; pip install -e ..geo"):
        labels.open_segmentation(c)
    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=HDF5))
    next(tmp_path.rglob("frame.0000.semantic.hdf5")).write_text("no numbers")
    with pytest.raises(ValueError, match="frame.0000.semantic.hdf5 cannot be read .no such signature"):
        labels.open_segmentation(c)
    with pytest.raises(ValueError, match="has no column frame_id; wanted scene_name"):
        labels.open_segmentation(hypersim(tmp_path, "scene_name,camera_name"))
    with pytest.raises(ValueError, match="of 2 frames of train that .* names none is in"):
        labels.open_segmentation(hypersim_without_photos(tmp_path))


def hypersim_without_photos(root):
    c = hypersim(root)
    for path in root.rglob("*.jpg"):
        path.unlink()
    return c
