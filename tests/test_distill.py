"""Distillation: every student as if alone, on any ranks; resuming; what stops one student; both modes; mistakes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import start
from safetensors.torch import load_file
from test_train import MICRO, rows

import distill
import train
from convnext import ConvNeXt
from data import Batches, colour_batch
from engine.ranks import Ranks, start_ranks
from engine.sources import open_source
from model import SIZES, Noise, ViT, ViTConfig, build, shard
from weights import load_backbone, save_backbone

ROOT = Path(__file__).parents[1]
SHORT = """--n_shapes 24 --batch 8 --steps 4 --cooldown 2 --group 2 --koleo_group 8 --workers 0 --log_every 1
           --device cpu --precision fp32 --momentum 0.5""".split()
TERMS = "loss", "dino_global", "dino_local", "ibot", "koleo"
BOTH, PAIR = ("tiny_half", "convnext_micro"), "tiny_half,convnext_micro"


def run(teacher, out, *words, students=PAIR):
    distill.main(["--teacher", str(teacher), "--students", students, *SHORT, "--out", str(out), *words])
    return {path.name: rows(path) for path in out.iterdir() if path.is_dir()}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "teacher"
    train.main([*MICRO, "--out", str(out), "--stop_after", "2"])
    return out


@pytest.fixture(scope="module")
def pair(teacher, tmp_path_factory):
    """Two students in turn, without interruption."""
    out = tmp_path_factory.mktemp("runs") / "pair"
    run(teacher, out)
    return out


def losses(rows):
    return [[row[name] for name in TERMS] for row in rows]

# --------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("name", BOTH)
def test_in_turn_each_student_learns_as_if_alone(teacher, pair, tmp_path, name):
    assert losses(run(teacher, tmp_path / "alone", students=name)[name]) == losses(rows(pair / name))
    a, b = (load_file(folder / name / "teacher.safetensors") for folder in (tmp_path / "alone", pair))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_two_students_on_four_ranks_learn_as_if_alone(teacher, pair, tmp_path):
    out = tmp_path / "four"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", "distill.py", "--teacher", str(teacher), *SHORT, "--out", str(out),
               "--students", "tiny_half:2,convnext_micro:2", "--stop_after", "3", "--cache", str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    images, masked = 3 * (2 * 32 * 32 + 2 * 16 * 16), 4 + 8  # a crop of 16 patches is masked by 0.3, one by 0.5
    received = 4 * (4 * (images + 2 * 16) + 2 * masked * 16) + 4 * 8  # a rank keeps 4 of 8 samples
    assert f"brings {received:,} bytes to this rank" in done.stdout
    assert done.stdout.count("the cache takes 4,096 bytes for each step, 16,384 for the run") == 1
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == 4 * 3  # each rank its part
    distill.main(["--out", str(out), "--resume", "--students", PAIR])  # the last step on one process
    for name in BOTH:
        assert rows(out / name)[0]["gathered_bytes"] == received
        for one, four in zip(losses(rows(pair / name)), losses(rows(out / name)), strict=True):
            assert one == pytest.approx(four, abs=1e-4)  # 1e-5 measured


def test_ranks_that_do_not_divide_the_batch(teacher, pair, tmp_path):
    """8 images on 3 ranks: 3 each for the teacher, the ninth is cut; the third rank trains nothing"""
    out = tmp_path / "three"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", "distill.py", "--teacher", str(teacher), *SHORT, "--out", str(out),
               "--students", "tiny_half:1,convnext_micro:1", "--stop_after", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for name in BOTH:
        for one, three in zip(losses(rows(pair / name))[:2], losses(rows(out / name)), strict=True):
            assert one == pytest.approx(three, abs=1e-4)  # the same as of four


def test_resumed_equals_uninterrupted_bit_for_bit(teacher, pair, tmp_path):
    run(teacher, tmp_path / "parts", "--stop_after", "2")
    distill.main(["--out", str(tmp_path / "parts"), "--resume"])
    for name in BOTH:
        assert losses(rows(pair / name)) == losses(rows(tmp_path / "parts" / name))
        a, b = (load_file(folder / name / "teacher.safetensors") for folder in (tmp_path / "parts", pair))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_resumed_with_other_students(teacher, pair, tmp_path):
    """one goes on, one is left as it stands, one begins: each has all its own steps in the end"""
    out = tmp_path / "changed"
    run(teacher, out, "--stop_after", "2")
    assert distill.main(["--out", str(out), "--resume", "--students", "tiny_half,tiny"])
    assert losses(rows(out / "tiny_half")) == losses(rows(pair / "tiny_half"))
    assert [row["step"] for row in rows(out / "convnext_micro")] == [0, 1]
    assert [row["step"] for row in rows(out / "tiny")] == [0, 1, 2, 3]
    assert json.loads((out / "tiny/config.json").read_text())["joined"] == 2
    assert distill.main(["--out", str(out), "--resume", "--students", "tiny,convnext_micro"])
    assert [row["step"] for row in rows(out / "convnext_micro")] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="all have their 4 steps"):
        distill.main(["--out", str(out), "--resume", "--students", "tiny"])


def test_targets_are_those_of_train(teacher):
    c = distill.configure(["--teacher", str(teacher), "--students", "tiny_half", *SHORT])
    networks = distill.make_teacher(c, Ranks(0, 1, torch.device("cpu"), None))
    batch = colour_batch(Batches(c, open_source("shapes", 24), 0, 8)[0], c)
    said = distill.teacher_says(c, networks, batch)
    assert said["cls"].shape == (16, 16) and len(said["patches"]) == len(batch["masked"])
    with torch.no_grad():
        theirs = train.teacher_targets(networks, [batch], 0.04, None)[0]
    ours = distill.assignments(networks["dino_head"].last_layer(said["cls"]), 0.04).unflatten(0, (2, -1))
    assert torch.equal(ours.written(), theirs["dino"].written())


@pytest.mark.parametrize("mode, precision", [("heads", "fp32"), ("heads", "bf16"), ("features", "fp32")])
def test_two_ranks_share_the_teacher_and_it_says_the_same(teacher, tmp_path, mode, precision):
    """each holds half of the backbone, of a ConvNeXt's too; with --cache all of it"""
    path = teacher
    if mode == "features":
        path = tmp_path / "convnext.safetensors"
        save_backbone(build(lambda: ConvNeXt(distill.STUDENTS["convnext_micro"]), seed=3), path, "nano")

    def compare(argv):
        ranks = start_ranks("cpu")
        c = distill.configure([*argv, "--precision", precision])
        whole = distill.make_teacher(replace(c, cache=str(tmp_path)), ranks)
        shared = distill.make_teacher(c, ranks)
        batch = colour_batch(Batches(c, open_source("shapes", 24), 4 * ranks.rank, 4)[0], c)
        a, b = (distill.teacher_says(c, each, batch) for each in (whole, shared))
        apart = max(float((a[name] - b[name]).abs().max()) for name in a)
        held = [[sum(shard(p)[0].numel() for p in part.parameters()) for part in each.values()]
                for each in (shared, whole)]
        Path(tmp_path, f"{ranks.rank}.json").write_text(json.dumps([apart, *held]))
    words = ["--teacher", str(path), "--students", "tiny_half", "--mode", mode, *SHORT]
    group = start(tmp_path / "run", ranks=2, base=words, main=compare)
    assert group.wait()[0] == [0, 0], group.text()[-3000:]
    for rank in "01":
        apart, (half, *heads), (backbone, *all_heads) = json.loads((tmp_path / f"{rank}.json").read_text())
        assert apart < 5e-5 and heads == all_heads  # 0 measured, in bfloat16 too
        assert half == pytest.approx(backbone / 2, rel=0.01)


def test_nothing_is_hidden_from_the_student_and_the_teacher_stands_still(teacher, tmp_path, monkeypatch):
    seen, real = [], train.loss_terms
    before = load_file(teacher / "teacher.safetensors")
    monkeypatch.setattr(train, "loss_terms", lambda *args: seen.append(args[2]["masks"]) or real(*args))
    made, make = [], distill.make_teacher
    monkeypatch.setattr(distill, "make_teacher", lambda *args: made.append(make(*args)) or made[0])
    run(teacher, tmp_path / "run", students="tiny_half")
    assert seen == [None] * 4
    assert all(torch.equal(x, before[key]) for key, x in made[0]["backbone"].state_dict().items())


def test_what_is_saved_is_the_average(teacher, tmp_path):
    run(teacher, tmp_path / "run", "--momentum", "1", "--momentum_end", "1", students="tiny_half")
    vit = distill.DistillConfig(size="tiny_half", patch_size=8).vit
    start = build(lambda: torch.nn.ModuleDict(dict(backbone=ViT(vit))))["backbone"].state_dict()
    saved = load_backbone(tmp_path / "run/tiny_half").state_dict()
    assert all(torch.equal(saved[key], start[key]) for key in start)


def test_meters_are_those_of_train_and_only_of_logged_steps(teacher, tmp_path, monkeypatch):
    seen, real = [], train.health
    monkeypatch.setattr(train, "health", lambda *args: seen.append(real(*args)) or seen[-1])
    found = run(teacher, tmp_path / "run", "--log_every", "2", students="tiny_half")["tiny_half"]
    assert [row["step"] for row in found] == [0, 2, 3] and len(seen) == 3
    for row, meters in zip(found, seen, strict=True):
        assert {"dino_entropy", "dino_balance", "prototypes_used", "cls_rank", "patch_others"} <= meters.keys()
        assert {name: row[name] for name in meters} == pytest.approx(meters, rel=1e-5)  # six digits are written

# --------------------------------------------------------------------------------
# Stops


def test_one_student_that_is_not_finite_stops_alone(teacher, pair, tmp_path, monkeypatch, capsys):
    real = distill.head_terms

    def poisoned(student, *args):
        terms, *rest = real(student, *args)
        bad = student.c.size == "tiny_half" and student.step == 2
        return (terms | dict(ibot=terms["ibot"] * float("nan")) if bad else terms), *rest
    monkeypatch.setattr(distill, "head_terms", poisoned)
    with pytest.raises(ValueError, match="tiny_half: step 2, rank 0: loss is nan, ibot is nan.*--resume goes on"):
        run(teacher, tmp_path / "run", "--save_every", "1")
    assert "student tiny_half: step 2" in capsys.readouterr().out
    assert losses(rows(tmp_path / "run/convnext_micro")) == losses(rows(pair / "convnext_micro"))
    assert (tmp_path / "run/convnext_micro/teacher.safetensors").exists()
    monkeypatch.setattr(distill, "head_terms", real)
    distill.main(["--out", str(tmp_path / "run"), "--resume"])
    assert [row["step"] for row in rows(tmp_path / "run/tiny_half")] == [0, 1, 2, 3]


def test_a_run_ends_when_no_student_is_left(teacher, tmp_path, monkeypatch):
    endless = torch.tensor(torch.inf, requires_grad=True)
    monkeypatch.setattr(distill, "head_terms", lambda *args: (dict(a=endless), dict(a=1), dict))
    with pytest.raises(ValueError, match="tiny_half: .*loss is inf"):
        run(teacher, tmp_path / "run", "--steps", "1000", students="tiny_half")

# --------------------------------------------------------------------------------
# Features, grids, schedules


@pytest.mark.parametrize("kind, layout", [("vit", "hf"), ("convnext", "meta")])
def test_features_of_any_weights(tmp_path, kind, layout):
    """no heads, another width, a ConvNeXt's grid, its own normalisation: student and adapters learn"""
    statistics = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    config = ViTConfig(2, 128, 2, 512, **statistics) if kind == "vit" else distill.STUDENTS["convnext_micro"]
    path = tmp_path / ("weights.pth" if layout == "meta" else "weights")
    save_backbone(build(lambda: (ViT if kind == "vit" else ConvNeXt)(config), seed=3), path, layout)
    words = ["--mode", "features", "--global_size", "48", "--steps", "12", "--lr", "0.01"]
    for name, found in run(path, tmp_path / "run", *words).items():
        assert found[-1]["loss"] < 0.8 * found[0]["loss"], name
        assert {"cls_cosine", "cls_l1", "patches_cosine", "patches_l1", "grad_norm_patches_adapter"} <= found[0].keys()
        assert 1 <= found[0]["cls_rank"] <= 16
        assert load_backbone(tmp_path / "run" / name).config.mean == config.mean


def test_rank_of_a_student_of_features(teacher):
    """exp of the entropy of the singular values of its class tokens"""
    c = distill.configure(["--teacher", str(teacher), "--mode", "features", "--students", "tiny_half", *SHORT])
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    networks, batch = distill.make_teacher(c, ranks), colour_batch(Batches(c, open_source("shapes", 24), 0, 8)[0], c)
    batch |= distill.teacher_says(c, networks, batch)
    student, noise = distill.Student(replace(c, size="tiny_half"), ranks, SIZES["tiny"].width), Noise(0, 0, 0, 8, 2)
    found = distill.feature_terms(student, networks, batch, noise)[2]()["cls_rank"]
    spectrum = np.linalg.svd(student.networks["backbone"](batch["global_crops"]).cls.double().detach().numpy())[1]
    p = spectrum / spectrum.sum()
    assert found == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_a_convnext_sees_whole_patches_and_speaks_of_the_teachers_grid():
    c = distill.DistillConfig(size="convnext_micro", global_size=80, local_size=112, patch_size=16)
    sides = []

    class Spy(ConvNeXt):
        def forward(self, images, masks=None, noise=None):
            sides.extend(x.shape[-1] for x in images)
            return super().forward(images, masks, noise)
    one, other = distill.seen(Spy(c.vit), c)([torch.randn(2, 3, 80, 80), torch.randn(4, 3, 112, 112)])
    assert sides == [96, 128] and one.grid == (5, 5) and one.patches.shape == (2, 25, 128) and len(other.cls) == 4


def test_learning_rate_stays_and_then_cools_down(teacher, tmp_path):
    c = distill.configure(["--teacher", str(teacher), "--students", "tiny", *SHORT, "--steps", "10", "--cooldown", "4",
                           "--lr_warmup", "2", "--lr", "1", "--lr_end", "0.1", "--out", str(tmp_path / "x")])
    lr = distill.Student(replace(c, size="tiny"), Ranks(0, 1, torch.device("cpu"), None), 8).lr / c.lr_factor
    assert lr == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.775, 0.325, 0.1])
    paper = distill.RECIPES["paper"]
    assert (paper.steps - paper.cooldown, paper.cooldown, paper.batch) == (1_000_000, 250_000, 1920)  # §5.2


def test_recipe_of_the_convnexts(tmp_path):
    """twice the teacher's crops, one grid; rates of T and S, of B and L; straight lines"""
    path, alone = tmp_path / "vit.pth", Ranks(0, 1, torch.device("cpu"), None)
    save_backbone(ViT(ViTConfig(1, 256, 4, 64)), path)
    words = ["--teacher", str(path), "--mode", "features", "--out", str(tmp_path / "x"), "--workers", "0", "--students"]
    c = distill.configure([*words, ",".join(f"convnext_{size}" for size in "tsbl")])
    assert (c.recipe, c.global_size, c.local_size, c.patch_size, c.teacher_scale) == ("convnext", 512, 224, 32, 0.5)
    named = {name: getattr(c, name) for name in (
        "steps", "lr_warmup", "lr_end", "weight_decay_end", "momentum", "momentum_end", "teacher_temp_warmup",
        "freeze_last_layer", "layer_decay", "patch_embed_lr", "drop_path", "clip", "beta2")}
    assert named == dict(
        steps=500 * 1250, lr_warmup=80 * 1250, lr_end=1e-6, weight_decay_end=0.2, momentum=0.994, momentum_end=1.0,
        teacher_temp_warmup=150_000, freeze_last_layer=1250, layer_decay=1.0, patch_embed_lr=1.0, drop_path=0.0,
        clip=3.0, beta2=0.999)
    own = {size: distill.of_student(c, f"convnext_{size}") for size in "tsbl"}
    assert {size: each.lr for size, each in own.items()} == dict(t=2e-4, s=2e-4, b=1e-4, l=1e-4)
    assert {size: each.weight_decay for size, each in own.items()} == dict(t=0.04, s=0.04, b=0.02, l=0.04)
    asked = distill.configure([*words, "convnext_b", "--lr", "3e-4"])
    assert distill.of_student(asked, "convnext_b").lr == 3e-4
    small = distill.Student(replace(c, size="convnext_micro"), alone, 256)
    assert small.lr[:100_000].argmax() == 99_999 and small.lr.max() / c.lr_factor == pytest.approx(2e-4, rel=1e-4)
    assert small.lr[-1] / c.lr_factor == pytest.approx(1e-6)
    for values, ends in (small.weight_decay, (0.04, 0.2)), (small.momentum, (0.994, 1)):
        assert (values[0], values[-1]) == ends and np.ptp(np.diff(values)) < 1e-12
    teacher, seen = distill.make_teacher(replace(c, precision="fp32"), alone), []
    teacher["backbone"].register_forward_pre_hook(lambda _, args: seen.append(args[0][0].shape[-1]))
    batch = dict(global_crops=torch.randn(2, 3, 512, 512), masked=torch.arange(512))
    assert distill.teacher_says(c, teacher, batch)["patches"].shape == (2 * 16 * 16, 256) and seen == [256]
    assert small.networks["backbone"](batch["global_crops"][:1]).grid == (16, 16)


def test_recipe_of_the_released_vits(tmp_path, teacher):
    c = distill.configure(["--teacher", str(teacher), "--students", "tiny_half", "--recipe", "released", "--out",
                           str(tmp_path / "x"), "--group", "64"])
    student = distill.Student(replace(c, size="tiny_half"), Ranks(0, 1, torch.device("cpu"), None), 128)
    assert len(student.lr) == 25_000 and (student.lr[12_500:] == 5e-5 * c.lr_factor).all()
    assert student.lr[6249] / c.lr_factor == pytest.approx(2.5e-5, rel=1e-3)
    assert (student.weight_decay == 0.04).all() and student.temp[[0, -1]] == pytest.approx([0.04, 0.07], abs=1e-5)
    assert (student.momentum[0], student.momentum[-1]) == (0.994, 1)


def test_steps_to_time(teacher, tmp_path):
    """three of each, were the run to have one"""
    c = distill.configure(["--teacher", str(teacher), "--students", "tiny_half", *SHORT, "--out", str(tmp_path / "x")])
    c, ranks = replace(c, steps=1, cooldown=0), Ranks(0, 1, torch.device("cpu"), None)
    args = distill.make_teacher(c, ranks), open_source("shapes", 24)
    said = distill.step_to_time(c, *args, "teacher", ranks, 16)()
    assert len(said["cls"]) == 2 * 16
    step = distill.step_to_time(c, *args, "tiny_half", ranks, 16)
    first, _, third = (step() for _ in range(3))
    assert third["loss"] != first["loss"] and "cls_rank" not in third


def test_layers_of_a_convnext():
    """depths 1 1 3 1: seven layers, as a ViT of six blocks has"""
    def layer(name):
        return train.layer_of(name, (1, 1, 3, 1))
    names = "downsample_layers.0.0.weight", "downsample_layers.2.1.weight", "stages.0.0.gamma", "stages.2.1.norm.bias"
    assert [layer(f"backbone.{name}") for name in (*names, "stages.3.0.x")] == [0, 2, 1, 4, 6]
    assert layer("backbone.norm.weight") == layer("dino_head.mlp.0.weight") == 7

# --------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("words, says", [
    (["--students", "s,xl"], "--students s,xl: write s,b or s:1,b:2"),
    (["--students", "s,s"], "no student twice"),
    (["--students", "s:1,b"], "ranks for all or for none"),
    (["--students", "s:0"], "write s,b"),
    (["--students", "tiny:1,tiny_half:1"], "2 ranks, for a batch of 8; there are 1"),
    (["--teacher", "nowhere"], "nowhere does not exist"),
    (["--teacher", "FILE"], "has no heads.*--mode features"),
    (["--mode", "magic"], "--mode magic: name a run"),
    (["--mode", "features", "--n_local", "2"], "looks at global crops alone"),
    (["--cooldown", "9"], "--cooldown 9: a cooldown has 0 to --steps 4"),
    (["--size", "s"], "unknown option --size"),
    (["--recipe", "convnext"], "--recipe convnext: choose one of paper, released.*ConvNeXts alone"),
    (["--recipe", "papre"], "--recipe papre: choose one of paper"),
    (["--teacher_scale", "0"], "--teacher_scale is 0; it must be in "),
    (["--batch", "9"], "not a multiple of --group 2"),
    (["--resume"], "no run to go on with"),
])
def test_mistakes_end_in_one_line(teacher, tmp_path, words, says):
    words = [str(teacher / "teacher.safetensors") if word == "FILE" else word for word in words]
    base = ["--teacher", str(teacher), "--students", "tiny", *SHORT, "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=says) as error:
        distill.main([*base, *words])
    assert "\n" not in str(error.value)


def test_every_option_is_read():
    names = ("distill", "engine/groups", "engine/checkpoint", "engine/profile", "engine/channels", "train", "recipes",
             "data")
    source = "".join((ROOT / f"{name}.py").read_text() for name in names)
    unread = [name for name in distill.OPTIONS if not re.search(rf"\b(c|config)\.{name}\b", source)]
    assert not unread


def test_a_run_is_not_overwritten(teacher, pair):
    with pytest.raises(ValueError, match="holds a run already"):
        run(teacher, pair)


@pytest.mark.parametrize("words, says", [
    (["--batch", "16"], "was begun with --batch 8, not with --batch 16: that would be another run"),
    (["--lr", "1", "--seed", "3"], "--seed 0, not with --lr 1.0, --seed 3"),
])
def test_another_run_is_refused_and_nothing_changed(pair, words, says):
    before = (pair / "config.json").read_bytes()
    with pytest.raises(ValueError) as error:
        distill.main(["--out", str(pair), "--resume", *words])
    assert says in str(error.value) and "\n" not in str(error.value)
    assert (pair / "config.json").read_bytes() == before


def test_other_images_are_refused(teacher, pair, tmp_path):
    config = json.loads((pair / "config.json").read_text())
    assert config["data_images"] == 24 and config["data_digest"].startswith("shapes 24 ")
    run(teacher, tmp_path / "run", "--stop_after", "1", students="tiny_half")
    words = ["--out", str(tmp_path / "run"), "--resume", "--data", "shapes*1"]
    with pytest.raises(ValueError, match="shapes[*]1 does not hold the images .* after 24 of .*--data_changed true"):
        distill.main(words)
    assert distill.main([*words, "--data_changed"])


def test_auto_begins_and_goes_on(teacher, pair, tmp_path):
    for stop in "1", "0":
        run(teacher, tmp_path / "run", "--resume", "auto", "--stop_after", stop, students="tiny_half")
    assert losses(rows(tmp_path / "run/tiny_half")) == losses(rows(pair / "tiny_half"))


def test_a_folder_that_cannot_be_written_is_one_line(teacher, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out .*file is no folder; name another") as error:
        run(teacher, tmp_path / "file", students="tiny_half")
    assert "\n" not in str(error.value)
