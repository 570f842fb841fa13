"""One run, whatever ranks it has and goes on with; uneven shards, cut by more ranks than a tensor has rows."""

import pytest
import torch
from forks import start
from safetensors.torch import load_file
from test_train import MICRO, rows

NAMES = "loss", "dino_global", "dino_local", "ibot", "koleo", "grad_norm_backbone"
WORDS = [*MICRO, "--group", "2", "--ibot_bottleneck", "3"]  # 2 samples of each of 4 ranks; 3 rows on 4 ranks


def finish(out, ranks, *words):
    codes, _ = start(out, *words, ranks=ranks, base=WORDS).wait(120)
    assert codes == [0] * ranks, out.with_name(out.name + ".log").read_text()[-3000:]
    return rows(out)


def apart(a, b):
    """The largest relative difference of any number of any step."""
    return max(abs(x[name] - y[name]) / abs(x[name]) for x, y in zip(a, b, strict=True) for name in NAMES)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    finish(out, 1)
    return out


def test_four_ranks_are_one_and_go_on_as_two_and_one(one, tmp_path):
    finish(tmp_path / "run", 4, "--stop_after", "2")
    finish(tmp_path / "run", 2, "--resume", "--stop_after", "2")
    found = finish(tmp_path / "run", 1, "--resume")
    print(f"apart by {apart(rows(one), found):.1e}")
    assert apart(rows(one), found) < 5e-5  # 4e-6 measured
    a, b = (load_file(out / "teacher.safetensors") for out in (one, tmp_path / "run"))
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


@pytest.mark.parametrize("ranks, words", [
    (1, "--accumulate 4"), (4, "--replicas 2"), pytest.param(2, "--accumulate 2", marks=pytest.mark.long)])
def test_parts_and_replicas_are_one(ranks, words, one, tmp_path):
    """And go on as what they were not."""
    words = [*words.split(), "--koleo_group", "2"]
    whole = finish(tmp_path / "whole", 1, "--koleo_group", "2")
    finish(tmp_path / "run", ranks, *words, "--stop_after", "3")
    found = finish(tmp_path / "run", 3 - ranks if ranks < 3 else 1, "--resume", "--replicas", "1",
                   "--accumulate", "2", "--koleo_group", "2")
    print(f"{words} apart by {apart(whole, found):.1e}")
    assert apart(whole, found) < 5e-5  # 4e-6 measured
    a, b = (load_file(tmp_path / f"{name}/teacher.safetensors") for name in ("whole", "run"))
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


@pytest.mark.long
def test_moments_are_rounded_alike_on_any_ranks(tmp_path):
    whole = finish(tmp_path / "whole", 1, "--moments", "bf16")
    found = finish(tmp_path / "run", 4, "--moments", "bf16", "--replicas", "2")
    print(f"apart by {apart(whole, found):.1e}")
    assert apart(whole, found) < 5e-5


def test_two_ranks_go_on_as_four(one, tmp_path):
    finish(tmp_path / "run", 2, "--stop_after", "3")
    before = load_file(tmp_path / "run/teacher.safetensors")
    assert len(list((tmp_path / "run/checkpoints/3").glob("[01].safetensors"))) == 2
    found = finish(tmp_path / "run", 4, "--resume")
    print(f"apart by {apart(rows(one), found):.1e}")
    assert apart(rows(one), found) < 5e-5 and before.keys() == load_file(one / "teacher.safetensors").keys()


def test_what_four_ranks_take_back_is_what_two_left(tmp_path):
    """bit for bit: without a learning rate the checkpoints before and after hold the same weights"""
    still = "--lr", "0", "--lr_end", "0", "--momentum", "1", "--weight_decay", "0", "--weight_decay_end", "0"
    finish(tmp_path / "run", 2, *still, "--stop_after", "1")
    finish(tmp_path / "run", 4, *still, "--resume", "--stop_after", "1")
    a, b = (load_file(tmp_path / f"run/checkpoints/{step}/teacher.safetensors") for step in (1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
