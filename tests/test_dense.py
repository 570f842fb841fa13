"""dense.py: an oracle scores 100, noise scores chance; heads, windows, losses and layouts against plain loops."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import eigh
from scipy.ndimage import label

import dense
from engine.features import fitted
from engine.metrics import IGNORE
from evaluate import EvaluateConfig

CPU = torch.device("cpu")


class Source:
    """Images that nobody looks at, with their truths."""

    def __init__(self, truths):
        self.truths = truths

    def __len__(self):
        return len(self.truths)

    def image(self, i):
        return torch.zeros(3, 16, 16, dtype=torch.uint8)

    def truth(self, i):
        return self.truths[i]


class Listed(list):
    """What Stored is, in memory."""
    views = property(lambda self: Row(m for each in self for m in each))


class Row(list):
    shapes = property(lambda self: [m.shape for m in self])


class Oracle:
    """Patches whose features are feature(truth), a patch for each pixel; or noise."""
    device, whole = CPU, partial(fitted, side=16, patch=16)

    def __init__(self, feature, noise=False):
        self.feature, self.noise = feature, noise

    def __call__(self, name, source, views_of):
        mirrored = getattr(views_of, "keywords", {}).get("mirrored")
        found = []
        for i in range(len(source)):
            m = self.feature(source.truth(i)).astype(np.float16)
            m = np.random.default_rng([i, name == "val"]).normal(size=m.shape).astype(np.float16) if self.noise else m
            found.append([m, m[:, ::-1].copy()] if mirrored else [m])
        return Listed(found)

    def keep(self, name, arrays_of, n):
        return Listed(arrays_of(i) for i in range(n))


def one_hot(truth, n=5):
    return np.eye(n)[np.where(truth == IGNORE, 0, truth)]


def random_labels(n, seed):
    rng = np.random.default_rng(seed)
    truths = [np.kron(rng.choice(5, (4, 4), p=(0.4, 0.15, 0.15, 0.15, 0.15)), np.ones((4, 4))) for _ in range(n)]
    return Source([truth.astype(np.uint8) for truth in truths])

# --------------------------------------------------------------------------------
# Segmentation


@pytest.mark.parametrize("noise, control, low, high", [(0, 0, 99, 100), (1, 0, 0, 20), (0, 1, 0, 25)])
def test_oracle_segments_and_noise_does_not(noise, control, low, high, monkeypatch):
    monkeypatch.setattr(dense, "open_segmentation", lambda c: (random_labels(48, 0), random_labels(12, 1), 5))
    c = EvaluateConfig(task="segmentation", resolution=16, iterations=200, control=bool(control))
    found = dense.segmentation(Oracle(one_hot, noise), c)
    assert low <= found["miou"] <= high and 4 < found["chance_miou"] < 12


@pytest.mark.parametrize("length, side, wanted", [(512, 512, [0]), (683, 512, [0, 171]), (1024, 512, [0, 341, 512]),
                                                  (853, 512, [0, 341]), (854, 512, [0, 341, 342])])
def test_windows_are_341_apart_and_end_with_the_image(length, side, wanted):
    assert dense.starts(length, side) == wanted


@pytest.mark.parametrize("H, W", [(48, 80), (80, 48), (32, 32)])
def test_label_map_averages_windows(H, W):
    """A head that copies: logits are the maps. By hand: each window enlarged and added where it lies."""
    views = dense.windows(torch.zeros(3, H, W, dtype=torch.uint8), 32)
    maps = [np.random.default_rng(i).normal(size=(2, 2, 3)).astype(np.float16) for i in range(len(views))]
    ours = dense.label_map(lambda maps: [m.permute(2, 0, 1) for m in maps], maps, (H, W), 32, CPU)
    scale = 32 / min(H, W)
    h, w = round(H * scale), round(W * scale)
    total, count, k = np.zeros((3, h, w)), np.zeros((h, w)), 0
    for y in dense.starts(h, 32):
        for x in dense.starts(w, 32):
            view = F.interpolate(torch.tensor(maps[k]).float().permute(2, 0, 1)[None], (32, 32), mode="bilinear")[0]
            total[:, y : y + 32, x : x + 32] += view.numpy()
            count[y : y + 32, x : x + 32] += 1
            k += 1
    exact = F.interpolate(torch.tensor(total / count)[None], (H, W), mode="bilinear")[0].argmax(0)
    assert k == len(maps) and (ours == exact).float().mean() > 0.999


def test_segmentation_loss_counts_ignored_pixels():
    """Mean over all pixels of the cross entropy, which is 0 where the truth is ignored."""
    rng = np.random.default_rng(0)
    out, truth = torch.tensor(rng.normal(size=(4, 6, 6))), rng.integers(0, 4, (6, 6))
    truth[0] = IGNORE
    log = torch.log_softmax(out, 0)
    exact = -sum(log[truth[y, x], y, x] for y in range(1, 6) for x in range(6)) / 36
    assert sum(dense.segmentation_loss([out], [torch.tensor(truth)])) == pytest.approx(exact.item(), rel=1e-6)
    twice = sum(dense.segmentation_loss([out, 0 * out], [torch.tensor(truth)] * 2))
    assert twice == pytest.approx((exact.item() + 30 / 36 * np.log(4)) / 2, rel=1e-6)


def test_head_is_norm_then_linear():
    head = dense.LinearHead(4, 3).double()
    maps = [torch.randn(2, 3, 4).double(), torch.randn(5, 1, 4).double()]
    x = torch.cat([m.flatten(0, 1) for m in maps])
    unit = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    exact = unit @ head.linear.weight.T + head.linear.bias
    found = head(maps)
    assert [tuple(m.shape) for m in found] == [(3, 2, 3), (3, 5, 1)]
    torch.testing.assert_close(torch.cat([m.flatten(1).T for m in found]), exact)


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
            labels = np.repeat(np.array([0, 1, 3, 255], np.uint8), 15)[None].repeat(40, 0)
            write(tmp_path / f"annotations/{split}/{name}.png", labels)
    write(tmp_path / "images/training/alone.jpg", photo())
    train, val, n = dense.open_segmentation(EvaluateConfig(task=task, data=str(tmp_path), ignore=ignore))
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
        train, val, found = dense.open_segmentation(EvaluateConfig(task=task, data=str(tmp_path)))
        assert (len(train), len(val), found, train.truth(0).max()) == (1, 1, n, largest)


@pytest.mark.parametrize("task, says", [("ade20k", "has no folder images/training or images/train; ade20k wants one"),
                                        ("voc", "has no folder SegmentationClassAug or SegmentationClass"),
                                        ("nyu", "has no folder train; nyu wants one"),
                                        ("discovery", "has no folder JPEGImages/480p or JPEGImages")])
def test_other_folders_are_named(task, says, tmp_path):
    opener = dict(nyu=dense.open_depth, discovery=dense.open_discovery).get(task, dense.open_segmentation)
    with pytest.raises(ValueError, match=says) as error:
        opener(EvaluateConfig(task=task, data=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_photo_is_no_annotation(tmp_path):
    write(tmp_path / "a.png", photo())
    with pytest.raises(ValueError, match="a.png has mode RGB; wanted class numbers"):
        dense.read_labels(tmp_path / "a.png", dense.Labels())
    write(tmp_path / "b.png", np.full((4, 5), 150, np.uint8))
    assert dense.read_labels(tmp_path / "b.png", dense.Labels(150, first=1)).max() == 149
    with pytest.raises(ValueError, match="b.png has label 150; wanted 150 classes from 0 on"):
        dense.read_labels(tmp_path / "b.png", dense.Labels(150))

# --------------------------------------------------------------------------------
# Object discovery


def test_oracle_discovers(monkeypatch):
    rng, boxes = np.random.default_rng(0), []
    for _ in range(6):
        top, left = rng.integers(0, 9, 2)
        boxes.append(np.array([[left, top, left + 5, top + 7]], float))

    def filled(box):
        (left, top, right, bottom), out = box[0].astype(int), np.zeros((16, 16, 2))
        out[..., 0], out[top:bottom, left:right] = 1, (0, 1)
        return out

    monkeypatch.setattr(dense, "open_discovery", lambda c: Source(boxes))
    c = EvaluateConfig(task="discovery", resolution=16)
    assert dense.discovery(Oracle(filled), c)["corloc"] == 100
    assert dense.discovery(Oracle(filled, noise=True), c)["corloc"] < 40


def test_cut_is_scipys_generalised_eigenvector():
    x = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(x.flatten(0, 1).double(), dim=1)
    for threshold, ours in zip(dense.THRESHOLDS, dense.cut_graph(x), strict=True):
        weight = np.where((unit @ unit.T).numpy() > threshold, 1.0, dense.FAINT)
        degree = np.diag(weight.sum(1))
        exact = eigh(degree - weight, degree, subset_by_index=[1, 1])[1][:, 0]
        assert abs(np.corrcoef(ours.numpy(), exact)[0, 1]) > 1 - 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_main_object_is_the_seeds_component(seed):
    x = np.random.default_rng(seed).normal(size=(7, 9))
    at = np.unravel_index(np.abs(x).argmax(), x.shape)
    inside = x > x.mean()
    parts = label(inside if inside[at] else ~inside)[0]
    np.testing.assert_array_equal(dense.main_object(torch.tensor(x.ravel()), (7, 9)), parts == parts[at])


def test_boxes_of_voc_and_davis(tmp_path):
    voc, davis = tmp_path / "voc", tmp_path / "davis"
    write(voc / "JPEGImages/1.jpg", photo())
    (voc / "Annotations").mkdir()
    box = "".join(f"<{name}>{x}</{name}>" for name, x in (("xmin", 3), ("ymin", 4), ("xmax", 10), ("ymax", 20)))
    (voc / "Annotations/1.xml").write_text(f"<a><object><bndbox>{box}</bndbox></object></a>")
    found = dense.open_discovery(EvaluateConfig(task="discovery", data=str(voc)))
    assert len(found) == 1 and found.truth(0).tolist() == [[2, 3, 10, 20]]
    mask = np.zeros((40, 60), np.uint8)
    mask[3:20, 2:10], mask[39, 59] = 1, 2
    write(davis / "JPEGImages/480p/dog/00000.jpg", photo())
    write(davis / "Annotations/480p/dog/00000.png", mask)
    found = dense.open_discovery(EvaluateConfig(task="discovery", data=str(davis)))
    assert found.truth(0).tolist() == [[2, 3, 10, 20], [59, 39, 60, 40]]


def test_the_whole_image_finds_no_object_of_shapes():
    source = dense.open_discovery(EvaluateConfig(task="discovery", resolution=96, limit=4))
    assert len(source) == 4 and source.image(0).shape == (3, 96, 96)
    for i in range(4):
        boxes = source.truth(i)
        assert len(boxes) and dense.box_overlap((0, 0, 96, 96), boxes).max() < 0.5
