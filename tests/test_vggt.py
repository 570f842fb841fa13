"""tasks/vggt.py: what a step sees, scores of a known answer, a head fitted end to end, by two ranks; mistakes."""

import json
import os
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from fitted import goes_on_where_it_was, two_ranks_are_one
from test_posed import write_scan

import evaluate
from decoders import load_decoder
from decoders import vggt as decoder
from decoders.fit import FILE, fit
from engine.cameras import auc, points_of
from engine.features import load
from engine.ranks import Ranks
from model import Features, ViT, ViTConfig, initialise
from sets.posed import drawn, open_posed
from sets.rooms import Room
from tasks import TASKS, vggt
from weights import load_backbone, save_backbone

VIT = ViTConfig(depth=4, width=32, heads=2, hidden=64)
ALONE = Ranks()
SIZE = 48, 64


@pytest.fixture
def weights(tmp_path):
    save_backbone(initialise(ViT(VIT), 0), tmp_path / "teacher.safetensors", "nano")
    return tmp_path / "teacher.safetensors"


def run(capsys, *words):
    evaluate.main(["--task", "vggt", "--device", "cpu", "--workers", "0", *map(str, words)])
    said = capsys.readouterr().out
    return json.loads(said.splitlines()[-1]), said

# --------------------------------------------------------------------------------
# What a step sees


def on_faces(frames):
    """Median distance, metres, of other frames' depths from where the first one's points would lie there"""
    off = []
    first, _ = points_of(frames.depths[0], frames.intrinsics, frames.poses[0])
    H, W = frames.depths.shape[1:]
    for depth, pose in zip(frames.depths[1:], frames.poses[1:], strict=True):
        there = (first - pose[:3, 3]) @ pose[:3, :3]
        u, v = (there @ frames.intrinsics.T)[:, :2].T / there[:, 2].clip(1e-6)
        seen = (there[:, 2] > 0) & (u >= 0) & (u < W) & (v >= 0) & (v < H)
        off.append(np.abs(depth[v[seen].astype(int), u[seen].astype(int)] - there[seen, 2]))
    return np.median(np.concatenate(off))


def test_a_mirrored_scene_is_a_scene():
    frames = drawn(Room(0, 7, SIZE), [0, 1, 2], SIZE)
    K = frames.intrinsics + [[0, 0, 3], [0, 0, 0], [0, 0, 0]]
    mirror = vggt.mirrored(frames)
    assert on_faces(frames) < 0.02 and on_faces(mirror) < 0.02                                 # measured: 0.006
    assert on_faces(mirror._replace(poses=frames.poses)) > 0.1
    assert torch.equal(mirror.images, frames.images.flip(3))
    np.testing.assert_allclose(np.linalg.det(mirror.poses), 1, atol=1e-5)
    assert vggt.mirrored(frames._replace(intrinsics=K)).intrinsics[0, 2] == 64 - 35
    again = vggt.mirrored(mirror)
    np.testing.assert_allclose(again.poses, frames.poses)
    np.testing.assert_array_equal(again.depths, frames.depths)


def test_truths_are_in_the_scenes_own_unit():
    frames = drawn(Room(1, 7, SIZE), [2, 0], SIZE)
    truth, scale = vggt.truths(frames)
    points = np.concatenate([points_of(d, frames.intrinsics, pose)[0] - frames.poses[0][:3, 3]
                             for d, pose in zip(frames.depths, frames.poses, strict=True)])
    assert scale == pytest.approx(np.linalg.norm(points, axis=1).mean())
    assert (truth["depth"] * scale - torch.from_numpy(frames.depths)).abs().max() < 1e-5
    assert truth["cameras"][0].tolist() == pytest.approx([0, 0, 0, 1, 0, 0, 0, *frames.fov], abs=1e-6)
    other, twice = vggt.truths(frames._replace(depths=2 * frames.depths, poses=scaled(frames.poses, 2)))
    assert twice == pytest.approx(2 * scale)
    for name in truth:
        torch.testing.assert_close(other[name], truth[name])


def scaled(poses, by):
    poses = poses.copy()
    poses[:, :3, 3] *= by
    return poses


def test_a_step_sees_other_frames_each_time_and_no_rng_the_same():
    scenes = [Room(k, 7, SIZE) for k in range(2)]
    look = partial(vggt.sample, scenes=scenes, n_frames=3, size=SIZE, patch=16, control=False, vary=True)
    image, truth = look(1, None)
    assert truth["places"].shape == (3, 3, 4, 2) and not truth["places"][0].isnan().any()
    assert image.shape == (9, *SIZE) and image.dtype == torch.uint8
    assert torch.equal(look(1, None)[0], image) and torch.equal(look(1, None)[1]["cameras"], truth["cameras"])
    seen = [look(0, np.random.default_rng(k)) for k in range(6)]
    assert len({each["cameras"][1, 0].item() for _, each in seen}) > 3
    own = [np.abs(scenes[1].image(i).numpy().astype(int) - image[:3].numpy()).max() for i in range(5)]
    assert min(own) == 0  # the first of them is a frame of this scene, as it is
    again = look(0, np.random.default_rng(0))
    assert torch.equal(again[0], seen[0][0]) and torch.equal(again[1]["depth"], seen[0][1]["depth"])


@pytest.mark.parametrize("data, vary", [("shapes", False), ("SCAN", True)])
def test_generated_rooms_are_as_they_are_and_others_vary(data, vary, monkeypatch):
    scenes, kept = [Room(k, 7, SIZE) for k in range(2)], []
    monkeypatch.setattr(vggt, "fit", lambda head, views, *rest: kept.append(views) or {})
    frozen = Frozen()
    frozen.c = replace(config(), data=data)
    vggt.train_live(frozen, scenes, SIZE, ALONE)
    [views] = kept
    seen = [views(0, np.random.default_rng(k))[0].unflatten(0, (-1, 3))[0] for k in range(4)]
    own = [scenes[0].image(i) for i in range(5)]
    assert all(any(torch.equal(image, each) for each in own) for image in seen) is not vary


def test_control_has_truths_of_other_frames():
    scenes = [Room(k, 7, SIZE) for k in range(2)]
    own, other = (vggt.sample(0, None, scenes, 2, SIZE, 16, control, True) for control in (False, True))
    assert torch.equal(own[0], other[0]) and not torch.equal(own[1]["depth"], other[1]["depth"])

# --------------------------------------------------------------------------------
# Scores


def answer(frames):
    """The right one, in another unit"""
    truth, scale = vggt.truths(frames)
    return dict(cameras=truth["cameras"] * torch.tensor([3.0] * 3 + [1] * 6), depth=3 * truth["depth"],
                confidence=torch.ones_like(truth["depth"]))


def test_the_right_answer_is_right_and_another_is_as_wrong_as_it_is():
    frames = drawn(Room(2, 7, SIZE), range(4), SIZE)
    scores, angles, still, row = vggt.measured(frames, answer(frames), True)
    assert scores["abs_rel"] < 1e-5 and scores["delta1"] == 1 and angles.shape == (2, 6) and angles.max() < 0.05
    assert scores["chance_abs_rel"] > 0.05 and still[0].min() > 1 and (still[1] == 90).all()
    assert len(row) == 7 and all(each.shape == (3, *SIZE) for each in row)
    painted = (row[3] != row[5]).any(0).float().mean().item()
    assert painted < 0.1 * (row[3] != 255).any(0).float().mean().item()  # float32 moves a few points
    wrong = answer(frames)
    wrong["depth"][0] *= 1.1  # of one frame of four: the median of ratios is that of the others
    wrong["cameras"][:, :3] *= -1
    scores, angles, _, _ = vggt.measured(frames, wrong, False)
    assert scores["abs_rel"] == pytest.approx(0.025, rel=1e-3) and angles[0].max() < 0.05 and angles[1].min() > 100


def test_what_is_known_counts_alone():
    frames = drawn(Room(2, 7, SIZE), range(2), SIZE)
    out = answer(frames)
    out["depth"][:, :, :20] = 9.0
    frames.depths[:, :, :20] = 0
    right = answer(frames)
    out["cameras"], out["depth"][:, :, 20:] = right["cameras"], right["depth"][:, :, 20:]
    assert vggt.measured(frames, out, True)[0]["abs_rel"] < 1e-5


def test_a_scenes_scores_become_the_tasks(monkeypatch):
    """Errors of three pairs of two scenes; one direction is not known."""
    found = [(dict(abs_rel=0.2), np.array([[2.0, 20], [8, 3]]), np.array([[5.0, 7], [90, 90]]), None),
             (dict(abs_rel=0.4), np.array([[4.0], [np.nan]]), np.array([[9.0], [90]]), None)]

    class Frozen:
        def together(self, function):
            return found, dict(lr=1)
    said = vggt.run(None, Frozen(), TASKS["vggt"].config())
    assert said["auc30"] == auc(np.array([8.0, 20]), 30) == pytest.approx(100 * (12 * 0.5 + 10) / 30)
    assert said["rotation"] == pytest.approx(26 / 3) and said["direction"] == 5.5 and said["chance_rotation"] == 7
    assert said["rotation_5"] == pytest.approx(200 / 3) and said["direction_15"] == 100 and said["n_pairs"] == 3
    assert said["abs_rel"] == pytest.approx(0.3) and said["n_scenes"] == 2 and said["lr"] == 1

    found[:] = [(dict(abs_rel=0.4), np.array([[4.0], [np.nan]]), np.array([[9.0], [90]]), None)]
    with pytest.raises(ValueError, match="the cameras of each scene of shapes stand in one place; vggt wants"):
        vggt.run(None, Frozen(), TASKS["vggt"].config())

# --------------------------------------------------------------------------------
# Training


class Frozen:
    device, about, layers = torch.device("cpu"), dict(weights="w"), [0, 1, 2, 3]

    def __init__(self):
        self.model = initialise(ViT(VIT), 0).eval()

    def network_input(self, images):
        return torch.stack(images).float() / 255 - 0.5

    def network(self, x, layers):
        return self.model.layers(x, layers)


def trained(c, ranks=ALONE, stop=None):
    torch.manual_seed(0)
    scenes = [Room(k, 7, SIZE) for k in range(3)]
    head, left = decoder.Head(32), [stop]

    def views(row, rng):
        if left[0] is not None and rng is not None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGTERM)
        return vggt.sample(row, rng, scenes, 2, SIZE, 16, False, True)
    said = fit(head, views, 20, decoder.loss, decoder.recipe(32), c, Frozen(), ranks)
    return torch.cat([x.flatten() for x in head.state_dict().values()]), said["held_out_loss"]


def config(**changes):
    return replace(TASKS["vggt"].config(workers=0, iterations=3, resolution=48), **changes)


def one(ranks=ALONE, stop=None, **changes):
    return trained(config(**changes), ranks, stop)


def test_two_ranks_are_one(tmp_path):
    two_ranks_are_one(one, tmp_path)


def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path, capsys):
    goes_on_where_it_was(one, tmp_path, capsys)


def by_heart(monkeypatch, iterations):
    """One room; two of its frames in every order"""
    room = [Room(4, 7, SIZE)]
    monkeypatch.setattr(evaluate, "TASKS", dict(vggt=replace(TASKS["vggt"], open=lambda c: (room, room))))
    words = f"--task vggt --weights untrained:tiny --resolution 48 --iterations {iterations} --workers 0 --frames 2"
    return evaluate.evaluate(evaluate.configure(words.split()))


def test_it_learns(monkeypatch):
    before, after = (by_heart(monkeypatch, n)["held_out_loss"] for n in (1, 12))
    assert after < 0.8 * before, (before, after)


@pytest.mark.long
def test_one_room_is_learned_by_heart(monkeypatch):
    found = by_heart(monkeypatch, 80)
    assert found["rotation"] < 0.65 * found["chance_rotation"]                                 # measured: 0.50
    assert found["abs_rel"] < 0.8 * found["chance_abs_rel"]

# --------------------------------------------------------------------------------
# End to end


def test_rooms_a_head_kept_and_read_again(weights, tmp_path, capsys):
    words = "--weights", weights, "--limit", 2, "--resolution", 48, "--frames", 2
    found, _ = run(capsys, *words, "--iterations", 2, "--out", tmp_path / "o")
    assert 0 <= found["auc30"] <= 100 and found["n_scenes"] == 2 and found["n_pairs"] == 20 and found["n_train"] == 10
    assert (tmp_path / "o/vggt.png").is_file() and not (tmp_path / "o" / FILE).exists()
    again, _ = run(capsys, *words, "--head", tmp_path / "o/head.safetensors")
    assert again["auc30"] == found["auc30"] and again["rotation"] == found["rotation"]
    backbone = load_backbone(weights)
    both = load_decoder(tmp_path / "o/head.safetensors", backbone)
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        alike = both.head([Features(*(x[None] for x in (f.cls, f.registers, f.patches)), f.grid)
                           for f in backbone.layers(images, [0, 1, 2, 3])])
    assert both.layers == [0, 1, 2, 3] and torch.equal(both(images)["cameras"], alike["cameras"][0])
    with pytest.raises(ValueError, match="is for a backbone of width 32, this one has 128"):
        load_decoder(tmp_path / "o/head.safetensors", load("untrained:tiny"))
    for pixels in "pixels", "untrained:tiny":
        found, _ = run(capsys, "--weights", pixels, *words[2:], "--iterations", 1)
        assert found["rotation"] > 0


def test_a_scan_end_to_end(weights, tmp_path, capsys):
    scan = write_scan(tmp_path / "scan", 10)
    words = "--weights", weights, "--data", scan, "--resolution", 32, "--frames", 3
    found, _ = run(capsys, *words, "--iterations", 2)
    assert found["n_scenes"] == 1 and found["n_pairs"] == 3 and found["n_train"] == 7
    control, _ = run(capsys, *words, "--iterations", 2, "--control", "true")
    assert control["held_out_loss"] != found["held_out_loss"]
    (train,), (val,) = open_posed(TASKS["vggt"].config(data=str(scan), frames=3))
    assert not set(train.names) & set(val.names)


@pytest.mark.parametrize("words, says", [
    (["--frames", "1"], "--frames"),
    (["--frames", "6"], "--frames 6: a scene of shapes has 5"),
    (["--resolution", "50"], "--resolution 50: write whole patches"),
    (["--layers", "0,1"], "--layers 0,1: a DPT sees four blocks; name four, or none"),
    (["--weights", "untrained:convnext_t", "--resolution", "64"], "name a ViT"),
    (["--data", "nowhere"], "nowhere has 0 scenes in train and 0 in val"),
    (["--decoder", "dpt"], "--decoder dpt: vggt has vggt"),
    (["--head", "nothing"], "--head nothing cannot be read"),
])
def test_mistakes(words, says, weights, capsys):
    with pytest.raises(ValueError, match=says):
        run(capsys, "--weights", weights, "--limit", 2, "--resolution", 48, "--iterations", 1, *words)


def test_frames_whose_depth_is_not_known(weights, tmp_path, capsys):
    from test_tracking import write
    scan = write_scan(tmp_path / "scan", 10)
    for k in range(7, 10):
        write(scan / f"f{k}.depth.png", np.zeros((24, 32), np.uint16))
    with pytest.raises(ValueError, match="no depth of 3 frames of a scene is known"):
        run(capsys, "--weights", weights, "--data", scan, "--resolution", 32, "--frames", 2, "--iterations", 1)


def test_a_plan_of_the_papers_size(capsys):
    evaluate.main("--task vggt --weights untrained:l --plan --memory 80 --batch 1 --data nowhere".split())
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["parameters_of_decoder"] == 628_957_419 and found["backbone_bytes"] == 2 * 303_154_176
    P = 37 * 50  # 592 x 800 pixels
    assert found["features_bytes"] == 4 * 4 * 4 * (1 + 4 + P) * 1024 and 10e9 < found["total_bytes"] < 80e9
