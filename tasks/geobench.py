"""
GEO-Bench: twelve sets of small satellite images; a linear classifier on class tokens, or a DPT for every pixel.

    python evaluate.py --task geobench --weights sat-l.pth --data GEO/classification_v1.0/m-eurosat
    python evaluate.py --task geobench_seg --weights sat-l.pth --data GEO/segmentation_v1.0/m-cashew-plant --out heads

`valid` picks the learning rate, the score is of `test`: accuracy, F1 over all labels where an image has several, mIoU.

paper:   DINOv3 §8.3, Tab. 18, App. D.13: RGB; 2,400 steps of 32 images, SGD, cosine, rates from 1e-5 to 1; a DPT on
         the frozen network, rates 3e-5 to 1e-3
differs: features of a classification are extracted once. Input size, normalisation and steps of the DPT are not stated:
         bands from their least to their most, as the sets say, then the weights' statistics; so no number of the paper
         stands beside ours. Dimension letters: see the top of model.py.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from decoders import dpt
from decoders.fit import everyone, fit, untrained
from engine import probe
from engine.classify import held
from engine.crops import turned
from engine.features import chosen_layers, describe
from engine.heads import head_of
from engine.images import shown
from engine.metrics import IGNORE, confusion, segmentation_scores
from engine.pictures import SHOWN, hues, save_pictures
from engine.ranks import linked
from engine.sliding import resized
from engine.task import Option, Task
from engine.views import fitted, middle
from sets.geobench import CLASSIFICATION, SEGMENTATION, open_geobench
from sets.pairs import others

RATES = [a * 10.0 ** b for b in range(-5, 0) for a in (1, 2, 5)] + [1.0]
PIXEL_RATES = 3e-5, 1e-4, 3e-4, 1e-3

# --------------------------------------------------------------------------------
# Classification


def f1(found, truth):
    """n classes bool, both -> F1 over all labels of all images, in percent; 0 if nothing is said"""
    both = (found & truth).sum()
    return 100 * (2 * both / max(found.sum() + truth.sum(), 1)).item()


def several(logits, y):
    """n R classes, 0 or 1 for each n classes -> the mean over classes of the binary cross entropy, summed"""
    y = y[:, None].expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / y.shape[2]


def measured(x, y, weight, bias, R):
    """Scores of R classifiers, in percent"""
    logits, y = (torch.cat(parts).cpu() for parts in zip(*probe.scored(x, y, weight, bias, R), strict=True))
    if y.ndim == 2:
        return [f1(logits[:, r] > 0, y > 0) for r in range(R)]
    return (100 * (logits.argmax(2) == y[:, None]).double().mean(0)).tolist()


def classes(data, frozen, c):
    (name, sources), splits = data, []
    form, rng = CLASSIFICATION[name], np.random.default_rng(c.seed)
    for split, source in zip(("train", "valid", "test"), sources, strict=True):
        tokens = frozen.tokens(split, source)
        truth = torch.from_numpy(np.stack([source.truth(row) for row in tokens.rows]))
        splits.append((held(tokens.table("cls"), frozen.device),
                       truth[torch.from_numpy(rng.permutation(len(truth)))] if c.control else truth))
    (x, y), *_ = splits
    loss, R = several if y.ndim == 2 else probe.cross_entropy, len(RATES)
    weight, bias = probe.trained(x, y.to(frozen.device), form.n_classes, RATES, c.linear_batch, c.iterations, c.seed,
                                 loss)
    valid, test = (measured(*split, weight, bias, R) for split in splits[1:])
    best = int(np.argmax(valid))
    truth = splits[2][1]
    constant = f1((y.mean(0) > 0.5).expand_as(truth), truth > 0) if y.ndim == 2 else \
        100 * (truth == y.mode().values).double().mean().item()
    return dict(set=name, score=test[best], valid_score=valid[best], lr=RATES[best], chance=constant,
                n_classes=form.n_classes, **sizes(*(len(y) for _, y in splits)))


def sizes(train, valid, test):
    return dict(n_train=train, n_valid=valid, n_test=test)

# --------------------------------------------------------------------------------
# A class for every pixel


def Head(width, n_classes):
    """A DPT that answers with classes"""
    return dpt.DPT(replace(dpt.sized(width), n_out=n_classes))


def mean_loss(out, truths):
    """Cross entropy of the pixels that count, of answers n classes h w and truths H W"""
    losses = [F.cross_entropy(resized(logits, truth.shape)[None], truth[None].long(), ignore_index=IGNORE,
                              reduction="sum") for logits, truth in zip(out, truths, strict=True)]
    return sum(losses) / max(sum((truth != IGNORE).sum().item() for truth in truths), 1)


def train(frozen, data, ranks):
    """The head of the rate that `valid` picks; what is known of it"""
    (name, (source, valid, _)), c = data, frozen.c
    width, n = frozen.model.config.width, SEGMENTATION[name].n_classes
    size = tuple(frozen.view(source.image(0))[0].shape[1:])
    views = partial(turned, source=source, order=others(len(source), c), size=size)
    best = None
    for lr in (c.lr,) if c.lr else PIXEL_RATES:
        head = untrained(partial(Head, width, n), c)
        fit(head, views, len(source), mean_loss, dpt.recipe(width), replace(c, lr=lr, out=""), frozen, ranks)
        score = segmentation_scores(counted(head, valid, frozen, ranks)[0])["miou"]
        if best is None or score > best[1]["valid_score"]:
            best = head, dict(valid_score=score, lr=lr)
    return best[0], best[1] | dict(iterations=c.iterations, n_train=len(source), n_valid=len(valid))


@torch.no_grad()
def counted(head, source, frozen, ranks):
    """Confusion, summed over the images of a source;  rows of pictures"""
    n = source.form.n_classes

    def one(i):
        truth = torch.from_numpy(source.truth(i))
        features = frozen.network(frozen.network_input(frozen.view(source.image(i))), frozen.layers)
        found = resized(head(features)[0].float(), truth.shape).argmax(0).cpu()
        row = [shown(source.image(i)), hues(truth), hues(found)] if frozen.c.out and i < SHOWN else None
        return confusion(found, truth, n), row
    counts, rows = zip(*everyone(one, len(source), ranks), strict=True)
    return sum(counts), [row for row in rows if row]


def live(frozen, data):
    (name, (*_, test)), c, ranks = data, frozen.c, linked(frozen.ranks)
    n = SEGMENTATION[name].n_classes
    frozen.layers = dpt.layers_of(frozen.model.config, chosen_layers(c, frozen.model.config))
    head, said = head_of(partial(Head, n_classes=n), partial(train, frozen, data, ranks), f"{n} classes of {name}",
                         frozen, c)
    return *counted(head.eval(), test, frozen, ranks), said


def pixels(data, frozen, c):
    counts, rows, said = frozen.together(partial(live, data=data))
    save_pictures(c, rows)
    constant = torch.zeros_like(counts)
    constant[:, counts.sum(1).argmax()] = counts.sum(1)
    return dict(set=data[0], score=segmentation_scores(counts)["miou"], chance=segmentation_scores(constant)["miou"],
                n_classes=len(counts), n_test=len(data[1][2]), **said)

# --------------------------------------------------------------------------------
# The tasks


def opened(c, forms):
    """As open_geobench, for a network of as many channels. Raises ValueError."""
    n, channels = describe(c.weights).in_chans, c.channels.split(",")
    if len(channels) != n:
        raise ValueError(f"--channels {c.channels} names {len(channels)}, the network has {n}: name as many")
    if forms is SEGMENTATION:
        dpt.layers_of(describe(c.weights), chosen_layers(c, describe(c.weights)))
    return open_geobench(c, forms)


CHANNELS = Option("channels", "Red,Green,Blue", "names of bands, as the set has them, in the network's order")
STEPS = Option("iterations", 2400, "steps", least=1)
TASKS = (
    Task("geobench", "classification_v1.0/m-NAME/, as downloaded", partial(opened, forms=CLASSIFICATION), classes,
         wants="tokens", metric="score", view=middle, shapes=False,
         options=(CHANNELS, STEPS, Option("linear_batch", 32, "samples of a step", least=1))),
    Task("geobench_seg", "segmentation_v1.0/m-NAME/, as downloaded", partial(opened, forms=SEGMENTATION), pixels,
         wants="maps", metric="score", view=fitted, sides=(512, 160), shapes=False, decoders=("dpt",),
         pictures="image, truth, prediction",
         options=(CHANNELS, STEPS._replace(default=40000),
                  Option("lr", 0.0, "peak; 0 = the best on valid of 3e-5, 1e-4, 3e-4, 1e-3"))))
