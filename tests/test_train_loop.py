"""Two steps of the loop with extreme values: what each step does with every schedule, and how networks are cut."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forks import start
from test_train import MICRO, rows
from torch.utils._python_dispatch import TorchDispatchMode

import recipes
import train
from engine import fp8, plan
from engine.ranks import Ranks

WORDS = [*MICRO, *"""--steps 2 --lr 0.01 --lr_end 0.005 --lr_warmup 0 --weight_decay 0.5 --weight_decay_end 0.1
         --momentum 0 --momentum_end 1 --teacher_temp_start 0.04 --teacher_temp 0.4 --teacher_temp_warmup 1 --beta1 0.3
         --beta2 0.5 --freeze_last_layer 1 --local_weight 50 --ibot_weight 7 --koleo_weight 3 --student_temp 0.2
         --layer_decay 0.5 --patch_embed_lr 0.25 --clip 0.001 --drop_path 0""".split()]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the loop has done, step by step."""
    out, seen = tmp_path_factory.mktemp("runs") / "run", dict(groups=[], grads=[], temps=[], after=[], before=[])
    balanced, teacher_targets, update_ema = train.balanced, train.teacher_targets, train.update_ema
    step, losses, loss_terms = torch.optim.AdamW.step, train.dino_losses, train.loss_terms

    def state(networks):
        return {name: x.detach().clone() for name, x in networks.state_dict().items()}

    def spy_step(optimizer, *args):
        seen["groups"].append([{key: value for key, value in group.items() if key != "params"}
                               for group in optimizer.param_groups])
        seen["grads"].append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        return step(optimizer, *args)

    def spy_targets(teacher, *args):
        seen["teacher"] = teacher
        seen["training"] = seen.get("training", False) or any(part.training for part in teacher.modules())
        targets = teacher_targets(teacher, *args)
        seen["graph"] = any(p.requires_grad for p in teacher.parameters())
        return targets

    def spy_terms(c, student, *args):
        seen["student"], piled = student, any(p.grad is not None for p in student.parameters())
        seen["piled"] = seen.get("piled", False) or piled
        return loss_terms(c, student, *args)

    def spy_ema(*args):
        seen["before"].append(state(seen["teacher"]))
        update_ema(*args)
        seen["after"].append((state(seen["student"]), None))

    def spy_balanced(logits, temperature, **kwargs):
        if seen["after"] and seen["after"][-1][1] is None:  # what the teacher is when the next step begins
            seen["after"][-1] = seen["after"][-1][0], state(seen["teacher"])
        seen["temps"].append(temperature)
        return balanced(logits, temperature, **kwargs)

    def spy_losses(*args):
        seen["student_temp"] = args[3]
        return losses(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy_step)
        for name, spy in dict(teacher_targets=spy_targets, update_ema=spy_ema, balanced=spy_balanced,
                              dino_losses=spy_losses, loss_terms=spy_terms).items():
            patch.setattr(train, name, spy)
        train.main([*WORDS, "--out", str(out)])
    seen["after"][-1] = seen["after"][-1][0], state(seen["teacher"])
    return seen | dict(rows=rows(out))


def test_rates_decay_and_betas_of_every_group(seen):
    """AdamW's, at the moment of each step: cosines of two values are their ends, both scaled"""
    factor = 4 * (8 / 1024) ** 0.5
    for groups, lr, decay, frozen in zip(seen["groups"], (0.01, 0.005), (0.5, 0.1), (True, False), strict=True):
        assert {group["lr_factor"] for group in groups} == {1, 0.5, 0.25, 0.125, 0.125 * 0.25}
        for group in groups:
            expected = 0 if frozen and group["still"] else lr * factor * group["lr_factor"]
            assert group["lr"] == pytest.approx(expected)
            assert group["weight_decay"] == pytest.approx(decay if group["decays"] else 0)
            assert tuple(group["betas"]) == (0.3, 0.5)


def test_last_layers_do_not_move_in_the_first_step(seen):
    first, second = (student for student, _ in seen["after"])
    start = seen["before"][0]  # student and teacher start alike
    for name in start:
        still = name.endswith(("last_layer.weight", "periods", "bias_mask"))
        assert torch.equal(start[name], first[name]) == still or not start[name].any(), name
        if name.endswith("last_layer.weight"):
            assert not torch.equal(first[name], second[name])


def test_the_teacher_follows_backbone_and_heads_and_then_stands_still(seen):
    """momentum 0, then 1: it is the student after the first step, and still after the second"""
    (first, after_first), (second, after_second) = seen["after"]
    for name in first:
        assert torch.equal(after_first[name], first[name]), name
        assert torch.equal(after_second[name], first[name]), name
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_the_teacher_evaluates_and_leaves_no_graph(seen):
    assert not seen["training"] and not seen["graph"]


def test_temperatures_of_each_step(seen):
    assert seen["temps"] == pytest.approx([0.22, 0.22, 0.4, 0.4]) and seen["student_temp"] == 0.2  # DINO, iBOT


def test_the_loss_is_the_weighted_sum(seen):
    for row in seen["rows"]:
        terms = 2 / 6 * row["dino_global"] + 4 / 6 * 50 * row["dino_local"] + 7 * row["ibot"] + 3 * row["koleo"]
        assert row["loss"] == pytest.approx(terms, rel=1e-5)


def test_gradients_are_clipped_and_do_not_pile_up(seen):
    assert not seen["piled"]
    for grads in seen["grads"]:
        total = torch.stack([g.norm() for g in grads]).norm()
        assert total == pytest.approx(0.001 * 3 ** 0.5, rel=1e-3)  # backbone and two heads


@pytest.mark.parametrize("precision, stays", [("bf16", False), ("fp8", True)])
def test_every_block_is_sharded_and_gradients_are_summed_in_float32(precision, stays, tmp_path, monkeypatch):
    """as on GPUs in bfloat16 or float8: each block, the prototypes, then the networks, all with one policy"""
    calls = []
    monkeypatch.setattr(train, "fully_shard", lambda part, **kwargs: calls.append((part, kwargs)))
    monkeypatch.setattr(train.DeviceMesh, "from_group", lambda *args: None)
    monkeypatch.setattr(train, "initialise", lambda networks, seed: networks)
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda networks, device: networks)
    c = replace(recipes.configure([*MICRO, "--out", str(tmp_path)]), precision=precision)
    networks = train.build_networks(c, Ranks(0, 2, torch.device("cuda"), object()), stays=stays)
    heads = networks["dino_head"], networks["ibot_head"]
    parts = [*networks["backbone"].blocks, *(head.last_layer for head in heads), networks["backbone"], *heads]
    assert Counter(id(part) for part, _ in calls) == Counter(map(id, parts)) and len(parts) == 7
    assert {id(part) for part, _ in calls[:4]} == set(map(id, parts[:4]))  # before what they are parts of
    for _, kwargs in calls:
        policy = kwargs["mp_policy"]
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        assert kwargs["reshard_after_forward"] == (not stays)
    eights = [name for name, part in networks.named_modules() if type(part) in fp8.OURS.values()]
    assert len(eights) == 4 * 2 * (precision == "fp8") and all(".blocks." in name for name in eights)


def test_what_is_not_in_float8_is_in_bfloat16(tmp_path, monkeypatch):
    """and without such a device nothing begins"""
    kinds, dino_losses = [], train.dino_losses
    monkeypatch.setattr(train, "dino_losses", lambda *args: kinds.append(args[0].dtype) or dino_losses(*args))
    words = [*MICRO, "--precision", "fp8", "--steps", "1", "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="--precision fp8 wants CUDA"):
        train.main(words)
    monkeypatch.setitem(fp8.PRODUCTS, "cpu", fp8.emulated)
    train.main(words)
    assert kinds == [torch.bfloat16]


class Gathered(TorchDispatchMode):
    """Bytes that this rank has sent to gather weights."""
    sent = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_allgather_base_" in str(function):
            self.sent += args[1].numel() * args[1].element_size()
        return function(*args, **(kwargs or {}))


def two(out, full):
    """A run on two ranks: its rows, and what its steps sent to gather weights.    full  plan.FULL"""
    def count(rank):
        plan.FULL, mode, update = full, Gathered().__enter__(), train.update_ema

        def update_ema(*args):
            update(*args)
            out.with_name(f"{out.name}.{rank}").write_text(str(mode.sent))
        train.update_ema = update_ema
    codes, _ = start(out, "--drop_path", "0", ranks=2, prepare=count, main=train.main).wait(120)
    assert codes == [0, 0], out.with_name(out.name + ".log").read_text()[-3000:]
    return rows(out), int(out.with_name(f"{out.name}.1").read_text())


def test_weights_that_stay_gathered_travel_once_less(tmp_path):
    """the student's from forward to backward; the teacher's, which follow by shards, do not; all as planned"""
    once, twice = two(tmp_path / "stays", 0.75), two(tmp_path / "again", 0.0)
    assert [row["loss"] for row in once[0]] == [row["loss"] for row in twice[0]]
    said = [(tmp_path / f"{name}.log").read_text().count("weights stay gathered") for name in ("stays", "again")]
    assert said == [1, 0]
    c = recipes.configure([*MICRO, "--out", str(tmp_path / "plan")])
    networks = plan.meta(c, train.make_networks)
    for stays, (_, sent) in (True, once), (False, twice):
        planned = plan.wire(c, plan.Where("cpu", 2, stays), networks)
        expected = sum(planned[f"gather_{kind}"] for kind in ("teacher", "forward", "backward"))
        print(f"stays {stays}: {sent:,} bytes gathered in 6 steps, {6 * expected:,} planned")
        assert sent == pytest.approx(6 * expected, rel=0.03)


@pytest.mark.long
def test_every_mutant_is_caught():
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("mutants_train.py"))], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
