"""What is kept and gained, which step is the best, and that nothing is handed back that has gained nothing."""

import inspect
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_train import MICRO, torchrun

import recipes
import train
import weights
from engine import adapt
from engine.images import read_image
from engine.sources import Shapes
from model import SIZES, ViT, build
from weights import save_backbone


def look(step, kept, *hits):
    return dict(step=step, kept=kept, retrieval=100 * sum(hits) / len(hits), hits=hits)


C = replace(recipes.RECIPES["tiny"], stage="adapt", global_size=32, patch_size=16)
FIRST = look(0, 100, 0.2, 0.4, 0.6, 0.8)
MORE = 0.3, 0.5, 0.7, 0.8             # by .075, with a standard error of .025: 3 of them


@pytest.mark.parametrize("looks, step", [
    ([], 0),
    ([look(10, 99, *MORE)], 10),
    ([look(10, 99, *MORE), look(20, 99, 0.3, 0.4, 0.7, 0.8)], 10),             # not the last one but the best
    ([look(10, 99, *MORE), look(20, 99, 0.4, 0.5, 0.7, 0.8)], 20),
    ([look(10, 99, 0.3, 0.4, 0.7, 0.8)], 0),                                   # by .05, with .029: 1.7 of them
    ([look(10, 99, 1.0, 0.4, 0.6, 0.8)], 0),                                   # one photo alone
    ([look(10, 94.9, 0.9, 0.9, 0.9, 0.9)], 0),                                 # ruined what it had
    ([look(10, 94.9, 0.9, 0.9, 0.9, 0.9), look(20, 95, *MORE)], 20),
    ([look(10, 100, 0.1, 0.3, 0.5, 0.7)], 0),
    ([look(10, 100, 0.2, 0.4, 0.6, 0.8)], 0),
])
def test_the_best_step_gained_for_sure_and_kept_enough(looks, step):
    assert adapt.best([FIRST, *looks])["step"] == step


def test_photos_are_held_out_once_for_all():
    source = Shapes(45)
    train, held = adapt.apart(source, C)
    assert len(held) == 4 and sorted([*train.rows, *held.rows]) == list(range(45))
    again, other = (adapt.apart(source, c)[1].rows.tolist() for c in (C, replace(C, seed=1)))
    assert again == held.rows.tolist() != other
    assert train.digest() != held.digest() and held.name(0) == f"shapes {held.rows[0]}"
    assert len(adapt.apart(Shapes(5000), C)[1]) == adapt.HELD
    with pytest.raises(ValueError, match="holds 19 images; .* at least 20"):
        adapt.apart(Shapes(19), C)


def test_similarities_beside_float64():
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    found = adapt.similarities(x)
    for b in range(3):
        p = x[b].double() / x[b].double().norm(dim=1, keepdim=True)
        pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
        cosines = torch.tensor([float(p[i] @ p[j]) for i, j in pairs], dtype=torch.float64)
        cosines = (cosines - cosines.mean()) / (cosines - cosines.mean()).norm()
        wanted = torch.zeros(5, 5, dtype=torch.float64)
        for (i, j), value in zip(pairs, cosines, strict=True):
            wanted[i, j] = value
        assert (found[b].double() - wanted.flatten()).abs().max() < 1e-6   # measured: 9e-8
    turned = x @ torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1))).Q
    assert (adapt.similarities(turned) * found).sum(-1).min() > 1 - 1e-6   # a rotation loses nothing


def test_retrieval_is_of_each_photo_over_all_pairs_of_its_crops():
    a = torch.eye(3)
    b = F.normalize(torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 1]]), dim=-1)   # of photo 1 nearer to photo 0
    assert adapt.found(torch.stack([a, a], 1)).tolist() == [1, 1, 1]
    # a -> b: all right (photo 1 has .6 with its own, 0 with the others); b -> a: photo 1 says photo 0
    assert adapt.found(torch.stack([a, b], 1)).tolist() == [1, 0.5, 1]
    assert adapt.found(torch.stack([a, a[[1, 0, 2]]], 1)).tolist() == [0, 0, 1]
    assert adapt.found(torch.stack([a, a, a[[1, 0, 2]]], 1)).tolist() == pytest.approx([1 / 3, 1 / 3, 1])


def test_views_are_the_same_in_every_look_and_crops_are_coloured():
    held = adapt.apart(Shapes(45), C)[1]
    once, again = (list(adapt.held_views(C, held, 3)) for _ in range(2))
    assert [len(labels) for *_, labels in once] == [3, 1]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(once, again, strict=True) for k in (0, 1))
    views, crops, labels = once[0]
    assert views.shape == (3, 3, 32, 32) and crops.shape == (3, 8, 3, 32, 32)
    assert labels == [held.label(i) for i in range(3)]
    off = dict.fromkeys(("jitter", "grey", "solarize", "blur_global_1", "blur_global_2"), 0.0)
    plain = next(adapt.held_views(replace(C, **off), held))
    assert torch.equal(plain[0][:3], views) and not torch.equal(plain[1][:3], crops)


def test_what_cannot_be_read_is_left_out(monkeypatch):
    held = adapt.apart(Shapes(45), C)[1]
    load = held.load
    monkeypatch.setattr(held, "load", lambda i: load(i) if i != 1 else read_image("nothing.png"))
    views, crops, labels = next(adapt.held_views(C, held))
    assert len(views) == len(crops) == len(labels) == 3


def test_neighbours_leave_the_photo_itself_out():
    x = torch.tensor([[1, 0.1], [1, 0.0], [1, -0.1], [0.1, 1], [0.0, 1], [-0.1, 1]])
    assert adapt.neighbours(x, [0, 0, 0, 1, 1, 1]) == 0            # of 5 neighbours 3 are the others
    many = torch.cat([x[:1].repeat(8, 1), x[3:4].repeat(8, 1)]) + torch.randn(
        16, 2, generator=torch.Generator().manual_seed(0)) / 100
    assert adapt.neighbours(many, [0] * 8 + [1] * 8) == 100
    assert math.isclose(adapt.neighbours(many, [0] * 7 + [1] + [1] * 8), 100 * 15 / 16)

# --------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Weights of a backbone alone."""
    path = tmp_path_factory.mktemp("weights") / "released.safetensors"
    save_backbone(build(lambda: ViT(replace(SIZES["tiny"], depth=2, patch_size=8)), seed=3), path, "nano")
    return path


def go_on(released, out, *words):
    done = train.main(["--stage", "adapt", "--init", str(released), *MICRO, "--drop_path", "0", "--lr", "0.05",
                       "--backbone_lr", "1", "--momentum", "0.5", "--momentum_end", "0.5", "--save_every", "2",
                       "--freeze_backbone", "3", "--out", str(out), *words])
    return done, [json.loads(line) for line in (out / "adapt.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def adapted(released, tmp_path_factory):
    """Six steps, without interruption."""
    out = tmp_path_factory.mktemp("runs") / "adapted"
    return out, *go_on(released, out)


def test_the_backbone_stands_still_while_the_heads_begin(released, adapted):
    out = adapted[0]
    start = load_file(released)
    moved = {step: any(not torch.equal(start[name], x) for name, x in load_file(
        out / f"checkpoints/{step}/teacher.safetensors").items()) for step in (2, 4, 6)}
    assert moved == {2: False, 4: True, 6: True}


def test_a_look_at_every_checkpoint_and_before_the_first_step(adapted):
    _, done, looks = adapted
    assert done and [look["step"] for look in looks] == [0, 2, 4, 6]
    assert looks[0]["kept"] == pytest.approx(100) and looks[1] | dict(step=0) == looks[0] and looks[3]["kept"] < 99.9
    assert all(len(look["hits"]) == 2 and 0 <= look["knn"] <= 100 for look in looks)


def test_a_run_that_is_cut_looks_again_at_what_was_not_saved(released, adapted, tmp_path):
    out, _, looks = adapted
    done, first = go_on(released, tmp_path, "--stop_after", "4")
    assert not done and first == looks[:3]
    (tmp_path / "adapt.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks[:3]) + json.dumps(
        looks[3] | dict(kept=12.0)) + "\n")   # of a run that was killed before it saved
    train.main(["--out", str(tmp_path), "--resume"])
    assert [json.loads(line) for line in (tmp_path / "adapt.jsonl").read_text().splitlines()] == looks
    assert_equal_files(tmp_path / "checkpoints/6/0.safetensors", out / "checkpoints/6/0.safetensors")


def assert_equal_files(a, b):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_nothing_gained_hands_back_what_was_released(released, tmp_path, capsys):
    go_on(released, tmp_path, "--steps", "2")
    said = capsys.readouterr().out
    assert "nothing was gained in 2 steps" in said and f"{tmp_path}/best.safetensors are the released" in said
    assert_equal_files(tmp_path / "best.safetensors", released)
    assert weights.find(tmp_path) == [tmp_path / "best.safetensors"]


@pytest.mark.parametrize("step", [4, 6])
def test_the_best_step_is_kept_when_its_checkpoint_is_gone(released, adapted, tmp_path, monkeypatch, capsys, step):
    """seen at the next look, before the save that ends its checkpoint; the last one at the end"""
    monkeypatch.setattr(adapt, "best", lambda rows: ([row for row in rows if row["step"] == step] or rows)[0])
    go_on(released, tmp_path, "--keep", "1")
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == ["6"]
    assert_equal_files(tmp_path / "best.safetensors", adapted[0] / f"checkpoints/{step}/teacher.safetensors")
    assert f"best at step {step}, kept" in capsys.readouterr().out


def test_the_held_out_photos_are_not_trained_on(released, tmp_path, monkeypatch):
    seen = set()
    load = Shapes.load
    monkeypatch.setattr(Shapes, "load", lambda self, i: seen.add((i, in_look())) or load(self, i))

    def in_look():
        return any(frame.function == "held_views" for frame in inspect.stack(0))
    go_on(released, tmp_path, "--stop_after", "2")
    held = {i for i, look in seen if look}
    assert len(held) == 2 and not held & {i for i, look in seen if not look}


@pytest.mark.parametrize("words, says", [
    (["--stage", "adapt"], "--stage adapt goes on from weights; name them: --init WEIGHTS"),
    (["--stage", "adapt", "--init", "{released}", "--gram_weight", "0"], "wants all three"),
    (["--stage", "adapt", "--init", "{released}", "--n_shapes", "19"], "--data holds 19 images; .* at least 20"),
    (["--stage", "adapt", "--init", "nothing.pth"], "nothing.pth does not exist"),
])
def test_mistakes_are_said_in_one_line(released, tmp_path, words, says):
    with pytest.raises(ValueError, match=says) as error:
        train.main([*MICRO, *(word.format(released=released) for word in words), "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out/checkpoints"))


def test_prototypes_follow_the_number_of_photos(released, tmp_path):
    words = ["--stage", "adapt", "--init", str(released), "--batch", "64", "--out", str(tmp_path)]
    assert recipes.configure([*words, "--n_shapes", "30000"]).dino_prototypes == 1024
    assert recipes.configure([*words, "--n_shapes", "30000", "--ibot_prototypes", "77"]).ibot_prototypes == 77


@pytest.mark.long
def test_two_ranks_look_alike(released, adapted, tmp_path):
    words = ["--stage", "adapt", "--init", str(released), "--drop_path", "0", "--lr", "0.05", "--backbone_lr", "1",
             "--momentum", "0.5", "--momentum_end", "0.5", "--save_every", "2", "--freeze_backbone", "3"]
    torchrun(tmp_path, *words)
    found = [json.loads(line) for line in (tmp_path / "adapt.jsonl").read_text().splitlines()]
    for a, b in zip(found, adapted[2], strict=True):
        assert a["kept"] == pytest.approx(b["kept"], abs=0.01) and a["step"] == b["step"]
