"""engine/adam.py: AdamW's arithmetic, what is kept of it in bfloat16, and that its mean is right."""

import pytest
import torch
from test_train import rows, run

from engine.adam import AdamW16, rounded

ONE = 2.0 ** -8                 # between bfloat16's numbers from 1 to 2: twice this


def test_what_lies_between_goes_up_as_often_as_it_is_near():
    x = torch.tensor([1.0, 1 + 0.5 * ONE, 1 + 1.5 * ONE, -1 - 0.5 * ONE, 3e-30, 0.0]).expand(40_000, 6).contiguous()
    found = rounded(x, 7).float()
    steps = ((found.abs() - 1) / (2 * ONE))[:, :4]
    assert ((steps == 0) | (steps == 1)).all()
    assert steps.mean(0).tolist() == pytest.approx([0, 0.25, 0.75, 0.25], abs=0.01)      # 0.002 is one deviation
    assert found[:, 4].mean().item() == pytest.approx(3e-30, rel=1e-4) and not found[:, 5].any()
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert rounded(odd, 1)[:2].tolist() == [torch.inf, -torch.inf] and rounded(odd, 1)[2].isnan()


def test_what_is_drawn_is_of_key_and_place():
    x = torch.full((64, 100), 1 + ONE)
    whole, again, other = (rounded(x, key) for key in (3, 3, 4))
    assert torch.equal(whole, again) and 0.4 < (whole == other).float().mean() < 0.6
    assert torch.equal(torch.cat([rounded(x[:10], 3), rounded(x[10:], 3, 1000)]), whole)
    up = (whole > 1).float()
    for shift in 1, 2, 64, 100:  # neighbours have nothing to do with each other
        a, b = up.flatten()[shift:], up.flatten()[:-shift]
        assert abs(((a - a.mean()) * (b - b.mean())).mean()) < 0.02


def problem(kind, steps=800, seed=0, skip=()):
    """Weights and state after so many steps on gradients that are drawn, and that shrink after a hundred."""
    draw = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(torch.randn(50, 40, generator=draw, dtype=torch.float32))
    group = dict(params=[p], lr=1e-2, weight_decay=0.1)
    if kind == "bf16":
        optimizer = AdamW16([group], {p: "p"}, (0.9, 0.999), seed)
        optimizer.state[p] = dict(step=torch.zeros(()), exp_avg=torch.zeros_like(p, dtype=torch.bfloat16),
                                  exp_avg_sq=torch.zeros_like(p, dtype=torch.bfloat16))
    else:
        optimizer = torch.optim.AdamW([group], betas=(0.9, 0.999))
    for step in range(steps):
        p.grad = (0.3 + torch.randn(50, 40, generator=draw)) * (1 if step < 100 else 0.01)
        if kind == "bf16":
            optimizer.at, optimizer.found_inf = step, torch.tensor(float(step in skip))
        if kind == "bf16" or step not in skip:
            optimizer.step()
    return p.detach(), optimizer.state[p]


def test_it_is_adamw_but_for_what_it_keeps(monkeypatch):
    (exact, theirs), (found, ours) = problem("fp32"), problem("bf16")
    assert ours["exp_avg"].dtype == ours["exp_avg_sq"].dtype == torch.bfloat16
    v = ours["exp_avg_sq"].float() / theirs["exp_avg_sq"]
    assert abs(v.mean() - 1) < 5e-3 and v.std() < 0.08                                   # measured .0009, .057
    assert (found - exact).abs().max() < 0.02 and (found - exact).mean().abs() < 5e-4    # .005, .00004; moved by .48
    (one, _), (first, _) = problem("fp32", 1), problem("bf16", 1)
    torch.testing.assert_close(first, one, atol=1e-7, rtol=1e-6)
    monkeypatch.setattr("engine.adam.rounded", lambda x, *_: x.bfloat16())
    _, stuck = problem("bf16")
    v = stuck["exp_avg_sq"].float() / theirs["exp_avg_sq"]
    assert v.mean() > 1.8                                       # to the nearest, it stands still; measured 2.0


def test_a_step_that_is_skipped_changes_nothing():
    (a, state), (exact, theirs) = problem("bf16", 3, skip=(1,)), problem("fp32", 3, skip=(1,))
    assert (a - exact).abs().max() < 2e-3 and state["step"] == theirs["step"] == 2
    b, _ = problem("bf16", 2, skip=(0, 1))
    assert torch.equal(b, problem("bf16", 0)[0])


def test_a_run_keeps_half_as_much_and_goes_on_bit_for_bit(tmp_path):
    run(tmp_path / "whole", "--moments", "bf16")
    run(tmp_path / "parts", "--moments", "bf16", "--stop_after", "2")
    import train
    train.main(["--out", str(tmp_path / "parts"), "--resume"])
    assert [row["loss"] for row in rows(tmp_path / "whole")] == [row["loss"] for row in rows(tmp_path / "parts")]
    plain = run(tmp_path / "plain")
    assert rows(tmp_path / "whole")[0]["loss"] == plain[0]["loss"]
    assert [row["loss"] for row in rows(tmp_path / "whole")] == pytest.approx([row["loss"] for row in plain], rel=5e-3)
    files = [sum(x.stat().st_size for x in (tmp_path / f"{name}/checkpoints/6").glob("0.safetensors"))
             for name in ("whole", "plain")]
    assert files[0] == pytest.approx(files[1] * 12 / 16, rel=0.02)   # student, teacher, and two moments
