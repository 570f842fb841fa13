"""text.py: the loss as it is known, its gradient in parts and on ranks, resuming bit for bit, mistakes in one line."""

import json
import math
import signal
from dataclasses import replace

import pytest
import torch
from forks import start
from safetensors.torch import load_file

import dinotxt
import health
import text
from dinotxt import TowerConfig, load_dinotxt, new_towers
from engine.ranks import Ranks
from model import Noise, ViT, ViTConfig, build
from text import RECIPES, TextConfig, contrastive_loss
from weights import load_backbone, save_backbone

VIT = ViTConfig(1, 64, 2, 128, patch_size=16, layerscale=1.0, init_std=0.2)
MICRO = """--n_shapes 24 --batch 8 --steps 6 --resolution 32 --depth 1 --width 64 --merges 60 --lr_warmup 1 --lr 1e-3
           --drop_path 0.3 --group 4 --workers 0 --log_every 1 --device cpu --precision fp32""".split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_backbone(build(lambda: ViT(VIT)), path, "nano")
    return path


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory):
    """Six steps, without interruption."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(weights, out)
    return out


def run(weights, out, *words):
    done = text.main([*MICRO, "--weights", str(weights), "--out", str(out), *words])
    return done, rows(out)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_files(a, b, name):
    one, two = load_file(a / name), load_file(b / name)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)

# --------------------------------------------------------------------------------
# The loss


def test_equal_vectors_are_at_chance_and_orthonormal_pairs_known():
    scale = torch.tensor([math.log(1 / 0.07)])
    loss, right = contrastive_loss(torch.ones(8, 16), torch.ones(8, 16), scale)
    assert loss.item() == pytest.approx(2.0794415, abs=1e-6)
    loss, right = contrastive_loss(3 * torch.eye(8), 0.2 * torch.eye(8), scale)
    assert loss.item() == pytest.approx(4.3741e-6, rel=4e-2) and right.item() == 8  # float32: 4.26e-6 to 4.41e-6


def test_the_loss_is_the_plain_loop():
    """One image, one text after the other, in float64"""
    g = torch.Generator().manual_seed(0)
    images, texts, scale = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g), torch.tensor([1.3])
    cosine = [[(i @ t / i.norm() / t.norm()).item() * math.exp(1.3) for t in texts.double()] for i in images.double()]
    total = 0
    for k in range(6):
        total += math.log(sum(map(math.exp, cosine[k]))) + math.log(sum(math.exp(row[k]) for row in cosine))
        total -= 2 * cosine[k][k]
    loss, right = contrastive_loss(images, texts, scale)
    assert loss.item() == pytest.approx(total / 12, rel=1e-6)                                  # 2e-8 measured
    assert right.item() == sum(max(row) == row[k] for k, row in enumerate(cosine))


def gradients(n_parts, dtype=torch.float32, B=64):
    """Of the loss of one batch, in so many parts, with stochastic depth; the loss beside"""
    c = replace(RECIPES["laptop"], precision="fp32", resolution=32, batch=B, accumulate=n_parts, drop_path=0.3)
    backbone = build(lambda: ViT(VIT)).eval()
    towers = new_towers(VIT, TowerConfig(1, 64, 12, 30)).to(dtype)
    with torch.no_grad():
        for block in towers.visual_model["head"].blocks:
            block.ls1.gamma.fill_(1), block.ls2.gamma.fill_(1)
    g, size = torch.Generator().manual_seed(0), B // n_parts
    images = torch.randint(0, 256, (B, 3, 32, 32), generator=g, dtype=torch.uint8)
    ids = torch.randint(0, 29, (B, 12), generator=g)
    ids[:, -1] = 29
    parts = [dict(images=images[k : k + size], ids=ids[k : k + size],
                  noise=Noise(0, 5, k, size, 16, c.drop_path).draw(2, [size], [9])) for k in range(0, B, size)]
    loss, top1 = text.learn(c, Ranks(), backbone, towers, parts)
    assert all(p.grad is None for p in backbone.parameters()) or not any(p.grad.any() for p in backbone.parameters())
    return loss.item(), {name: p.grad for name, p in towers.named_parameters()}


@pytest.mark.parametrize("n_parts", [2, 8, 32])
def test_parts_have_the_gradient_of_the_whole(n_parts):
    """Of each parameter, relative to its norm: 7e-7 measured"""
    loss, exact = gradients(1)
    again, found = gradients(n_parts)
    assert again == pytest.approx(loss, rel=1e-6)
    worst = max(((found[name] - x).norm() / x.norm()).item() for name, x in exact.items())
    assert worst < 1e-6, worst
    assert all(x.abs().max() > 0 for x in exact.values())


def test_other_draws_are_another_gradient(monkeypatch):
    """The test above would not see parts that draw anew, unless that shows"""
    _, exact = gradients(1)
    see, calls = text.Noise.kept, []
    monkeypatch.setattr(Noise, "kept", lambda self, *words: (calls.append(1), see(replace(self, step=9), *words))[1])
    _, found = gradients(1)
    assert calls and max((found[name] - x).abs().max().item() for name, x in exact.items()) > 1e-4

# --------------------------------------------------------------------------------
# The run


def test_health_knows_what_kind_of_run_it_is(whole, capsys):
    health.main([str(whole)])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["verdict"] == "warming" and None not in told.values() and told["scale"] == pytest.approx(14.3, abs=0.2)


def test_a_run_leaves_what_can_be_used(whole, weights):
    found = rows(whole)
    assert [row["step"] for row in found] == list(range(6)) and found[-1]["loss"] < found[0]["loss"]
    model = load_dinotxt(whole, load_backbone(whole))
    assert model.towers.config.head_blocks == 2 and model.encode_words(["a red star"]).shape == (1, 128)
    one, two = load_backbone(whole).state_dict(), load_backbone(weights).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert not list(whole.glob("tokens-*")) and found[0]["scale"] == pytest.approx(1 / 0.07, rel=1e-2)
    assert 0 < found[0]["lr"] <= 1e-3 and found[-1]["lr"] == 0 and found[0]["cut"] == 0


def test_the_scale_stays_below_a_hundred(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(dinotxt, "SCALE", 6.0)
    _, found = run(weights, tmp_path / "run", "--steps", "2", "--lr", "1e-6", "--n_shapes", "8")
    assert [row["scale"] for row in found] == pytest.approx([100, 100], rel=1e-4)


def test_resuming_is_exact(weights, whole, tmp_path):
    out = tmp_path / "run"
    done, _ = run(weights, out, "--stop_after", "3")
    assert not done and list(out.glob("tokens-*"))
    assert text.main(["--out", str(out), "--resume"])
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in rows(whole)]
    for name in "text.safetensors", "teacher.safetensors", "checkpoints/6/0.safetensors":
        same_files(out, whole, name)


def test_a_signal_saves_and_leaves(weights, whole, tmp_path, monkeypatch):
    learn, calls = text.learn, []

    def interrupted(*words):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return learn(*words)
    monkeypatch.setattr(text, "learn", interrupted)
    out = tmp_path / "run"
    done, found = run(weights, out)
    assert not done and [row["step"] for row in found] == [0, 1] and (out / "checkpoints/2").is_dir()
    assert text.main(["--out", str(out), "--resume", "auto"])
    same_files(out, whole, "text.safetensors")


@pytest.mark.parametrize("words", [pytest.param([], marks=pytest.mark.long), ["--accumulate", "2"]])
def test_two_ranks_learn_what_one_does(words, weights, whole, tmp_path):
    group = start(tmp_path / "two", *words, ranks=2, base=[*MICRO, "--weights", str(weights)], main=text.main)
    codes, _ = group.wait(120)
    assert codes == [0, 0], group.text()
    for one, two in zip(rows(whole), rows(tmp_path / "two"), strict=True):
        for name in "loss", "top1", "grad_norm_towers":
            assert two[name] == pytest.approx(one[name], abs=1e-5)
    one, two = (load_file(out / "text.safetensors") for out in (whole, tmp_path / "two"))
    assert max((one[name] - x).abs().max().item() for name, x in two.items()) < 1e-4


def test_parts_learn_what_the_whole_does(weights, whole, tmp_path):
    _, found = run(weights, tmp_path / "parts", "--accumulate", "4")
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in rows(whole)], abs=1e-5)


def test_augmented_views_are_functions_of_seed_and_step():
    """Crops, flips and captions: the same again, others in the next epoch, and no middles"""
    c = replace(RECIPES["laptop"], batch=8, resolution=32, augment=True, drop_path=0.3, group=4)
    source = text.open_captions("shapes", n_shapes=8)
    pairs, again = (text.Pairs(c, source, text.Tokenizer([]), VIT, 0, 8) for _ in range(2))
    one, two, other = pairs[1], again[1], pairs[0]
    assert all(torch.equal(one[name], two[name]) for name in ("images", "ids", "indices"))
    assert torch.equal(one["noise"]["rows"], two["noise"]["rows"]) and one["images"].shape == (8, 3, 32, 32)
    place = {index: k for k, index in enumerate(other["indices"].tolist())}
    for k, index in enumerate(one["indices"].tolist()):
        middle = text.square(index, source, 32, 16)
        assert not torch.equal(one["images"][k], other["images"][place[index]])
        assert not torch.equal(one["images"][k], middle)
    image = source.load(0)
    source.load = lambda i: image                                    # of one image, each sample cuts its own
    views = text.Pairs(c, source, text.Tokenizer([]), VIT, 0, 8)[0]["images"]
    assert len(views.flatten(1).unique(dim=0)) == 8


def test_control_gives_images_the_captions_of_others(weights):
    c = replace(RECIPES["laptop"], n_shapes=24, batch=24, resolution=32, augment=True, control=True)
    source = text.open_captions("shapes", n_shapes=24)
    pairs = text.Pairs(c, source, text.Tokenizer([]), VIT, 0, 24)
    assert sorted(pairs.said.tolist()) == list(range(24)) and sum(pairs.said == range(24)) < 5
    batch, tokenizer = pairs[0], text.Tokenizer([])
    for index, ids in zip(batch["indices"].tolist(), batch["ids"], strict=True):
        (said,), _ = tokenizer(source.captions(int(pairs.said[index])), c.context)
        assert ids[: len(said)].tolist() == said.tolist()


def test_long_captions_are_cut_and_counted(weights, tmp_path, capsys):
    _, found = run(weights, tmp_path / "run", "--context", "8", "--steps", "2")
    assert [row["cut"] for row in found] == [8, 16]
    assert "16 captions were longer than --context 8, and cut" in capsys.readouterr().out

# --------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("words, says", [
    (["--weights", "pixels"], "--weights pixels: words want a ViT for RGB; name the folder of a run, or a file of one"),
    (["--weights", "untrained:convnext_t"], "untrained:convnext_t: words want a ViT"),
    (["--weights", "nowhere.pth"], "nowhere.pth does not exist"),
    (["--size", "b"], "--size b: .* is .*; leave it out, or name another file"),
    (["--recipe", "huge"], "--recipe huge is not known; choose one of full, laptop"),
    (["--resolution", "40"], "--resolution 40 is not a multiple of the patch, 16; try 32"),
    (["--width", "100"], "--width 100: the text tower has heads of 64; try 64"),
    (["--accumulate", "3"], "--batch 8 is not divisible by --accumulate 3"),
    (["--precision", "fp8"], "--precision fp8 is not known"),
    (["--context", "2"], r"--context is 2; it must be in \[3, 4096\]"),
    (["--data", "nowhere.json"], "--data: nowhere.json does not exist; name captions"),
    (["--captions", "x"], "unknown option --captions; did you mean --"),
    (["--resume", "true"], "no run to go on with")])
def test_mistakes_end_in_one_line(words, says, weights, tmp_path):
    with pytest.raises(ValueError, match=says):
        run(weights, tmp_path / "run", *words)
    assert not (tmp_path / "run/checkpoints").exists()


def test_another_run_is_not_resumed(weights, whole, tmp_path):
    with pytest.raises(ValueError, match="was begun with --lr 0.001, not with --lr 0.5"):
        text.main(["--out", str(whole), "--resume", "--lr", "0.5"])
    with pytest.raises(ValueError, match="--steps 5: .* has 6 steps already"):
        text.main(["--out", str(whole), "--resume", "--steps", "5"])
    with pytest.raises(ValueError, match="does not hold the captions that"):
        text.main(["--out", str(whole), "--resume", "--data", captions(tmp_path), "--steps", "7"])
    with pytest.raises(ValueError, match="holds a run already; add --resume"):
        run(weights, whole)


def captions(folder):
    from PIL import Image
    Image.new("RGB", (40, 40), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("a red square")
    return str(folder)


def test_every_option_is_told(capsys):
    text.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"--{name} " in said for name in TextConfig.__dataclass_fields__)
    full = RECIPES["full"]
    assert (full.batch, full.steps, full.lr, full.lr_warmup, full.weight_decay, full.beta1, full.beta2) == (
        8192, 50_000, 7e-4, 2000, 1e-4, 0.9, 0.99)
    assert (full.depth, full.width, full.context, full.merges, full.head_blocks, full.drop_path, full.resolution) == (
        24, 1280, 77, 0, 2, 0.3, 224)


def test_only_matrices_decay():
    groups = text.make_optimizer(RECIPES["laptop"], new_towers(VIT, TowerConfig(1, 64, 12, 30))).param_groups
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim < 2 for p in groups[1]["params"])
    assert (groups[0]["decays"], groups[1]["decays"], groups[0]["betas"]) == (True, False, (0.9, 0.99))
