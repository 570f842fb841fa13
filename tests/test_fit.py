"""decoders/fit.py: rate, memory, statistics over ranks, what is held out, a run that goes on where it was stopped."""

import math
import os
import signal
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from decoders import fit as fitting
from decoders.fit import BatchNorm, Recipe, fit, rate
from engine.ranks import Ranks
from model import Features


@dataclass(frozen=True)
class Config:
    iterations: int = 12
    lr: float = 0.0
    seed: int = 0
    batch: int = 64
    workers: int = 0
    out: str = ""


class Frozen:
    """Patches that are pixels"""
    layers, device, about = [0], torch.device("cpu"), dict(weights="w")
    model = nn.Identity()
    model.config = SimpleNamespace(patch_size=1, width=3)

    def network_input(self, images):
        return torch.stack(images).float() / 255

    def network(self, x, layers):
        return [Features(x.mean((2, 3)), x[:, :0, 0], x.flatten(2).transpose(1, 2), tuple(x.shape[2:]))]


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.conv = BatchNorm(3), nn.Conv2d(3, 2, 1)

    def forward(self, features):
        return self.conv(self.norm(features[0].map()))


ALONE = Ranks()
RECIPE = Recipe(lr=0.05, weight_decay=0.01, batch=8, part=2, warmup=0.25, clip=1.0)


def samples(row, rng):
    """The truth of an image is its first channel, and twice its second"""
    image = np.random.default_rng(row).integers(0, 256, (3, 4, 5)).astype(np.uint8)
    if rng is not None and rng.random() < 0.5:
        image = image[:, :, ::-1].copy()
    image = torch.from_numpy(image)
    return image, torch.stack([image[0] / 255, image[1] / 127.5])


def loss_of(out, truths):
    return (out - torch.stack(truths)).square().mean()


def trained(c=Config(), ranks=ALONE, recipe=RECIPE, samples=samples, n=40):
    head = Head()
    said = fit(head, samples, n, loss_of, recipe, c, Frozen(), ranks)
    return head, said


def flat(head):
    return torch.cat([x.flatten().double() for x in head.state_dict().values()])


def test_rate():
    r = Recipe(lr=1.0, weight_decay=0, batch=2, warmup=0.2)
    assert [rate(r, 1.0, i, 10) for i in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    early = replace(r, until=0.6, least=0.1)
    assert [rate(early, 2.0, i, 10) for i in (0, 2, 4, 6, 9)] == pytest.approx([1, 2, 1.1, 0.2, 0.2])
    power = replace(r, power=3.5, warmup=0)
    assert rate(power, 2.0, 5, 10) == pytest.approx(2 * 0.5**3.5)
    drop = replace(r, drop=0.8)
    assert [rate(drop, 2.0, i, 10) for i in (0, 1, 7, 8, 9)] == pytest.approx([1, 2, 2, 0.2, 0.2])


def test_what_has_weight_decay():
    def names(undecayed):
        head = nn.ModuleDict(dict(conv=nn.Conv2d(2, 2, 1), query=nn.Embedding(3, 2), norm=nn.LayerNorm(2)))
        known = {p: name for name, p in head.named_parameters()}
        found = fitting.groups(head, replace(RECIPE, undecayed=undecayed))
        return {group["weight_decay"]: [known[p] for p in group["params"]] for group in found}
    assert [*names(None)] == [0.01] and len(names(None)[0.01]) == 5
    assert names(()) == {0.01: ["conv.weight", "query.weight"], 0: ["conv.bias", "norm.weight", "norm.bias"]}
    assert names(("query",))[0.01] == ["conv.weight"]


def test_it_learns_and_keeps_what_fits_the_held_out_images_best():
    head, said = trained(Config(iterations=200))
    assert said["held_out_loss"] < 1e-3 and not head.training
    rows = np.random.default_rng([0, 7]).permutation(40)[:2]
    exact = np.mean([loss_of(head(Frozen().network(samples(int(i), None)[0][None] / 255, [0])),
                             [samples(int(i), None)[1]]).item() for i in rows])
    assert said["held_out_loss"] == pytest.approx(exact, rel=1e-5)


def test_held_out_images_are_not_learned_from():
    asked = []

    def watched(row, rng):
        if rng is not None:
            asked.append(row)
        return samples(row, rng)
    trained(samples=watched)
    held = set(np.random.default_rng([0, 7]).permutation(40)[:2].tolist())
    assert asked.pop(0) == asked[0] and len(asked) == 96 and not held & set(asked)  # the first tells the images' size
    assert len(set(asked[:38])) == 38  # an epoch has each once


def test_the_best_is_kept_and_not_the_last(monkeypatch):
    seen = []

    def judge(head, *_):
        seen.append(flat(head))
        return 1.0 + (len(seen) != 5)
    monkeypatch.setattr(fitting, "judge", judge)
    head, said = trained()
    assert said["best_step"] == 5 and len(seen) == 12 and torch.equal(flat(head), seen[4])


def test_batch_norm_is_torch_s():
    own, theirs = BatchNorm(3), nn.BatchNorm2d(3)
    for _ in range(3):
        x, g = (torch.randn(4, 3, 5, 6) * 3 + 1).requires_grad_(), torch.randn(4, 3, 5, 6)
        torch.testing.assert_close(own(x), theirs(x))
        for a, b in zip(*(torch.autograd.grad(norm(x), [x, norm.weight, norm.bias], g) for norm in (own, theirs)),
                        strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for name, value in theirs.state_dict().items():
        if name != "num_batches_tracked":
            torch.testing.assert_close(own.state_dict()[name], value)
    torch.testing.assert_close(own.eval()(x), theirs.eval()(x))


def as_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    for name, train in dict(maps=trained, boxes=boxes_fitted).items():
        head, said = train(Config(iterations=6), Ranks(rank, 2, group=dist.group.WORLD))
        torch.save((flat(head), said["held_out_loss"]), f"{folder}/{name}{rank}")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    mp.spawn(as_rank, (tmp_path,), nprocs=2)
    for name, train in dict(maps=trained, boxes=boxes_fitted).items():
        head, said = train(Config(iterations=6))
        for rank in range(2):
            found, loss = torch.load(tmp_path / f"{name}{rank}")
            assert (found - flat(head)).norm() / flat(head).norm() < 1e-5
            assert loss == pytest.approx(said["held_out_loss"])


def test_a_batch_that_does_not_go_into_the_ranks():
    with pytest.raises(ValueError, match="a batch of 8 in parts of 2 does not go into 3 ranks"):
        trained(ranks=SimpleNamespace(count=3, rank=0))


class Boxes(nn.Module):
    """An answer of dicts, of the image itself beside its features"""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def see(self, frozen, images):
        x = frozen.network_input(images)
        return x, frozen.network(x, frozen.layers)

    def forward(self, seen):
        x, (f,) = seen
        return dict(boxes=[self.linear(torch.cat([x.mean((2, 3)), f.cls], 1))])


def boxed(row, rng):
    image, _ = samples(row, rng)
    return image, dict(boxes=image.float().mean((1, 2))[: 1 + row % 3, None] / 255 * torch.arange(1, 5))


def boxes_loss(out, truths, n):
    return sum((truth["boxes"] - box).abs().sum() for box, truth in zip(out["boxes"][0], truths, strict=True)) / n


def boxes_fitted(c=Config(), ranks=ALONE):
    head = Boxes()
    said = fit(head, boxed, 40, boxes_loss, RECIPE, c, Frozen(), ranks, count=lambda truths: sum(
        len(truth["boxes"]) for truth in truths))
    return head, said


def test_truths_of_any_form_and_number():
    """Dicts of as many boxes as an image has."""
    first, last = (boxes_fitted(Config(iterations=n))[1]["held_out_loss"] for n in (1, 60))
    assert last < first / 2


def test_a_mean_over_boxes_is_over_those_of_the_step(monkeypatch):
    seen, grads, update = [], [], fitting.Run.update

    def watched(row, rng):
        seen.append((rng is not None, boxed(row, rng)))
        return seen[-1][1]
    monkeypatch.setattr(fitting.Run, "update", lambda run, *words: (
        grads.append(run.head.linear.bias.grad.clone()), update(run, *words)))
    fit(Boxes(), watched, 40, boxes_loss, RECIPE, Config(iterations=1, batch=4), Frozen(), ALONE,
        count=lambda truths: sum(len(truth["boxes"]) for truth in truths))
    views, frozen, head = [view for trained, view in seen if trained][-8:], Frozen(), Boxes()
    out = head(head.see(frozen, [image for image, _ in views]))
    boxes_loss(out, [truth for _, truth in views], sum(len(truth["boxes"]) for _, truth in views)).backward()
    torch.testing.assert_close(grads[0], head.linear.bias.grad)


def test_parts_that_have_a_graph_at_once():
    """Of a head without a BatchNorm, nothing depends on it."""
    whole, halves = (boxes_fitted(Config(batch=batch))[0] for batch in (64, 5))
    assert fitting.at_once(RECIPE, Config(batch=5), ALONE) == 4 and fitting.at_once(RECIPE, Config(batch=1), ALONE) == 2
    torch.testing.assert_close(flat(whole), flat(halves), rtol=1e-5, atol=1e-6)


def test_needs_are_what_a_forward_pass_keeps():
    head, shape = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)), (3, 16, 12)
    head.see = lambda frozen, images: frozen.network(frozen.network_input(images), [0])[0].map()
    config = SimpleNamespace(patch_size=2, width=3, hidden=7)
    found = fitting.needs(head, config, [0], shape, 4)
    n, P = 3 * 8 * 9 + 8 + 8 * 5 + 5, 8 * 6
    exact = dict(parameters=4 * n, gradients=4 * n, adam=8 * n, best=4 * n, features=4 * 4 * (1 + P) * 3,
                 activations=4 * 4 * P * 8, outputs=4 * 4 * 4 * P * 5, block=4 * 4 * P * (6 * 3 + 2 * 7))
    assert found == exact | dict(total=sum(exact.values()))


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch):
    monkeypatch.setattr(fitting, "device_memory", lambda kind: 20e3)
    with pytest.raises(ValueError, match=r"needs 3.82e-05 GB on each rank, 8 images of 5x4 at once, where there are "
                       r"2e-05; what would fit: --batch 4 \(1.93e-05 GB\)"):
        trained()
    trained(Config(iterations=1, batch=4))
    monkeypatch.setattr(fitting, "device_memory", lambda kind: 1e3)
    with pytest.raises(ValueError, match="what would fit: a smaller --resolution, or backbone"):
        trained()


@pytest.mark.parametrize("held, says", [(False, "gradient is nan in step 0; try a smaller --lr than 0.0167"),
                                        (True, "loss is nan on held-out images in step 1; look for nan")])
def test_nan_is_said(held, says):
    def broken(row, rng):
        image, truth = samples(row, rng)
        return image, truth * (math.nan if (rng is None) == held else 1)
    with pytest.raises(ValueError, match=says):
        trained(samples=broken)


class Stopped(Exception):
    pass


def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path, capsys):
    whole, said = trained()

    left = [60]

    def stopping(row, rng):
        left[0] -= rng is not None
        if not left[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return samples(row, rng)
    c = Config(out=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        trained(c, samples=stopping)
    assert (tmp_path / fitting.FILE).is_file()
    again, same = trained(c)
    assert "goes on from step 8" in capsys.readouterr().out
    assert torch.equal(flat(again), flat(whole)) and said == same and not list(tmp_path.iterdir())


def test_what_is_left_of_another_run(tmp_path):
    c = Config(out=str(tmp_path))
    run = fitting.Run(Head(), RECIPE, 0.05, c, Frozen(), Ranks())
    run.save(3)
    with pytest.raises(ValueError, match="is of a run with other options or weights"):
        trained(replace(c, seed=1))
    (tmp_path / fitting.FILE).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read .* delete it to begin again"):
        trained(c)
