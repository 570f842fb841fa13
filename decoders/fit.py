"""
One trainer for all decoders: the features of a frozen backbone, of new views in every step, on any number of ranks.

    Recipe    the numbers of a decoder's training
    rate      the learning rate of a step
    fit       trains a head; goes on where the same command was stopped

What is random in a step is a function of (seed, step, sample); two ranks give the losses of one.
Dimension letters: see the top of model.py.
"""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from data import loader
from engine.chunks import Computed
from engine.interrupt import Interrupt
from engine.ranks import add_up
from engine.shards import Entry, write_tensors

FILE = "fit.safetensors"  # in --out, until the head is done
LOOKS = 20                # at held-out images, in all
PATIENCE = 60             # seconds from one save to the next


@dataclass(frozen=True)
class Recipe:
    lr: float                     # peak
    weight_decay: float
    batch: int                    # images of a step
    part: int = 2                 # of them that have one loss; the step's is the mean over parts
    betas: tuple = (0.9, 0.999)
    warmup: float = 0.0           # share of the steps in which the rate rises to its peak
    power: float = 0.0            # of the polynomial by which it falls to 0; 0 = half a cosine
    clip: float = math.inf        # largest gradient norm


def rate(recipe, peak, step, steps):
    warmup = round(recipe.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * ((1 - done) ** recipe.power if recipe.power else (1 + math.cos(math.pi * done)) / 2)


class BatchNorm(nn.BatchNorm2d):
    """Of features that take no gradient, by the statistics of all ranks' batch."""
    ranks = None

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            values = x.double().transpose(0, 1).flatten(1)                                     # D (B h w)
            sums = torch.stack([values.sum(1), values.square().sum(1), torch.full_like(values[:, 0], values.shape[1])])
            if self.ranks:
                add_up([sums], self.ranks)
            n = sums[2, 0].item()
            mean = sums[0] / n
            var = (sums[1] / n - mean**2).clamp(min=0)
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_((var * n / max(n - 1, 1)).float(), self.momentum)
            mean, std = (v.float()[:, None, None] for v in (mean, (var + self.eps).sqrt()))
        return (x - mean) / std * self.weight[:, None, None] + self.bias[:, None, None]


def fit(head, samples, n, loss_of, recipe, c, frozen, ranks):
    """
    Trains a head in place; it ends with the parameters that fit held-out images best, in eval mode.

    head      Features of the layers of `frozen` -> outputs; in train mode it may drop
    samples   (row, rng or None) -> image C H W uint8, and its truths, tensors; None: as it is, to be held out
    n         rows: one in LOOKS of them, 64 at most, is held out
    loss_of   (outputs of a part, [truths of each image]) -> scalar
    c         iterations, lr (0 = the recipe's), seed, workers, out
    returns   {what is known of it: number}
    """
    rng, mine = np.random.default_rng([c.seed, 7]), recipe.batch // ranks.count
    if recipe.batch % (ranks.count * recipe.part):
        raise ValueError(f"a batch of {recipe.batch} in parts of {recipe.part} does not go into {ranks.count} ranks")
    rows, peak = rng.permutation(n), c.lr or recipe.lr
    held, rows = np.split(rows, [min(max(n // LOOKS, 1), 64) if n > 1 else 0])
    for norm in (module for module in head.modules() if isinstance(module, BatchNorm)):
        norm.ranks = ranks if ranks.count > 1 else None
    run = Run(head, recipe, peak, c, frozen, ranks)
    look = Computed(partial(sample, samples=samples, rows=rows, c=c, batch=recipe.batch))
    first = ranks.rank * mine
    places = [(step, first + i) for step in range(run.step, c.iterations) for i in range(mine)]
    stream, every = loader(look, places, c.workers), max(c.iterations // LOOKS, 1)
    bar = tqdm(range(run.step, c.iterations + 1), "decoder", c.iterations, initial=run.step, unit="it", leave=False,
               disable=ranks.rank > 0 or None)
    with Interrupt() as interrupt:
        for step in bar:
            last = step == c.iterations
            if last or step > run.step and step % every == 0:
                run.keep_best(step, judge(head, samples, held, loss_of, recipe, frozen, ranks))
            if last:
                break
            leave = torch.tensor([float(bool(interrupt.asked))])
            add_up([leave], ranks)
            if leave:
                run.save(step)
                raise KeyboardInterrupt
            run.save(step, every=PATIENCE)

            views = [readable(next(stream)) for _ in range(mine)]
            with torch.random.fork_rng(devices=[frozen.device] if frozen.device.type == "cuda" else []):
                torch.manual_seed(c.seed * 1_000_003 + step)
                loss = losses(head, views, loss_of, recipe, frozen) * recipe.part / recipe.batch
            loss.backward()
            add_up([p.grad for p in head.parameters()], ranks)
            run.update(rate(recipe, peak, step, c.iterations))
            if step % 50 == 0:
                bar.set_postfix_str(f"loss {loss.item() * ranks.count:.4f}")
    run.finish()
    return dict(best_step=run.best_step, held_out_loss=run.best_loss, lr=peak, iterations=c.iterations)


def sample(place, samples, rows, c, batch):
    """Sample i of a step: an image of an endless series of shuffled epochs, and what is random in it"""
    step, i = place
    epoch, at = divmod(step * batch + i, len(rows))
    order = np.random.default_rng([c.seed, 8, epoch]).permutation(len(rows))
    return samples(int(rows[order[at]]), np.random.default_rng([c.seed, 9, step, i]))


def readable(view):
    if isinstance(view, Exception):
        raise ValueError(f"{view}; it was readable before")
    return view


def losses(head, views, loss_of, recipe, frozen):
    """The sum of the losses of the parts of this rank's batch"""
    images, *truths = zip(*views, strict=True)
    with torch.no_grad():
        features = frozen.network(frozen.network_input(list(images)), frozen.layers)
    parts = head(features).split(recipe.part)  # their gradients come back as one; of slices each would be whole
    truths = [[x.to(frozen.device) for x in each] for each in truths]
    return sum(loss_of(part, *(each[k * recipe.part :][: recipe.part] for each in truths))
               for k, part in enumerate(parts))


@torch.no_grad()
def judge(head, samples, held, loss_of, recipe, frozen, ranks):
    """Mean loss of the images that nothing is learned from, one at a time; each rank has a share of them"""
    total = torch.zeros(2, dtype=torch.float64, device=frozen.device)
    head.eval()
    for row in held[ranks.rank :: ranks.count]:
        total += torch.stack([losses(head, [samples(int(row), None)], loss_of, recipe, frozen).double(),
                              total.new_tensor(1.0)])
    head.train()
    add_up([total], ranks)
    return (total[0] / total[1]).item() if total[1] else 0.0


class Run:
    """A head on its way: the optimizer, the best parameters so far, and all of it on disk, so that it goes on"""

    def __init__(self, head, recipe, peak, c, frozen, ranks):
        self.head, self.recipe, self.ranks = head.to(frozen.device).train(), recipe, ranks
        self.optimizer = torch.optim.AdamW(head.parameters(), peak, recipe.betas, weight_decay=recipe.weight_decay)
        for p in head.parameters():
            self.optimizer.state[p] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p),
                                           exp_avg_sq=torch.zeros_like(p))
        self.step, self.best_step, self.best_loss = 0, 0, math.inf
        self.best = {name: x.clone() for name, x in head.state_dict().items()}
        self.path, self.saved = c.out and Path(c.out, FILE), time.monotonic()
        what = {k: v for k, v in asdict(c).items() if k not in ("out", "workers", "cache", "device")}
        self.about = hashlib.sha1(json.dumps([what, asdict(recipe), frozen.about["weights"]], default=str).encode())
        self.about = self.about.hexdigest()
        if self.path and self.path.is_file():
            self.resume()

    def tensors(self):
        """{name: tensor} of all that a step changes"""
        names = {p: name for name, p in self.head.named_parameters()}
        found = {f"head.{name}": x for name, x in self.head.state_dict().items()}
        found |= {f"best.{name}": x for name, x in self.best.items()}
        return found | {f"{key}.{names[p]}": state[key] for p, state in self.optimizer.state.items()
                        for key in ("exp_avg", "exp_avg_sq")}

    def resume(self):
        try:
            with safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
                if about.get("about") != self.about:
                    raise ValueError(f"--out: {self.path} is of a run with other options or weights; name them again, "
                                     "or another --out, or delete it")
                for name, x in self.tensors().items():
                    x.copy_(file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"--out: {self.path} cannot be read ({error}); delete it to begin again") from error
        self.step, self.best_step, self.best_loss = (json.loads(about[k]) for k in ("step", "best_step", "best_loss"))
        for state in self.optimizer.state.values():
            state["step"].fill_(self.step)
        if self.ranks.main:
            print(f"decoder: goes on from step {self.step:,}, kept in {self.path}")

    def save(self, step, every=0):
        if not self.path or not self.ranks.main or time.monotonic() - self.saved < every:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        entries = {name: Entry(tuple(x.shape), x.dtype, partial(iter, [x])) for name, x in self.tensors().items()}
        write_tensors(new, entries, {"format": "pt", "about": self.about, **{
            name: json.dumps(value) for name, value in
            (("step", step), ("best_step", self.best_step), ("best_loss", self.best_loss))}})
        new.replace(self.path)
        self.saved = time.monotonic()

    def update(self, lr):
        nn.utils.clip_grad_norm_(self.head.parameters(), self.recipe.clip)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def keep_best(self, step, loss):
        if loss <= self.best_loss:  # with nothing held out, the last
            self.best_step, self.best_loss = step, loss
            self.best = {name: x.clone() for name, x in self.head.state_dict().items()}

    def finish(self):
        self.head.load_state_dict(self.best)
        self.head.eval()
        if self.path and self.ranks.main:
            self.path.unlink(missing_ok=True)
