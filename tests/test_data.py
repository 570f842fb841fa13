"""
data.py: crops against torchvision, draws against the recipe's numbers, batches that ranks do not
change. Its sources: test_data_sources.py.
"""

import ctypes
import itertools
import mmap
import os
import sys
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

import data
import ops
from data import Batches, CropConfig, draw_crops, draw_masks
from engine.images import resize
from engine.order import permutation
from recipes import TrainConfig

CONFIG = TrainConfig(global_size=32, local_size=16, n_local=3, batch=8, group=8, patch_size=8, seed=0,
                     mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


class Noise:
    """n images of different sizes; those in `broken` cannot be read."""

    def __init__(self, n, broken=()):
        self.n, self.broken = n, broken

    def __len__(self):
        return self.n

    def load(self, i):
        if i in self.broken:
            raise OSError("cut short")
        return torch.from_numpy(np.random.default_rng(i).integers(0, 256, (3, 40 + i, 50 - i), dtype=np.uint8))

    def name(self, i):
        return f"noise {i}"

# --------------------------------------------------------------------------------
# Crops


def draws(c, n, height, width):
    rng = np.random.default_rng(1)
    return [np.stack(part) for part in zip(*(draw_crops(rng, c, height, width) for _ in range(n)), strict=True)]


def test_boxes_have_the_areas_shapes_and_places_asked_for():
    top, left, h, w = draws(CropConfig(), 400, 1800, 2000)[0].transpose(2, 0, 1)
    assert top.min() >= 0 and left.min() >= 0 and (top + h).max() <= 1800 and (left + w).max() <= 2000
    share, ratio = h * w / (1800 * 2000), w / h
    for views, low, high in (slice(0, 2), 0.32, 1), (slice(2, 10), 0.05, 0.32):
        assert low * 0.99 < share[:, views].min() < low * 1.1 and high * 0.9 < share[:, views].max() < high * 1.01
        assert 0.74 < ratio[:, views].min() < 0.76 and 1.31 < ratio[:, views].max() < 1.35
    assert share[:, 2:].mean() == pytest.approx((0.05 + 0.32) / 2, abs=0.006)          # uniform in area
    assert np.log(ratio[:, 2:]).mean() == pytest.approx(0, abs=0.012)                  # and in log ratio
    for place in top / (1801 - h), left / (2001 - w):
        assert (place.mean(), place.std()) == pytest.approx((0.5, 12 ** -0.5), abs=0.02)


@pytest.mark.parametrize("height, width, largest", [(1, 500, 1), (500, 3, 12), (1, 1, 1), (2, 2, 4), (30, 29, 870)])
def test_extreme_images_are_cut_too(height, width, largest):
    """largest: pixels of the largest box whose sides are at most 4:3"""
    boxes = draws(CONFIG, 20, height, width)[0]
    top, left, h, w = boxes.transpose(2, 0, 1)
    assert boxes.min() >= 0 and (top + h).max() <= height and (left + w).max() <= width
    assert 0 < (h * w).min() and (h * w).max() <= largest
    image = torch.full((3, height, width), 9, dtype=torch.uint8)
    assert torch.equal(data.cut(image, boxes[0, 0], True, 32), torch.full((3, 32, 32), 9, dtype=torch.uint8))


@pytest.mark.skipif(not ops.BUILT, reason="csrc is not built")
def test_kernel_of_cut_and_definition_are_the_same_bytes():
    """Photos of every size, to crops of every size; what is not stored pixel by pixel the definition cuts."""
    rng = np.random.default_rng(2)
    for size in 1, 5, 16, 37, 64, 224:
        for H, W in (1, 1), (3, 200), (150, 2), (64, 64), *rng.integers(10, 130, (8, 2)):
            image = torch.from_numpy(rng.integers(0, 256, (H, W, 3), dtype=np.uint8)).permute(2, 0, 1)
            h, w = int(rng.integers(1, H + 1)), int(rng.integers(1, W + 1))
            box, flip = (int(rng.integers(0, H - h + 1)), int(rng.integers(0, W - w + 1)), h, w), bool(h % 2)
            ours = data.cut(image, box, flip, size)
            assert torch.equal(data.cut(image.contiguous(), box, flip, size), ours)
            ops.use_kernels("off")
            assert torch.equal(data.cut(image, box, flip, size), ours)
            ops.use_kernels("auto")


@pytest.mark.skipif(not ops.BUILT, reason="csrc is not built")
def test_kernel_of_cut_shrinks_as_the_definition_does():
    """So far that weights have as many bits as they may, 22 and not what the largest has room for."""
    rng = np.random.default_rng(3)
    for _ in range(40):  # a bit fewer is another byte in one of some thousand
        image = torch.from_numpy(rng.integers(0, 256, (4000, 64, 3), dtype=np.uint8)).permute(2, 0, 1)
        exact = resize(image.contiguous(), 8, 8)
        assert torch.equal(data.cut(image, (0, 0, 4000, 64), False, 8), exact)


@pytest.mark.skipif(not ops.BUILT or sys.platform != "linux", reason="csrc is not built, or memory cannot be guarded")
@pytest.mark.parametrize("height, width", [(16, 21), (32, 5), (17, 21), (1, 1)])
def test_kernel_of_cut_reads_nothing_beyond_the_photo(height, width):
    """It reads 16 rows of 16 bytes: the photo ends where memory does. A child, as it would be killed."""
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    room = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    assert libc.mprotect(ctypes.c_void_p(start + page), page, 0) == 0
    size = 3 * height * width
    image = torch.frombuffer(room, dtype=torch.uint8, count=size, offset=page - size).view(height, width, 3)
    child = os.fork()
    if not child:
        torch.ops.nanodino.cut(image.permute(2, 0, 1), (0, 0, height, width), False, 9)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_cut_is_torchvisions_resized_crop():
    image = Noise(1).load(0)
    exact = tv.resized_crop(image, 3, 5, 20, 31, [16, 16], tv.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(data.cut(image, (3, 5, 20, 31), False, 16), exact)
    assert torch.equal(data.cut(image, (3, 5, 20, 31), True, 16), exact.flip(2))


def test_quarter_turns():
    """Each of four as likely, whatever is mirrored; all else is drawn as without them"""
    image, c = Noise(1).load(0), replace(CONFIG, flip=0.5)
    plain, turned = (draws(replace(c, turns=turns), 1000, 40, 50) for turns in (False, True))
    assert (plain[0][0] == turned[0][0]).all() and (plain[2][0] == turned[2][0]).all()
    assert set(np.unique(plain[1])) == {0, 1}
    assert np.bincount(turned[1].ravel(), minlength=8) / turned[1].size == pytest.approx([1 / 8] * 8, abs=0.02)
    mirrored = data.cut(image, (3, 5, 20, 31), 1, 16)
    for quarters in range(4):
        found = data.cut(image, (3, 5, 20, 31), 2 * quarters + 1, 16)
        assert np.array_equal(found, np.rot90(mirrored, quarters, (1, 2)))


def test_chances_and_amounts():
    _, flips, colours = draws(CropConfig(flip=0.3), 1500, 100, 120)
    on = (colours != 0).mean(0)                                                        # G+L 12
    assert (flips.mean(), on[:, 0].mean(), on[:, 9].mean()) == pytest.approx((0.3, 0.8, 0.2), abs=0.02)
    assert (on[0, 10], on[1, 10], on[2:, 10].mean()) == pytest.approx((1, 0.1, 0.5), abs=0.03)
    assert on[1, 11] == pytest.approx(0.2, abs=0.04) and on[0, 11] == on[2:, 11].max() == 0
    for column, middle, spread in (1, 1, 0.4), (2, 1, 0.4), (3, 1, 0.2), (4, 0, 0.1):
        x = colours[..., column] - middle
        assert abs(x).max() <= spread + 1e-6
        assert (x.mean(), x.std()) == pytest.approx((0, spread / 3 ** 0.5), abs=0.01)
    sigma = colours[..., 10][colours[..., 10] > 0]
    assert sigma.min() >= 0.1 and sigma.max() <= 2 and sigma.mean() == pytest.approx(1.05, abs=0.03)
    orders, counts = np.unique(colours[..., 5:9].reshape(-1, 4), axis=0, return_counts=True)
    assert [tuple(o) for o in orders] == list(itertools.permutations(range(4))) and counts.min() > 0.8 * 15000 / 24

# --------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("n, h, w, share, ratio, counts", [
    (6, 3, 11, 0.5, (0.1, 0.5), [7, 12, 16]), (4, 1, 9, 0.5, (0.2, 0.9), [4, 8]), (2, 1, 1, 1, (0.1, 1), [0, 1]),
    (4, 2, 2, 1, (0, 1), [1, 2, 3, 4]), (5, 4, 7, 0.5, (1, 1), [28, 28]), (2, 7, 7, 0.5, (0.1, 0.5), [24]),
    (1, 7, 7, 0.5, (0.1, 0.5), []), (9, 7, 7, 0, (0.1, 0.5), []), (2, 8, 8, 1, (0, 0), [0, 0]),
])
def test_masks_are_exact_in_number(n, h, w, share, ratio, counts):
    """The i-th of m masked images gets int(P linspace(*ratio, m + 1)[i + 1]) patches."""
    for seed in range(5):
        masks = draw_masks(np.random.default_rng(seed), n, h, w, share, ratio)
        assert masks.shape == (n, h * w) and masks.dtype == bool
        assert sorted(masks.sum(1)) == [0] * (n - len(counts)) + counts


def test_masks_of_the_recipe():
    """1274 patches for 16 images at 256 px: 16 of their 32 crops, 0.1 to 0.5 of 256 patches, in blocks."""
    masks = np.stack([draw_masks(np.random.default_rng(seed), 32, 16, 16, 0.5, (0.1, 0.5)) for seed in range(20)])
    assert set(masks.sum((1, 2))) == {1274} and set(masks.any(2).sum(1)) == {16}
    batches = Batches(replace(CONFIG, global_size=256, patch_size=16, batch=16, group=16), Noise(20), 0, 16)
    assert {len(batches.masks(step, 0)["masked"]) for step in range(10)} == {1274}
    assert masks.any((0, 1)).all() and masks.any((0, 2)).all()                         # any patch of any crop
    rows = masks[masks.any(2)]
    assert len(np.unique(rows, axis=0)) == len(rows) == 320
    rows = rows.reshape(-1, 16, 16)
    right, below = rows[:, :, 1:][rows[:, :, :-1]].mean(), rows[:, 1:][rows[:, :-1]].mean()
    assert min(right, below) > 0.6                                                     # single patches: 0.37

# --------------------------------------------------------------------------------
# Batches


def equal(a, b):
    tables = [torch.cat(batch.pop("colours")) if "colours" in batch else torch.empty(0) for batch in (dict(a), dict(b))]
    return a.keys() == b.keys() and torch.equal(*tables) and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a if k != "colours")


def test_a_batch_is_a_function_of_seed_and_step():
    batch, again = (Batches(CONFIG, Noise(20), 0, 8)[3] for _ in range(2))
    assert equal(batch, again)
    for other in Batches(CONFIG, Noise(20), 0, 8)[4], Batches(replace(CONFIG, seed=1), Noise(20), 0, 8)[3]:
        differ = batch.keys() - {"broken", "weights", "colours"}
        assert not any(torch.equal(batch[key], other[key]) for key in differ)


def test_shapes_of_a_batch_and_what_its_masks_mean():
    batch = Batches(replace(CONFIG, mask_ratio=(0.3, 0.9)), Noise(20), 0, 8)[0]
    assert batch["global_crops"].shape == (16, 3, 32, 32) and batch["local_crops"].shape == (24, 3, 16, 16)
    assert batch["masks"].shape == (16, 16) and batch["masks"].dtype == torch.bool
    image, patch = batch["masks"].nonzero(as_tuple=True)
    assert torch.equal(batch["masked"], 16 * image + patch)
    assert torch.equal(batch["weights"], 1 / batch["masks"].sum(1)[image].float())
    assert len(Batches(replace(CONFIG, n_local=0), Noise(9), 0, 8)[0]["local_crops"]) == 0


@pytest.mark.parametrize("group", [8, 4])
def test_ranks_share_one_batch(group):
    c = replace(CONFIG, group=group)
    whole, *parts = (Batches(c, Noise(20), first, n)[5] for first, n in [(0, 8), (0, 4), (4, 4)])
    for key in "global_crops", "local_crops", "masks":
        views = [part[key].unflatten(0, (-1, 4)) for part in parts]
        assert torch.equal(whole[key].unflatten(0, (-1, 8)), torch.cat(views, dim=1)), key
    assert torch.equal(whole["indices"], torch.cat([part["indices"] for part in parts]))
    if group == 4:
        assert len(parts[0]["masked"]) == len(parts[1]["masked"])  # a rank of whole groups has constant shapes
        assert not torch.equal(parts[0]["masks"], parts[1]["masks"])


def test_colours_wait_for_the_device():
    batch = Batches(CONFIG, Noise(20), 0, 8)[2]
    assert batch["global_crops"].dtype == batch["local_crops"].dtype == torch.uint8
    done, tables = data.colour_batch(batch, CONFIG), batch.pop("colours")
    assert done.keys() == batch.keys() and [len(table) for table in tables] == [16, 24]
    for key, table in zip(("global_crops", "local_crops"), tables, strict=True):
        assert torch.equal(done.pop(key), data.augment(batch.pop(key), table, CONFIG.mean, CONFIG.std))
    assert equal(done, batch)


def test_every_epoch_visits_every_image_once_in_its_own_order():
    batches = Batches(CONFIG, Noise(12), 0, 8)
    series = torch.cat([batches[step]["indices"] for step in range(6)]).view(4, 12)
    assert (series.sort(1).values == torch.arange(12)).all() and len(series.unique(dim=0)) == 4


def test_a_neighbour_stands_in_for_an_unreadable_image():
    good, batch = (Batches(CONFIG, Noise(8, broken), 0, 8)[0] for broken in [(), (5, 6)])
    kept = (good["indices"] != 5) & (good["indices"] != 6)
    assert torch.equal(batch["indices"][kept], good["indices"][kept]) and not {5, 6} & set(batch["indices"].tolist())
    assert set(batch["broken"]) == {("noise 5", "cut short"), ("noise 6", "cut short")}
    with pytest.raises(ValueError, match="--data: none of 3 images in a row can be read; the last: cut short"):
        Batches(CONFIG, Noise(3, range(3)), 0, 8)[0]


def test_what_cannot_be_read_is_tried_once():
    source = Noise(8, (5,))
    source.load = MagicMock(side_effect=source.load)
    batches = Batches(CONFIG, source, 0, 8)
    assert all(batches[step]["broken"] == [("noise 5", "cut short")] for step in range(3))
    assert [call.args[0] for call in source.load.call_args_list].count(5) == 1


def test_a_disk_that_is_gone_is_found_after_64_tries():
    source = Noise(100_000, range(100_000))
    source.load = MagicMock(side_effect=OSError("no such device"))
    with pytest.raises(ValueError, match="--data: none of 64 images in a row can be read; the last: no such device"):
        Batches(CONFIG, source, 0, 8)[3]
    tried = [call.args[0] for call in source.load.call_args_list]
    assert tried == [permutation(100_000, CONFIG.seed, 5, 0, 0)(24 + k) for k in range(64)]

# --------------------------------------------------------------------------------
# For a Gram teacher, and of several resolutions


GRAM = replace(CONFIG, gram_teacher="self")


def test_the_gram_teacher_sees_the_same_crops_without_colours():
    """From one cut: the small ones are what is left of the large; normalised; in the same order."""
    plain = replace(GRAM, gram_size=64, jitter=0, grey=0, blur_global_1=0, blur_global_2=0, solarize=0, flip=0.5)
    cut, other = (Batches(c, Noise(20), 0, 8)[3] for c in (plain, replace(plain, jitter=1, grey=1, blur_global_1=1)))
    pixels, batch, other = cut["gram_crops"], data.colour_batch(cut, plain), data.colour_batch(other, plain)
    assert batch["gram_crops"].shape == (16, 3, 64, 64) and batch["gram_crops"].dtype == torch.float32
    assert torch.equal(batch["gram_crops"], other["gram_crops"])
    assert not torch.equal(batch["global_crops"], other["global_crops"])
    mean, std = (torch.tensor(v)[:, None, None] for v in (CONFIG.mean, CONFIG.std))
    assert torch.equal(((batch["gram_crops"] * std + mean) * 255).round().to(torch.uint8), pixels)
    small = torch.stack([resize(crop, 32, 32) for crop in pixels])
    assert torch.allclose((small / 255 - mean) / std, batch["global_crops"], atol=1e-6)   # measured: 0


def test_gram_crops_leave_the_rest_of_a_batch_as_it_is():
    """the same boxes and colours; of the same size, the same pixels, too"""
    batch, equal_size, none = (Batches(replace(GRAM, gram_size=side), Noise(20), 0, 8)[5] for side in (64, 32, 0))
    assert none.keys() == batch.keys() - {"gram_crops", "enlarged"}
    assert all(torch.equal(none[key], batch[key]) for key in ("local_crops", "masks", "indices"))
    assert torch.equal(none["global_crops"], equal_size["global_crops"])
    smaller = Batches(replace(GRAM, gram_size=16, jitter=0), Noise(20), 0, 8)[5]
    assert torch.equal(smaller["local_crops"], Batches(replace(CONFIG, jitter=0), Noise(20), 0, 8)[5]["local_crops"])


def test_images_smaller_than_the_gram_crop_are_counted():
    """images of Noise are 40+i x 50-i: with a short side of 40 at most, 45 at i = 5"""
    c = replace(GRAM, gram_size=44)
    batch = Batches(c, Noise(10), 0, 8)[0]
    assert batch["enlarged"] == sum(min(40 + i, 50 - i) < 44 for i in batch["indices"].tolist()) > 0


TRIPLES = "32x16x64*0.5,48x28x72*0.3,16x8x32*0.2"


def test_resolutions_are_drawn_by_step_and_as_often_as_they_say():
    c = replace(GRAM, resolutions=TRIPLES)
    drawn = [(at.global_size, at.local_size, at.gram_size) for at in map(c.at, range(2000))]
    shares = [drawn.count(sides) / 2000 for sides in ((32, 16, 64), (48, 28, 72), (16, 8, 32))]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.04)                             # 3 standard errors: 0.034
    assert drawn != [(at.global_size, at.local_size, at.gram_size) for at in map(replace(c, seed=1).at, range(2000))]
    assert c.at(7) == c.at(7) and GRAM.at(7) is GRAM


def test_a_batch_has_the_sides_that_its_step_draws():
    """on any rank and in any part; a local crop of 28 px with patches of 8 keeps its middle 24"""
    c = replace(GRAM, resolutions=TRIPLES, group=4)
    step = next(step for step in range(100) if c.at(step).local_size == 28)
    whole, *parts = (Batches(c, Noise(20), first, n)[step] for first, n in [(0, 8), (0, 4), (4, 4)])
    assert whole["global_crops"].shape[2:] == (48, 48) and whole["gram_crops"].shape[2:] == (72, 72)
    assert whole["masks"].shape == (16, 36) and whole["local_crops"].shape == (24, 3, 24, 24)
    for key in "global_crops", "local_crops", "gram_crops", "masks":
        views = [part[key].unflatten(0, (-1, 4)) for part in parts]
        assert torch.equal(whole[key].unflatten(0, (-1, 8)), torch.cat(views, dim=1)), key
    uncut = Batches(replace(c, resolutions="48x28x72*1", patch_size=4), Noise(20), 0, 8)[step]
    assert torch.equal(uncut["local_crops"][..., 2:26, 2:26], whole["local_crops"])
    split = Batches(c, Noise(20), 0, 4, parts=2)
    assert all(torch.equal(split[2 * step + i]["gram_crops"], part["gram_crops"]) for i, part in enumerate(parts))


@pytest.mark.parametrize("text", ["512", "512x112x768", "512x112*0.5", "512x112x768*0.5,", "512x112x768*0",
                                  "512x112x768*0.5 768x112x1152*0.5", "512x112x768*-1", "axbxc*1"])
def test_resolutions_that_say_nothing(text):
    with pytest.raises(ValueError, match="--resolutions .*: write sides in pixels and how often"):
        data.read_resolutions(text)
    assert data.read_resolutions("96x48x192*2,160x64x240*2.0")[1] == ((160, 64, 240), 0.5)
