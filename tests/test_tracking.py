"""tasks/tracking.py: propagation and the whole score against plain loops; an oracle tracks, noise does not."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from engine.features import Frozen, Pixels
from engine.views import fitted
from tasks import TASKS, tracking

CPU = torch.device("cpu")


class Oracle:
    """Frozen features: feature(source, i); or noise."""
    device = CPU

    def __init__(self, feature, noise=False, view=fitted):
        self.feature, self.noise, self.view = feature, noise, partial(view, side=48, patch=16)

    def maps(self, name, source, views=None):
        maps = [self.feature(source, i).astype(np.float16) for i in range(len(source))]
        rng = np.random.default_rng(0)
        return [[rng.normal(size=m.shape).astype(np.float16) if self.noise else m] for m in maps]

    def walk(self, source):
        return (m for m, in self.maps("", source))

    def each(self, name, function, n, size=1):
        return [function(i, self) for i in range(n)]


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)

# --------------------------------------------------------------------------------
# Propagation


def propagate_by_hand(maps, first, context=7, radius=12):
    """Patch by patch, over all patches of the context that lie within the circle."""
    h, w, _ = maps[0].shape
    unit = [m.astype(np.float64) / np.linalg.norm(m.astype(np.float64), axis=-1, keepdims=True) for m in maps]
    shares, out = [first], []
    for t in range(1, len(maps)):
        frames = [0, *range(max(1, t - context), t)]
        now = np.zeros_like(first)
        for i in range(h):
            for j in range(w):
                near = [(float(unit[t][i, j] @ unit[s][y, x]), s, y, x) for s in frames for y in range(h)
                        for x in range(w) if (y - i) ** 2 + (x - j) ** 2 <= radius**2]
                best = sorted(near, reverse=True)[:5]
                weights = np.exp([cosine / 0.2 for cosine, *_ in best])
                for weight, (_, s, y, x) in zip(weights / weights.sum(), best, strict=True):
                    now[:, i, j] += weight * shares[s][:, y, x]
        shares.append(now)
        out.append(now)
    return out


@pytest.mark.parametrize("n_frames, grid, changed", [(11, (2, 15), {}), (5, (5, 6), dict(context=2, radius=2))])
def test_propagation_is_the_loop(n_frames, grid, changed, monkeypatch):
    """More frames and columns than the protocol's 7 and 12 reach; and a context and a circle that are smaller."""
    for name, value in changed.items():
        monkeypatch.setattr(tracking, name.upper(), value)
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(*grid, 4)).astype(np.float16) for _ in range(n_frames)]
    first = np.eye(3)[rng.integers(0, 3, grid)].transpose(2, 0, 1)
    ours = list(tracking.propagate(maps, torch.tensor(first).float(), CPU))
    for found, exact in zip(ours, propagate_by_hand(maps, first, **changed), strict=True):
        np.testing.assert_allclose(found.numpy(), exact, atol=1e-5)
        np.testing.assert_allclose(found.sum(0).numpy(), 1, atol=1e-5)


def test_to_pixels_stretches_every_object():
    """An object whose shares are small everywhere still wins where they are largest."""
    shares = torch.tensor([[[0.9, 0.8]], [[0.1, 0.2]]])
    assert tracking.to_pixels(shares, (1, 2)).tolist() == [[0, 1]]
    assert tracking.to_pixels(torch.ones(2, 1, 1), (2, 2)).tolist() == [[0, 0], [0, 0]]  # nothing to tell them apart

# --------------------------------------------------------------------------------
# The whole score


def tracked_by_hand(maps, masks):
    """J of each object of the first frame, in the frames between first and last that have a truth."""
    h, w, _ = maps[0].shape
    H, W = masks[0].shape
    ids = sorted(set(masks[0].flat) - {0, 255})
    places = [[int((i + 0.5) * H / h), int((j + 0.5) * W / w)] for i in range(h) for j in range(w)]
    first = np.array([masks[0][y, x] in ([k] if k else [0, 255]) for k in [0, *ids] for y, x in places], float)
    scores = {k: [] for k in ids}
    for t, shares in enumerate(propagate_by_hand(maps, first.reshape(-1, h, w)), 1):
        rows, columns = ([min(max((i + 0.5) * n / N - 0.5, 0), n - 1) for i in range(N)] for n, N in ((h, H), (w, W)))
        large = np.zeros((len(shares), H, W))
        for i, y in enumerate(rows):
            for j, x in enumerate(columns):
                for a in range(h):
                    for b in range(w):
                        large[:, i, j] += max(1 - abs(a - y), 0) * max(1 - abs(b - x), 0) * shares[:, a, b]
        for x in large:
            x[...] = (x - x.min()) / (x.max() - x.min())
        found = np.array([0, *ids])[large.argmax(0)]
        for k in ids if masks[t] is not None and t < len(maps) - 1 else []:
            either = (found == k) | (masks[t] == k)
            scores[k].append(((found == k) & (masks[t] == k)).sum() / either.sum() if either.any() else 1)
    return [100 * np.mean(score) for score in scores.values()]


def test_tracking_is_the_loop(tmp_path):
    """Objects 1 and 3 of the first frame, one of them void in part; 2 comes later; the third frame has no truth."""
    rng, masks = np.random.default_rng(0), []
    for i in range(6):
        mask = np.zeros((18, 26), np.uint8)
        mask[3:12, 2 + i : 9 + i], mask[8:16, 15:23 - i], mask[2:4, :5] = 1, 3, 255
        mask[14:, :4] = 2 if i else 0
        masks.append(mask)
        write(tmp_path / f"JPEGImages/480p/a/{i}.jpg", np.zeros((18, 26, 3), np.uint8))
        if i != 2:
            write(tmp_path / f"Annotations/480p/a/{i}.png", mask)
    seen = [mask.clip(max=3)[np.ix_([2, 6, 11, 15], [2, 6, 10, 15, 19, 23])] for mask in masks]
    maps = [(np.eye(4)[x] + 0.3 * rng.normal(size=(4, 6, 4))).astype(np.float16) for x in seen]
    masks[2] = None
    c = TASKS["davis"].config(data=str(tmp_path))
    found = TASKS["davis"].run(TASKS["davis"].open(c), Oracle(lambda clip, i: maps[i]), c)
    exact = tracked_by_hand(maps, masks)
    assert found["n_objects"] == len(exact) == 2 and 10 < found["j"] < 90
    assert found["j"] == pytest.approx(np.mean(exact), abs=1e-9)


def test_oracle_tracks():
    def colours(clip, i):
        return np.eye(8)[clip.truth(i)]

    c = TASKS["tracking"].config(resolution=32, limit=2)
    found, lost = (tracking.run(tracking.open_videos(c), Oracle(colours, noise), c) for noise in (False, True))
    assert found["j"] > 97 and found["f"] > 97 and lost["j"] < found["chance_j"]
    assert found["j_and_f"] == pytest.approx((found["j"] + found["f"]) / 2)


def davis(root, n=4, top="480p"):
    for name in "dog", "cat":
        for i in range(n):
            mask = np.zeros((40, 60), np.uint8)
            mask[10:30, 5 + 2 * i : 25 + 2 * i] = 1
            write(root / f"JPEGImages/{top}/{name}/{i:05}.jpg", np.repeat(mask[..., None] * 200, 3, 2))
            write(root / f"Annotations/{top}/{name}/{i:05}.png", mask)
    return TASKS["davis"].config(data=str(root), resolution=32, workers=0)


@pytest.mark.parametrize("top", ["480p", "."])
def test_davis_folder(top, tmp_path):
    c = davis(tmp_path, top=top)
    found = tracking.run(tracking.open_videos(c), Frozen(Pixels(), TASKS["davis"], c), c)
    assert found["n_objects"] == 2 and found["chance_j"] == pytest.approx(100 * np.mean([18 / 22, 16 / 24]))


def test_two_frames_are_too_few(tmp_path, capsys):
    c = davis(tmp_path, 2)
    with pytest.raises(ValueError, match="no video of .* has an object in its first frame and three frames"):
        tracking.run(tracking.open_videos(c), Frozen(Pixels(), TASKS["davis"], c), c)
    assert capsys.readouterr().out.count("skipped object 1 of ") == 2
