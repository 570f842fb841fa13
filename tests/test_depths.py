"""sets/depths.py: folders and lists, crops, the pixels that count."""

import numpy as np
import pytest
from test_labels import photo, write

import evaluate
from engine.task import SKIPPED
from sets import depths
from tasks import TASKS


@pytest.mark.parametrize("task, rows, cols", [("nyu", (45, 471), (41, 601)), ("depth", (0, 480), (0, 640))])
def test_scored_pixels(task, rows, cols):
    truth = np.full((480, 640), 3, np.float32)
    truth[100, 100], truth[101, 101], truth[102, 102], truth[103, 103] = 0, 10, 9e-4, 1.1e-3
    found = depths.scored_pixels(truth, depths.SETS[task]).numpy()
    exact = np.zeros((480, 640), bool)
    exact[slice(*rows), slice(*cols)] = True
    exact[100, 100] = exact[101, 101] = exact[102, 102] = False
    np.testing.assert_array_equal(found, exact)


def test_garg_is_rounded_down():
    """352 x 1216: rows 143 to 349, columns 43 to 1172."""
    found = depths.scored_pixels(np.full((352, 1216), 9, np.float32), depths.SETS["kitti"]).numpy()
    exact = np.zeros((352, 1216), bool)
    exact[143:349, 43:1172] = True
    np.testing.assert_array_equal(found, exact)


def test_nyus_share_of_1920_columns_is_exact():
    """3 x 41 = 123 of them lie left of what is scored, where 41 / 640 x 1920 is a little less in floating point."""
    found = depths.scored_pixels(np.full((1440, 1920), 3, np.float32), depths.SETS["nyu"])
    assert found.any(0).nonzero()[[0, -1], 0].tolist() == [123, 1802] and found.any(1).nonzero()[0] == 135


def test_depths_of_one_name_in_two_rooms_are_two(tmp_path):
    for split in "train", "test":
        for k, room in enumerate(("kitchen", "office"), 1):
            write(tmp_path / f"{split}/{room}/rgb_00001.jpg", photo(k))
            write(tmp_path / f"{split}/{room}/sync_depth_00001.png", np.full((40, 60), 1000 * k, np.uint16))
    train, val, _ = depths.open_depth(TASKS["depth"].config(data=str(tmp_path)))
    assert [[part.truth(i).max() for i in range(len(part))] for part in (train, val)] == [[1, 2]] * 2


def test_nyu_is_trained_between_43_and_608_45_and_472(tmp_path):
    for split in "train", "test":
        write(tmp_path / f"{split}/rgb_1.jpg", photo(0, (480, 640)))
        write(tmp_path / f"{split}/depth_1.png", np.full((480, 640), 2000, np.uint16))
    train, val, _ = depths.open_depth(TASKS["nyu"].config(data=str(tmp_path)))
    exact = np.zeros((480, 640))
    exact[45:472, 43:608] = 2
    np.testing.assert_array_equal(train.truth(0), exact)
    assert train.image(0).shape == (3, 480, 640) and val.truth(0).min() == 2


def test_nyu_as_bts_lists_it(tmp_path):
    """Two lists among those of KITTI; train below sync/, test below official_splits/test/."""
    for root, k in ("sync", 1), ("official_splits/test", 2):
        write(tmp_path / root / "kitchen_0028b/rgb_00045.jpg", photo())
        write(tmp_path / root / "kitchen_0028b/sync_depth_00045.png", np.full((40, 60), 1000 * k, np.uint16))
    inputs = tmp_path / "train_test_inputs"
    inputs.mkdir()
    row = "kitchen_0028b/rgb_00045.jpg {}kitchen_0028b/sync_depth_00045.png 518.8579\n"
    (inputs / "nyudepthv2_train_files_with_gt.txt").write_text("/" + row.format("/"))
    (inputs / "nyudepthv2_test_files_with_gt.txt").write_text(row.format(""))
    (inputs / "eigen_test_files_with_gt.txt").write_text("a b 1\n")
    train, val, _ = depths.open_depth(TASKS["nyu"].config(data=str(tmp_path)))
    assert (len(train), len(val), train.truth(0).max(), val.truth(0).max()) == (1, 1, 1, 2)


@pytest.mark.parametrize("below", ["", "/train"])
def test_kitti_as_bts_lists_it(below, tmp_path, capsys):
    """Raw drives beside data_depth_annotated/, as its zip unpacks or with both halves together."""
    SKIPPED.clear()
    drive = "2011_09_26_drive_0001_sync"
    image, depth = (f"{root}/image_02/{end}0000000069.png" for root, end in (
        (f"2011_09_26/{drive}", "data/"), (f"{drive}/proj_depth/groundtruth", "")))
    row = f"{image} {depth} 721.5377\n"
    write(tmp_path / image, photo(0, (375, 1242)))
    write(tmp_path / f"data_depth_annotated{below}" / depth, np.full((375, 1242), 2560, np.uint16))
    none = "2011_09_26/x/image_02/data/0000000000.png None 721.5\n"
    (tmp_path / "eigen_train_files_with_gt.txt").write_text(row)
    (tmp_path / "eigen_test_files_with_gt.txt").write_text(none + row)
    train, val, _ = depths.open_depth(TASKS["kitti"].config(data=str(tmp_path)))
    assert (len(train), len(val), val.truth(0).shape, val.truth(0).max()) == (1, 1, (352, 1216), 10)
    assert sum(SKIPPED.values()) == 1 and "skipped 1 images of" in capsys.readouterr().out


@pytest.mark.parametrize("truth, says", [
    (np.full((60, 40), 2000, np.uint16), "depth_1.png has 40x60 pixels, its image 60x40; wanted the image's"),
    (np.full((40, 60), 200, np.uint8), "depth_1.png has mode L, 1 x 8 bits; wanted one of 16 bits, 1000 a metre"),
    (photo(), "depth_1.png has mode RGB, 3 x 8 bits"),
    (np.full((40, 60), 20000, np.uint16), "depth_1.png is 20 m deep at its median, at 1000 a metre, wanted 0.02 to 10"),
    (np.full((40, 60), 3, np.float32), "depth_1.tiff is 0.003 m deep at its median"),
    (np.zeros((40, 60), np.uint16), "depth_1.png has no known depth below 10 m to score; leave it out")])
def test_wrong_depths_of_test_are_named_before_weights_are_loaded(truth, says, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *words: 1 / 0)
    for split in "train", "test":
        write(tmp_path / f"{split}/rgb_1.jpg", photo())
        good = np.full((40, 60), 2000, np.uint16)
        write(tmp_path / f"{split}/depth_1.{'png' if truth.dtype != np.float32 or split == 'train' else 'tiff'}",
              truth if split == "test" else good)
    with pytest.raises(ValueError, match=says) as error:
        evaluate.main(["--task", "nyu", "--weights", "pixels", "--data", str(tmp_path), "--device", "cpu"])
    assert "\n" not in str(error.value)


def test_no_depth_is_known(tmp_path):
    for split, value in ("train", 0), ("test", 2000):
        write(tmp_path / f"{split}/rgb_1.jpg", photo())
        write(tmp_path / f"{split}/depth_1.png", np.full((40, 60), value, np.uint16))
    with pytest.raises(ValueError, match="no depth of train of .* is known"):
        depths.open_depth(TASKS["nyu"].config(data=str(tmp_path)))


def test_a_list_with_files_that_are_missing(tmp_path):
    for split in "train", "test":
        (tmp_path / f"nyu_{split}.txt").write_text("a.jpg a.png 518\nb.jpg b.png 518\n")
    write(tmp_path / "a.jpg", photo())
    with pytest.raises(ValueError, match="nyu_train.txt names 1 of 2 files that are not there; the first: .*/b.jpg"):
        depths.open_depth(TASKS["nyu"].config(data=str(tmp_path)))
    (tmp_path / "nyudepthv2_train_files_with_gt.txt").touch()
    with pytest.raises(ValueError, match="nyu_train.txt and .*nyudepthv2_train.* are both lists of train"):
        depths.open_depth(TASKS["nyu"].config(data=str(tmp_path)))


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
    assert [train.truth(i).max() for i in (0, 1)] == [1, 3] and len(val) == 2 and form.top == 10
    train, val, form = depths.open_depth(TASKS["kitti"].config(data=str(lists)))
    assert len(train) == len(val) == 1 and form.top == 80
    assert train.truth(0).shape == (352, 1216) and train.image(0).shape == (3, 352, 1216) and train.truth(0).max() == 2


def test_lower_middle_is_kittis_crop():
    array = np.arange(375 * 1242).reshape(375, 1242)
    np.testing.assert_array_equal(depths.lower_middle(array, (352, 1216)), array[23:, 13:1229])


def put(folder, name, array):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    array.tofile(path) if path.suffix == ".JPG" else np.save(path, array)


def opened(task, folder):
    SKIPPED.clear()
    return depths.open_depth(TASKS[task].config(data=str(folder), head="x"))


def test_eth3d_as_marigold_lists_it(tmp_path, monkeypatch):
    monkeypatch.setattr(depths, "ETH3D", (40, 60))
    truth = np.arange(2400, dtype=np.float32).reshape(40, 60) / 100 + 0.5
    truth[3, 4] = np.inf
    image, raw = "rgb/pipes/images/dslr_images/DSC_1.JPG", "depth/pipes_dslr_depth/pipes/ground_truth_depth/DSC_1.JPG"
    write(tmp_path / image, photo())
    put(tmp_path, raw, truth)
    (tmp_path / "eth3d_filename_list.txt").write_text(f"{image} {raw}\n")
    train, val, form = opened("eth3d", tmp_path)
    assert train is None and val.truth(0)[3, 4] == 0 and val.truth(0)[3, 5] == truth[3, 5] and form.bins == 100
    assert not SKIPPED and depths.scored_pixels(val.truth(0), form).sum() == 2399
    put(tmp_path, raw, truth[:20])
    with pytest.raises(ValueError, match="DSC_1.JPG holds 1,200 numbers; wanted 60x40 of 32 bits"):
        opened("eth3d", tmp_path)


def test_diode_as_marigold_lists_it(tmp_path, capsys):
    truth = np.full((40, 60, 1), 20, np.float32)
    truth[:2, :2, 0] = [[0.5, 0.7], [np.nan, 351]]
    mask = np.ones((40, 60), np.float32)
    mask[9] = 0
    name = "outdoor/scene_00022/scan_00195/00022_00195_outdoor_280_030"
    write(tmp_path / f"{name}.png", photo())
    put(tmp_path, f"{name}_depth.npy", truth)
    put(tmp_path, f"{name}_depth_mask.npy", mask)
    (tmp_path / "diode_val_all_filename_list.txt").write_text(f"{name}.png {name}_depth.npy {name}_depth_mask.npy\n")
    _, val, form = opened("diode", tmp_path)
    scored = depths.scored_pixels(val.truth(0), form)
    assert scored[:2, :3].tolist() == [[False, True, True], [False, False, True]] and not scored[9].any()
    assert "skipped the pixels that are nan of 1 depths" in capsys.readouterr().out and [*SKIPPED.values()] == [1]
    put(tmp_path, f"{name}_depth_mask.npy", mask[1:])
    with pytest.raises(ValueError, match=r"has float32 \(40, 60\), its mask \(39, 60\); wanted float32, and a mask"):
        opened("diode", tmp_path)
    (tmp_path / f"{name}_depth_mask.npy").unlink()
    with pytest.raises(ValueError, match="or .*_depth_mask.npy cannot be read"):
        opened("diode", tmp_path)
    (tmp_path / "diode_val_all_filename_list.txt").unlink()
    with pytest.raises(ValueError, match="diode_val_all_filename_list.txt cannot be read"):
        opened("diode", tmp_path)


def test_relative_nyu_and_kitti(tmp_path):
    for k in 1, 2:
        write(tmp_path / f"test/bath/rgb_{k}.png", photo())
        write(tmp_path / f"test/bath/depth_{k}.png", np.full((40, 60), 1000 * k, np.uint16))
    (tmp_path / "filename_list_test.txt").write_text("test/bath/rgb_2.png test/bath/depth_2.png filled_2.png\n")
    train, val, form = opened("nyu_relative", tmp_path)
    assert train is None and len(val) == 1 and val.truth(0).max() == 2 and form.relative and form.top == 10
    assert depths.SETS["nyu"].scored == form.scored and not depths.SETS["nyu"].relative
    scored = depths.scored_pixels(np.full((352, 1216), 9, np.float32), depths.SETS["kitti_relative"])
    rows, cols = (scored.any(k).nonzero() for k in (1, 0))
    assert (rows[0], rows[-1], cols[0], cols[-1]) == (117, 320, 43, 1171)


def test_images_to_train_on_without_depth_are_left_out_and_counted(tmp_path, capsys):
    for split, n in ("train", 3), ("test", 1):
        for i in range(n):
            write(tmp_path / f"{split}/rgb_{i}.jpg", photo())
            write(tmp_path / f"{split}/depth_{i}.png", np.full((40, 60), 2000 * (i != 1), np.uint16))
    SKIPPED.clear()
    train, val, _ = depths.open_depth(TASKS["depth"].config(data=str(tmp_path)))
    assert len(train) == 2 and len(val) == 1 and [*SKIPPED.values()] == [1]
    assert "skipped 1 images of train of which no depth is known" in capsys.readouterr().out
