"""
losses.py against its equations, written out by hand in float64 loops that share no code with it; what half precision,
autocast and two ranks must not change; edges and errors.
"""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import ops
from losses import dino_loss, gram_loss, ibot_loss, koleo_loss, sinkhorn_knopp

# --------------------------------------------------------------------------------
# By hand


def sinkhorn_by_hand(x, temperature, n_iterations=3):
    """As SwAV writes it; overflows float64 above logit 28 at temperature 0.04."""
    Q = np.exp(x / temperature)
    n, K = Q.shape
    for _ in range(n_iterations):
        for k in range(K):
            Q[:, k] /= Q[:, k].sum() * K
        for b in range(n):
            Q[b] /= Q[b].sum() * n
    return Q * n


def log_sinkhorn_by_hand(x, temperature, n_iterations=3):
    """The same on logarithms."""
    Q = x / temperature
    for _ in range(n_iterations):
        Q = Q - np.logaddexp.reduce(Q, axis=0, keepdims=True)
        Q = Q - np.logaddexp.reduce(Q, axis=1, keepdims=True)
    return np.exp(Q)


def cross_entropy(target, logits, temperature):
    exps = [math.exp(z / temperature) for z in logits]
    return -sum(t * math.log(e / sum(exps)) for t, e in zip(target, exps, strict=True))


def dino_by_hand(logits, targets, skip=False):
    terms = [cross_entropy(targets[t, b], logits[s, b], 0.1)
             for s in range(len(logits)) for t in range(len(targets)) if not (skip and s == t)
             for b in range(logits.shape[1])]
    return sum(terms) / len(terms)


def ibot_by_hand(logits, targets, images, n_images):
    """images  the image of each masked patch"""
    total = 0.0
    for i in set(images):
        own = [m for m, image in enumerate(images) if image == i]
        total += sum(cross_entropy(targets[m], logits[m], 0.1) for m in own) / len(own)
    return total / n_images


def koleo_by_hand(cls, size, rows=slice(None)):
    unit, terms = [v / np.sqrt((v * v).sum()) for v in cls], []
    for b in range(len(cls)):
        others = [c for c in range(b // size * size, (b // size + 1) * size) if c != b]
        terms.append(-math.log(min(np.sqrt(((unit[b] - unit[c]) ** 2).sum()) for c in others) + 1e-8))
    return np.mean(terms[rows])


def gram_by_hand(student, teacher):
    total, count = 0.0, 0
    for s, t in zip(student, teacher, strict=True):  # P D each
        s = s / np.sqrt((s * s).sum(1, keepdims=True))
        t = t / np.sqrt((t * t).sum(1, keepdims=True))
        for i in range(len(s)):
            for j in range(len(s)):
                total += (s[i] @ s[j] - t[i] @ t[j]) ** 2
                count += 1
    return total / count

# --------------------------------------------------------------------------------
# Every loss: the equation, its gradient, and what dtypes must not change


def arrays(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def assignments(*shape):
    p = np.random.default_rng(9).random(shape)
    return p / p.sum(-1, keepdims=True)


IMAGES = [0, 0, 0, 2, 2, 3]  # of 6 masked patches; image 1 has none
WEIGHTS = torch.tensor([1 / IMAGES.count(i) for i in IMAGES])
T2, T3, TM, GRAM = assignments(2, 3, 7), assignments(3, 3, 7), assignments(6, 7), arrays(2, 5, 6, seed=5)
CASES = {  # the loss of a tensor, the same by hand of an array, where to evaluate them
    "dino": (lambda x: dino_loss(x, torch.tensor(T2)), lambda x: dino_by_hand(x, T2), arrays(4, 3, 7)),
    "dino, other crops": (lambda x: dino_loss(x, torch.tensor(T3), ignore_diagonal=True),
                          lambda x: dino_by_hand(x, T3, skip=True), arrays(3, 3, 7)),
    "dino, more targets": (lambda x: dino_loss(x, torch.tensor(T3), ignore_diagonal=True),
                           lambda x: dino_by_hand(x, T3, skip=True), arrays(2, 3, 7)),
    "ibot": (lambda x: ibot_loss(x, torch.tensor(TM), WEIGHTS, 4),
             lambda x: ibot_by_hand(x, TM, IMAGES, 4), arrays(6, 7)),
    "koleo": (koleo_loss, lambda x: koleo_by_hand(x, 12), arrays(12, 5)),
    "koleo in sets": (lambda x: koleo_loss(x, group_size=4), lambda x: koleo_by_hand(x, 4), arrays(12, 5)),
    "gram": (lambda x: gram_loss(x, torch.tensor(GRAM)), lambda x: gram_by_hand(x, GRAM), arrays(2, 5, 6)),
}
every_loss = pytest.mark.parametrize("loss, by_hand, x", CASES.values(), ids=CASES)


@every_loss
def test_equation(loss, by_hand, x):
    ours = loss(torch.tensor(x))
    assert ours.dtype == torch.float32 and ours.ndim == 0
    assert ours.item() == pytest.approx(by_hand(x), rel=2e-6)  # measured: 3.3e-7 at most


@every_loss
def test_gradient(loss, by_hand, x):
    """Along random directions, against central differences of the equation in float64."""
    at = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    loss(at).backward()
    for seed in range(5):
        d = arrays(*x.shape, seed=100 + seed)
        slope = (by_hand(x + 1e-6 * d) - by_hand(x - 1e-6 * d)) / 2e-6
        assert (at.grad.numpy() * d).sum() == pytest.approx(slope, rel=1e-4, abs=1e-6)  # measured: 1.9e-5 at most


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_change_nothing(loss, by_hand, x, dtype):
    x = torch.tensor(x).to(dtype).requires_grad_()
    before, exact = x.detach().clone(), loss(x.detach().float())
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss(x)
    ours.backward()
    assert ours.dtype == torch.float32 and torch.equal(ours, exact)
    assert torch.equal(x, before) and x.grad.dtype == dtype and x.grad.isfinite().all()

# --------------------------------------------------------------------------------
# Sinkhorn-Knopp


@pytest.mark.parametrize("n, K, n_iterations", [(1, 4, 3), (2, 9, 1), (16, 5, 3), (7, 33, 8)])
def test_sinkhorn_is_alternate_normalisation(n, K, n_iterations):
    x = arrays(n, K)
    ours = sinkhorn_knopp(torch.tensor(x), 0.07, n_iterations)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours, sinkhorn_by_hand(x, 0.07, n_iterations), rtol=2e-5, atol=1e-8)  # measured: 3.2e-6
    np.testing.assert_allclose(ours.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_sinkhorn_without_iterations_is_the_softmax(kernels):
    """That it is centred by nothing is what makes tests/sick_runs.py's first run collapse."""
    x = torch.tensor(arrays(7, 33), dtype=torch.float32)
    ops.use_kernels(kernels)
    try:
        ours = sinkhorn_knopp(x, 0.07, n_iterations=0)
    finally:
        ops.use_kernels("auto")
    torch.testing.assert_close(ours, (x / 0.07).softmax(1), rtol=2e-6, atol=1e-9)


def test_sinkhorn_balances_prototypes():
    ours = sinkhorn_knopp(torch.tensor(arrays(24, 6) + 3 * arrays(6)), 0.5, n_iterations=50)
    np.testing.assert_allclose(ours.sum(0), 24 / 6, rtol=1e-4)


def test_sinkhorn_of_extreme_logits():
    """+-60 at temperature 0.04: 3000 nats, of which the direct form holds 700 even in float64."""
    x = np.random.default_rng(0).uniform(-60, 60, (32, 48)).astype(np.float32)
    ours, exact = sinkhorn_knopp(torch.tensor(x), 0.04), log_sinkhorn_by_hand(x.astype(np.float64), 0.04)
    assert ours.isfinite().all()
    np.testing.assert_allclose(ours.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(ours, exact, atol=1e-4)  # measured: 1.2e-6; 2.8e-5 with other seeds
    mild = arrays(8, 6)
    np.testing.assert_allclose(log_sinkhorn_by_hand(mild, 0.1), sinkhorn_by_hand(mild, 0.1), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sinkhorn_leaves_its_input_and_takes_any_dtype(dtype):
    x = torch.tensor(arrays(6, 8)).to(dtype).requires_grad_()
    before, exact = x.detach().clone(), sinkhorn_knopp(x.detach().float(), 0.04)
    with torch.autocast("cpu", torch.bfloat16):
        ours = sinkhorn_knopp(x, 0.04)
    assert torch.equal(ours, exact) and ours.dtype == torch.float32 and not ours.requires_grad
    assert torch.equal(x, before)
    assert sinkhorn_knopp(x[:0], 0.04).shape == (0, 8)

# --------------------------------------------------------------------------------
# Edges, and what each loss promises


def test_uniform_student_costs_log_k():
    for ignore in (False, True):
        loss = dino_loss(torch.full((2, 3, 7), 5.0), torch.tensor(T2), ignore_diagonal=ignore)
        assert loss.item() == pytest.approx(math.log(7), abs=1e-6)


def test_ibot_without_masked_patches_is_zero():
    logits = torch.zeros(0, 7, requires_grad=True)
    loss = ibot_loss(logits, torch.zeros(0, 7), torch.zeros(0), 4)
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 7)


def test_ibot_images_weigh_the_same():
    """Repeating the patches of one image, each at a smaller weight, changes nothing; an unmasked image counts as 0."""
    x, targets = torch.tensor(arrays(2, 7)), torch.tensor(assignments(2, 7))
    once = ibot_loss(x, targets, torch.ones(2), 2)
    twice = ibot_loss(x[[0, 0, 1]], targets[[0, 0, 1]], torch.tensor([0.5, 0.5, 1]), 2)
    assert twice.item() == pytest.approx(once.item(), rel=1e-6)
    assert ibot_loss(x, targets, torch.ones(2), 4).item() == pytest.approx(once.item() / 2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_koleo_of_duplicates_is_finite(dtype):
    x = torch.tensor(arrays(4, 6))[[0, 1, 1, 2]].to(dtype).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert 5 < loss.item() < -math.log(1e-8) and x.grad.isfinite().all()


def test_koleo_adds_gradients_in_one_order():
    """Many samples may have the same neighbour: what gathers rows would add theirs in any order on a GPU."""
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.add(op._schema.name)
            return op(*args, **kwargs or {})
    x, seen = torch.tensor(arrays(12, 5), requires_grad=True), set()
    loss = koleo_loss(x, group_size=4)
    with Log():
        loss.backward()
    assert "aten::bmm" in seen and not [name for name in seen if "scatter" in name or "index" in name]


@pytest.mark.parametrize("group_size, rows", [(0, 1), (1, 3)])
def test_koleo_of_a_sample_alone_is_zero(group_size, rows):
    x = torch.tensor(arrays(rows, 6), requires_grad=True)
    loss = koleo_loss(x, group_size=group_size)
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()


def test_gram_ignores_rotation_and_length_and_spares_the_teacher():
    """Features are free to move as long as their similarities stay (paper, below eq. 2)."""
    x, turn = torch.tensor(arrays(2, 9, 8)), torch.linalg.qr(torch.tensor(arrays(8, 8, seed=1))).Q
    assert gram_loss(x, 3 * x @ turn).item() < 1e-12                                    # measured: 4e-15
    student, teacher = torch.randn(2, 1, 3, 4).requires_grad_().unbind(0)
    assert torch.autograd.grad(gram_loss(student, teacher), teacher, allow_unused=True) == (None,)


@pytest.mark.parametrize("B, P, D, other", [(5, 7, 3, 3), (1, 1, 4, 4), (3, 9, 4, 6), (2, 20, 8, 5)])
def test_gram_in_parts_is_equation_2_with_its_gradient(B, P, D, other, monkeypatch):
    """beside autograd of the definition in float64; parts of several images, of one, and the last one short"""
    x, teacher = torch.tensor(arrays(B, P, D)), torch.tensor(arrays(B, P, other, seed=1))
    exact = x.detach().double().requires_grad_()
    s, t = (F.normalize(each.double(), dim=-1) for each in (exact, teacher))
    loss = (s @ s.mT - t @ t.mT).square().mean()
    loss.backward()
    for held in 1, 2 * P * P, 2 ** 20:
        monkeypatch.setattr(losses, "SIMILARITIES", held)
        ours = x.detach().float().clone().requires_grad_()
        (3 * gram_loss(ours, teacher)).backward()
        assert gram_loss(ours, teacher).item() == pytest.approx(loss.item(), rel=2e-6)       # measured: 1.4e-7
        apart = (ours.grad / 3 - exact.grad).abs().max() / exact.grad.abs().max().clamp(min=1e-12)
        assert apart < 3e-6 or P == 1 and ours.grad.abs().max() < 1e-6                       # measured: 2.2e-7


def test_gram_holds_the_similarities_of_few_images(monkeypatch):
    """forward and backward, whatever the number of images: no tensor has more numbers than the input, or than some E"""
    monkeypatch.setattr(losses, "SIMILARITIES", 5000)
    B, P, D = 40, 30, 4
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(x.untyped_storage().nbytes() for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out
    x, teacher = torch.tensor(arrays(B, P, D)).float().requires_grad_(), torch.tensor(arrays(B, P, D, seed=1))
    with Watch():
        gram_loss(x, teacher.float()).backward()
    assert max(largest) == max(4 * 5 * P * P, 4 * B * P * D) < 4 * B * P * P


def test_gram_of_no_similarity_at_all_is_finite():
    student = torch.zeros(2, 3, 4, requires_grad=True)
    loss = gram_loss(student, torch.ones(2, 3, 4))
    loss.backward()
    assert loss.item() == 1 and student.grad.isfinite().all()


@pytest.mark.parametrize("call, says", [
    (lambda: dino_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)), r"dino_loss.*\(2, 3, 4\).*\(2, 3, 5\)"),
    (lambda: dino_loss(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), ignore_diagonal=True), "dino_loss.*no pair"),
    (lambda: ibot_loss(torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(3), 1), r"ibot_loss.*\(3, 4\).*\(2, 4\)"),
    (lambda: ibot_loss(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2), 1), r"ibot_loss.*weights \(2,\)"),
    (lambda: koleo_loss(torch.zeros(6, 4), group_size=4), "koleo_loss: 6 samples.*sets of 4"),
    (lambda: gram_loss(torch.zeros(1, 4, 8), torch.zeros(1, 16, 8)), "gram_loss.*resample"),
])
def test_bad_shapes_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()

# --------------------------------------------------------------------------------
# Two ranks


LOGITS, CLS = 3 * arrays(7, 5).astype(np.float32), arrays(12, 5).astype(np.float32)  # exp(x / 0.04) leaves float32
SPLITS, SIZES = (5, 7), (4, 12, 3, 0)                                               # rows on rank 0; sets of koleo


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    group, out = dist.group.WORLD, {}
    for rows in SPLITS:
        out["sinkhorn", rows] = sinkhorn_knopp(torch.tensor(np.split(LOGITS, [rows])[rank]), 0.04, group=group)
    for size in SIZES:
        x = torch.tensor(np.split(CLS, 2)[rank], requires_grad=True)
        loss = koleo_loss(x, group, size)
        loss.backward()
        out["koleo", size] = loss.item(), x.grad
    with pytest.raises(ValueError, match="12 samples.*sets of 5"):
        koleo_loss(x, group, 5)
    torch.save(out, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (folder,), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.parametrize("rows", SPLITS)
def test_sinkhorn_of_two_ranks_is_that_of_the_joined_batch(ranks, rows):
    parts = [rank["sinkhorn", rows] for rank in ranks]
    assert [len(part) for part in parts] == [rows, 7 - rows]
    np.testing.assert_allclose(torch.cat(parts), log_sinkhorn_by_hand(LOGITS.astype(float), 0.04), atol=1e-5)  # 4.2e-7


@pytest.mark.parametrize("size", SIZES)
def test_koleo_of_two_ranks_is_that_of_the_joined_batch(ranks, size):
    """Value: each rank's rows in the joined batch. Gradient: over the number of ranks, as averaging it would."""
    x, (values, grads) = torch.tensor(CLS, requires_grad=True), zip(*(r["koleo", size] for r in ranks), strict=True)
    koleo_loss(x, group_size=size or 6).backward()
    by_hand = [koleo_by_hand(CLS.astype(float), size or 6, rows) for rows in (slice(0, 6), slice(6, 12))]
    assert list(values) == pytest.approx(by_hand, abs=1e-6)                      # measured: 5.9e-8
    np.testing.assert_allclose(torch.cat(grads) / 2, x.grad, atol=1e-6)
