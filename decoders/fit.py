"""
One trainer for all decoders: the features of a frozen backbone, of new views in every step, on any number of ranks.

    Recipe    the numbers of a decoder's training
    rate      the learning rate of a step
    untrained a head, as its seed draws it
    everyone  what a function says of each image, on all ranks
    fit       trains a head; goes on where the same command was stopped
    needs     the bytes that this takes, by a forward pass on the meta device; plan, what --plan prints

What is random in a step is a function of (seed, step, sample); two ranks give the losses of one.
Dimension letters: see the top of model.py.
"""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from tqdm import tqdm

from data import loader
from engine.chunks import Computed
from engine.config import choose_device
from engine.interrupt import Interrupt
from engine.plan import BF16, F32, GB, device_memory
from engine.plan import rows as table
from engine.ranks import Ranks, add_up, choose_precision
from engine.shards import Entry, write_tensors
from model import Features
from weights import empty

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
    power: float = 0.0            # of the polynomial by which it falls; 0 = half a cosine
    until: float = 1.0            # share of the steps after which it falls no more
    least: float = 0.0            # share of the peak that it falls to
    drop: float = 0.0             # share of the steps after which it is a tenth, instead of falling; 0 = it falls
    clip: float = math.inf        # largest gradient norm
    undecayed: tuple = None       # words in names of what has no weight decay, beside biases and norms; None: all has


def rate(recipe, peak, step, steps):
    warmup = round(recipe.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if recipe.drop:
        return peak * (1 if step < round(recipe.drop * steps) else 0.1)
    done = min((step - warmup) / max(recipe.until * steps - warmup, 1), 1)
    left = (1 - done) ** recipe.power if recipe.power else (1 + math.cos(math.pi * done)) / 2
    return peak * (recipe.least + (1 - recipe.least) * left)


class Normalised(torch.autograd.Function):
    """B D h w -> the same, of mean 0 and variance 1 over all ranks' batch;  mean and variance D float64, and of what"""

    @staticmethod
    def forward(ctx, x, eps, ranks):
        values = x.double().transpose(0, 1).flatten(1)                                         # D (B h w)
        sums = torch.stack([values.sum(1), values.square().sum(1), torch.full_like(values[:, 0], values.shape[1])])
        add_up([sums], ranks)
        n = sums[2, 0]
        mean = sums[0] / n
        var = (sums[1] / n - mean**2).clamp(min=0)
        scale = (var + eps).rsqrt().float()[:, None, None]
        out = (x - mean.float()[:, None, None]) * scale
        ctx.save_for_backward(out, scale, n)
        ctx.ranks = ranks
        ctx.mark_non_differentiable(mean, var, n)
        return out, mean, var, n

    @staticmethod
    def backward(ctx, g, *_):
        out, scale, n = ctx.saved_tensors
        sums = torch.stack([g.sum((0, 2, 3)), (g * out).sum((0, 2, 3))])
        add_up([sums], ctx.ranks)
        mean, along = (sums / n.float())[:, :, None, None]
        return scale * (g - mean - out * along), None, None


class BatchNorm(nn.BatchNorm2d):
    """By the statistics of all ranks' batch."""
    ranks = Ranks()

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        x, mean, var, n = Normalised.apply(x, self.eps, self.ranks)
        with torch.no_grad():
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_((var * n / (n - 1).clamp(min=1)).float(), self.momentum)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def untrained(build, c):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(c.seed)
        return build()


def everyone(function, n, ranks):
    """[function(i) for i in range(n)], each rank's share by it"""
    each = ranks.together(lambda: [(i, function(i)) for i in range(ranks.rank, n, ranks.count)])
    return [found for _, found in sorted(sum(each, []), key=itemgetter(0))]


def fit(head, samples, n, loss_of, recipe, c, frozen, ranks, count=None):
    """
    Trains a head in place; it ends with the parameters that fit held-out images best, in eval mode.

    head      what `seen` gives of images -> outputs: a tensor, or dicts and lists of them, first dimension B; in train
              mode it may drop. It must run on the meta device: no shape in it may depend on values
    samples   (row, rng or None) -> image C H W uint8, and its truths: tensors, or dicts and lists of them; None: as it
              is, to be held out
    n         rows: one in LOOKS of them, 64 at most, is held out
    loss_of   (outputs of a part, [truths of each image]) -> scalar
    c         iterations, lr (0 = the recipe's), batch (images of a rank that have a graph at once, and of whose
              features a BatchNorm takes its statistics, together with other ranks'), seed, workers, out
    count     ([truths of each image]) -> number of what is averaged over, as of boxes: then loss_of also has n=, that
              of all images of the step, and its values are summed; None: their mean is the loss
    returns   {what is known of it: number};  raises ValueError if it cannot fit, or a gradient or loss is not finite
    """
    rng, mine = np.random.default_rng([c.seed, 7]), recipe.batch // ranks.count
    if recipe.batch % (ranks.count * recipe.part):
        raise ValueError(f"a batch of {recipe.batch} in parts of {recipe.part} does not go into {ranks.count} ranks")
    rows, peak = rng.permutation(n), c.lr or recipe.lr
    held, rows = np.split(rows, [min(max(n // LOOKS, 1), 64) if n > 1 else 0])
    look = Computed(partial(sample, samples=samples, rows=rows, c=c, batch=recipe.batch))
    refuse(head, recipe, c, frozen, ranks, readable(look[0, 0])[0].shape)
    for module in (module for module in head.modules() if hasattr(module, "ranks")):
        module.ranks = ranks  # BatchNorm's, and what draws for all ranks' batch
    run = Run(head, recipe, peak, c, frozen, ranks)
    first = ranks.rank * mine
    places = ((step, first + i) for step in range(run.step, c.iterations) for i in range(mine))
    stream, every = loader(look, places, c.workers), max(c.iterations // LOOKS, 1)
    bar = tqdm(range(run.step, c.iterations + 1), "decoder", c.iterations, initial=run.step, unit="it", leave=False,
               disable=ranks.rank > 0 or None)
    with Interrupt() as interrupt:
        for step in bar:
            last = step == c.iterations
            if last or step > run.step and step % every == 0:
                run.keep_best(step, judge(head, samples, held, loss_of, recipe, frozen, ranks, count))
            if last:
                break
            leave = torch.tensor([float(bool(interrupt.asked))])
            add_up([leave], ranks)
            if leave:
                run.save(step)
                raise KeyboardInterrupt
            run.save(step, every=PATIENCE)

            views = [readable(next(stream)) for _ in range(mine)]
            loss_here, loss = counting(loss_of, count, views, ranks), 0
            weight = 1 if count else recipe.part / recipe.batch
            with torch.random.fork_rng(devices=[frozen.device] if frozen.device.type == "cuda" else []):
                torch.manual_seed(c.seed * 1_000_003 + step)
                for k in range(0, mine, alike := at_once(recipe, c, ranks)):
                    share = losses(head, views[k : k + alike], loss_here, recipe, frozen) * weight
                    share.backward()
                    loss += share.detach()
            run.update(step, rate(recipe, peak, step, c.iterations))
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


def seen(head, frozen, images):
    """What the head's forward takes, of C H W uint8 each: Features of frozen.layers, if it has no `see` of its own"""
    if hasattr(head, "see"):
        return head.see(frozen, images)
    return frozen.network(frozen.network_input(images), frozen.layers)


def at_once(recipe, c, ranks):
    """Images of a rank that have a graph at the same time: whole parts"""
    return max(min(c.batch, recipe.batch // ranks.count) // recipe.part, 1) * recipe.part


def in_parts(x, size):
    """A tensor, or dicts and lists of them -> the same of `size` after `size` of the first dimension"""
    leaves, form = tree_flatten(x)  # of a split all gradients come back as one; of slices each would be whole
    return [tree_unflatten(list(each), form) for each in zip(*(leaf.split(size) for leaf in leaves), strict=True)]


def counting(loss_of, count, views, ranks):
    """loss_of, told over how many it is to average, if there is a count: those of all ranks' views"""
    if not count:
        return loss_of
    _, *truths = zip(*views, strict=True)
    n = torch.tensor([float(count(*truths))])
    add_up([n], ranks)
    return partial(loss_of, n=n.item())


def losses(head, views, loss_of, recipe, frozen):
    """The sum of the losses of the parts of some images"""
    images, *truths = zip(*views, strict=True)
    with torch.no_grad():
        features = seen(head, frozen, list(images))
    parts = in_parts(head(features), recipe.part)
    truths = tree_map(lambda x: x.to(frozen.device), truths)
    return sum(loss_of(part, *(each[k * recipe.part :][: recipe.part] for each in truths))
               for k, part in enumerate(parts))


@torch.no_grad()
def judge(head, samples, held, loss_of, recipe, frozen, ranks, count=None):
    """Mean loss of the images that nothing is learned from, one at a time; each rank has a share of them"""
    total = torch.zeros(2, dtype=torch.float64, device=frozen.device)
    head.eval()
    for row in held[ranks.rank :: ranks.count]:
        views = [samples(int(row), None)]
        loss_here = counting(loss_of, count, views, Ranks())
        total += torch.stack([losses(head, views, loss_here, recipe, frozen).double(), total.new_tensor(1.0)])
    head.train()
    add_up([total], ranks)
    return (total[0] / total[1]).item() if total[1] else 0.0

# --------------------------------------------------------------------------------
# Memory


class OnMeta:
    """Stands for a Frozen of this config where nothing is computed: what a head sees of images of that shape"""
    device = torch.device("meta")

    def __init__(self, config, layers):
        self.config, self.layers = config, layers

    def network_input(self, images):
        return torch.empty(len(images), *images[0].shape, device="meta")

    def network(self, x, layers):
        B, (h, w), D = len(x), (n // self.config.patch_size for n in x.shape[2:]), self.config.width
        R = getattr(self.config, "n_registers", 0)
        tokens = [torch.empty(B, 1 + R + h * w, D, device="meta").split([1, R, h * w], 1) for _ in layers or [0]]
        return [Features(cls[:, 0], registers, patches, (h, w)) for cls, registers, patches in tokens]


def needs(head, config, layers, shape, n_images):
    """
    Bytes of a rank by kind, and their sum: what training this head takes beside the backbone's parameters.

    head     on any device, the meta one too    config  of the backbone    shape  C H W of what a step sees
    returns  parameters, gradients, Adam's moments, the best so far; features of n_images, what the head keeps of them
             for its backward, and four times its outputs: the loss's own, two gradients, a convolution's copy
    """
    meta = OnMeta(config, layers)
    values = {name: x.detach().to("meta").requires_grad_(x.requires_grad)
              for name, x in (*head.named_parameters(), *head.named_buffers())}
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x
        return x
    with torch.no_grad():
        features = seen(head, meta, [torch.empty(shape, device="meta")] * n_images)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = functional_call(head, values, (features,))
    for x in (*values.values(), *tree_leaves(features)):
        kept.pop(x.untyped_storage()._cdata, None)
    learned = sum(x.nbytes for x in values.values() if x.requires_grad)
    P, hidden = math.prod(n // config.patch_size for n in shape[1:]), getattr(config, "hidden", 4 * config.width)
    found = dict(
        parameters=sum(x.nbytes for x in values.values()),
        gradients=learned,
        adam=2 * learned,
        best=sum(x.nbytes for x in values.values()),
        features=whole(tree_leaves(features)),
        activations=whole(kept.values()),
        outputs=4 * sum(x.nbytes for x in tree_leaves(outputs)),
        block=n_images * P * (6 * config.width + 2 * hidden) * F32,  # of the backbone, at work: stream, q k v, MLP
    )
    return found | dict(total=sum(found.values()))


def whole(tensors):
    """Bytes of all that they are views of"""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def fitting(head, recipe, c, config, layers, shape, backbone, room, ranks):
    """
    What a step needs, backbone and all.

    backbone, room  bytes: of its parameters, of a device
    raises          ValueError if that is not there, with what would fit
    """
    def of(n_images):
        found = dict(backbone=backbone) | needs(head, config, layers, shape, n_images)
        return found | dict(total=found["total"] + backbone)
    n_images = at_once(recipe, c, ranks)
    found = of(n_images)
    if found["total"] <= room:
        return found
    fewer = ((n, of(n)["total"]) for n in range(n_images - recipe.part, 0, -recipe.part))
    ways = [f"--batch {n} ({size / GB:.3g} GB)" for n, size in islice((each for each in fewer if each[1] <= room), 1)]
    raise ValueError(f"the decoder's training needs {found['total'] / GB:.3g} GB on each rank, {n_images} images of "
                     f"{shape[2]}x{shape[1]} at once, where there are {room / GB:.3g}; what would fit: "
                     f"{', '.join(ways) or 'a smaller --resolution, or backbone'}")


def refuse(head, recipe, c, frozen, ranks, shape):
    """A line of what training will take. Raises ValueError, on every rank, if a device has not so much."""
    room = min(ranks.together(lambda: device_memory(frozen.device.type)))
    backbone = sum(x.nbytes for x in frozen.model.parameters())
    found = fitting(head, recipe, c, frozen.model.config, frozen.layers, shape, backbone, room, ranks)
    if ranks.main:
        print(f"decoder: {sum(p.numel() for p in head.parameters()):,} parameters, {c.iterations:,} steps of "
              f"{recipe.batch} images; {found['total'] / GB:.3g} GB wanted on each rank of the {room / GB:.3g} that "
              "are there")


def plan(head, recipe, c, config, layers, shape):
    """
    What --plan prints of one device: nothing is loaded or started.    head  on the meta device    c  also memory: GB

    returns  {what: bytes};  raises ValueError if it would not fit
    """
    kind = "cuda" if c.memory else choose_device(c.device).type
    room = c.memory * GB if c.memory else device_memory(kind)
    short = c.precision == "auto" if c.memory else choose_precision(c.precision, torch.device(kind)) == "bf16"
    with torch.device("meta"):
        backbone = sum(p.numel() for p in empty(config).parameters()) * (BF16 if short else F32)
    found = fitting(head, recipe, c, config, layers, shape, backbone, room, Ranks())
    n = sum(p.numel() for p in head.parameters())
    print(f"decoder: {n:,} parameters, {recipe.batch} images of {shape[2]}x{shape[1]} a step, "
          f"{at_once(recipe, c, Ranks())} at once; {found['total'] / GB:.3g} of {room / GB:.3g} GB")
    print(*table("MB of one device", found, 1e6), sep="\n")
    return dict(parameters_of_decoder=n, **{f"{name}_bytes": size for name, size in found.items()}, room_bytes=room)

# --------------------------------------------------------------------------------
# On its way


def groups(head, recipe):
    """AdamW's: with and without weight decay"""
    decayed = {p: recipe.undecayed is None or p.ndim > 1 and not any(word in name for word in recipe.undecayed)
               for name, p in head.named_parameters() if p.requires_grad}
    both = [dict(params=[p for p, has in decayed.items() if has == decays], weight_decay=recipe.weight_decay * decays)
            for decays in (True, False)]
    return [group for group in both if group["params"]]


class Run:
    """A head on its way: the optimizer, the best parameters so far, and all of it on disk, so that it goes on"""

    def __init__(self, head, recipe, peak, c, frozen, ranks):
        self.head, self.recipe, self.ranks = head.to(frozen.device).train(), recipe, ranks
        self.optimizer = torch.optim.AdamW(groups(head, recipe), peak, recipe.betas)
        for p in self.parameters():
            p.grad = torch.zeros_like(p)  # also of what a step has no use for: all ranks add up the same
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

    def parameters(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

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

    def update(self, step, lr):
        add_up([p.grad for p in self.parameters()], self.ranks)
        norm = nn.utils.clip_grad_norm_(self.parameters(), self.recipe.clip)
        if not norm.isfinite():
            raise ValueError(f"the decoder's gradient is {norm.item()} in step {step}; try a smaller --lr than "
                             f"{lr:.3g}, and look for nan in the truths")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def keep_best(self, step, loss):
        if not math.isfinite(loss):
            raise ValueError(f"the decoder's loss is {loss} on held-out images in step {step}; look for nan in their "
                             "truths")
        if loss <= self.best_loss:  # with nothing held out, the last
            self.best_step, self.best_loss = step, loss
            self.best = {name: x.clone() for name, x in self.head.state_dict().items()}

    def finish(self):
        self.head.load_state_dict(self.best)
        self.head.eval()
        if self.path and self.ranks.main:
            self.path.unlink(missing_ok=True)
