"""
A linear classifier on class token and mean patch, by SGD, at many learning rates at once; val picks the rate.

    python evaluate.py --task linear --weights runs/s --data IMAGENET --tests imagenet-r,imagenet-a,real.json
                                                     the rate that val picked on more sets: see sets/variants.py

paper: DINOv3 App. D, App. D.7, Tab. 3, Tab. 4. Dimension letters: see the top of model.py.
"""

from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

from engine.classify import SHOTS, classify, columns, splits
from engine.task import Option, Paper, Task, by_size
from engine.views import centre_crop, middle
from sets import variants
from sets.classes import LAYOUT, limited, open_splits

RATES = [a * 10.0 ** b for b in range(-5, -1) for a in (1, 2, 5)] + [0.1]  # times batch / 256


def open_all(c):
    """train, val, and of all --tests {name: (its name in --cache, images, Variant)}"""
    if c.tests and c.data == "shapes":
        raise ValueError("--tests: linear on shapes has no use for it; write --data IMAGENET")
    train, val = open_splits(c)
    tests = {}
    for path in c.tests.split(",") if c.tests else []:
        for name, variant in variants.open_variants(path, train, val).items():
            tests[name] = f"{path} {name}", limited(variant.source, c.limit), variant
    return train, val, tests


def run(data, frozen, c):
    *sources, tests = data
    train, val, n_classes = *splits(sources, frozen, patches=True), len(sources[0].classes)
    views = {True: frozen.seen(middle), False: frozen.view}  # of what is stored as a crop, and of photos
    seen = [(name, columns(frozen.tokens(key, images, views[variant.cropped]), patches=True), variant)
            for name, (key, images, variant) in tests.items()]
    return classify(train, val, n_classes, c,
                    partial(sweep, n_classes=n_classes, c=c, device=frozen.device, tests=seen))


def sweep(train, val, n_classes, c, device, tests=()):
    """
    A linear classifier for each learning rate, trained side by side; val picks the rate.

    train, val  (x n F, labels n)
    tests    (name, the same, Variant) of other sets, which the rate that val picked is applied to
    returns  top-1 of the best rate, in percent, and the rate; top-1 or mCE of the tests

    paper:   DINOv3 App. D: SGD, momentum 0.9, cosine to 0, 10 epochs; there on cls alone, 15 rates, 2 weight decays
    differs: input, rates and steps are the released code's; but features are extracted once, from centre crops, where
             both train on random crops and flips, and val is looked at once, at the end
    """
    x, y = (column.to(device) for column in train)                                             # n F, n
    n, width, R = len(x), x.shape[1], len(RATES)
    rates = torch.tensor(RATES, device=device) * c.linear_batch / 256
    generator = torch.Generator().manual_seed(c.seed)
    weight = (torch.randn(width, R * n_classes, generator=generator) * 0.01).to(device).requires_grad_()
    bias = torch.zeros(R * n_classes, device=device, requires_grad=True)
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    order = torch.empty(0, dtype=torch.long)
    for step in tqdm(range(c.iterations), desc="linear", unit="it", leave=False, disable=None):
        while len(order) < c.linear_batch:
            order = torch.cat([order, torch.randperm(n, generator=generator)])
        rows, order = order[: c.linear_batch].to(device), order[c.linear_batch :]
        logits = torch.addmm(bias, x[rows], weight).view(len(rows), R, n_classes)
        loss = F.cross_entropy(logits.flatten(0, 1), y[rows].repeat_interleave(R), reduction="sum") / len(rows)
        gradients = torch.autograd.grad(loss, (weight, bias))
        lr = (rates * (1 + torch.cos(torch.tensor(torch.pi * step / c.iterations))) / 2).repeat_interleave(n_classes)
        with torch.no_grad():
            for value, v, gradient in zip((weight, bias), speed, gradients, strict=True):
                value -= lr * v.mul_(0.9).add_(gradient)

    @torch.no_grad()
    def logits(x):
        return torch.addmm(bias, x.to(device), weight).unflatten(1, (R, n_classes))

    top1 = (logits(val[0]).argmax(-1) == val[1].to(device)[:, None]).float().mean(0) * 100     # rates
    best = top1.argmax().item()
    others = {name: variants.top1(logits(x)[:, best], rows, variant) for name, (x, rows), variant in tests}
    return dict(top1=top1[best].item(), lr=RATES[best], **variants.summary(others))


PAPER = tuple(Paper(metric, by_size(*values), 512, dict(n_val=50000)) for metric, values in (  # Tab. 14, of ImageNet
    ("top1_real", (87.0, 88.0, 89.3, 90.2, 90.3, 90.4, 87.7, 88.7, 89.2, 89.4)),
    ("top1_imagenet-r", (60.4, 68.8, 76.7, 88.1, 90.0, 91.1, 74.1, 74.1, 78.2, 82.4)),
    ("top1_objectnet", (50.9, 54.6, 64.1, 74.8, 78.6, 79.0, 58.7, 58.7, 61.3, 65.2))))
TASK = Task(
    "linear", LAYOUT, open_all, run, wants="tokens", metric="top1", view=centre_crop, wide=middle, paper=PAPER,
    options=(SHOTS, Option("iterations", 12500, "steps", least=1),
             Option("linear_batch", 1024, "samples of a step", least=1),
             Option("tests", "", "more sets to score, as in imagenet-r,imagenet-a,real.json; see sets/variants.py",
                    scored=False)))
