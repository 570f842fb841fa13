"""No step of the trainer makes the host wait for the device: what would is counted, on a CPU, op by op."""

from collections import Counter

import pytest
import torch
from test_train import MICRO
from torch.utils._python_dispatch import TorchDispatchMode

import recipes
import train
from data import Batches, colour_batch
from engine.interrupt import Interrupt, Verdicts
from engine.ranks import Ranks
from model import to_device

ALONE = Ranks(0, 1, torch.device("cpu"), None)
# what copies from or to the host at once, or has a shape that only the device knows
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "is_nonzero", "equal", "bincount",
         "lift_fresh", "repeat_interleave"}


class Count(TorchDispatchMode):
    """Ops that would wait; indexing by a bool tensor asks for its nonzero."""
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else []
        by_bool = any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in indices)
        if name in WAITS and not (name == "repeat_interleave" and "self_int" in func.name()) or by_bool:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def prepare(words, tmp_path):
    c = recipes.configure([*MICRO, *words, "--out", str(tmp_path / "out")])
    source = train.open_source(c.data, c.n_shapes, c.seed)
    batches = Batches(c, source, 0, c.batch, train.partial(train.draw_noise, c, c.batch))
    student, teacher = (train.build_networks(c, ALONE) for _ in range(2))
    teacher.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(train.parameter_groups(c, student), fused=True)
    return c, batches, student, teacher, optimizer, Verdicts(ALONE, Interrupt(), source.name)


def step(c, batch, student, teacher, optimizer, verdicts, at=0):
    """The lines of train.train, without those of logging; as on a GPU the crops come without their colours."""
    batch.pop("broken")
    stays = {k: batch.pop(k) for k in ("indices", "colours")}
    batch = colour_batch(to_device(batch, "cpu") | stays, c)
    train.set_schedules(optimizer, 1e-3, 0.04, c.freeze_last_layer)
    with torch.no_grad():
        targets = train.teacher_targets(teacher, [batch], 0.04, None)[0]
    terms, _ = train.loss_terms(c, student, batch, targets, batch["noise"], None)
    loss = sum(train.term_weights(c)[name] * term for name, term in terms.items())
    loss.backward()
    norms = train.clip_gradients(student, c.clip)
    verdicts.judge(at, dict(loss=loss, **terms), norms, batch["indices"])
    optimizer.found_inf = verdicts.skip
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    train.update_ema(teacher, student, 0.99)


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_no_step_waits(tmp_path, kernels):
    c, batches, *rest = prepare(["--kernels", kernels], tmp_path)
    ready = [batches[i] for i in range(3)]
    step(c, ready[0], *rest)
    for at in 1, 2:
        with Count() as count:
            step(c, ready[at], *rest, at=at)
        assert not count.found


def test_the_count_finds_what_waits():
    x = torch.arange(4.0)
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 1], lambda: torch.tensor([1.0, 2.0]),
                 lambda: x.unique(), lambda: bool(x[0] > 1)):
        with Count() as count:
            wait()
        assert count.found
