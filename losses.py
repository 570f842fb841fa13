"""
The DINOv3 losses. Each is one function of tensors; none holds state or changes its inputs.

    sinkhorn_knopp   teacher logits -> balanced soft assignments            DINOv3 §3.2; SwAV (Caron et al. 2020)
    dino_loss        class tokens agree across crops                        DINOv3 §3.2, eq. 1
    ibot_loss        masked patches agree with what the teacher sees        DINOv3 §3.2, eq. 1
    koleo_loss       class tokens spread evenly over the sphere             DINOv3 §3.2, eq. 1
    gram_loss        patches keep the similarities of an earlier teacher    DINOv3 §4.2, eq. 2

All arithmetic is float32 whatever comes in. `group` is a torch.distributed process group, or None for one process:
where the paper sums over all ranks, so do we. Dimension letters: see the top of model.py.
"""

from dataclasses import dataclass, replace
from functools import cache, wraps

import torch
import torch.distributed as dist
import torch.nn.functional as F

import ops


def float32(loss):
    """Keeps autocast out: it would run the matrix products below in bfloat16."""
    @wraps(loss)
    def inside(x, *args, **kwargs):
        if not torch.is_autocast_enabled(x.device.type):
            return loss(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return loss(x, *args, **kwargs)
    return inside

# --------------------------------------------------------------------------------
# Targets


@dataclass(frozen=True)
class Assignments:
    """The teacher's soft assignments, not written out: softmax over k of logits / temperature + log_u."""
    logits: torch.Tensor       # ... K, any float dtype
    log_u: torch.Tensor        # K float32, of sinkhorn_knopp
    temperature: float

    @property
    def shape(self):
        return self.logits.shape

    def unflatten(self, dim, sizes):
        return replace(self, logits=self.logits.unflatten(dim, sizes))

    def written(self, dtype=torch.float32):
        """As a tensor, ... K."""
        return ops.sinkhorn_targets(self.logits, self.temperature, self.log_u, dtype)


def sinkhorn_knopp(logits, temperature, n_iterations=3, group=None):
    """
    Soft assignments in which every prototype gets the same mass, as far as `n_iterations` reach.

        Q = exp(logits / temperature); repeat: each column of all ranks' rows sums to 1/K, then each row to 1/n
        which is  Q = softmax over k of (logits / temperature + log u)

    logits       n K, any float dtype; n may differ between ranks, and be 0
    temperature  of the teacher, 0.04 to 0.07
    n_iterations 0 = the softmax alone
    returns      n K float32, rows sum to 1

    paper:       DINOv3 §3.2; SwAV for the algorithm
    """
    return assignments(logits, temperature, n_iterations, group).written()


def assignments(logits, temperature, n_iterations=3, group=None):
    """sinkhorn_knopp before it is written out."""
    return balanced([logits], temperature, n_iterations, group)[0]


@torch.no_grad()
def balanced(parts, temperature, n_iterations=3, group=None):
    """
    The assignments of n K logits in parts, balanced over all of them: the row scaling cancels in the softmax, and so do
    K and n.

        log v_b = -log sum_k exp(logits_bk / temperature + log u_k)   over a row, on one rank;  v = 1 at first
        log u_k = -log sum_b exp(logits_bk / temperature + log v_b)   over the rows of all ranks

    Logarithms throughout: logits of +-60 at temperature 0.04 span 3000 nats, float32 alone holds 176.
    """
    with torch.autocast(parts[0].device.type, enabled=False):
        log_u = ops.sinkhorn(parts[0], temperature, n_iterations) if group is None and len(parts) == 1 else None
        for _ in range(n_iterations if log_u is None else 0):
            here = [ops.sinkhorn_pass(logits, temperature, log_u) for logits in parts]                # of K
            here = here[0] if len(here) == 1 else torch.stack(here).logsumexp(0)
            log_u = -all_logsumexp(here, group, log_u)
    if log_u is None:
        log_u = torch.zeros(parts[0].shape[-1], device=parts[0].device)
    return [Assignments(logits.detach(), log_u, temperature) for logits in parts]


def all_logsumexp(x, group, log_u=None):
    """log of the sum over ranks of exp(x), elementwise.    x  K float32    log_u  known to lie near minus the result"""
    if group is None:
        return x
    top = x.clone() if log_u is None else -log_u
    if log_u is None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
    total = (x - top).exp()
    dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return total.log() + top

# --------------------------------------------------------------------------------
# Cross-entropies


def dino_loss(student_logits, targets, temperature=0.1, ignore_diagonal=False):
    """
    Mean cross-entropy between every student crop and every teacher crop of the same image.

        for s in student crops: for t in teacher crops: unless ignore_diagonal and s == t:
            for b: loss -= sum_k targets[t,b,k] log_softmax(student_logits[s,b] / temperature)[k]
        loss /= number of (s, t, b)

    student_logits   S B K, any float dtype (S crops)
    targets          T B K float32, rows sum to 1 (T crops); or the Assignments of T B K
    ignore_diagonal  leave out pairs of a crop with itself: both lists are the same global crops
    returns          0-dim float32, nats, ln K for a uniform student;  raises ValueError if the shapes do not fit

    paper:           DINOv3 §3.2, eq. 1
    """
    n_global = len(student_logits) if ignore_diagonal else 0
    return dino_losses(student_logits, targets, n_global, temperature)[0 if ignore_diagonal else 1]


def dino_losses(student_logits, targets, n_global, temperature=0.1, factors=None):
    """
    dino_loss of the first n_global crops, without the diagonal, and of the others, in one pass; None for no crops.

    factors  what the two will be multiplied with in the sum of all losses: student_logits then become their gradient at
             once (ops.assignment_loss), and nothing else may read them
    """
    if student_logits.shape[1:] != targets.shape[1:]:
        raise ValueError(f"dino_loss: student_logits are {tuple(student_logits.shape)} but targets are "
                         f"{tuple(targets.shape)}; both need the same images and prototypes")
    S, (T, B) = len(student_logits), targets.shape[:2]
    n_pairs = n_global * T - min(n_global, T), (S - n_global) * T
    if not sum(n_pairs) * B:
        raise ValueError(f"dino_loss: {S} student and {T} teacher crops of {B} images leave no pair to compare")
    pairs, weights, each = dino_weights(S, T, B, n_global, factors, student_logits.device)
    each = cross_entropy(student_logits, targets, weights, pairs, temperature, each)                            # S
    return [part.sum() if len(part) else None for part in (each[:n_global], each[n_global:])]


@cache
def constant(values, device):
    """values, numbers in tuples, as a float32 tensor that is made once: a copy to a GPU makes the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(values).to(device)


@cache
def dino_weights(S, T, B, n_global, factors, device):
    """What ops.assignment_loss wants: pairs  S T, weights  B, factors  S or None; on the device, made once."""
    n_pairs = n_global * T - min(n_global, T), (S - n_global) * T
    pairs = [[(s != t) / n_pairs[0] for t in range(T)] for s in range(n_global)]
    pairs += [[1 / n_pairs[1]] * T for _ in range(S - n_global)]
    each = [factors[0]] * n_global + [factors[1]] * (S - n_global) if factors else [0]
    return (constant(tuple(map(tuple, pairs)), device), constant((1 / B,) * B, device),
            constant(tuple(each), device) if all(each) else None)


@float32
def cross_entropy(student_logits, targets, weights, pairs, temperature, factors):
    """Of each student crop, S float32; see ops.cross_entropies.    targets  T B K, a tensor or Assignments"""
    if isinstance(targets, Assignments):
        return ops.assignment_loss(student_logits, targets.logits, targets.log_u, weights, pairs, temperature,
                                   targets.temperature, factors)
    return ops.cross_entropies(student_logits, targets.float(), weights, pairs, temperature)


def ibot_loss(student_logits, targets, weights, n_images, temperature=0.1, factor=None):
    """
    Cross-entropy at the masked patches, each image's patches weighing 1 together.

        loss = sum over m of weights[m] (-sum_k targets[m,k] log_softmax(student_logits[m] / temperature)[k]) / n_images

    student_logits  M K, any float dtype: the student saw the mask token there
    targets         M K float32: the teacher saw the patch; or their Assignments
    weights         M, 1 / (masked patches of the same image)
    n_images        global crops on this rank, masked or not
    factor          what the loss will be multiplied with, as the factors of dino_losses
    returns         0-dim float32, nats; 0 when M is 0;  raises ValueError if the shapes do not fit

    paper:          DINOv3 §3.2, eq. 1
    differs:        from the mean over masked images of iBOT: like the released code, unmasked images count as zeros
    """
    if student_logits.shape != targets.shape or len(weights) != len(student_logits):
        raise ValueError(f"ibot_loss: student_logits are {tuple(student_logits.shape)}, targets "
                         f"{tuple(targets.shape)}, weights {tuple(weights.shape)}; want a row per masked patch")
    weights, device = weights.float() / n_images, student_logits.device
    factors = constant((factor,), device) if factor else None
    return cross_entropy(student_logits[None], targets.unflatten(0, (1, len(weights))), weights,
                         constant(((1.0,),), device), temperature, factors)[0]

# --------------------------------------------------------------------------------
# Regularisers of features


@float32
def koleo_loss(cls, group=None, group_size=0):
    """
    Minus the mean log distance of each class token to its nearest neighbour, on the unit sphere (Kozachenko-Leonenko).

        for b in a set of samples: loss -= log(min over c != b of |cls_b / |cls_b| - cls_c / |cls_c|| + 1e-8)

    cls         B D of one global crop, any float dtype
    group_size  samples of a set: consecutive in the global batch (rank 0's rows first); 0 = this rank's batch
    returns     0-dim float32, the mean over this rank's samples; 0 where a sample has no other
    raises      ValueError if the global batch is not a whole number of sets

    paper:      DINOv3 §3.2: sets of 16 samples, possibly across ranks
    """
    B = len(cls)
    x = F.normalize(cls.float(), dim=-1, eps=1e-8)                                # B D
    size = group_size or B
    if size < 2:
        return x.sum() * 0
    if B % size and group is not None:  # a set spans ranks
        first, x = dist.get_rank(group) * B, GatherRows.apply(x, group)           # (S B) D
    else:
        first = 0
    if len(x) % size:
        raise ValueError(f"koleo_loss: {len(x)} samples are not a whole number of sets of {size}")
    sets = x.unflatten(0, (-1, size))                                             # sets size D
    with torch.no_grad():
        dots = sets @ sets.mT                                                     # sets size size
        dots.diagonal(dim1=1, dim2=2).fill_(-2)                                   # below any cosine
        nearest = dots.argmax(-1, keepdim=True) == torch.arange(size, device=x.device)
    others = nearest.to(x) @ sets                                                 # a gather's gradient has no order
    distance = (sets - others).norm(dim=-1)                                       # sets size; duplicates: gradient 0
    return -(distance + 1e-8).log().flatten()[first : first + B].mean()


class GatherRows(torch.autograd.Function):
    """Rows of all ranks, in the order of ranks; a row's gradient is the sum of what all ranks make of it."""
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


@float32
def gram_loss(student, teacher):
    """
    Mean squared difference of the two patch-similarity matrices of each image.

        s, t = student, teacher, each patch scaled to unit length
        loss = mean over b, i, j of (s[b,i] . s[b,j] - t[b,i] . t[b,j])^2

    student  B P D, any float dtype
    teacher  B P D, no gradient; already resampled to the student's patch grid (§4.3); D may be another
    returns  0-dim float32, squared cosine, in [0, 4];  raises ValueError if images or patches differ in number

    paper:   DINOv3 §4.2, eq. 2
    differs: eq. 2 sums over i, j; we average, like the released code, so one weight serves every resolution
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"gram_loss: student is {tuple(student.shape)} but teacher is {tuple(teacher.shape)}; "
                         "resample the teacher's patches to the student's grid")
    return GramDifference.apply(student, teacher.detach()) / (len(student) * student.shape[1] ** 2)


SIMILARITIES = 2 ** 20  # at once: of one image, or of as many as are fewer


class GramDifference(torch.autograd.Function):
    """
    sum over images of |E|^2,  E = s s^T - t t^T;  of s the gradient is 4 E s. Each image's E is made, used and left
    behind, and once more in the backward pass: it takes no more memory for many images, and E, which is symmetric,
    is multiplied once there, where autograd would do so twice.
    """
    @staticmethod
    def forward(ctx, student, teacher):
        ctx.save_for_backward(student, teacher)
        return sum(E.square().sum() for *_, E in differences(student, teacher))

    @staticmethod
    def backward(ctx, grad):
        student, teacher = ctx.saved_tensors
        out = torch.empty_like(student)
        parts = out.split(images_at_once(student))
        for part, (s, norm, E) in zip(parts, differences(student, teacher), strict=True):
            along = E.mul_(4 * grad) @ s                                          # b P D
            part.copy_(along.addcmul_(s, (s * along).sum(-1, keepdim=True), value=-1).div_(norm))  # across s alone
        return out, None


def images_at_once(x):
    """x  B P D"""
    return max(SIMILARITIES // max(x.shape[1], 1) ** 2, 1)


def differences(student, teacher):
    """For each few images: s  b P D, of unit length; what it was divided by  b P 1; E  b P P; all float32."""
    n = images_at_once(student)
    for s, t in zip(student.split(n), teacher.split(n), strict=True):
        norm = s.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
        s, t = s.float() / norm, F.normalize(t.float(), dim=-1)
        yield s, norm, (s @ s.mT).baddbmm_(t, t.mT, alpha=-1)
