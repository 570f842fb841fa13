"""tasks/depth.py, relative: scale and shift forgiven, what trains it, heads from elsewhere."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_labels import photo, write

import evaluate
from decoders import dpt
from decoders.depth import evenly, mean_of_bins, relative_loss
from sets import depths
from tasks import TASKS, depth


@pytest.fixture
def rooms(tmp_path):
    """As Marigold lists ScanNet: two images, and what is deeper to the right"""
    names = []
    for k in range(2):
        image, truth = f"scene000{k}_00/color/000000.jpg", f"scene000{k}_00/depth/000000.png"
        write(tmp_path / image, photo(k))
        write(tmp_path / truth, np.linspace(1000, 5000, 60, dtype=np.uint16)[None].repeat(40, 0))
        names.append(f"{image} {truth}\n")
    (tmp_path / "scannet_val_sampled_list_800_1.txt").write_text("".join(names))
    return tmp_path


SHORT = "--weights untrained:tiny --resolution 64"


def run(*words):
    words = " ".join(map(str, ("--device cpu --workers 0", *words)))
    return evaluate.evaluate(evaluate.configure(words.split()))


def test_a_head_is_trained_on_one_set_and_measured_on_another(rooms, tmp_path):
    trained = run("--task relative", SHORT, "--limit 2 --iterations 2 --out", tmp_path / "out")
    head = f"--head {tmp_path / 'out/head.safetensors'}"
    same = run("--task eth3d", SHORT, "--limit 2", head)
    for name in "abs_rel", "rmse", "n_train":
        assert same[name] == trained[name]
    found = run("--task scannet", SHORT, "--data", rooms, head)
    truth = np.linspace(1000, 5000, 60, dtype=np.uint16) / 1000
    assert found["n_val"] == 2
    assert found["chance_abs_rel"] == pytest.approx((abs(truth - truth.mean()) / truth).mean(), rel=1e-5)
    assert found["abs_rel"] <= found["chance_abs_rel"] * 1.05  # least squares: of squares no worse than a constant
    with pytest.raises(ValueError, match="has metric 'abs_rel', this command 'rmse'"):
        run("--task depth --decoder dpt", SHORT, "--limit 2", head)


@pytest.mark.parametrize("form", [dict(), dict(class_token=True)])
def test_a_released_head(form, rooms, tmp_path):
    torch.manual_seed(0)
    torch.save(dpt.DPT(dpt.DPTConfig(128, (8,) * 4, 8, hidden=8, **form)).state_dict(), tmp_path / "x.pth")
    words = "--task scannet", SHORT, "--data", rooms, "--head", tmp_path / "x.pth"
    if form:
        with pytest.raises(ValueError, match="x.pth answers with no depth; name a head of depth"):
            run(*words)
    else:
        found = run(*words)
        assert 0 < found["abs_rel"] <= 1.05 * found["chance_abs_rel"] and "n_train" not in found
        with pytest.raises(ValueError, match="x.pth is for a backbone of width 128, this one has 384"):
            run(*words, "--weights untrained:s")


def test_nothing_to_train_on(rooms):
    with pytest.raises(ValueError, match="--head is missing: scannet has nothing to train on"):
        run("--task scannet", SHORT, "--data", rooms)


def test_scale_and_shift_are_forgiven_of_the_mean_of_both_views():
    truth = np.linspace(1, 5, 12, dtype=np.float32).reshape(3, 4)
    val = SimpleNamespace(truth=lambda i: truth, image=None)
    metres = torch.from_numpy(0.25 * truth + 2)
    form, c = depths.SETS["scannet"], SimpleNamespace(out="")
    scores, _ = depth.measured(0, (metres, metres.flip(1)), val, form, {}, c)
    assert scores["abs_rel"] < 1e-6 and scores["delta1"] == 1
    assert scores["chance_abs_rel"] == pytest.approx((abs(truth - 3) / truth).mean(), rel=1e-6)
    plain = replace(form, relative=False)
    assert depth.measured(0, (metres, metres.flip(1)), val, plain, {}, c)[0]["abs_rel"] > 0.2
    low, _ = depth.measured(0, (metres - metres, metres - metres), val, form, {}, c)
    assert low["abs_rel"] == pytest.approx(low["chance_abs_rel"])


def test_what_is_trained_on_is_that_of_the_paper():
    recipe = dpt.SYNTHMIX
    steps = TASKS["relative"].config(data="photos").iterations
    assert (recipe.lr, recipe.power, round(recipe.warmup * steps)) == (1e-3, 3.5, 12000)
    assert dpt.sized(4096).dropout == 0.05
    logits, truth = torch.randn(2, 256, 6, 5), torch.rand(2, 12, 10) * 120 - 10
    metres = F.interpolate(mean_of_bins(logits, evenly(0.001, 100, 256))[None], (12, 10), mode="bilinear")
    form = depths.SETS["relative"]
    loss = depth.forgiving_loss(logits, list(truth), form)
    torch.testing.assert_close(loss, relative_loss(metres[0], truth, (truth > 0) & (truth <= 100)))


def test_colours_are_disturbed_and_depth_is_not():
    image = torch.randint(256, (3, 48, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image //= 2

    def changed(*which):
        rng = SimpleNamespace(random=lambda n: np.array([0 if k in which else 1 for k in range(n)]),
                              uniform=lambda low, high, n=None: np.full(n, high) if n else high,
                              standard_normal=np.random.default_rng(0).standard_normal)
        found = depth.disturbed(image, rng)
        assert found.dtype == torch.uint8 and found.shape == image.shape
        return not torch.equal(found, image)
    assert [changed(k) for k in range(5)] == [True] * 5 and not changed()
    one, two = (depth.disturbed(image, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(one, two)
    source = SimpleNamespace(image=lambda i: image, truth=lambda i: np.full((48, 64), 2, np.float32))
    for k in range(8):
        seen, truth = depth.seen(0, np.random.default_rng(k), source, [0], (48, 64), 16, relative=True)
        assert seen.shape == (3, 48, 48) and truth.shape == (48, 48) and set(truth.unique().tolist()) <= {0, 2}


def test_the_papers_numbers_stand_beside_a_released_head_alone():
    task = TASKS["eth3d"]
    c = task.config(data="x", resolution=768, head="x.pth")
    assert task.beside(c, "7b", dict(abs_rel=1, delta1=1, n_val=454)) == dict(paper_abs_rel=0.054, paper_delta1=0.975)
    assert not task.beside(c, "7b", dict(abs_rel=1, n_val=453)) and not task.beside(c, "l", dict(abs_rel=1, n_val=454))
    nyu = TASKS["nyu"]
    assert not nyu.beside(nyu.config(data="x", resolution=480, head="x"), "7b", dict(rmse=1, n_val=654))
