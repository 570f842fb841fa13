"""
engine/stages.py: what a stage takes from the run before, the Gram term beside its definition, exactness of resuming and
of ranks, several resolutions, and what is said to mistakes.
"""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from forks import start
from safetensors.torch import load_file
from test_train import MICRO, rows, torchrun

import distill
import recipes
import train
from data import read_resolutions
from engine import stages
from model import Features, ViT, ViTConfig, build
from weights import save_backbone

STAGE = "--steps 5 --gram_refresh 2 --gram_refreshes 1 --gram_warmup 3 --lr 1e-3 --lr_end 1e-3 --log_every 1".split()
STILL = "--lr 0 --lr_end 0 --momentum 1 --momentum_end 1 --weight_decay 0 --weight_decay_end 0".split()
TRIPLES = "32x16x64*0.5,48x28x64*0.3,16x8x32*0.2"


def go_on(before, out, *words, stage="gram"):
    train.main(["--stage", stage, "--start", str(before), "--out", str(out), *STAGE, *words])
    return rows(out)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A run of six steps, that keeps its third."""
    out = tmp_path_factory.mktemp("runs") / "before"
    train.main([*MICRO, "--out", str(out), "--save_every", "3"])
    return out


@pytest.fixture(scope="module")
def gram(before, tmp_path_factory):
    """The stage gram after it, without interruption."""
    out = tmp_path_factory.mktemp("runs") / "gram"
    go_on(before, out, "--gram_teacher", f"{before}@3")
    return out


def tensors(out, step):
    """All of a checkpoint, of one rank."""
    return load_file(out / f"checkpoints/{step}/0.safetensors")

# --------------------------------------------------------------------------------
# What goes on


def test_all_of_the_checkpoint_goes_on(before, tmp_path):
    """both networks, heads, moments, the count of steps: where nothing moves them they are the run's, bit for bit"""
    go_on(before, tmp_path, "--gram_teacher", "self", "--stop_after", "1", *STILL)
    a, b = tensors(before, 6), tensors(tmp_path, 7)
    assert a.keys() == b.keys() - {name for name in b if name.startswith("gram.")}
    moved = {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}
    assert moved == {"optimizer"}  # moments go on, weights stay
    own = {name.removeprefix("gram."): x for name, x in b.items() if name.startswith("gram.")}
    assert own and all(torch.equal(x, a[f"teacher.backbone.{name}"]) for name, x in own.items())  # self: the teacher
    assert not torch.equal(own["norm.weight"], a["student.backbone.norm.weight"])
    assert {b[name].item() - a[name].item() for name in a if name.endswith(".step")} == {1}
    assert [row["step"] for row in rows(tmp_path)] == [6] and json.loads(
        (tmp_path / "checkpoints/7/step.json").read_text())["step"] == 7


def test_a_kept_step_goes_on(before, tmp_path):
    """--start RUN@STEP: that step's weights, not the newest ones, and its number"""
    found = go_on(f"{before}@3", tmp_path, "--gram_teacher", "self", "--stop_after", "1", *STILL)
    a, b = tensors(before, 3), tensors(tmp_path, 4)
    assert all(torch.equal(x, b[name]) for name, x in a.items() if not name.startswith("optimizer."))
    assert not torch.equal(a["student.backbone.norm.weight"], tensors(before, 6)["student.backbone.norm.weight"])
    assert [row["step"] for row in found] == [3]


def test_metrics_go_on_counting_and_steps_are_the_stage_s_own(gram):
    assert [row["step"] for row in rows(gram)] == [6, 7, 8, 9, 10]
    config = json.loads((gram / "config.json").read_text())
    assert (config["began"], config["steps"], config["stage"], config["gram_size"]) == (6, 5, "gram", 64)
    assert config["data_digest"] == "shapes 24 0" and config["gram"]["depth"] == 2
    assert rows(gram)[0]["gram"] > 0


def test_the_gram_teacher_is_the_kept_step_then_the_teacher_of_the_refresh(before, gram, tmp_path):
    """replaced before the third step of the stage, by what the second has left; once and no more"""
    kept = {f"gram.{name}": x for name, x in load_file(before / "checkpoints/3/teacher.safetensors").items()}
    for stop, expected in ((2, kept), (3, None), (5, None)):
        out = tmp_path / str(stop)
        every = "--save_every", "1", "--keep", "5"
        go_on(before, out, "--gram_teacher", f"{before}@3", "--stop_after", str(stop), *every)
        found = {name: x for name, x in tensors(out, 6 + stop).items() if name.startswith("gram.")}
        expected = expected or {f"gram.{name}": x for name, x in load_file(
            out / "checkpoints/8/teacher.safetensors").items()}
        assert found.keys() == expected.keys() and all(torch.equal(found[name], x) for name, x in expected.items())
    assert not torch.equal(kept["gram.norm.weight"], found["gram.norm.weight"])


def test_refreshes():
    c = replace(recipes.TrainConfig(), began=100, gram_refresh=10, gram_refreshes=3)
    assert [step for step in range(100, 200) if stages.refreshes(c, step)] == [110, 120, 130]
    assert not any(stages.refreshes(replace(c, gram_refresh=0), step) for step in range(100, 200))


def test_weights_of_a_step():
    """half cosines over the warm-up, from the stage's first step"""
    c = replace(recipes.TrainConfig(), began=50, gram_weight=2.0, gram_warmup=4, local_weight=0.5, gram_teacher="self")
    found = [(c.at(step).gram_weight, c.at(step).local_weight) for step in range(50, 56)]
    share = [(1 - math.cos(math.pi * t / 4)) / 2 for t in range(5)] + [1]
    assert sum(found, ()) == pytest.approx([weight for x in share for weight in (2 * x, 1 - x / 2)])
    assert train.term_weights(c.at(53))["gram"] == pytest.approx(2 * share[3]) and c.at(54) is c


def test_what_a_stage_says():
    said = list(stages.describe(replace(recipes.RECIPES["7b"], patch_size=16, **recipes.STAGES["7b", "highres"])))
    assert said[2] == ("30 % of the steps: crops of 768 px (48x48) and 168 px (10x10 patches, the middle 160 px of "
                       "each), 1152 px for the Gram teacher")
    assert said[5] == ("Gram teacher self: weight 1.5, local crops 0.5, from 0 and 0.5 over 0 steps; replaced by the "
                       "teacher: never") and len(said) == 6
    c = replace(recipes.RECIPES["7b"], gram_teacher="x", gram_size=512, **recipes.STAGES["7b", "gram"])
    assert list(stages.describe(c)) == ["Gram teacher x, of crops of 512 px: weight 2, local crops 0.5, from 0 and 1 "
                                        "over 1,000 steps; replaced by the teacher: 3 times, every 10,000 steps"]
    assert not list(stages.describe(recipes.RECIPES["7b"]))


def test_a_rise_of_half_a_cosine():
    s = train.schedule(0, 1.0, 1.0, 3, 6, cosine_warmup=True)
    assert s == pytest.approx([(1 - 0.5 ** 0.5) / 2, 0.5, (1 + 0.5 ** 0.5) / 2, 1, 1, 1])

# --------------------------------------------------------------------------------
# The term


def test_the_term_is_its_definition():
    """of the same crops at twice the side; bicubic without antialiasing; other width, other statistics"""
    config = ViTConfig(1, 16, 2, 32, patch_size=4, layerscale=1.0, init_std=0.3, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    network, c = build(lambda: ViT(config)), recipes.TrainConfig(gram_teacher="x")
    pixels, draw = torch.rand(6, 3, 32, 32), torch.Generator().manual_seed(0)
    student = torch.randn(6, 16, 8, generator=draw, requires_grad=True)
    seen, own = ((pixels - torch.tensor(a)[:, None, None]) / torch.tensor(b)[:, None, None]
                 for a, b in ((c.mean, c.std), (config.mean, config.std)))
    features = Features(student[:, 0], student[:, :0], student, (4, 4))
    found = stages.gram_term(c, network, dict(gram_crops=seen), features)["gram"]
    with torch.no_grad():
        maps = F.interpolate(network(own).map().double(), (4, 4), mode="bicubic")
    s, t = F.normalize(student.double(), dim=-1), F.normalize(maps.flatten(2).mT, dim=-1)
    assert found.item() == pytest.approx((s @ s.mT - t @ t.mT).square().mean().item(), rel=1e-5)  # measured: 3e-9
    found.backward()
    assert student.grad.abs().min() > 0 and all(p.grad is None for p in network.parameters())
    assert stages.gram_term(c, None, {}, features) == {}


def test_its_own_teacher_sees_no_difference(before, tmp_path):
    """at the same resolution, without masks, distortions and noise, the student that is its Gram teacher has no loss"""
    plain = ("--gram_size 32 --mask_share 0 --jitter 0 --grey 0 --solarize 0 --blur_global_1 0 --blur_global_2 0 "
             "--drop_path 0 --rope_rescale 1 --stop_after 1").split()
    alone = "--stop_after 0 --gram_size 0 --momentum 0 --momentum_end 0".split()
    train.main([*MICRO, "--out", str(tmp_path / "a"), *plain, *alone])  # the teacher is the student of the step before
    found = go_on(tmp_path / "a", tmp_path / "b", "--gram_teacher", "self", *plain)
    assert found[0]["gram"] < 1e-9  # measured: 0
    assert go_on(before, tmp_path / "c", "--gram_teacher", "self", "--stop_after", "1")[0]["gram"] > 1e-3

# --------------------------------------------------------------------------------
# Exactness


def equal(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items()) and a.keys() == b.keys()


@pytest.mark.parametrize("stop", [2, 3])
def test_a_stage_resumes_bit_for_bit(before, gram, tmp_path, stop):
    """at the very step of the refresh, and after it; with the whole command, or with OUT alone"""
    words = "--gram_teacher", f"{before}@3"
    go_on(before, tmp_path, *words, "--stop_after", str(stop))
    train.main(["--out", str(tmp_path), "--resume", "--stop_after", "1"])
    go_on(before, tmp_path, *words, "--resume", "auto")
    assert equal(tensors(gram, 11), tensors(tmp_path, 11))
    assert [row["loss"] for row in rows(gram)] == [row["loss"] for row in rows(tmp_path)]


def test_two_ranks_are_one(before, gram, tmp_path):
    torchrun(tmp_path, "--stage", "gram", "--start", str(before), *STAGE, "--gram_teacher", f"{before}@3",
             "--stop_after", "3", micro=())
    train.main(["--out", str(tmp_path), "--resume"])
    names = "gram", "dino_global", "dino_local", "ibot", "koleo", "grad_norm_backbone"
    apart = max(abs(a[name] / b[name] - 1) for a, b in zip(rows(gram), rows(tmp_path), strict=True) for name in names)
    print(f"apart by {apart:.1e}")
    assert apart < 2e-4


def test_replicas_that_are_stopped_at_the_refresh_are_one(before, gram, tmp_path):
    """four ranks in two groups, of which the scheduler tells one to leave; one rank goes on"""
    def told(rank):
        def stops(c, step, plain=train.refreshes):
            if rank == 2 and step == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(c, step)
        train.refreshes = stops

    words = ["--stage", "gram", "--start", str(before), *STAGE, "--gram_teacher", f"{before}@3"]
    group = start(tmp_path / "run", *words, "--replicas", "2", ranks=4, prepare=told, base=())
    codes, _ = group.wait(120)
    assert codes == [0] * 4 and len(rows(tmp_path / "run")) in (3, 4), group.text()
    train.main(["--out", str(tmp_path / "run"), "--resume", "--replicas", "1"])
    names = "gram", "dino_global", "dino_local", "ibot", "koleo", "grad_norm_backbone"
    pairs = zip(rows(gram), rows(tmp_path / "run"), strict=True)
    apart = max(abs(a[name] / b[name] - 1) for a, b in pairs for name in names)
    print(f"apart by {apart:.1e}")
    assert apart < 2e-4


def test_parts_are_one(before, gram, tmp_path):
    """of a batch; with a refresh, and the moments that the run before has left"""
    words = "--gram_teacher", f"{before}@3", "--koleo_group", "4", "--group", "4"
    whole = go_on(before, tmp_path / "whole", *words)
    parts = go_on(before, tmp_path / "parts", *words, "--accumulate", "2")
    names = "gram", "dino_global", "dino_local", "ibot", "koleo", "grad_norm_backbone"
    apart = max(abs(a[name] / b[name] - 1) for a, b in zip(whole, parts, strict=True) for name in names)
    print(f"apart by {apart:.1e}")
    assert apart < 2e-4


def test_a_gram_teacher_of_another_kind_outlives_its_file(before, tmp_path):
    """other width, depth and patches; a resumed run has it from its checkpoint"""
    config, path = ViTConfig(1, 32, 2, 48, patch_size=16, layerscale=1.0), tmp_path / "other.safetensors"
    save_backbone(build(lambda: ViT(config)), path, "nano")
    words = "--gram_teacher", str(path), "--gram_refresh", "0"
    whole = go_on(before, tmp_path / "whole", *words)
    go_on(before, tmp_path / "parts", *words, "--stop_after", "2")
    path.unlink()
    train.main(["--out", str(tmp_path / "parts"), "--resume"])
    assert [row["gram"] for row in whole] == [row["gram"] for row in rows(tmp_path / "parts")]
    assert tensors(tmp_path / "parts", 11)["gram.norm.weight"].shape == (32,)


# --------------------------------------------------------------------------------
# Several resolutions


def test_highres_draws_and_resumes_bit_for_bit(gram, tmp_path):
    """with a local crop of 28 px, of which patches of 8 leave 24"""
    words = "--resolutions", TRIPLES, "--batch", "8", "--group", "8", "--seed", "5"
    go_on(gram, tmp_path / "whole", *words, stage="highres")
    config = recipes.saved_config(tmp_path / "whole")
    assert {config.at(step).local_size for step in range(11, 16)} == {8, 16, 28}
    assert (config.stage, config.began, config.gram_teacher, config.cosine_warmup) == ("highres", 11, "self", True)
    rise = train.schedule(0, 1e-3, 1e-3, config.lr_warmup, 5, cosine_warmup=True) * config.lr_factor
    assert [row["lr"] for row in rows(tmp_path / "whole")] == pytest.approx(rise, rel=1e-4) and config.lr_warmup == 2
    go_on(gram, tmp_path / "parts", *words, "--stop_after", "3", stage="highres")
    train.main(["--out", str(tmp_path / "parts"), "--resume"])
    assert equal(tensors(tmp_path / "whole", 16), tensors(tmp_path / "parts", 16))


def test_highres_without_a_gram_teacher(gram, tmp_path):
    """as distilled students have it: paper, §5.2"""
    found = go_on(gram, tmp_path, "--resolutions", TRIPLES, "--batch", "8", "--group", "8", "--gram_weight", "0",
                  "--stop_after", "1", stage="highres")
    c = recipes.saved_config(tmp_path)
    assert "gram" not in found[0] and not any(c.at(step).gram_size for step in range(11, 16))  # nor crops for one


def test_a_stage_without_a_gram_term_refreshes_nothing(before, tmp_path):
    """the control of every figure of the stage: --gram_refresh of its recipe has no teacher to replace"""
    assert len(go_on(before, tmp_path, "--gram_weight", "0")) == 5
    assert json.loads((tmp_path / "config.json").read_text())["gram_refreshes"] == 0


def test_a_run_of_stages_can_be_distilled_and_that_one_goes_on(gram, tmp_path):
    """to high resolution, without a Gram teacher: paper, §5.2; its mask token, which was not trained, begins so"""
    distill.main(["--teacher", str(gram), "--students", "tiny", "--data", "shapes", "--n_shapes", "24", "--steps",
                  "1", "--batch", "8", "--workers", "0", "--device", "cpu", "--out", str(tmp_path)])
    assert math.isfinite(rows(tmp_path / "tiny")[0]["loss"])
    config = json.loads((tmp_path / "tiny/config.json").read_text())
    assert (config["gram_size"], config["gram_teacher"], config["resolutions"], config["began"]) == (0, "", "", 0)
    found = go_on(tmp_path / "tiny", tmp_path / "next", "--resolutions", TRIPLES, "--batch", "8", "--group", "8",
                  "--gram_weight", "0", "--stop_after", "1", *STILL, stage="highres")
    a, b = tensors(tmp_path / "tiny", 1), tensors(tmp_path / "next", 2)
    token = "optimizer.state.backbone.mask_token."
    assert b.keys() - a.keys() == {f"{token}{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
    assert b[f"{token}step"] == 1 and b["optimizer.state.backbone.cls_token.step"] == 2 and "gram" not in found[0]
    assert all(torch.equal(x, b[name]) for name, x in a.items() if not name.startswith("optimizer."))

# --------------------------------------------------------------------------------
# Recipes


def test_the_numbers_of_7b():
    gram, highres = (recipes.STAGES["7b", stage] for stage in ("gram", "highres"))
    assert (gram["steps"], gram["lr"], gram["momentum"], gram["gram_weight"], gram["local_weight"]) == (
        200_000, 3e-5, 0.999, 2.0, 0.5)
    assert (gram["gram_warmup"], gram["gram_refresh"], gram["gram_refreshes"]) == (1000, 10_000, 3)
    c = replace(recipes.RECIPES["7b"], **highres, began=1_200_000)
    assert c.batch * 2 / 8 == 512 and c.koleo_group == 16 and c.gram_weight == 1.5 and c.lr == 1.25e-5
    assert (highres["steps"], c.lr_warmup, c.cosine_warmup, c.local_weight_start) == (30_000, 10_000, True, 0.5)
    assert (gram["lr_warmup"], gram["local_weight_start"]) == (0, 1.0)
    for stage in gram, highres:  # nothing moves along a cosine, and what began the run is over
        assert (stage["lr_end"], stage["momentum_end"], stage["weight_decay_end"]) == (
            stage["lr"], stage["momentum"], stage["weight_decay"]) and stage["momentum"] == 0.999
        assert not (stage["teacher_temp_warmup"] or stage["freeze_last_layer"])
    shares = {sides: share for sides, share in read_resolutions(c.resolutions)}
    assert shares == pytest.approx({(512, 112, 768): 0.3, (768, 112, 1152): 0.3, (768, 168, 1152): 0.3,
                                    (768, 224, 1152): 0.05, (768, 336, 1152): 0.05})
    assert c.at(1_200_000).local_weight == 0.5 and c.at(1_200_000).gram_weight == 1.5


def test_other_sizes_have_7b_s_share_of_their_pretraining():
    for stage, part in ("gram", 10), ("highres", 25):
        own, paper = recipes.STAGES["s", stage], recipes.STAGES["7b", stage]
        scale = recipes.RECIPES["s"].steps / recipes.RECIPES["7b"].steps
        assert own["lr"] == own["lr_end"] == recipes.RECIPES["s"].lr / part
        for name in "steps", "lr_warmup", "gram_warmup", "gram_refresh":
            assert own[name] == paper[name] * scale, name


def test_warm_ups_of_a_stage_shrink_with_its_steps(before, tmp_path):
    c = recipes.configure(["--stage", "gram", "--start", str(before), "--gram_teacher", "self", "--steps", "300",
                           "--out", str(tmp_path / "out")])
    tiny = recipes.STAGES["tiny", "gram"]
    assert (c.steps, 2 * c.gram_warmup, 2 * c.gram_refresh) == (300, tiny["gram_warmup"], tiny["gram_refresh"])
    assert c.gram_refreshes == tiny["gram_refreshes"] == 3


@pytest.mark.parametrize("size", recipes.RECIPES)
def test_every_size_has_its_stages(size, tmp_path):
    for stage in "gram", "highres":
        changes = recipes.STAGES[size, stage]
        c = replace(recipes.RECIPES[size], **changes, patch_size=16, stage=stage,
                    **({} if stage == "highres" else dict(gram_teacher="self", gram_size=448)))
        recipes.check(recipes.derive(c))
        assert c.gram_warmup * 200 in (c.steps, 4000, 6000, 0)  # in proportion to the steps, but for tiny

# --------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("words, says", [
    ("--stage gram", "--stage gram goes on from a run; name it: --start RUN, or RUN@STEP"),
    ("--stage highres", "--stage highres goes on from a run"),
    ("--stage grma --start BEFORE", "--stage grma does not follow"),
    ("--start BEFORE", "--stage pretrain does not follow .*before, tiny pretrain; there are pretrain, then gram, then"),
    ("--stage gram --start nowhere", "nowhere: no run to go on with"),
    ("--stage gram --start BEFORE@4", "before@4: there is no checkpoint of step 4 in .*before; it has 3, 6; --keep"),
    ("--stage gram --start BEFORE@six", "there is no checkpoint of step six"),
    ("--stage gram --start BEFORE", "--stage gram --gram_weight 2 wants a Gram teacher: --gram_teacher WEIGHTS, RUN"),
    ("GRAM BEFORE@5", "no checkpoint of step 5"),
    ("GRAM nowhere", "nowhere does not exist"),
    ("GRAM self --size s", "--size: networks and heads are those of --start"),
    ("GRAM self --depth 3", "--depth: networks and heads are those of --start"),
    ("GRAM self --dino_prototypes 32", "--dino_prototypes: networks and heads"),
    ("GRAM self --began 3", "--began: networks and heads"),
    ("GRAM self --init BEFORE", "--init: networks and heads"),
    ("GRAM self --gram_size 60", "self, tiny, 2 of 6 layers: 60 px are 7.5 of its "
     "patches of 8 px; whole ones are wanted, and 4 or more, as the student has of 32 px; try 64"),
    ("GRAM self --gram_size 24", "24 px are 3 of its .*; try 32"),
    ("GRAM self --gram_size 0", "--gram_size 0 .*a Gram term wants all three"),
    ("GRAM OTHER", "is another network than the teacher, tiny, 2 of 6 layers, that "
     "would take its place; --gram_refresh 0 keeps it"),
    ("GRAM OTHER --gram_refresh 0 --gram_size 32", "32 px are 2 of its patches of"),
    ("--stage highres --start BEFORE --resolutions 32x16", "--resolutions 32x16: write sides in pixels"),
    ("--stage highres --start BEFORE --resolutions 33x16x64*1", "33x16x64: 33 px is not a multiple of the patch, 8"),
    ("--stage highres --start BEFORE --resolutions 32x4x64*1", "32x4x64: 4 px: the image is smaller than a patch of 8"),
    ("--stage highres --start BEFORE --resolutions 32x16x36*1", "36 px are 4.5 of its patches of 8"),
    ("--gram_weight 2", "--stage pretrain --gram_weight 2 wants a Gram teacher"),
    ("--gram_teacher self", "--gram_teacher self --gram_size 0 --gram_weight 0: a Gram term wants all three"),
])
def test_mistakes_end_in_one_line(words, says, before, tmp_path):
    other = tmp_path / "other.safetensors"
    save_backbone(build(lambda: ViT(ViTConfig(1, 128, 2, 512, patch_size=16))), other, "nano")
    for word, means in ("GRAM", "--stage gram --start BEFORE --gram_teacher"), ("BEFORE", before), ("OTHER", other):
        words = words.replace(word, str(means))
    words = words.split()
    with pytest.raises(ValueError, match=says) as error:
        recipes.configure([*words, "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_order_of_stages(gram, before, tmp_path):
    go_on(gram, tmp_path / "highres", "--resolutions", TRIPLES, "--batch", "8", "--group", "8", "--stop_after", "1",
          stage="highres")
    with pytest.raises(ValueError, match="--stage gram does not follow .*highres, tiny highres"):
        go_on(tmp_path / "highres", tmp_path / "out", "--gram_teacher", "self")
    with pytest.raises(ValueError, match="holds a run already"):
        go_on(before, gram, "--gram_teacher", "self")
    c = recipes.configure(["--stage", "gram", "--start", str(gram), "--gram_teacher", "self", "--out", str(tmp_path)])
    assert c.began == 11


def test_a_damaged_start_is_named(before, tmp_path):
    import shutil
    shutil.copytree(before, tmp_path / "before")
    path = tmp_path / "before/checkpoints/6/0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="0.safetensors is damaged"):
        go_on(tmp_path / "before", tmp_path / "out", "--gram_teacher", "self")
    assert not (tmp_path / "out/config.json").exists()
