"""engine/meters.py: each meter beside its sentence, in loops; what has no answer is 0."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.meters import effective_rank, health, of_features
from losses import assignments
from model import Features

C = SimpleNamespace(dino_prototypes=7)


def features(B=3, h=3, w=4, D=5, seed=0):
    """Patches share a direction, so that no cosine is near 0."""
    x = torch.randn(B, 1 + h * w, D, generator=torch.Generator().manual_seed(seed)) + 0.7
    return Features(x[:, 0], x[:, :0], x[:, 1:], (h, w))


def cosine(a, b):
    a, b = (x.double().numpy() for x in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("hidden", [0.0, 0.4])
def test_cosines_of_patches_are_those_of_the_loops(hidden):
    f = features()
    masks = torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) < hidden
    near, others, cls = [], [], []
    for b in range(3):
        seen = [i for i in range(12) if not masks[b, i]]
        cls += [cosine(f.patches[b, i], f.cls[b]) for i in seen]
        for i in seen:
            for j in seen:
                step = abs(i // 4 - j // 4) + abs(i % 4 - j % 4)
                near += [cosine(f.patches[b, i], f.patches[b, j])] * (step == 1)
                others += [cosine(f.patches[b, i], f.patches[b, j])] * (i != j)
    found = of_features(f, masks if hidden else None)
    expected = dict(patch_neighbours=np.mean(near), patch_others=np.mean(others), patch_cls=np.mean(cls))
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)  # 1.3e-7 measured


def test_what_masked_patches_say_counts_for_nothing():
    f, masks = features(), torch.zeros(3, 12, dtype=torch.bool)
    masks[:, 5] = True
    before = of_features(f, masks)
    f.patches[:, 5] = 1000.0
    assert of_features(f, masks) == before


def test_patches_all_alike_and_images_of_one_patch():
    f = features()
    f.patches[:] = f.cls[:, None]
    found = of_features(f)
    assert [found[name] for name in ("patch_neighbours", "patch_others", "patch_cls")] == pytest.approx([1, 1, 1])
    found = of_features(features(h=1, w=1))
    assert found["patch_neighbours"] == found["patch_others"] == 0 != found["patch_cls"]
    assert of_features(features(), torch.ones(3, 12, dtype=torch.bool))["patch_cls"] == 0


def test_patches_span_what_the_seen_ones_do():
    f, masks = features(B=2, h=20, w=30, D=8), torch.zeros(2, 600, dtype=torch.bool)
    f.patches[:] = torch.eye(8)[torch.arange(600) % 4]
    f.patches[:, 5::7] = 1000 * torch.eye(8)[7]
    masks[:, 5::7] = True
    assert of_features(f, masks)["patch_rank"] == pytest.approx(4, rel=0.02)
    assert of_features(f)["patch_rank"] < 2  # of the long ones, above all
    assert of_features(f, torch.ones_like(masks))["patch_rank"] == 1


def test_effective_rank_counts_directions():
    assert effective_rank(torch.eye(6)[:, :4]) == pytest.approx(4)
    assert effective_rank(torch.eye(4, 9)) == pytest.approx(4)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1, abs=1e-4)  # the clamped spectrum: 3e-7 measured
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).double()
    p = np.linalg.svd(x.numpy(), compute_uv=False)
    p /= p.sum()
    assert effective_rank(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_entropy_splits_into_that_of_each_and_that_of_the_mean():
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    targets = dict(dino=assignments(logits.flatten(0, 1), 0.5, n_iterations=0).unflatten(0, (2, -1)))
    found, p = health(C, targets, features()), (logits / 0.5).softmax(-1).flatten(0, 1).double().numpy()
    assert found["dino_entropy"] == pytest.approx(-(p * np.log(p)).sum(1).mean() / math.log(7), abs=1e-6)
    assert found["dino_balance"] == pytest.approx(-(p.mean(0) * np.log(p.mean(0))).sum() / math.log(7), abs=1e-6)
    assert found["prototypes_used"] == len(set(p.argmax(1))) / 7
    assert found.keys() > of_features(features()).keys()


def test_one_prototype_for_all_is_0_and_no_opinion_is_1():
    one, none = torch.zeros(2, 4, 7), torch.zeros(2, 4, 7)
    one[..., 3] = 100
    for logits, says in ((one, 0), (none, 1)):
        targets = dict(dino=assignments(logits.flatten(0, 1), 1.0, n_iterations=0).unflatten(0, (2, -1)))
        found = health(C, targets, features())
        assert (found["dino_entropy"], found["dino_balance"]) == pytest.approx((says, says), abs=1e-6)
        assert found["prototypes_used"] == pytest.approx(1 / 7)
