"""tasks/video.py: the probe against plain loops, what it must and must not see, an oracle."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from forks import start
from PIL import Image
from test_clips import a_clip, folders_of_frames

from engine.chunks import serve
from engine.features import Frozen, Pixels
from engine.ranks import Ranks, leading, start_ranks
from engine.task import SKIPPED
from sets import clips
from tasks import TASKS, video

CPU = torch.device("cpu")
TOY = replace(video.SHAPES, width=64, depth=1, n_frames=3, epochs=12, batch=8, rates=(2e-3,))
C = TASKS["video"].config(resolution=32, workers=0)


def a_probe(**changes):
    torch.manual_seed(0)
    return video.Probe(8, 3, replace(TOY, depth=2, **changes))


def some_tokens(b=2, T=4, h=2, w=3, seed=0):
    rng = np.random.default_rng(seed)
    maps, times = rng.normal(size=(b, T, h, w, 8)), np.sort(rng.random((b, T)) * 3)
    return torch.tensor(maps, dtype=torch.float32), torch.tensor(times, dtype=torch.float32)

# --------------------------------------------------------------------------------
# The probe


def test_scores_depend_on_differences_of_positions_alone():
    """In float64, pairs (e, e + E/2) as complex numbers that angles turn."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    turns = video.directions(4).double().numpy()                                           # A 3 E/2
    q, k = rng.normal(size=(2, 5, 4, 32)) + 1j * rng.normal(size=(2, 5, 4, 32))            # N A E/2
    positions = rng.random((5, 3)) * (9, 1, 1)

    def scores(positions):
        turned = [x * np.exp(1j * np.einsum("nc,ace->nae", positions, turns)) for x in (q, k)]
        return np.einsum("iae,jae->aij", turned[0], turned[1].conj()).real

    np.testing.assert_allclose(scores(positions + (3.7, -0.4, 0.9)), scores(positions), atol=1e-10)
    for axis in np.eye(3):
        assert np.abs(scores(positions * (1 - axis)) - scores(positions)).max() > 1


def test_directions_are_perpendicular_and_of_every_wavelength():
    turns = video.directions(5)
    time, down, across, rest = turns.split([10, 10, 10, 2], 2)
    assert (time[:, 1:] == 0).all() and (down[:, 0] == 0).all() and (across[:, 0] == 0).all() and (rest == 0).all()
    assert (down * across).sum(1).abs().max() < 1e-3 and down[:, 1, 0].unique().numel() == 5
    for found, (low, high) in (time, video.TIME), (down, video.SPACE), (across, video.SPACE):
        length = 2 * math.pi / found.norm(dim=1)                                           # A n
        torch.testing.assert_close(length[:, 0], torch.full((5,), low))
        torch.testing.assert_close(length[:, -1], torch.full((5,), high))
        torch.testing.assert_close(length[:, 1:-1] ** 2, length[:, :-2] * length[:, 2:])   # geometric


def test_embedding_is_the_loop():
    positions = torch.rand(2, 5, 3, dtype=torch.float64)
    ours, exact = video.embedding(positions, 64), np.zeros((2, 5, 64))
    for b in range(2):
        for i in range(5):
            for axis, (low, high) in enumerate((video.TIME, video.SPACE, video.SPACE)):
                for k in range(10):
                    angle = 2 * math.pi * positions[b, i, axis].item() / (low * (high / low) ** (k / 9))
                    exact[b, i, 20 * axis + k], exact[b, i, 20 * axis + 10 + k] = math.sin(angle), math.cos(angle)
    np.testing.assert_allclose(ours.numpy(), exact, atol=1e-5)                             # waves are float32: 4e-6


@pytest.mark.parametrize("asked", [False, True])
def test_block_is_the_loop(asked):
    """Pre-LN attention with turned queries and keys, or of a query without position; then the MLP; in float64."""
    torch.manual_seed(0)
    block, x, query = video.Block(128).double(), torch.randn(1, 4, 128).double(), torch.randn(1, 1, 128).double()
    angles = torch.randn(1, 4, 2, 32).double()
    tables = None if asked else (angles.cos(), angles.sin())
    with torch.no_grad():
        ours = block(x, tables, query if asked else None)[0].numpy()
        y = block.norm1(x)[0]
        q, k, v = (z.numpy().reshape(-1, 2, 64) for z in (block.q(query[0] if asked else y), *block.kv(y).chunk(2, -1)))
        q, k = (z[..., :32] + 1j * z[..., 32:] for z in (q, k))
        if not asked:
            q, k = (z * np.exp(1j * angles[0].numpy()) for z in (q, k))
        out = np.zeros((len(q), 128))
        for i in range(len(q)):
            for head in range(2):
                weights = np.exp([(q[i, head] * k[j, head].conj()).real.sum() / 8 for j in range(4)])
                out[i, 64 * head : 64 * head + 64] = weights @ v[:, head] / weights.sum()
        z = (query if asked else x)[0] + block.proj(torch.tensor(out))
        exact = (z + block.mlp(block.norm2(z))).numpy()
    np.testing.assert_allclose(ours, exact, atol=1e-5)                                     # rotate is float32: 4e-7


def test_frames_may_come_in_any_order_but_not_at_any_time():
    probe, (maps, times) = a_probe().eval(), some_tokens()
    probe.blocks[-1].proj.weight.data *= 50                                                # or the query sees little
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        logits = probe(maps, times)
        torch.testing.assert_close(probe(maps[:, order], times[:, order]), logits, atol=1e-5, rtol=1e-5)
        for other in (maps[:, order], times), (maps, times + 1), (maps, times * 2), (maps.flip(3), times):
            assert (probe(*other) - logits).abs().max() > 1e-3
        torch.testing.assert_close(probe(maps[1:], times[1:]), logits[1:])                 # views do not mix


def test_without_the_embedding_only_differences_of_times_count(monkeypatch):
    monkeypatch.setattr(video, "embedding", lambda positions, width: 0)
    probe, (maps, times) = a_probe().eval(), some_tokens()
    probe.blocks[-1].proj.weight.data *= 50
    with torch.no_grad():
        logits = probe(maps, times)
        torch.testing.assert_close(probe(maps, times + 1), logits, atol=1e-4, rtol=1e-4)
        assert (probe(maps, times * 2) - logits).abs().max() > 1e-3


def test_start_values():
    probe = video.Probe(384, 3, video.ProbeConfig(depth=2))
    assert [b.mlp[2].weight.std().item() for b in probe.blocks] == pytest.approx(
        [0.02 / math.sqrt(2 * k) for k in (1, 2, 3)], rel=0.01)
    assert probe.enter.weight.std().item() == pytest.approx(0.02, rel=0.02) and probe.enter.bias.abs().max() == 0
    assert probe.directions.shape == (2, 16, 3, 32)


def test_gradients_reach_every_parameter():
    probe = a_probe()
    torch.nn.functional.cross_entropy(probe(*some_tokens()), torch.tensor([0, 2])).backward()
    for name, p in probe.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


class Fed:
    """A feed of what is at hand"""
    device, squares, width = CPU, 1, 8

    def __init__(self, maps, times):
        self.maps, self.times = maps, times

    def __call__(self, batches):
        for rows in ([k for _, k in places] for places in batches):
            yield self.maps[rows], self.times[rows]


def test_fit_learns_eight_clips_and_keeps_the_generator():
    feed, labels = Fed(*some_tokens(8)), torch.arange(8) % 3
    state = torch.get_rng_state()
    grid = replace(TOY, epochs=40, rates=(1e-9, 2e-3))
    probes = video.train_probes(feed, labels, torch.arange(8), 3, grid, C, Ranks())
    assert torch.equal(torch.get_rng_state(), state)
    found = video.probabilities([probe for probe, *_ in probes], feed, torch.arange(8), Ranks())
    right = (found[:, :, 0].argmax(2) == labels).sum(1)
    assert right[1] == 8 and right[0] < 8
    short = replace(grid, epochs=1, decays=(0.01, 0.1))
    for c, rates in (C, (1e-9, 2e-3)), (replace(C, lr=0.5), (0.5,)):
        probes = video.train_probes(feed, labels, torch.arange(8), 3, short, c, Ranks())
        assert [setting for _, *setting in probes] == [[lr, decay] for lr in rates for decay in (0.01, 0.1)]
    (one, *_), (other, *_) = video.train_probes(feed, labels, torch.arange(8), 3, replace(grid, epochs=0), C, Ranks())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_probes_see_each_clip_once_in_an_epoch_and_their_rate_falls_as_a_cosine(monkeypatch):
    seen, rates = [], []

    class Asked(Fed):
        def __call__(self, batches):
            seen.extend(batches)
            return super().__call__(batches)

    class Optimizer(torch.optim.AdamW):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            assert self.param_groups[0]["weight_decay"] == 0.01
            return super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    recipe = replace(TOY, epochs=2, batch=3)
    video.train_probes(Asked(*some_tokens(8)), torch.arange(8) % 3, torch.arange(1, 8), 3, recipe, C, Ranks())
    assert [len(places) for places in seen] == [3, 3, 1] * 2
    for epoch in range(2):
        assert sorted(place for places in seen[3 * epoch : 3 * epoch + 3] for place in places) == [
            (epoch, k) for k in range(1, 8)]
    assert rates == pytest.approx([2e-3 * x for x in (1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873)])

# --------------------------------------------------------------------------------
# The task


class Oracle:
    """Frozen features: the class of the clip."""
    device = CPU

    def maps(self, name, source, views):
        n = len(views.keywords["at"]) * source.times.shape[1]
        return [[np.eye(12, dtype=np.float16)[[[clip.label] * 2]]] * n for clip, _ in source.views]


def test_kept_puts_squares_beside_views():
    class Numbered(Oracle):
        def maps(self, name, source, views):
            return [[np.full((1, 1, 1), 100 * view + 10 * at + t, np.float16) for at in range(3) for t in range(2)]
                    for view in range(4)]

    views = [(a_clip(8), np.array([2 * k, 2 * k + 1])) for k in range(4)]
    (maps, times), = video.Kept(Numbered(), "", views, [0, 0.5, 1], 32)([[(0, 2), (5, 0)]])
    assert maps[..., 0, 0, 0].tolist() == [[200, 201], [210, 211], [220, 221], [0, 1], [10, 11], [20, 21]]
    np.testing.assert_allclose(times, [[0.4, 0.5]] * 3 + [[0, 0.1]] * 3)


def test_live_is_kept(tmp_path):
    """The same views through the network when they are asked for, by two workers, a few frames at a time"""
    c = replace(folders_of_frames(tmp_path), workers=2, batch=5)
    train, _, _ = video.open_data(c)
    views, frozen = [clips.uniform(clip, 4) for clip in train], Frozen(Pixels(), TASKS["video"], c)
    for at in [0.5], [0, 0.5, 1]:
        kept = video.Kept(frozen, "train", views, at, 32)
        live = video.Live(frozen, partial(clips.whole, views=views, side=32, at=at), at)
        assert live.width == kept.width == 48 and live.squares == kept.squares == len(at)
        places = [[(0, 2), (1, 0)], [], [(1, 5)]]
        for found, exact in zip(live(places), kept([places[0], places[0], places[2]]), strict=True):
            if len(found[0]):
                assert torch.equal(found[0], exact[0]) and torch.equal(found[1], exact[1])
                assert found[0].dtype == torch.float16


def test_a_clip_that_is_gone_ends_in_one_line(tmp_path):
    c = folders_of_frames(tmp_path)
    train, _, _ = video.open_data(c)
    look = partial(clips.sampled, clips=train, T=3, side=32, seed=0)
    live = video.Live(Frozen(Pixels(), TASKS["video"], c), look, [0.5])
    for file in train[1].source.iterdir():
        file.write_bytes(b"gone")
    with pytest.raises(ValueError, match="video: .*readable before"):
        next(live([[(0, 1)]]))


@pytest.mark.parametrize("control", [False, True])
def test_oracle_is_right_and_shuffled_labels_are_chance(control, monkeypatch):
    """Of two learning rates, one of which learns nothing, the other one is picked."""
    monkeypatch.setattr(video, "SHAPES", replace(TOY, rates=(1e-9, 2e-3)))
    c = replace(C, limit=80, control=control)
    found = video.run(video.open_data(c), Oracle(), c)
    if control:
        assert max(found["top1"], found["top1_tta"]) < 22  # of 80 clips of 12 classes: 8.3 +- 3.1
    else:
        assert found["top1"] == found["top1_tta"] == found["top1_held_out"] == 100 and found["best_lr"] == 2e-3
    assert found["chance"] == pytest.approx(100 / 12) and found["n_train"] == found["n_val"] == 80


def test_folders_of_frames_from_images(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "ProbeConfig", lambda: replace(TOY, epochs=30, rates=(2e-3, 5e-3)))
    c = folders_of_frames(tmp_path)
    (tmp_path / "train/dark/empty").mkdir()
    c = replace(c, out=str(tmp_path / "pictures"))
    SKIPPED.clear()
    found = video.run(video.open_data(c), Frozen(Pixels(), TASKS["video"], c), c)
    assert found["top1"] == found["top1_tta"] == 100 and sum(SKIPPED.values()) == 1 and found["chance"] == 50
    assert Image.open(tmp_path / "pictures/video.png").width == 5 * (48 + 4)


def test_two_ranks_train_the_probes_of_one(tmp_path, monkeypatch):
    """Of batches of five, of which one has three clips and the other two; of one, which one has alone."""
    monkeypatch.setattr(video, "ProbeConfig", lambda: replace(TOY, epochs=3, rates=(2e-3, 5e-3), batch=5))
    c, train = folders_of_frames(tmp_path), video.train_probes

    def main(argv):
        ranks = start_ranks("cpu", talk=True)
        frozen = Frozen(Pixels(), TASKS["video"], c, ranks)
        if ranks.rank:
            return serve(frozen, c, ranks)
        found = {}

        def trained(*args):
            probes = train(*args)
            found["probes"] = [probe.state_dict() for probe, *_ in probes]
            return probes

        monkeypatch.setattr(video, "train_probes", trained)
        with leading(ranks):
            found |= dict(scores=video.run(video.open_data(c), frozen, c))
        torch.save(found, tmp_path / f"{ranks.count}.pt")

    for count in 1, 2:
        group = start(tmp_path / f"run{count}", ranks=count, base=(), main=main)
        assert group.wait(60)[0] == [0] * count, group.text()
    one, two = (torch.load(tmp_path / f"{count}.pt", weights_only=False) for count in (1, 2))
    assert one["scores"] == two["scores"]
    for a, b in zip(one["probes"], two["probes"], strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=0)  # measured 1.3e-5; a rate is 2e-3
