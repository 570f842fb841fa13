"""
ops.py against float64: the kernels where csrc/ is built, the definitions where it is not. What autograd, torch.compile
and threads must not change; what the extension refuses.
"""

import math

import pytest
import torch

import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
on_devices = pytest.mark.parametrize("device", DEVICES)
needs_build = pytest.mark.skipif(not ops.BUILT, reason="csrc is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=["auto", "off"], autouse=True)
def kernels(request):
    """Every test runs on both paths; without csrc they are one."""
    if request.param == "off" and not ops.BUILT:
        pytest.skip("csrc is not built: auto is off")
    ops.use_kernels(request.param)
    yield request.param
    ops.use_kernels("auto")


def normal(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


# --------------------------------------------------------------------------------
# Sinkhorn-Knopp


def exact_pass(logits, temperature, log_u=None):
    x = logits.double() / temperature
    log_v = 0 if log_u is None else -torch.logsumexp(x + log_u, 1, keepdim=True)
    return torch.logsumexp(x + log_v, 0)


def passes(one, logits, temperature, n=3):
    log_u = None
    for _ in range(n):
        log_u = -one(logits, temperature, log_u)
    return log_u


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, K", [(1, 5), (3, 16), (8, 31), (9, 33), (37, 1003), (130, 264), (5, 9000), (2, 140_001)])
def test_sinkhorn_is_that_of_float64(n, K, dtype, device):
    """Odd sizes: neither rows nor columns are multiples of what a kernel works in; 140,001 is past its panel sizes."""
    x = normal(n, K, device=device).mul(0.5).to(dtype)
    exact = passes(exact_pass, x, 0.06)
    ours = passes(ops.sinkhorn_pass, x, 0.06)
    assert ours.dtype == torch.float32 and ours.shape == (K,)
    assert (ours - exact).abs().max() < 2e-5                            # measured: 6.9e-6, of values up to 40
    targets = (x.double() / 0.06 + exact).softmax(-1)
    q = ops.sinkhorn_targets(x, 0.06, ours)
    assert q.dtype == torch.float32 and ((q - targets).norm() / targets.norm()) < 1e-5
    assert torch.allclose(q.sum(1), torch.ones(n, device=device), atol=2e-6)
    half = ops.sinkhorn_targets(x, 0.06, ours, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.double(), targets, rtol=2 ** -8, atol=1e-30)


@on_devices
@pytest.mark.parametrize("n_iterations", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, K", [(1, 5), (3, 16), (37, 1003), (70, 1857), (130, 264), (300, 500), (2, 140_001)])
def test_all_passes_at_once_are_those_of_float64(n, K, dtype, n_iterations, device):
    """One to 137 tiles of a kernel, the last one ragged; rows that are no multiple of four."""
    x = normal(n, K, device=device).mul(0.5).to(dtype)
    ours = ops.sinkhorn(x, 0.06, n_iterations)
    assert ours.dtype == torch.float32 and ours.shape == (K,)
    assert (ours - passes(exact_pass, x, 0.06, n_iterations)).abs().max() < 1e-5       # measured: 6.5e-6, of up to 40


def with_column(x, value):
    return x.index_fill(1, torch.tensor(7), value)


@needs_build
@pytest.mark.parametrize("change", [  # the last sums to 2^-60.0001 in its column; in rows and columns 2^+-60 are 41.6
    lambda x: x * 60, lambda x: x.index_fill(0, torch.tensor(3), -50), lambda x: x * math.nan, lambda x: x + 2,
    lambda x: x - 4.3 * (torch.arange(40)[:, None] == 3),                          # half of that row below 2^-126
    lambda x: with_column(x, math.inf), lambda x: with_column(x, -(60.0001 + math.log2(40)) * math.log(2) * 0.05)])
def test_what_products_cannot_hold_is_done_in_logarithms(kernels, change):
    x = change(normal(40, 1100) * 0.2)
    exact, ours = passes(ops.sinkhorn_pass, x, 0.05), ops.sinkhorn(x, 0.05, 3)
    assert torch.equal(ours, exact) or exact.isnan().any() and torch.equal(ours.isfinite(), exact.isfinite())


@needs_build
def test_what_products_hold_is_not(kernels):
    """So that the test above asks for something; and what lies just within the limits is as right as any."""
    if kernels == "off":
        pytest.skip("the definition is the passes")
    x = with_column(normal(40, 1100) * 0.2, -(57 + math.log2(40)) * math.log(2) * 0.05)
    x[3] -= 0.7                                                         # a row of 2^-20 of the others
    ours = ops.sinkhorn(x, 0.05, 3)
    assert not torch.equal(ours, passes(ops.sinkhorn_pass, x, 0.05))
    assert (ours - passes(exact_pass, x, 0.05)).abs().max() < 1e-5      # measured: 3.0e-6
    large = normal(2, 2 ** 22 + 1) * 0.2                                # more than is kept
    many = ops.sinkhorn(x, 0.05, 40)                                    # no drift out of range
    assert not torch.equal(many, passes(ops.sinkhorn_pass, x, 0.05, 40))
    assert torch.equal(ops.sinkhorn(large, 0.05, 2), passes(ops.sinkhorn_pass, large, 0.05, 2))


@on_devices
@pytest.mark.parametrize("n, K", [(32, 48), (20, 257)])
def test_extreme_logits(n, K, device):
    """+-60 at temperature 0.04 span 3000 nats: rows whose sums leave float32 are done again with a shift."""
    x = (normal(n, K, seed=1, device=device) * 30).clamp(-60, 60)
    exact, ours = passes(exact_pass, x, 0.04), passes(ops.sinkhorn_pass, x, 0.04)
    assert ours.isfinite().all() and (ours - exact).abs().max() < 1e-3  # measured: 1.8e-4, of values up to 1500
    q = ops.sinkhorn_targets(x, 0.04, ours)
    assert torch.allclose(q.double(), (x.double() / 0.04 + exact).softmax(-1), atol=3e-4)     # measured: 6e-5


def test_subnormal_numbers_stay_what_they_are():
    """The kernels take them for zero, for speed; what the caller computes afterwards must not."""
    ops.sinkhorn_targets(normal(40, 2000), 0.01, torch.zeros(2000))
    assert (torch.full((4,), 2e-38) / 4 > 0).all()


@on_devices
def test_rows_far_below_all_others(device):
    """No column has its largest logit in row 3: its sum over scaled columns underflows without a shift."""
    x = normal(8, 40, device=device)
    x[3] -= 50
    exact, ours = passes(exact_pass, x, 0.05), passes(ops.sinkhorn_pass, x, 0.05)
    assert (ours - exact).abs().max() < 1e-4
    q = ops.sinkhorn_targets(x, 0.05, ours)
    assert torch.allclose(q.double(), (x.double() / 0.05 + exact).softmax(-1), atol=1e-4)


@on_devices
def test_no_rows(device):
    x = torch.zeros(0, 9, device=device)
    assert (ops.sinkhorn_pass(x, 0.1) == -math.inf).all()
    assert (ops.sinkhorn_pass(x, 0.1, torch.zeros(9, device=device)) == -math.inf).all()
    assert (ops.sinkhorn(x, 0.1, 1) == math.inf).all()
    assert ops.sinkhorn(torch.zeros(3, 9, device=device), 0.1, 0) is None
    assert ops.sinkhorn_targets(x, 0.1, torch.zeros(9, device=device)).shape == (0, 9)


@on_devices
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad, device):
    """A run that went wrong must be noticed, not smoothed over."""
    x = normal(9, 40, device=device)
    x[4, 7] = bad
    assert not ops.sinkhorn_pass(x, 0.1).isfinite()[7]
    assert ops.sinkhorn_targets(x, 0.1, passes(ops.sinkhorn_pass, x, 0.1)).isnan().any()

# --------------------------------------------------------------------------------
# The cross-entropies


def exact_loss(student, teacher, log_u, weights, pairs, student_temp, teacher_temp):
    q = (teacher.double() / teacher_temp + log_u.double()).softmax(-1)
    log_p = (student / student_temp).log_softmax(-1)
    return -torch.einsum("st,b,tbk,sbk->s", pairs.double(), weights.double(), q, log_p)


def loss_arguments(S, T, B, K, dtype, device):
    pairs = torch.ones(S, T, device=device)
    pairs[:2].fill_diagonal_(0 if T > 1 else 1)
    weights = torch.rand(B, generator=torch.Generator().manual_seed(3)).to(device)
    student, teacher = (normal(n, B, K, seed=i, device=device).to(dtype) for i, n in enumerate((S, T)))
    return student, teacher, normal(K, seed=9, device=device), weights, pairs, 0.1, 0.05


SHAPES = [(1, 1, 1, 5), (1, 1, 37, 1003), (5, 2, 3, 64), (2, 1, 2, 33), (4, 3, 2, 17), (3, 2, 2, 20_001)]


@on_devices
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("S, T, B, K", SHAPES)
def test_losses_and_gradients_are_those_of_float64(S, T, B, K, dtype, overwrite, device):
    student, *rest = loss_arguments(S, T, B, K, dtype, device)
    by = normal(S, seed=4, device=device)                               # what the losses are weighted with afterwards
    x = student.double().requires_grad_()
    exact = exact_loss(x, *rest)
    exact.backward(by.double())
    leaf = student.clone().requires_grad_()
    losses = ops.assignment_loss(leaf * 1, *rest, factors=by if overwrite else None)
    losses.backward(by)
    assert losses.dtype == torch.float32 and leaf.grad.dtype == dtype
    assert torch.allclose(losses.double(), exact, rtol=3e-6, atol=1e-6)  # measured: 4e-7 relative
    rounding = {torch.float32: 3e-6, torch.bfloat16: 2 ** -7, torch.float16: 2 ** -10}[dtype]  # two of half precision
    largest = x.grad.abs().amax(-1, keepdim=True)
    over = (leaf.grad - x.grad).abs() - rounding * x.grad.abs() - 3e-6 * largest
    assert over.max() < 1e-7 if over.numel() else True


@on_devices
def test_overwriting_is_noticed_by_autograd(kernels, device):
    student, *rest = loss_arguments(1, 1, 3, 40, torch.float32, device)
    x, factors = student.requires_grad_() * 1, torch.tensor([0.3], device=device)
    also = x.exp().sum() + (x * x).sum()                                # needs x as it was
    loss = ops.assignment_loss(x, *rest, factors=factors) @ factors
    if ops.BUILT and kernels == "auto":
        with pytest.raises(RuntimeError, match="inplace"):
            (loss + also).backward()
        loss = ops.assignment_loss(student * 1, *rest, factors=factors) @ factors
        loss.backward(retain_graph=True)
        with pytest.raises(ValueError, match="second backward"):
            loss.backward()
    before = student.detach().clone()                                   # a leaf is never overwritten
    (ops.assignment_loss(student, *rest, factors=factors) @ factors).backward()
    assert torch.equal(student, before) and student.grad is not None


@needs_build
def test_other_factors_than_those_given_are_noticed(kernels):
    """The gradient was computed with them already: another one would be wrong without a word."""
    if kernels == "off":
        pytest.skip("the definition takes none")
    student, *rest = loss_arguments(3, 2, 2, 40, torch.float32, "cpu")
    losses = ops.assignment_loss(student.requires_grad_() * 1, *rest, factors=torch.tensor([0.3, 0.3, 0.5]))
    with pytest.raises(RuntimeError, match="the losses were not multiplied with their factors"):
        losses.sum().backward()
    student.grad = None
    factors = torch.tensor([0.3, 0.3, 0.5])
    losses = ops.assignment_loss(student * 1, *rest, factors=factors)
    losses.backward(factors * torch.tensor([1, math.nan, 1]))           # a gradient that is not finite stays so
    assert student.grad[1].isnan().any() and student.grad[[0, 2]].isfinite().all()


@on_devices
def test_no_images(device):
    student, *rest = loss_arguments(2, 1, 0, 8, torch.float32, device)
    losses = ops.assignment_loss(student.requires_grad_(), *rest)
    losses.sum().backward()
    assert losses.tolist() == [0, 0] and student.grad.shape == (2, 0, 8)


@on_devices
def test_mixed_dtypes_and_strides_are_taken(device):
    student, teacher, *rest = loss_arguments(2, 2, 3, 40, torch.float32, device)
    exact = ops.assignment_loss(student, teacher, *rest)
    strided = torch.empty(3, 2, 40, device=device).transpose(0, 1).copy_(student)
    assert torch.equal(ops.assignment_loss(strided, teacher, *rest), exact)
    half = teacher.bfloat16()
    assert torch.equal(ops.assignment_loss(student, half, *rest), ops.assignment_loss(student, half.float(), *rest))

# --------------------------------------------------------------------------------
# What must not change a bit: threads, autocast, compilation


def everything(x):
    """All ops of one tensor, one after another; float32 results."""
    log_u = passes(ops.sinkhorn_pass, x.detach(), 0.06) + ops.sinkhorn(x.detach(), 0.06, 3)
    q = ops.sinkhorn_targets(x.detach(), 0.06, log_u)
    teacher, weights = x.detach().flip(0)[None], q[:, 0].contiguous()
    losses = ops.assignment_loss(x[None], teacher, log_u, weights, torch.ones(1, 1), 0.1, 0.06)
    return log_u, q, losses


@needs_build
def test_threads_and_repetition_change_no_bit(kernels):
    if kernels == "off":
        pytest.skip("PyTorch promises nothing of the kind")
    x, found = normal(67, 2003).bfloat16(), []
    for threads in (1, 2, 3, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        out = everything(leaf)
        out[2].sum().backward()
        found.append([*out, leaf.grad])
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_compiles_without_a_break():
    x = normal(9, 40)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for ours, exact in zip(compiled(a), everything(b), strict=True):
        torch.testing.assert_close(ours, exact)
    compiled(a)[2].sum().backward()
    everything(b)[2].sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
