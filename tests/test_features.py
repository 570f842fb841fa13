"""engine/features.py: tokens and maps in order, the unreadable named, kept on disk and taken up again; the floors."""

import copy
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from convnext import ConvNeXt, ConvNeXtConfig
from engine import features
from engine.features import Frozen, Pixels, chosen_layers, whole_patches
from engine.sources import Drawn
from engine.views import centre_crop, fitted, mirrored
from model import SIZES, ViT, initialise
from tasks import TASKS

CPU, TASK = torch.device("cpu"), TASKS["segmentation"]
C = TASK.config(resolution=32, workers=0, batch=4, precision="fp32")
VIT = initialise(ViT(replace(SIZES["tiny"], depth=2)), 0).eval()


def frozen_of(model=VIT, c=C, task=TASK, **more):
    return Frozen(model, replace(task, view=fitted), c, **more)

# --------------------------------------------------------------------------------
# Tokens


class Plain:
    """Image i has the grey value i everywhere; those in `broken` cannot be read."""
    classes = ["even", "odd"]

    def __init__(self, n, broken=()):
        self.n, self.broken = n, broken

    def __len__(self):
        return self.n

    def load(self, i):
        if i in self.broken:
            raise OSError(f"photo {i}: cut short")
        return torch.full((3, 20 + i, 30), i, dtype=torch.uint8)

    def label(self, i):
        return i % 2


class Echo(torch.nn.Module):
    """cls: the grey value; patches: 0 and twice it; and how many images came at a time."""
    config = SimpleNamespace(patch_size=16, depth=1, mean=(0.5,) * 3, std=(0.25,) * 3)

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        self.batches.append(tuple(x.shape))
        value = x.mean((2, 3))[:, :1]
        return SimpleNamespace(cls=value, patches=torch.stack([0 * value, 2 * value], 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_tokens_keep_the_order_and_skip_the_unreadable(workers, capsys):
    model, chosen = Echo(), [9, 0, 1, 3, 2, 5, 4, 8, 7, 6]
    c = TASKS["knn"].config(batch=4, resolution=16, workers=workers)
    found = Frozen(model, TASKS["knn"], c).tokens("val", Drawn(Plain(10, {3}), chosen))
    chosen.remove(3)
    exact = (torch.tensor(chosen).float()[:, None] / 255 - 0.5) / 0.25
    torch.testing.assert_close(found.cls, exact)
    torch.testing.assert_close(found.patches, exact)
    assert found.labels.tolist() == [i % 2 for i in chosen]
    assert model.batches == [(4, 3, 16, 16), (4, 3, 16, 16), (1, 3, 16, 16)]
    assert capsys.readouterr().out == "skipped unreadable photo 3: cut short\n"


def test_tokens_of_nothing():
    c = TASKS["knn"].config(resolution=16, workers=0)
    with pytest.raises(ValueError, match="none of 3 images could be read; the first: photo 0: cut short"):
        Frozen(Echo(), TASKS["knn"], c).tokens("val", Plain(3, range(3)))


def test_tokens_are_the_networks_own():
    c = TASKS["knn"].config(resolution=32, workers=0, batch=2, precision="fp32")
    frozen, source = Frozen(VIT, TASKS["knn"], c), Plain(3)
    found = frozen.tokens("val", source)
    for i in range(3):
        exact = network(centre_crop(source.load(i), 32, 16)[0])
        torch.testing.assert_close(found.cls[i], exact.cls[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.patches[i], exact.patches[0].mean(0), atol=1e-5, rtol=1e-5)


def test_a_pass_over_many_images_is_planned(tmp_path, monkeypatch, capsys):
    """Of 10 images: cls and mean patch of 128 floats each; of what is there, nothing."""
    monkeypatch.setattr(features, "MANY", 10)
    c = TASKS["knn"].config(resolution=32, workers=0, batch=4, cache=str(tmp_path))
    frozen = Frozen(VIT, TASKS["knn"], c)
    frozen.tokens("val", Plain(10))
    size = sum(x.nbytes for x in VIT.state_dict().values()) / 1e9
    said = capsys.readouterr().out
    assert "val: 10 images; disk 1.02e-05 GB in " in said
    assert f"memory {size:.1f} GB of weights on each of 1 devices" in said
    frozen.tokens("val", Plain(10))
    assert not capsys.readouterr().out
    frozen.maps("both", Photos(10), frozen.seen(mirrored))         # 2 views of 6 patches of 128 float16
    assert "both: 10 images; disk 3.07e-05 GB in " in capsys.readouterr().out

# --------------------------------------------------------------------------------
# Floors


def test_pixels_are_the_image_16x16():
    x = torch.rand(2, 3, 64, 64)
    cells = x.unflatten(2, (16, 4)).unflatten(4, (16, 4)).mean((3, 5))
    found = Pixels().thumbnail(x)
    assert found.shape == (2, 768) and (found - cells.flatten(1)).abs().mean() < 0.1
    cls, patches = frozen_of(Pixels()).tokens_of([torch.zeros(3, 20, 20, dtype=torch.uint8)])
    assert cls.shape == (1, 768) and patches.shape == (1, 0)                     # of any side


def test_pixels_patches_are_their_colours():
    x = torch.rand(2, 3, 32, 48)
    found = Pixels()(x)
    assert found.grid == (2, 3) and found.patches.shape == (2, 6, 48)
    cell = x[1, :, 16:32, 32:48].unflatten(1, (4, 4)).unflatten(3, (4, 4)).mean((2, 4))     # 3 4 4
    torch.testing.assert_close(found.patches[1, 5], cell.flatten())
    assert torch.equal(Pixels().layers(x, [0])[0].patches, found.patches)

# --------------------------------------------------------------------------------
# Maps


class Photos:
    """Image i has its own size; how often each was read."""

    def __init__(self, n):
        self.n, self.reads = n, []

    def __len__(self):
        return self.n

    def image(self, i):
        self.reads.append(i)
        rng = np.random.default_rng(i)
        return torch.from_numpy(rng.integers(0, 256, (3, 32 + 16 * (i % 3), 48), dtype=np.uint8))


def network(image):
    mean, std = (torch.tensor(v)[:, None, None] for v in (VIT.config.mean, VIT.config.std))
    with torch.no_grad():
        return VIT((image[None].float() / 255 - mean) / std)


def test_maps_are_the_networks_own():
    frozen, photos = frozen_of(), Photos(7)
    for i, found in enumerate(frozen.maps("val", photos, frozen.seen(mirrored))):
        for m, image in zip(found, mirrored(photos.image(i), 32, 16), strict=True):
            exact = network(image).map()[0].permute(1, 2, 0)
            torch.testing.assert_close(torch.from_numpy(m).float(), exact, atol=2e-3, rtol=2e-3)  # float16


def test_layers_lie_side_by_side():
    image = Photos(1).image(0)
    two, last = (frozen_of(c=replace(C, layers=layers)).arrays([image])[0] for layers in ("0,1", "1"))
    assert two.shape == (2, 3, 256) and np.array_equal(two[..., 128:], last)
    (stored,), = frozen_of().maps("val", Photos(1), layers=[0, 1])
    assert np.array_equal(stored, two)


def test_convnext_has_patches_of_16_pixels():
    net = initialise(ConvNeXt(ConvNeXtConfig((1, 1, 1, 1), (8, 8, 8, 8))), 0).eval()
    view = torch.zeros(3, 64, 96, dtype=torch.uint8)
    assert frozen_of(net, replace(C, resolution=64)).live([view])[0].shape == (4, 6, 8)
    assert frozen_of(net, replace(C, resolution=64, layers="2,3")).live([view])[0].shape == (4, 6, 16)


@pytest.mark.parametrize("check, change, says", [
    (whole_patches, dict(resolution=40), "--resolution 40: write whole patches, a multiple of 16"),
    (chosen_layers, dict(layers="2"), "--layers 2: write blocks, 0-based, as in 3,5; this network has 2"),
    (chosen_layers, dict(layers="x"), "--layers x: write blocks")])
def test_mistakes(check, change, says):
    with pytest.raises(ValueError, match=says):
        check(replace(C, **change), VIT.config)


def test_cache_is_taken_up_where_it_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 3)
    photos, plain = Photos(8), Photos(8)
    frozen, exact = frozen_of(c=replace(C, cache=str(tmp_path))), frozen_of().maps("val", plain)
    frozen.maps("val", photos)
    files = sorted(tmp_path.glob("*/*"))
    assert [file.name for file in files] == [f"{k:08}.safetensors" for k in (0, 3, 6)]
    files[1].unlink()                                                     # as if the run had been stopped
    photos.reads.clear()
    found = frozen.maps("val", photos)
    assert photos.reads == [3, 4, 5]
    assert all(np.array_equal(a, b) for x, y in zip(exact, found, strict=True) for a, b in zip(x, y, strict=True))


def cached_in(model, c, photos=None, view=fitted, task=TASK):
    """The folders in --cache after features of one more."""
    frozen = Frozen(model, replace(task, view=view), c)
    frozen.maps("val", photos or Photos(1))
    return {path.name for path in Path(c.cache).iterdir()}


@pytest.mark.parametrize("change", [dict(resolution=48), dict(limit=3), dict(data="elsewhere")])
def test_cache_knows_the_command(change, tmp_path):
    c = replace(C, cache=str(tmp_path))
    assert cached_in(VIT, c) == cached_in(VIT, c) < cached_in(VIT, replace(c, **change))


def test_cache_knows_all_of_the_weights(tmp_path):
    """The last value of the largest tensor; the first 1,024 of each are as they were."""
    c, other = replace(C, cache=str(tmp_path)), copy.deepcopy(VIT)
    largest = max(other.parameters(), key=torch.numel)
    assert largest.numel() > 1024 and cached_in(VIT, c) == cached_in(other, c)
    with torch.no_grad():
        largest.view(-1)[-1] += 1e-6
    assert len(cached_in(other, c)) == 2


@pytest.mark.parametrize("change", [
    lambda photo: photo.write_bytes(b"other"), lambda photo: os.utime(photo, ns=(1, 1)),
    lambda photo: photo.write_bytes(photo.read_bytes() + b" "), lambda photo: photo.rename(photo.with_name("b.png")),
    lambda photo: photo.with_name("new.png").write_bytes(b"")])
def test_cache_knows_the_files(change, tmp_path):
    """Path, size and time of each; of what the run itself writes, nothing."""
    photo = tmp_path / "data/x/a.png"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"image")
    c = replace(C, data=str(tmp_path / "data"), cache=str(tmp_path / "data/cache"), out=str(tmp_path / "data/out"))
    before = cached_in(VIT, c)
    (tmp_path / "data/out").mkdir()
    (tmp_path / "data/out/picture.png").write_bytes(b"")
    assert cached_in(VIT, c) == before
    change(photo)
    assert len(cached_in(VIT, c)) == 2


def test_maps_of_other_layers_views_and_controls_are_others(tmp_path):
    c, photos, patches = replace(C, cache=str(tmp_path)), Photos(2), replace(TASK, control="patches")
    for frozen, view in ((frozen_of(c=c), fitted), (frozen_of(c=replace(c, layers="0")), fitted),
                         (frozen_of(c=c), mirrored), (frozen_of(c=replace(c, control=True), task=patches), fitted),
                         (frozen_of(c=replace(c, control=True)), fitted)):  # shuffled truth: the features of the first
        frozen.maps("train", photos, frozen.seen(view))
    assert len(list(tmp_path.iterdir())) == 4 and photos.reads == [0, 1] * 4


@pytest.mark.parametrize("change, about", [(dict(control=True), {}), (dict(seed=1), {}), (dict(), dict(ignore=3))])
def test_cache_knows_what_truths_and_scores_depend_on(change, about, tmp_path):
    """Features are those of any seed, and of a head's control, too."""
    c, photos = replace(C, cache=str(tmp_path)), Photos(2)
    for k, (config, more) in enumerate(((c, {}), (replace(c, **change), about))):
        frozen = frozen_of(c=config)
        frozen.maps("train", photos)
        truths = frozen.keep("truths", lambda i, k=k: [np.full((2, 3), 10 * k + i, np.float32)], 2, **more)
        assert [x[0].tolist() for x in truths] == [[[10 * k + i] * 3] * 2 for i in range(2)]
        scores = frozen.each("scores", lambda i, frozen, k=k: [np.full(1, 10 * k + i)], 2, **more)
        assert [x.tolist() for x, in scores] == [[10 * k], [10 * k + 1]]
    assert photos.reads == [0, 1]


def test_walk_says_what_maps_do_and_keeps_nothing(tmp_path):
    c, photos = replace(C, cache=str(tmp_path)), Photos(7)
    walked, kept = list(frozen_of(c=c).walk(photos)), frozen_of().maps("val", photos)
    assert not list(tmp_path.iterdir()) and len(walked) == 7
    for m, (exact,) in zip(walked, kept, strict=True):
        np.testing.assert_allclose(m.astype(float), exact.astype(float), atol=2e-3)            # another batch, float16


def test_views_of_one_size_go_together_wherever_they_stand():
    """Photos of three sizes in turn: full batches all the same."""
    views = [torch.zeros(3, 16 * (1 + i % 3), 16, dtype=torch.uint8) for i in range(24)]
    groups = [(list(places), len(alike)) for places, alike in features.batched(views, 4)]
    assert [n for _, n in groups] == [4] * 6 and sorted(sum((places for places, _ in groups), [])) == list(range(24))
    assert all({views[k].shape for k in places} == {views[places[0]].shape} for places, _ in groups)


def test_scattered_patches_are_the_same_ones_elsewhere():
    image, task = Photos(2).image(1), replace(TASK, control="patches")
    (plain,), (moved,) = (frozen_of(c=replace(C, control=k), task=task).arrays([image]) for k in (False, True))
    assert not np.array_equal(plain, moved)
    rows = [sorted(m.reshape(-1, m.shape[2]).tolist()) for m in (plain, moved)]
    assert rows[0] == rows[1]
