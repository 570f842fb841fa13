"""
engine/proof.py: right kernels are found right; one that is broken in any of these ways is caught at its first use, the
definition runs, one line says so, and --kernels on stops.
"""

import re

import pytest
import torch

import ops
from data import augment, cut
from engine.proof import COLOURS, failure

pytestmark = pytest.mark.skipif(not ops.BUILT, reason="csrc is not built")
GENERATOR = torch.Generator().manual_seed(0)
X, LOG_U = (torch.randn(*shape, generator=GENERATOR) for shape in [(9, 40), (40,)])
ROPE = [tuple(f(torch.randn(6, 1, 1, 8, generator=GENERATOR)) for f in (torch.cos, torch.sin))]
CALLS = dict(  # an op of each kind, on something small
    sinkhorn=lambda: ops.sinkhorn(X, 0.1, 2),
    sinkhorn_pass=lambda: ops.sinkhorn_pass(X, 0.1, LOG_U),
    sinkhorn_targets=lambda: ops.sinkhorn_targets(X, 0.1, LOG_U),
    assignment_loss=lambda: ops.assignment_loss(X[None], X[None], LOG_U, X[:, 0], torch.ones(1, 1), 0.1, 0.1),
    rope_attention=lambda: ops.rope_attention(X[:6, :24].repeat(1, 4), [1], ROPE, 2),
    cut=lambda: cut(X.view(12, 10, 3).mul(60).byte().permute(2, 0, 1), (1, 2, 9, 7), False, 6).float(),
    colours=lambda: augment((X.view(1, 3, 10, 12) * 60 + 128).byte(), torch.tensor(COLOURS[:1]), [0.4] * 3, [0.2] * 3))


@pytest.fixture(autouse=True)
def asked_again():
    """No test leaves what it found out, or a choice, to the next."""
    ops.obstacle.cache_clear(), ops.ways.cache_clear()
    yield
    ops.obstacle.cache_clear(), ops.ways.cache_clear()
    ops.use_kernels("auto")


@pytest.mark.parametrize("E", [12, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ops.OPS)
def test_right_kernels_are_right(op, dtype, E):
    assert failure(op, dtype, E, "cpu") is None


def break_kernel(monkeypatch, op, how):
    right = getattr(torch.ops.nanodino, op)

    def wrong(*arguments):
        out = right(*arguments)
        out = out.float() if isinstance(out, torch.Tensor) else out         # bytes have no room for mistakes
        return how(out) if isinstance(out, torch.Tensor) else (how(out[0]), *out[1:])
    monkeypatch.setattr(torch.ops.nanodino, op, wrong)


def with_last(value):
    def how(x):
        x = x.clone()
        x.view(-1)[-1] += value
        return x
    return how


@pytest.mark.parametrize("how", [lambda x: x * 1.001, with_last(float("nan")), with_last(0.1)])
@pytest.mark.parametrize("op", ops.OPS)
def test_a_wrong_kernel_is_caught_and_the_definition_runs(monkeypatch, capsys, op, how):
    ops.use_kernels("off")
    exact = CALLS[op]()
    ops.use_kernels("auto")
    break_kernel(monkeypatch, op, how)
    for _ in range(2):
        torch.testing.assert_close(CALLS[op](), exact, rtol=1e-6, atol=2e-6)  # parts of it are kernels
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"ops: {op} in float32 on cpu: its error is" in said and "definition" in said
    ops.use_kernels("on")
    with pytest.raises(ValueError, match=f"--kernels on: {op} in float32 on cpu: its error is .*; take --kernels auto"):
        CALLS[op]()


def test_a_kernel_that_does_not_run_is_caught(monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("no kernel image is available\nand more")
    monkeypatch.setattr(torch.ops.nanodino, "sinkhorn_pass", refuse)
    assert CALLS["sinkhorn_pass"]().isfinite().all()
    assert "it does not run (no kernel image is available)" in capsys.readouterr().out


def test_a_wrong_gradient_is_caught(monkeypatch):
    break_kernel(monkeypatch, "rope_attention_backward", lambda x: x * 1.001)
    assert "error" in failure("rope_attention", torch.float32, 64, "cpu")


@pytest.mark.parametrize("op, dtype, E, device, says", [
    ("rope_attention", torch.float32, 64, "cuda:0", "bfloat16 and float16 with heads of 64 or 128 .* not float32 of"),
    ("rope_attention", torch.bfloat16, 96, "cuda:0", "not bfloat16 of 96"),
    ("rope_attention", torch.float16, 64, "cpu", "kernels take float32 and bfloat16"),
])
def test_what_kernels_do_not_take_is_said(op, dtype, E, device, says):
    assert re.search(says, failure(op, dtype, E, device))


def test_a_definition_does_not_run_without_a_word(capsys):
    qkv = X[:6, :24].repeat(1, 4).half()
    for _ in range(2):
        assert ops.rope_attention(qkv, [1], ROPE, 2).dtype == torch.float16
    assert capsys.readouterr().out.count("its definition in PyTorch runs") == 1
    ops.use_kernels("on")
    with pytest.raises(ValueError, match="--kernels on: rope_attention in float16 on cpu"):
        ops.rope_attention(qkv, [1], ROPE, 2)


def test_the_caller_notices_nothing():
    """Neither its random numbers nor its modes: the first use may lie within any of them."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        CALLS["rope_attention"]()
    assert torch.equal(torch.rand(1), expected)
