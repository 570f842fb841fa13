"""
Monocular depth: 256 bins of depth for every pixel, from frozen patches and a decoder; RMSE in metres.

    python evaluate.py --task depth --weights runs/tiny                                   on the generated `shapes`
    python evaluate.py --task nyu --weights runs/s --data NYU --cache features     train/rgb_*.jpg, train/depth_*.png

paper: DINOv3 Tab. 3, App. D.2. Dimension letters: see the top of model.py.
"""

from functools import partial

import numpy as np
import torch

from decoders import DECODERS
from engine.heads import head_of
from engine.metrics import depth_scores
from engine.pictures import SHOWN, save_pictures, shades
from engine.sliding import resized
from engine.task import Option, Paper, Task, by_size
from engine.views import fitted, mirrored, nearest
from sets.depths import NEAREST, open_depth, scored_pixels
from sets.pairs import others

BINS = 256


def decode(logits, top):
    """BINS h w -> metres h w: the mean of the bins, weighted by relu(logit) + 0.1"""
    weight = logits.relu() + 0.1
    bins = torch.linspace(NEAREST, top, BINS, device=logits.device)
    return (weight * bins[:, None, None]).sum(0) / weight.sum(0)


def depth_loss(out, truths, top):
    """
    sqrt(var(g) + 0.15 mean(g)^2),  g = ln(depth + 0.001) - ln(truth + 0.001) over the pixels whose depth is known.

    differs: the released code leaves out the variance for the first 100 steps
    """
    g = []
    for logits, truth in zip(out, truths, strict=True):
        known = (truth > 0) & (truth <= top)
        found = resized(decode(logits, top)[None], truth.shape)[0]
        g.append((found[known] + 1e-3).log() - (truth[known] + 1e-3).log())
    g = torch.cat(g)
    yield (g.var() + 0.15 * g.mean() ** 2 + 1e-12).sqrt()


def truth_at(i, source, order, sizes):
    return [nearest(source.truth(order[i]), sizes[i])]


def mean_of(truths, top):
    """Metres, over the pixels whose depth is known. Raises ValueError if there are none."""
    total = count = 0
    for truth in truths:
        known = truth[(truth > 0) & (truth <= top)]
        total, count = total + known.sum(dtype=np.float64), count + known.size
    if not count:
        raise ValueError(f"depth: no train image has a known depth below {top} m")
    return float(total / count)


def run(data, frozen, c):
    """The whole image, and at test the mean of it and its mirror image"""
    (train, val, form), decoder = data, DECODERS[c.decoder]

    def train_head():
        maps = frozen.maps("train", train).row
        sizes = [(16 * h, 16 * w) for h, w, _ in maps.shapes]
        truth_of = partial(truth_at, source=train, order=others(len(train), c), sizes=sizes)
        truths = frozen.keep("train truths", truth_of, len(train)).row
        mean = mean_of(truths, form.top)
        head = decoder.fit("depth", maps, truths, BINS, partial(depth_loss, top=form.top), c, frozen.device)
        return head, dict(mean_depth=mean, n_train=len(train), iterations=c.iterations,
                          lr=decoder.peak("depth", c))

    head, said = head_of(partial(decoder.Head, n_out=BINS), train_head, f"{BINS} bins to {form.top} m", frozen, c)
    mean_depth = said.pop("mean_depth")
    scores, constant, shown = [], [], []
    for i, views in enumerate(frozen.maps("val", val, frozen.seen(mirrored))):
        truth = val.truth(i)
        plain, mirror = (decode(x, form.top) for x in head.predict(views))
        found = resized(((plain + mirror.flip(1)) / 2)[None], truth.shape)[0].clamp(NEAREST, form.top).cpu()
        counted = scored_pixels(truth, form)
        if not counted.any():
            raise ValueError(f"depth: val image {i} has no known depth below {form.top} m; leave it out")
        there = torch.from_numpy(truth)[counted]
        scores.append(depth_scores(found[counted], there))
        constant.append(depth_scores(torch.full_like(there, mean_depth), there)["rmse"])
        if c.out and i < SHOWN:
            shown.append([val.image(i), shades(truth, form.top), shades(found.numpy(), form.top)])
    save_pictures(c, shown)
    return dict(**{name: float(np.mean([score[name] for score in scores])) for name in scores[0]},
                chance_rmse=float(np.mean(constant)), n_val=len(val), **said)


def task(name, layout, *paper, side=480):
    options = (Option("iterations", 38400, "steps of the head", shapes=300, least=1),
               Option("lr", 0.0, "peak; 0 = the decoder's own"))
    return Task(name, layout, open_depth, run, wants="maps", metric="rmse", lower=True, view=fitted, sides=(side, 160),
                options=options, decoders=("linear",), pictures="image, truth, prediction", paper=paper)


FOLDERS = "{train,test}/{rgb_NAME.jpg,depth_NAME.png}"
TASKS = (
    task("depth", FOLDERS),
    task("nyu", FOLDERS + ", or nyu_{train,test}.txt", Paper("rmse", by_size(
        0.403, 0.399, 0.373, 0.352, 0.352, 0.309, 0.448, 0.432, 0.420, 0.403), 480, dict(n_val=654))),  # Tab. 14
    task("kitti", "kitti_eigen_{train,test}.txt, input/, gt_depth/",
         Paper("rmse", {"7b": 2.346}, 352, dict(n_val=652)), side=352))                        # Tab. 3; native
