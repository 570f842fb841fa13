"""
A linear classifier on class token and mean patch, by SGD, at many learning rates at once; val picks the rate.

    python evaluate.py --task linear --weights runs/s --data IMAGENET --tests imagenet-r,imagenet-a,real.json
                                                     the rate that val picked on more sets: see sets/variants.py

paper: DINOv3 §6.2.1, App. D, App. D.7, Tab. 3, Tab. 4. Dimension letters: see the top of model.py.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine import probe
from engine.classify import SHOTS, averaged, classify, held
from engine.heads import head_of
from engine.keys import weights_of
from engine.task import HEAD, IMAGES, Option, Paper, Task, by_size
from engine.views import centre_crop, middle
from sets import variants
from sets.classes import LAYOUT, limited, open_splits

RATES = [a * 10.0 ** b for b in range(-5, -1) for a in (1, 2, 5)] + [0.1]  # times batch / 256


def open_all(c):
    """train, val, and of all --tests {name: (its name in --cache, images, Variant)}"""
    if c.tests and c.data == "shapes":
        raise ValueError("--tests: linear on shapes has no use for it; write --data IMAGENET")
    if c.out and c.shots:
        raise ValueError(f"linear: --out keeps one head, --shots {c.shots} trains several; leave out one of them")
    train, val = open_splits(c)
    tests = {}
    for path in c.tests.split(",") if c.tests else []:
        for name, variant in variants.open_variants(path, train, val).items():
            source = variant.source if variant.of_val else limited(variant.source, c.limit)
            tests[name] = f"{path} {name}", source, variant
    return train, val, tests


class Head(nn.Module):
    """Rows of features, a Table -> the likeliest of the classes `columns`, n"""

    def __init__(self, width, n_classes):
        super().__init__()
        self.width, self.linear = width, nn.Linear(width, n_classes, device="meta").to_empty(device="cpu")

    @torch.no_grad()
    def likeliest(self, x, columns):
        weight, bias = self.linear.weight[columns], self.linear.bias[columns]
        best = [F.linear(part.to(weight.device), weight, bias).argmax(1).cpu() for part in x.split(2048)]
        return torch.as_tensor(columns)[torch.cat(best)]


def run(data, frozen, c):
    """The heads, and then each test set by itself: its features are dropped before those of the next are made."""
    (train, val, tests), n_classes, heads, seen, found = data, len(data[0].classes), [], [], []

    def score(*splits):
        metrics, head = sweep(*splits, n_classes, c, frozen.device)
        heads.append(head)
        return metrics

    def train_head():
        metrics, tokens = classify((train, val), frozen, c, score, patches=True, settings=("lr",))
        seen.append(tokens)
        return heads[-1], metrics

    head, metrics = head_of(partial(Head, n_classes=n_classes), train_head, f"{n_classes} classes", frozen, c)
    if c.head:  # the number that is kept with it is of the val that it was picked by
        heads, seen = [head], [frozen.tokens("val", val)]
        right = head.likeliest(seen[0].table("cls", "patches"), range(n_classes)) == seen[0].labels
        metrics |= dict(top1=100 * right.double().mean().item(), n_val=len(right))
    about = [weights_of(head) for head in heads]
    for name, (key, images, variant) in tests.items():
        view = frozen.seen(middle) if variant.cropped else None  # what is stored as a crop has no margin
        tokens = partial(frozen.tokens, key, images, view) if not variant.of_val else None
        rows, *answers = frozen.once(f"answers {key}", partial(answer, tokens, heads, variant.columns, seen[0]),
                                     heads=about, columns=[*variant.columns])
        labels = [images.label(row) for row in rows]
        found.append({name: [variants.top1(each, labels, variant) for each in torch.from_numpy(np.stack(answers))]})
    scores = [variants.summary({name: each[k] for part in found for name, each in part.items()})
              for k in range(len(heads))]
    return metrics | averaged(scores, c, ("n_corruptions",))


def answer(tokens, heads, columns, seen):
    """Rows of a test set, and what each head says of them: 1+heads n.    tokens  () -> Tokens; None: `seen`, of val"""
    each = tokens() if tokens else seen
    x = each.table("cls", "patches")
    found = np.stack([each.rows, *(head.likeliest(x, columns).numpy() for head in heads)])
    if tokens:
        each.drop()
    return found


def sweep(train, val, rest, n_classes, c, device):
    """
    A linear classifier for each learning rate, trained side by side; val picks the rate.

    train, val  (x n F, a tensor or a Table; labels n)    rest  None: val is what picks
    returns  top-1 of the best rate, in percent, and the rate;  its Head

    paper:   DINOv3 App. D: SGD, momentum 0.9, cosine to 0, 10 epochs; there on cls alone, 15 rates, 2 weight decays
    differs: input, rates and steps are the released code's; but features are extracted once, from centre crops, where
             both train on random crops and flips, and val is looked at once, at the end
    """
    x, y, R = held(train[0], device), train[1].to(device), len(RATES)                          # n F, n
    rates = torch.tensor(RATES) * c.linear_batch / 256
    weight, bias = probe.trained(x, y, n_classes, rates, c.linear_batch, c.iterations, c.seed)
    right = torch.zeros(R, device=device)
    for logits, truth in probe.scored(*val, weight, bias, R):
        right += (logits.argmax(-1) == truth[:, None]).sum(0)
    best, head = right.argmax().item(), Head(x.shape[1], n_classes).to(device)
    weight, bias = (value.unflatten(-1, (R, n_classes))[..., best, :] for value in (weight, bias))
    head.linear.load_state_dict(dict(weight=weight.T, bias=bias))
    return dict(top1=100 * right[best].item() / len(val[1]), lr=RATES[best]), head


PAPER = tuple(Paper(metric, by_size(*values), 512, dict(n_val=50000)) for metric, values in (  # Tab. 14, of ImageNet
    ("top1_real", (87.0, 88.0, 89.3, 90.2, 90.3, 90.4, 87.7, 88.7, 89.2, 89.4)),
    ("top1_imagenet-r", (60.4, 68.8, 76.7, 88.1, 90.0, 91.1, 74.1, 74.1, 78.2, 82.4)),
    ("top1_objectnet", (50.9, 54.6, 64.1, 74.8, 78.6, 79.0, 58.7, 58.7, 61.3, 65.2))))
TASK = Task(
    "linear", LAYOUT, open_all, run, wants="tokens", metric="top1", view=centre_crop, wide=middle, paper=PAPER,
    options=(SHOTS, HEAD, Option("iterations", 12500, "steps", least=1),
             Option("linear_batch", 1024, "samples of a step", least=1),
             Option("tests", "", "more sets to score, as in imagenet-r,imagenet-a,real.json; see sets/variants.py",
                    scored=False), *IMAGES))
