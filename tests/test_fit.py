"""decoders/fit.py: the rate, statistics over ranks, what is held out, and a run that goes on where it was stopped."""

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
    workers: int = 0
    out: str = ""


class Frozen:
    """Patches that are pixels"""
    layers, device, about = [0], torch.device("cpu"), dict(weights="w")

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
    power = replace(r, power=3.5, warmup=0)
    assert rate(power, 2.0, 5, 10) == pytest.approx(2 * 0.5**3.5)


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
    assert len(asked) == 96 and not held & set(asked)
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
        x = torch.randn(4, 3, 5, 6) * 3 + 1
        torch.testing.assert_close(own(x), theirs(x))
    for name, value in theirs.state_dict().items():
        if name != "num_batches_tracked":
            torch.testing.assert_close(own.state_dict()[name], value)
    torch.testing.assert_close(own.eval()(x), theirs.eval()(x))


def as_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    head, said = trained(Config(iterations=6), Ranks(rank, 2, group=dist.group.WORLD))
    torch.save((flat(head), said["held_out_loss"]), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    mp.spawn(as_rank, (tmp_path,), nprocs=2)
    head, said = trained(Config(iterations=6))
    for rank in range(2):
        found, loss = torch.load(tmp_path / str(rank))
        assert (found - flat(head)).norm() / flat(head).norm() < 1e-5 and loss == pytest.approx(said["held_out_loss"])


def test_a_batch_that_does_not_go_into_the_ranks():
    with pytest.raises(ValueError, match="a batch of 8 in parts of 2 does not go into 3 ranks"):
        trained(ranks=SimpleNamespace(count=3, rank=0))


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
