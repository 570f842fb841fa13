"""opponents.py: what the ops are compared with computes the same as they do; float64, or the definitions in float32."""

import pytest
import torch

import ops
from engine.opponents import (
    TEMPERATURE,
    attention_arguments,
    attention_errors,
    attention_written_out,
    both_ways,
    by_kernels,
    by_sdpa,
    gram_written_out,
    in_calls,
    our_dino,
    our_loss,
    relative,
    same,
    textbook_dino,
    textbook_loss,
    textbook_sinkhorn,
    turned,
    with_gradient,
    with_kernels,
)
from losses import gram_loss, sinkhorn_knopp


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_textbook_is_what_ours_is():
    x, y = normal(9, 40) * 0.3, normal(9, 40, seed=1)
    assert relative(sinkhorn_knopp(x, TEMPERATURE), textbook_sinkhorn(x.double())) < 1e-6   # measured: 1.6e-7
    assert relative(our_loss(y, x), textbook_loss(y.double(), x.double())) < 1e-6           # measured: 1.9e-7
    student, teacher = normal(5, 3, 40), normal(2, 3, 40, seed=1)
    assert relative(our_dino(student, teacher), textbook_dino(student.double(), teacher.double())) < 1e-6


def test_gram_is_what_ours_is():
    x, y = normal(3, 7, 5).requires_grad_(), normal(3, 7, 5, seed=1)
    assert relative(gram_loss(x, y), gram_written_out(x, y)) < 1e-6
    ours, theirs = (with_gradient(loss, x, y) for loss in (gram_loss, gram_written_out))
    assert relative(ours, theirs) < 2e-6                                                    # measured: 8.9e-8


def test_attention_is_what_ours_is():
    qkv, grad, *rest = attention_arguments("cpu", torch.float32, [2, 3], [(3, 4), (2, 2)], 2, 16)
    exact = both_ways(attention_written_out, qkv.double(), grad.double(), *rest)
    ways = dict(ours=ops.rope_attention, calls=in_calls, sdpa=lambda *a: by_sdpa(turned, *a))
    for function in ways.values():
        assert all(relative(a, b) < 1e-6 for a, b in zip(both_ways(function, qkv, grad, *rest), exact, strict=True))
    errors = attention_errors(ways, "cpu", torch.float32, [2, 3], [(3, 4), (2, 2)], 2, 16)
    assert errors.keys() == ways.keys() and 0 < max(errors.values()) < 1e-6
    broken = attention_errors(dict(no_turn=lambda x, n, rope, A: ops.rope_attention(
        x, n, [(c.clone().fill_(1), s * 0) for c, s in rope], A)), "cpu", torch.float32, [2], [(3, 4)], 2, 16)
    assert broken["no_turn"] > 1e-2


def test_choices_are_given_back():
    x, asked = torch.zeros(1), []
    assert with_kernels("off", lambda: ops.mode) == "off" and ops.mode == "auto"
    with_kernels("off", lambda: by_kernels(lambda: asked.append(ops.path("rope_attention", x, 9999, 64))))
    assert asked == ["kernel" if ops.BUILT else "sdpa"]
    assert with_kernels("off", ops.path, "sinkhorn_pass", x, 9) == "sdpa"
    with pytest.raises(ZeroDivisionError):
        with_kernels("off", lambda: 1 / 0)
    assert ops.mode == "auto"


def test_same_is_bit_for_bit():
    x = torch.tensor([0.0, torch.nan])
    assert same(x, x.clone()) and not same(x, torch.tensor([-0.0, torch.nan])) and not same(x, x + 1)
    assert relative(x, torch.ones(2).double()) != 0
