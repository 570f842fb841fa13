"""features.py: maps of any view in order, kept on disk and taken up again, and the views themselves."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from convnext import ConvNeXt, ConvNeXtConfig
from engine import features
from engine.chunks import Folder, Ranks
from engine.features import Patches, PixelPatches, Scenes, fitted, nearest
from evaluate import EvaluateConfig
from model import SIZES, ViT, initialise

CPU = torch.device("cpu")
C = EvaluateConfig(task="segmentation", resolution=32, workers=0, batch=4)
VIT = initialise(ViT(replace(SIZES["tiny"], depth=2)), 0).eval()


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


def whole(vit, image):
    mean, std = (torch.tensor(v)[:, None, None] for v in (vit.config.mean, vit.config.std))
    with torch.no_grad():
        return vit((image[None].float() / 255 - mean) / std)


def test_maps_are_the_networks_own():
    patches, photos = Patches(VIT, C, CPU), Photos(7)
    for i, (m, mirrored) in enumerate(patches("val", photos, partial(patches.whole, mirrored=True))):
        view, other = fitted(photos.image(i), 32, 16, mirrored=True)
        assert torch.equal(view.flip(2), other) and min(view.shape[1:]) == 32
        for found, image in (m, view), (mirrored, other):
            exact = whole(VIT, image).map()[0].permute(1, 2, 0)
            torch.testing.assert_close(torch.from_numpy(found).float(), exact, atol=2e-3, rtol=2e-3)  # float16


def test_layers_lie_side_by_side():
    two, last = (Patches(VIT, replace(C, layers=layers), CPU).run([Photos(1).image(0)])[0] for layers in ("0,1", "1"))
    assert two.shape == (2, 3, 256) and np.array_equal(two[..., 128:], last)


def test_convnext_has_patches_of_16_pixels():
    net = initialise(ConvNeXt(ConvNeXtConfig((1, 1, 1, 1), (8, 8, 8, 8))), 0).eval()
    view = torch.zeros(3, 64, 96, dtype=torch.uint8)
    assert Patches(net, replace(C, resolution=64), CPU).run([view])[0].shape == (4, 6, 8)
    assert Patches(net, replace(C, resolution=64, layers="2,3"), CPU).run([view])[0].shape == (4, 6, 16)


def test_pixel_patches():
    x = torch.rand(2, 3, 32, 48)
    found = PixelPatches()(x)
    assert found.grid == (2, 3) and found.patches.shape == (2, 6, 48)
    cell = x[1, :, 16:32, 32:48].unflatten(1, (4, 4)).unflatten(3, (4, 4)).mean((2, 4))     # 3 4 4
    torch.testing.assert_close(found.patches[1, 5], cell.flatten())


@pytest.mark.parametrize("change, says", [
    (dict(resolution=40), "--resolution 40: write whole patches, a multiple of 16"),
    (dict(layers="2"), "--layers 2: write blocks, 0-based, as in 3,5; this network has 2"),
    (dict(layers="x"), "--layers x: write blocks")])
def test_mistakes(change, says):
    with pytest.raises(ValueError, match=says):
        Patches(VIT, replace(C, **change), CPU)


def test_cache_is_taken_up_where_it_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 3)
    photos, plain = Photos(8), Photos(8)
    c = replace(C, cache=str(tmp_path))
    patches = Patches(VIT, c, CPU)
    exact = Patches(VIT, C, CPU)("val", plain, patches.whole)
    patches("val", photos, patches.whole)
    files = sorted(tmp_path.glob("*/*"))
    assert [file.name for file in files] == [f"{k:08}.safetensors" for k in (0, 3, 6)]
    files[1].unlink()                                                     # as if the run had been stopped
    photos.reads.clear()
    found = patches("val", photos, patches.whole)
    assert photos.reads == [3, 4, 5]
    assert all(np.array_equal(a, b) for x, y in zip(exact, found, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("change", [dict(resolution=48), dict(layers="0"), dict(limit=3), dict(data="elsewhere")])
def test_cache_knows_what_features_depend_on(change, tmp_path):
    c = replace(C, cache=str(tmp_path))
    other = initialise(ViT(replace(SIZES["tiny"], depth=2)), 1)
    folders = {Folder(*args).path for args in (
        (VIT, c, {}), (VIT, replace(c, **change), {}), (other, c, {}), (VIT, c, dict(n=1)))}
    assert len(folders) == 4 and Folder(VIT, c, {}).path in folders


@pytest.mark.parametrize("change", [dict(control=True), dict(seed=1), dict(ignore=3)])
def test_cache_knows_what_truths_depend_on(change, tmp_path):
    """Features are those of any seed, and of a head's control, too."""
    c, photos = replace(C, cache=str(tmp_path)), Photos(2)
    for k, config in enumerate((c, replace(c, **change))):
        patches = Patches(VIT, config, CPU)
        patches("train", photos, patches.whole)
        truths = patches.keep("truths", lambda i, k=k: [np.full((2, 3), 10 * k + i, np.float32)], 2)
        assert [x[0].tolist() for x in truths] == [[[10 * k + i] * 3] * 2 for i in range(2)]
    assert photos.reads == [0, 1]


def test_what_comes_next_is_made_by_all_ranks_at_once(monkeypatch):
    made = []

    def make(jobs, worker, c, ranks):
        made.append([job.name for job in jobs])
        features_of(jobs, worker, c, Ranks())

    features_of = features.make
    monkeypatch.setattr(features, "make", make)
    patches, clips = Patches(VIT, C, CPU, ranks=Ranks(0, 2)), {name: Photos(n) for n, name in enumerate("abcde", 1)}
    patches.coming = [(name, clip, patches.whole) for name, clip in clips.items()]
    assert [len(patches(name, clips[name], patches.whole)) for name in "abced"] == [1, 2, 3, 5, 4]
    assert made == [["a", "b"], ["c", "d"], ["e"]]


def test_scattered_patches_are_the_same_ones_elsewhere():
    photos = Photos(2)
    (plain,), (moved,) = (Patches(VIT, C, CPU, scattered).run([photos.image(1)]) for scattered in (False, True))
    assert not np.array_equal(plain, moved)
    rows = [sorted(m.reshape(-1, m.shape[2]).tolist()) for m in (plain, moved)]
    assert rows[0] == rows[1]


def test_nearest_picks_values():
    truth = np.random.default_rng(0).integers(0, 9, (13, 17))
    exact = F.interpolate(torch.tensor(truth)[None, None].float(), (7, 40), mode="nearest-exact")[0, 0].numpy()
    np.testing.assert_array_equal(nearest(truth, (7, 40)), exact)


def test_scenes_and_pictures(tmp_path, capsys):
    scenes = Scenes(range(2), 1, 32, lambda scene: scene.semantic)
    assert scenes.image(0).shape == (3, 32, 32) and scenes.truth(1).shape == (32, 32) and len(scenes) == 2
    labels = torch.from_numpy(scenes.truth(0))
    c = replace(C, out=str(tmp_path / "new"))
    features.save_pictures(c, [[scenes.image(0), features.hues(labels), features.shades(np.ones((8, 8)), 10.0)]])
    assert (tmp_path / "new/segmentation.png").is_file() and "image, truth, prediction" in capsys.readouterr().out
    table = features.hues(torch.arange(256)[None])[:, 0].T
    assert len(table.unique(dim=0)) > 200 and table[255].tolist() == [255] * 3
