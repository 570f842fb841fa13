"""
Panoptic segmentation: a segment for every pixel, objects of one class apart, by queries on frozen patches; PQ.

    python evaluate.py --task panoptic --weights runs/tiny                        on the generated `shapes`
    python evaluate.py --task panoptic --weights runs/s --data COCO --resolution 640 --out heads

paper: none of its numbers; Kirillov et al. 2019. The decoder: App. D.10. Dimension letters: see the top of model.py.
"""

from functools import partial

import numpy as np
import torch

from decoders import DECODERS, masks
from decoders.adapter import COARSEST
from decoders.fit import everyone
from engine.features import describe
from engine.heads import head_of
from engine.metrics import IGNORE, PER, panoptic_counts, panoptic_scores
from engine.pictures import SHOWN, outlined, save_pictures
from engine.ranks import linked
from engine.task import Option, Task
from engine.views import fitted
from sets.pairs import others
from sets.panoptics import open_panoptic
from shapes import CLASSES

CATEGORIES = 133         # of COCO

@torch.no_grad()
def segments_of(image, size, head, frozen, stuff):
    """C H W -> H W int64 of a size, class x 1000 + number; 255000 where there is no segment"""
    (view,) = fitted(image, frozen.c.resolution, COARSEST)
    found = head(head.see(frozen, [view]))
    segments, known = masks.panoptic(found.logits[-1][0], found.masks[-1][0], size, stuff)
    codes = [IGNORE * PER] + [label * PER + k for k, (label, _) in enumerate(known)]
    return np.array(codes)[segments.cpu().numpy()]


def live(frozen, data):
    """The head, from new crops in every step, and scores of the val images: on all ranks"""
    (train, val, form), c, ranks = data, frozen.c, linked(frozen.ranks)
    decoder, n = DECODERS[c.decoder], len(form.names)
    if not frozen.layers:
        frozen.layers = decoder.blocks(frozen.model.config.depth)

    def train_head():
        head, said = decoder.trained(train, others(len(train), c), n, PER, frozen, ranks)
        return head, dict(n_train=len(train), **said)

    head, said = head_of(partial(decoder.Head, n_out=n), train_head, f"{n} classes in segments", frozen, c)

    def measured(i):
        truth = val.truth(i)
        found = segments_of(val.image(i), truth.shape, head, frozen, form.stuff)
        shown = [val.image(i), *(outlined(val.image(i), x) for x in (truth, found))] if c.out and i < SHOWN else None
        return panoptic_counts(found, truth, n), shown
    return everyone(measured, len(val), ranks), said


def run(data, frozen, c):
    found, said = frozen.together(partial(live, data=data))
    counts, shown = zip(*found, strict=True)
    save_pictures(c, [row for row in shown if row])
    return dict(**panoptic_scores(sum(counts), data[2].stuff), n_classes=len(data[2].names), n_val=len(data[1]), **said)


def opened(c):
    DECODERS[c.decoder].check(c, describe(c.weights))
    return open_panoptic(c)


def planned(c):
    config, n_classes = describe(c.weights), len(CLASSES) + 1 if c.data == "shapes" else CATEGORIES
    DECODERS[c.decoder].check(c, config)
    return DECODERS[c.decoder].planned(c, config, n_classes)


OPTIONS = (Option("iterations", 40000, "steps of the head", shapes=300, least=1),
           Option("lr", 0.0, "peak; 0 = the decoder's own"),
           Option("init", "", "head.safetensors of another --out that training begins from"))
TASK = Task("panoptic", "{train,val}2017/, annotations/panoptic_{train,val}2017.json, panoptic_{train,val}2017/",
            opened, run, wants="maps", metric="pq", sides=(640, 160), options=OPTIONS, decoders=("mask2former",),
            plan=planned, pictures="image, truth, prediction")
