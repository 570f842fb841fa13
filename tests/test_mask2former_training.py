"""decoders/mask2former.py in training: two ranks are one, a run goes on where it was stopped, what it begins from."""

import os
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_fit import ALONE, Config, Frozen, flat

from decoders import fit as fitting
from decoders import mask2former, masks
from decoders.mask2former import Mask2Former, Mask2FormerConfig
from engine.ranks import Ranks
from engine.shards import Entry, write_tensors
from model import Features, ViTConfig

TINY = Mask2FormerConfig(32, n_out=3, decoder=32, hidden=32, queries=6, encoder_layers=1, layers=2, stem=4)
RECIPE = fitting.Recipe(1e-3, 0.05, 4, warmup=0.1, clip=1.0, undecayed=mask2former.UNDECAYED)


class Fixed(Frozen):
    """Patches that are pixels, on a grid of 16 pixels, of four blocks"""
    layers, config = [0, 1, 2, 3], ViTConfig(depth=4, width=32, heads=2, hidden=32)

    def network(self, x, layers):
        grid = x.shape[2] // 16, x.shape[3] // 16
        means = torch.nn.functional.avg_pool2d(x, 16).flatten(2).transpose(1, 2)
        patches = torch.cat([means * (k + 1) for k in range(11)], 2)[:, :, :32]
        return [Features(patches[:, 0], patches[:, :0], patches.roll(k, 2), grid) for k in layers]


class Squares:
    """Images of one bright square, class 1 or 2, on class 0"""

    def __len__(self):
        return 12

    def image(self, i):
        return torch.from_numpy(100 * self.truth(i))[None].repeat(3, 1, 1) + 20

    def truth(self, i):
        truth = np.zeros((64, 64), np.uint8)
        top, left = np.random.default_rng(i).integers(0, 33, 2)
        truth[top : top + 32, left : left + 32] = 1 + i % 2
        return truth


def trained(c, ranks=ALONE, samples=None, seed=0):
    torch.manual_seed(seed)
    head = Mask2Former(TINY)
    samples = samples or partial(masks.sample, source=Squares(), order=range(12), side=64)
    frozen = Fixed()
    frozen.model = torch.nn.Linear(1, 1)
    frozen.model.config = frozen.config
    return head, fitting.fit(head, samples, 12, partial(masks.masks_loss, n_points=64), RECIPE, c, frozen, ranks)


def as_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    head, said = trained(Config(iterations=2), Ranks(rank, 2, group=dist.group.WORLD))
    torch.save((flat(head), said["held_out_loss"]), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    """Statistics, their gradients, points, and what is dropped"""
    mp.spawn(as_rank, (tmp_path,), nprocs=2)
    head, said = trained(Config(iterations=2))
    for rank in range(2):
        found, loss = torch.load(tmp_path / str(rank))
        error = (found - flat(head)).norm() / flat(head).norm()
        assert error < 2e-5 and loss == pytest.approx(said["held_out_loss"], rel=1e-3), error  # measured: 2.4e-6


def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path, capsys):
    whole, said = trained(Config(iterations=3))
    left = [9]

    def stopping(row, rng):
        left[0] -= rng is not None
        if not left[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return masks.sample(row, rng, Squares(), range(12), 64)
    c = Config(iterations=3, out=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        trained(c, samples=stopping)
    again, same = trained(c, seed=5)
    assert "goes on from step 2" in capsys.readouterr().out
    assert torch.equal(flat(again), flat(whole)) and said == same and not list(tmp_path.iterdir())


def kept(path, head):
    write_tensors(path, {name: Entry(tuple(x.shape), x.dtype, lambda x=x: iter([x]))
                         for name, x in head.state_dict().items()}, {})
    return str(path)


def test_training_begins_from_another_head(tmp_path, capsys):
    old, same, other = (Mask2Former(replace(TINY, n_out=n)) for n in (3, 3, 5))
    path = kept(tmp_path / "head.safetensors", old)
    mask2former.begin(same, path)
    assert torch.equal(flat(same), flat(old)) and "classes too, they are as many" in capsys.readouterr().out
    fresh = other.segmentation_model[1].predictor.class_embed.weight.clone()
    mask2former.begin(other, path)
    assert "classes are others, and begin anew" in capsys.readouterr().out
    assert torch.equal(other.segmentation_model[1].predictor.class_embed.weight, fresh)
    a, b = (x.segmentation_model[1].predictor.query_feat.weight for x in (old, other))
    assert torch.equal(a, b)


def test_heads_that_nothing_can_begin_from(tmp_path):
    path = kept(tmp_path / "wide.safetensors", Mask2Former(replace(TINY, decoder=64)))
    with pytest.raises(ValueError, match=r"pixel_decoder.*\(64, 32, 1, 1\), wanted \(32, 32, 1, 1\); name a head of"):
        mask2former.begin(Mask2Former(TINY), path)
    (tmp_path / "x").write_bytes(b"damaged")
    for name in "x", "nowhere":
        with pytest.raises(ValueError, match=f"--init .*{name} cannot be read"):
            mask2former.begin(Mask2Former(TINY), str(tmp_path / name))
    with pytest.raises(ValueError, match="is missing, wanted"):
        mask2former.begin(Mask2Former(TINY), kept(tmp_path / "y", torch.nn.Linear(2, 2)))


def test_rates_are_those_of_the_paper():
    """App. D.10: peaks, and steps of warm-up of those of each stage"""
    for task, lr, steps, warmup in (("stuff", 1.5e-5, 80000, 6000), ("hypersim", 2.5e-5, 10000, 1500),
                                    ("ade20k", 3e-5, 20000, 1500)):
        recipe = mask2former.recipe(task, 4096)
        assert (recipe.lr, recipe.batch, round(recipe.warmup * steps)) == (lr, 16, warmup)
        assert fitting.rate(recipe, recipe.lr, warmup, steps) == lr and mask2former.STAGES[task].iterations == steps
    assert mask2former.recipe("cityscapes", 4096).lr == 1.5e-5 and mask2former.recipe("voc", 4096).lr == 1e-5
    assert mask2former.recipe("ade20k", 128) == mask2former.recipe("segmentation", 128)
    assert mask2former.recipe("segmentation", 384).lr == 1e-4


@pytest.mark.parametrize("task, resolution, iterations, says", [
    ("ade20k", 896, 20000, ""), ("ade20k", 512, 20000, "the paper trains ade20k at 896 pixels, for 20,000 steps"),
    ("voc", 512, 7, "the paper trains voc at 1024 pixels"), ("voc", 1024, 7, ""), ("camvid", 512, 7, "")])
def test_what_the_paper_does_otherwise_is_said(task, resolution, iterations, says, monkeypatch, capsys):
    monkeypatch.setattr(mask2former, "fit", lambda *words: {})
    monkeypatch.setattr(mask2former, "Head", lambda width, n: torch.nn.Linear(1, 1))
    frozen = Fixed()
    frozen.c = SimpleNamespace(task=task, resolution=resolution, iterations=iterations, seed=0, init="")
    frozen.model = SimpleNamespace(config=SimpleNamespace(width=1024))
    mask2former.trained(Squares(), range(12), 3, 1, frozen, ALONE)
    assert capsys.readouterr().out == (f"mask2former: {says}\n" if says else "")


@pytest.mark.parametrize("width, scales, of_class", [(128, (0.8, 1.25), 30), (384, (0.5, 2.0), 2)])
def test_small_decoders_see_crops_near_the_image_and_weigh_classes_more(width, scales, of_class, monkeypatch):
    fitted = []
    monkeypatch.setattr(mask2former, "fit", lambda *words: fitted.append(words) or {})
    monkeypatch.setattr(mask2former, "Head", lambda width, n: torch.nn.Linear(1, 1))
    frozen = Fixed()
    frozen.c = SimpleNamespace(task="segmentation", resolution=64, iterations=1, seed=0, init="")
    frozen.model = SimpleNamespace(config=SimpleNamespace(width=width))
    mask2former.trained(Squares(), range(12), 3, 1, frozen, ALONE)
    (_, sample, _, loss, *_), = fitted
    assert sample.keywords["scales"] == scales and loss.keywords["of_class"] == of_class


def test_embeddings_do_not_decay():
    """Of two steps whose gradients are 0 only what decays changes"""
    torch.manual_seed(0)
    head = Mask2Former(TINY)
    before = {name: p.clone() for name, p in head.named_parameters()}
    frozen = Fixed()
    run = fitting.Run(head, RECIPE, 1e-1, Config(), frozen, Ranks())
    for p in head.parameters():
        p.grad = torch.zeros_like(p)
    run.update(0, 1e-1)
    still = {name for name, p in head.named_parameters() if torch.equal(p, before[name])}
    for name, p in before.items():
        if p.any():
            wanted = p.ndim == 1 or any(word in name for word in ("level_embed", "level_encoding", "query_feat",
                                                                  "query_embed"))
            assert (name in still) == wanted, name


def test_it_learns_squares():
    """The loss of images that nothing is learned from: 24.7 after one step, 17.9 after 24"""
    first, last = (trained(Config(iterations=n))[1]["held_out_loss"] for n in (1, 24))
    assert last < 0.8 * first


class Twice:
    """A source whose every image is there twice, so that all of them are learned from if one is held out"""

    def __init__(self, source):
        self.source, self.image = source, lambda i: source.image(i % len(source))
        self.truth = lambda i: source.truth(i % len(source))

    def __len__(self):
        return 2 * len(self.source)


@pytest.mark.long
def test_four_scenes_are_learned_by_heart(monkeypatch):
    from evaluate import configure, evaluate
    from tasks import segmentation
    opened = segmentation.open_segmentation

    def of_train(c):
        train, _, n_classes = opened(c)
        return Twice(train), train, n_classes
    monkeypatch.setattr(segmentation, "open_segmentation", of_train)
    words = "--task segmentation --decoder mask2former --weights untrained:tiny --limit 4 --iterations 250 --workers 0"
    assert evaluate(configure([*words.split(), "--device", "cpu"]))["miou"] > 90
