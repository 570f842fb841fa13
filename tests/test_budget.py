"""engine/budget.py beside what PyTorch counts of small networks, and the released size as it is known."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ops
import text
from dinotxt import TowerConfig, new_towers
from engine import budget
from model import Features, ViT, ViTConfig, build
from text import RECIPES, replace

VIT = ViTConfig(2, 64, 2, 192, patch_size=16)
C = replace(RECIPES["laptop"], depth=2, width=128, context=20, head_blocks=2, resolution=64, augment=True)


@pytest.fixture(scope="module")
def towers():
    return new_towers(VIT, TowerConfig(2, 128, 20, 50, 2))


def test_flops_are_those_that_pytorch_counts(towers, monkeypatch):
    """Forward, of 3 pairs; it sees attention where it is plain products"""
    monkeypatch.setattr(ops, "mode", "off")
    net, found = build(lambda: ViT(VIT)).eval(), {}
    runs = dict(text=lambda: towers.read(torch.zeros(3, 20, dtype=torch.int64)),
                backbone=lambda: net(torch.zeros(3, 3, 64, 64)))
    f = net(torch.zeros(3, 3, 64, 64))
    runs["head"] = lambda: towers.see(f)
    for name, run in runs.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            run()
        found[name] = counter.get_total_flops() / 3
    said = budget.flops(C, towers, VIT)
    assert said["backbone"] == pytest.approx(found["backbone"], rel=1e-3)
    assert said["head"] == pytest.approx(3 * found["head"], rel=1e-3)
    assert said["text"] == pytest.approx(3 * found["text"], rel=1e-3)
    parts = budget.flops(replace(C, accumulate=2, augment=False), towers, VIT)
    assert (parts["text"], parts["backbone"]) == (said["text"] / 3 * 4, 0)


def test_the_graph_takes_what_autograd_keeps(towers):
    f = Features(torch.randn(4, 64), torch.randn(4, 4, 64), torch.randn(4, 16, 64), (4, 4))
    towers.see(f)  # at its first use the kernel is tried, and that is kept, too
    n, c = dict(text=0, head=0, backbone=0), replace(C, batch=8, accumulate=2)
    for own, run in ((dict(depth=0), lambda: towers.see(f)),
                     (dict(head_blocks=0), lambda: towers.read(torch.zeros(4, 20, dtype=torch.int64)))):
        said, kept = budget.memory(replace(c, **own), towers, VIT, n, 1), budget.saved_bytes(towers, run)
        normed = 0 if "depth" in own else 4 * 4 * 21 * 64            # the head's norm keeps what it sees
        assert said["graph"] - normed == pytest.approx(kept, rel=0.02)                         # 0.6 % measured
    said = budget.memory(c, towers, VIT, n, 1)
    assert said["tokens"] == 4 * 8 * 21 * 64 and said["weights"] == 0
    assert said["peak"] == sum(size for name, size in said.items() if name != "peak")
    assert budget.memory(replace(C, batch=8, accumulate=4), towers, VIT, n, 2)["graph"] == said["graph"] / 4


def test_full_size(capsys):
    text.main(["--recipe", "full", "--weights", "untrained:l", "--plan", "--ranks", "32", "--accumulate", "2"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["parameters"] == dict(text=538_131_200, head=25_326_336, backbone=303_154_176)
    assert found["bytes"]["moments"] == 8 * 563_457_536 and found["flops"]["text"] == pytest.approx(3.0e11, rel=0.05)
    with pytest.raises(ValueError, match="--batch 8192 is not divisible by --ranks 3 x --accumulate 1"):
        text.main(["--recipe", "full", "--weights", "untrained:l", "--plan", "--ranks", "3"])
