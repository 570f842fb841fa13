"""
Semantic segmentation: a class for every pixel, from frozen patches and a decoder, in sliding windows; mIoU.

    python evaluate.py --task segmentation --weights runs/tiny                      on the generated `shapes`
    python evaluate.py --task ade20k --weights runs/s --data ADE --out pictures     images/, annotations/

paper: DINOv3 Tab. 3, App. D.1: short side 512, windows of 512. Dimension letters: see the top of model.py.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from decoders import DECODERS
from engine.heads import head_of
from engine.metrics import IGNORE, confusion, segmentation_scores
from engine.pictures import SHOWN, hues, save_pictures
from engine.sliding import enlarged, places, resized, slide
from engine.task import Option, Paper, Task, by_size
from engine.views import nearest
from sets.labels import open_segmentation
from sets.pairs import others


def loss(out, truths):
    """Cross entropy, summed over the pixels that count, over the number of all pixels, as the released code has it."""
    n = sum(truth.numel() for truth in truths)
    for logits, truth in zip(out, truths, strict=True):
        logits = resized(logits, truth.shape)[None]
        yield F.cross_entropy(logits, truth[None].long(), ignore_index=IGNORE, reduction="sum") / n


def truth_windows(i, source, order, side, stride):
    """The truth of image order[i], in the windows of image i -> list of side side"""
    size = enlarged(source.image(i).shape[1:], side)
    truth = nearest(source.truth(order[i]), size)
    return [truth[y : y + side, x : x + side] for y, x in places(size, side, stride)]


def run(data, frozen, c):
    """The head sees in training the windows that it sees in the test."""
    (train, val, n_classes), decoder, side = data, DECODERS[c.decoder], c.resolution
    cut, stride = partial(decoder.windows, side=side), decoder.stride(side)

    def train_head():
        maps = frozen.maps("train", train, cut).row
        truth_of = partial(truth_windows, source=train, order=others(len(train), c), side=side, stride=stride)
        truths = frozen.keep("train truths", truth_of, len(train), ignore=c.ignore).row
        head = decoder.fit("segmentation", maps, truths, n_classes, loss, c, frozen.device)
        seen = sum(np.bincount(truth.ravel(), minlength=256) for truth in truths)[:n_classes]
        return head, dict(commonest=int(seen.argmax()), n_train=len(train), iterations=c.iterations,
                          lr=decoder.peak("segmentation", c))

    head, said = head_of(partial(decoder.Head, n_out=n_classes), train_head, f"{n_classes} classes", frozen, c)
    commonest, counts, constant, shown = said.pop("commonest"), 0, 0, []
    for i, views in enumerate(frozen.maps("val", val, cut)):
        truth = torch.from_numpy(val.truth(i)).to(frozen.device)
        found = slide(head.predict(views), truth.shape, side, stride).argmax(0)
        counts = counts + confusion(found, truth, n_classes)
        constant = constant + confusion(torch.full_like(found, commonest), truth, n_classes)
        if c.out and i < SHOWN:
            shown.append([val.image(i), hues(truth.cpu()), hues(found.cpu())])
    save_pictures(c, shown)
    return dict(**segmentation_scores(counts), chance_miou=segmentation_scores(constant)["miou"], n_classes=n_classes,
                n_val=len(val), **said)


def task(name, layout, *paper):
    options = (Option("iterations", 40000, "steps of the head", shapes=300, least=1),
               Option("lr", 0.0, "peak; 0 = the decoder's own"),
               Option("ignore", IGNORE, f"a label that counts for nothing, beside {IGNORE}"))
    return Task(name, layout, open_segmentation, run, wants="maps", metric="miou", sides=(512, 160), options=options,
                decoders=("linear",), pictures="image, truth, prediction", paper=paper)


FOLDERS = "{images,annotations}/{training,validation}/"
TASKS = (
    task("segmentation", FOLDERS + ": class numbers from 0"),
    task("ade20k", FOLDERS, Paper("miou", by_size(
        47.0, 48.8, 51.8, 54.9, 54.8, 55.9, 42.7, 44.8, 46.3, 47.8), 512, dict(n_val=2000))),  # Tab. 14
    task("cityscapes", "leftImg8bit/, gtFine/*_labelTrainIds.png", Paper("miou", {"7b": 81.1}, 512, dict(n_val=500))),
    task("voc", "JPEGImages/, SegmentationClass[Aug]/, ImageSets/Segmentation/",
         Paper("miou", {"7b": 86.6}, 512, dict(n_val=1449))),                               # Tab. 3
    task("camvid", FOLDERS + ": 11 = void"))
