"""
rope_attention: definition and kernels beside the equation in float64, with rotations as products of complex numbers;
what packing, threads, torch.compile and checkpointing must not change. Without a GPU: test_ops_cuda.py.
"""

import math
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ops
from engine.opponents import by_kernels
from model import ViT, ViTConfig, rope_tables
from ops import rope_attention

CPU, CUDA = ops.have("rope_attention", torch.device("cpu")), ops.have("rope_attention", torch.device("cuda"))
built = pytest.mark.skipif(not CPU, reason="csrc is not built")
DEVICES = [pytest.param("cpu", marks=built), pytest.param("cuda", marks=pytest.mark.skipif(
    not (CUDA and torch.cuda.is_available()), reason="needs a GPU and csrc built for it"))]


@pytest.fixture(autouse=True)
def as_before():
    """No test leaves another choice of kernels, or of threads, to the next."""
    threads = torch.get_num_threads()
    yield
    ops.use_kernels("auto")
    torch.set_num_threads(threads)


def make(n_images, grids, A, E, dtype=torch.float32, n_prefix=5, device="cpu"):
    """Arguments of rope_attention, and a gradient of its result."""
    generator = torch.Generator().manual_seed(0)
    periods = 100 ** (torch.arange(E // 4) / (E // 4))
    rope = [tuple(x[0].to(device) for x in rope_tables(h, w, n_prefix, periods, [1.3])) for h, w in grids]
    T = sum(n * len(cos) for n, (cos, _) in zip(n_images, rope, strict=True))
    qkv, grad = (torch.randn(T, k * A * E, generator=generator).to(device, dtype) for k in (3, 1))
    return qkv, grad, n_images, rope, A


def value_and_grad(function, qkv, grad, *rest):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, *rest)
    return out.detach(), torch.autograd.grad(out, qkv, grad.to(out.dtype))[0]


def with_kernels(choice, *arguments):
    ops.use_kernels(choice)
    return value_and_grad(rope_attention, *arguments)


def by_hand(qkv, n_images, rope, A):
    """One image and one head at a time, in float64. A pair (x[e], x[e + E/2]) is one complex number."""
    start, out = 0, []
    for n, (cos, sin) in zip(n_images, rope, strict=True):
        turn = torch.complex(cos, sin).cdouble().view(len(cos), -1)                                # N E/2
        for _ in range(n):
            image = qkv[start : start + len(cos)].double().view(len(cos), 3, A, -1)                # N 3 A E
            start += len(cos)
            heads = []
            for q, k, v in (x.unbind(1) for x in image.unbind(2)):                                 # N E each
                q, k = (torch.complex(*x.chunk(2, 1)) * turn for x in (q, k))
                scores = (q @ k.mH).real / v.shape[1] ** 0.5
                heads.append(scores.softmax(1) @ v)
            out.append(torch.cat(heads, 1))
    return torch.cat(out) if out else qkv[:, : qkv.shape[1] // 3].double()


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()

# --------------------------------------------------------------------------------
# The equation


SHAPES = [  # images, grids, heads, head width
    ([2], [(4, 4)], 2, 64), ([1], [(16, 16)], 2, 64), ([3], [(7, 7)], 1, 128), ([1], [(3, 11)], 3, 64),
    ([2, 3], [(14, 14), (6, 6)], 1, 64), ([1, 2, 1], [(5, 2), (1, 1), (2, 9)], 2, 128),
]
ODD = [([2], [(5, 7)], 3, 16), ([1], [(9, 3)], 2, 12), ([2, 1], [(3, 3), (8, 9)], 1, 96)]  # the CPU's alone


@pytest.mark.parametrize("shape", SHAPES + ODD, ids=str)
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_definition_is_the_equation(shape, dtype, most):
    arguments = make(*shape, dtype)
    exact = value_and_grad(by_hand, *arguments)
    for ours, true in zip(with_kernels("off", *arguments), exact, strict=True):
        assert ours.dtype == dtype and error(ours, true) < most  # measured: 4.3e-7, 5.0e-3 at most


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES + ODD, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_are_as_exact_as_their_definition(device, shape, dtype):
    arguments = make(*shape, dtype, device=device)
    exact = value_and_grad(by_hand, *arguments)
    plain, ours = with_kernels("off", *arguments), with_kernels("auto", *arguments)
    for a, b, true in zip(ours, plain, exact, strict=True):
        assert a.dtype == dtype and a.shape == b.shape and error(a, true) <= 2 * error(b, true)


@pytest.mark.parametrize("choice", ["off", pytest.param("on", marks=built)])
def test_few_images_and_tokens(choice):
    qkv, grad, *rest = make([2], [(0, 0)], 2, 16, n_prefix=1)  # a token alone: it attends to itself
    out, dqkv = with_kernels(choice, qkv, grad, *rest)
    v, (dq, dk, dv) = qkv.chunk(3, 1)[2], dqkv.chunk(3, 1)
    assert error(out, v.double()) < 1e-6 and error(dv, grad.double()) < 1e-6 and dq.abs().max() + dk.abs().max() < 1e-6
    out, dqkv = with_kernels(choice, *make([0], [(4, 4)], 2, 16))
    assert out.shape == (0, 32) and dqkv.shape == (0, 96)
    with_nobody, without = make([0, 2], [(4, 4), (2, 3)], 2, 16), make([2], [(2, 3)], 2, 16)
    assert torch.equal(with_kernels(choice, *with_nobody)[0], with_kernels(choice, *without)[0])


@pytest.mark.parametrize("choice", ["off", pytest.param("on", marks=built)])
def test_groups_do_not_see_each_other_and_prefixes_do_not_turn(choice):
    qkv, grad, n_images, rope, A = make([2, 3], [(4, 5), (3, 3)], 2, 16)
    together, sizes = with_kernels(choice, qkv, grad, n_images, rope, A), [2 * 25, 3 * 14]
    parts = zip(qkv.split(sizes), grad.split(sizes), n_images, rope, strict=True)
    apart = zip(*(with_kernels(choice, q, g, [n], [tables], A) for q, g, n, tables in parts), strict=True)
    assert all(torch.equal(x, torch.cat(y)) for x, y in zip(together, apart, strict=True))
    assert all((cos[:5] == 1).all() and (sin[:5] == 0).all() for cos, sin in rope)
    swapped = qkv.clone()                                              # cls and a register of the first image
    swapped[:2] = qkv[:2].flip(0)
    out = with_kernels(choice, swapped, grad, n_images, rope, A)[0]
    assert error(out[:2].flip(0), together[0][:2].double()) < 1e-6 and error(out[2:], together[0][2:].double()) < 1e-6


@pytest.mark.parametrize("choice", ["off", pytest.param("on", marks=built)])
def test_not_a_number_stays_one_and_stays_in_its_image(choice):
    qkv, grad, *rest = make([2], [(4, 4)], 1, 16)
    qkv[7, 20] = torch.nan                                             # a key
    out, _ = with_kernels(choice, qkv, grad, *rest)
    assert out[:21].isnan().all() and out[21:].isfinite().all()

@built
def test_each_crop_group_takes_the_path_that_its_tokens_choose(monkeypatch, capsys):
    """A kernel for 9 tokens, SDPA for 21, with cuDNN first for 41; without a GPU the rotation is eager."""
    monkeypatch.setitem(ops.CHOICES, ("rope_attention", "cpu"), [(160, "kernel"), (480, "sdpa"), (math.inf, "cudnn")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    taken, by_parts, by_kernel = [], ops.attention_by_parts, ops.attention_kernel
    monkeypatch.setattr(ops, "attention_by_parts", lambda *a: taken.append((a[0].shape[1], a[3])) or by_parts(*a))
    monkeypatch.setattr(ops, "attention_kernel", lambda *a: taken.append((len(a[2][0][0]), "kernel")) or by_kernel(*a))
    for cached in ops.ways, ops.compiled:
        cached.cache_clear()
    arguments = make([2, 1, 1], [(2, 2), (4, 4), (6, 6)], 2, 16)
    exact = value_and_grad(by_hand, *arguments)
    for ours, true in zip(with_kernels("auto", *arguments), exact, strict=True):
        assert error(ours, true) < 1e-6
    assert taken == [(9, "kernel"), (21, "sdpa"), (41, "cudnn")]
    if not CUDA or not torch.cuda.device_count():
        assert "ops: no torch.compile here" in capsys.readouterr().out
    for cached in ops.ways, ops.compiled:
        cached.cache_clear()


@built
@pytest.mark.parametrize("N, E, way", [(264, 64, "kernel"), (265, 64, "cudnn"), (132, 128, "kernel"),
                                       (133, 128, "cudnn")])
def test_the_kernel_for_cuda_ends_where_it_was_measured(monkeypatch, N, E, way):
    monkeypatch.setitem(ops.CHOICES, ("rope_attention", "cpu"), ops.CHOICES["rope_attention", "cuda"])
    ops.ways.cache_clear()
    assert ops.path("rope_attention", torch.zeros(1), N * E, E) == way
    ops.ways.cache_clear()


@built
def test_what_trains_takes_a_path_of_its_own(monkeypatch, capsys):
    """One torch.compile of the whole; without a gradient, or within what is compiled already, nothing of it."""
    monkeypatch.setitem(ops.CHOICES, ("rope_attention", "cpu", "trained"), [(math.inf, "compiled")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ops.ways.cache_clear(), ops.compiled.cache_clear()
    taken, by_kernel = [], ops.attention_kernel
    monkeypatch.setattr(ops, "attention_kernel", lambda *a: taken.append(len(a[0])) or by_kernel(*a))
    monkeypatch.setattr(ops, "compiled", lambda function: taken.append(function.__name__) or function)
    arguments = qkv, grad, *rest = make([2, 1], [(2, 2), (4, 4)], 2, 16)
    exact = value_and_grad(by_hand, *arguments)
    for ours, true in zip(with_kernels("auto", *arguments), exact, strict=True):
        assert error(ours, true) < 1e-6
    assert taken == ["attention_by_parts"] * 2
    assert error(rope_attention(qkv, *rest), exact[0]) < 1e-6 and taken.pop() == 39
    whole = value_and_grad(torch.compile(rope_attention, fullgraph=True, backend="aot_eager"), *arguments)
    assert all(error(a, b) < 1e-6 for a, b in zip(whole, exact, strict=True)) and len(taken) == 2
    with torch.no_grad():
        rope_attention(qkv.requires_grad_(), *rest)
    assert taken.pop() == 39
    ops.ways.cache_clear()

# --------------------------------------------------------------------------------
# What must not change the result


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_every_time(device):
    arguments = make([3, 5], [(16, 16), (7, 7)], 2, 64, torch.bfloat16, device=device)
    attention = partial(by_kernels, rope_attention)  # of the backends that ops.py may choose not all do as much
    first = value_and_grad(attention, *arguments)
    for threads in 1, 2, 3, 1:
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(first, value_and_grad(attention, *arguments), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_operator_keeps_its_promises(device):
    qkv, grad, n_images, rope, A = make([2, 1], [(3, 3), (2, 2)], 2, 64, torch.bfloat16, device=device)
    tables = [x for pair in rope for x in pair]
    qkv.requires_grad_(device == "cpu")                                 # where there is a backward pass
    torch.library.opcheck(torch.ops.nanodino.rope_attention, (qkv, tables, n_images, A))
    out, lse = torch.ops.nanodino.rope_attention(qkv, tables, n_images, A)
    assert out.requires_grad == qkv.requires_grad and not lse.requires_grad
    if device == "cuda":
        return
    arguments = grad, qkv.detach(), out.detach(), lse, tables, n_images, A
    torch.library.opcheck(torch.ops.nanodino.rope_attention_backward, arguments)


@pytest.mark.parametrize("choice", ["off", pytest.param("on", marks=built)])
def test_compiles_as_one_graph(choice):
    arguments = make([2, 1], [(3, 3), (2, 2)], 2, 16)
    eager = with_kernels(choice, *arguments)
    compiled = value_and_grad(torch.compile(rope_attention, fullgraph=True, backend="aot_eager"), *arguments)
    assert all(error(a, b.double()) < 1e-6 for a, b in zip(compiled, eager, strict=True))


@built
def test_autocast_and_checkpointing():
    qkv, grad, *rest = make([2], [(4, 4)], 2, 64)
    half = with_kernels("on", qkv.bfloat16(), grad.bfloat16(), *rest)
    with torch.autocast("cpu", torch.bfloat16):
        out, dqkv = with_kernels("on", qkv, grad, *rest)
    assert out.dtype == torch.bfloat16 and torch.equal(out, half[0]) and torch.equal(dqkv, half[1].float())
    ops.ways.cache_clear(), ops.obstacle.cache_clear()  # the proof of first use runs within, and leaves no trace
    again = value_and_grad(lambda *a: checkpoint(rope_attention, *a, use_reentrant=False), qkv, grad, *rest)
    assert all(torch.equal(a, b) for a, b in zip(again, with_kernels("on", qkv, grad, *rest), strict=True))


@built
@pytest.mark.parametrize("checkpointing", ops.RECOMPUTED)
def test_network_is_the_same_with_kernels(checkpointing):
    config = ViTConfig(3, 64, 2, 96, patch_size=4, n_registers=2, layerscale=1.0, init_std=0.1)
    vit, found, generator = ViT(config), [], torch.Generator().manual_seed(0)
    crops = [torch.randn(*shape, generator=generator) for shape in [(2, 3, 16, 24), (3, 3, 8, 8)]]
    weight = torch.randn(64, generator=generator)
    for choice in "off", "on":
        ops.use_kernels(choice)
        vit.checkpointing = checkpointing if choice == "on" else "none"
        vit.zero_grad()
        features = vit(crops)
        sum((f.patches[:, ::2] @ weight).sum() for f in features).backward()
        found.append([f.patches for f in features] + [p.grad for p in vit.parameters() if p.grad is not None])
    assert all(error(a, b.double()) < 2e-6 for a, b in zip(*found, strict=True))  # measured: 4.1e-7

# --------------------------------------------------------------------------------
# Mistakes


@built
@pytest.mark.parametrize("change, message", [
    (lambda qkv, *rest: (qkv.T.contiguous().T, *rest), "qkv has strides .*; wanted it contiguous; call .contiguous"),
    (lambda qkv, *rest: (qkv[1:], *rest), "qkv has 41 rows; wanted 42, the images times their tokens; check n_images"),
    (lambda qkv, n, rope, A: (qkv, n, [[x[..., :4] for x in rope[0]]], A), "cos is .*; wanted tokens x 8, half a head"),
    (lambda qkv, n, rope, A: (qkv, n, rope, 5), "qkv is .42, 96. for 5 heads; wanted tokens x 3 A E, E even"),
    (lambda qkv, n, rope, A: (qkv, [1, 1], rope, A), "got 2 tables for 2 crop groups; wanted cos and sin of each"),
    (lambda qkv, n, rope, A: (qkv, n, [(rope[0][0], rope[0][1].double())], A), "sin is Double; wanted Float; cast it"),
])
def test_mistakes_are_named(change, message):
    qkv, _, *rest = make([2], [(4, 4)], 2, 16)
    with pytest.raises(RuntimeError, match=message):
        rope_attention(*change(qkv, *rest))
