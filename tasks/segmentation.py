"""
Semantic segmentation: a class for every pixel, from frozen patches and a decoder, in sliding windows; mIoU.

    python evaluate.py --task segmentation --weights runs/tiny                      on the generated `shapes`
    python evaluate.py --task ade20k --weights runs/s --data ADE --out pictures     images/, annotations/
    python evaluate.py --task ade20k --weights 7B.pth --data ADE --decoder mask2former --resolution 896 --head HEAD.pth

The paper's best, on ADE20k: three trainings, each from what the last one has left, and several sizes at test

    D="--decoder mask2former --resolution 896 --weights runs/7b"
    python evaluate.py --task stuff $D --data COCO --iterations 80000 --resolution 1280 --out heads/stuff
    python evaluate.py --task hypersim $D --data HYPERSIM --iterations 10000 --init heads/stuff/head.safetensors \\
        --out heads/hypersim
    python evaluate.py --task ade20k $D --data ADE --iterations 20000 --init heads/hypersim/head.safetensors \\
        --out heads/ade20k --scales 0.9,0.95,1,1.05,1.1

    stored    linear: the features of all windows once, on disk
    live      mask2former: those of new crops in every step, on all ranks

paper:   DINOv3 §6.1.2, Tab. 3, App. D.1: short side 512, windows of 512; §6.3.2, Tab. 11, App. D.10: 896. Dimension
         letters: see the top of model.py.
differs: §8.3, Tab. 19 has LoveDA and iSAID by an UPerNet, which is not here: none of its numbers stands beside ours
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from decoders import DECODERS, load_decoder, masks
from decoders.adapter import COARSEST
from decoders.mask2former import OfImages as Mask2Former
from engine.channels import Channels
from engine.features import describe, reads
from engine.heads import head_of, released
from engine.images import shown
from engine.metrics import IGNORE, confusion, segmentation_scores
from engine.pictures import SHOWN, hues, save_pictures
from engine.ranks import linked
from engine.sliding import enlarged, places, resized, slide, windows
from engine.task import GIVEN, IMAGES, Option, Paper, Task, by_size
from engine.views import nearest
from sets.labels import SETS, open_segmentation
from sets.pairs import others
from shapes import CLASSES

MANY = 150               # classes that a plan is of, where a set's number is not known
COUNTED = 1000           # truths, at most, that tell which class is the commonest


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


def commonest_of(truths, n_classes):
    """The class of the most pixels"""
    return int(sum(np.bincount(truth.ravel(), minlength=256) for truth in truths)[:n_classes].argmax())

# --------------------------------------------------------------------------------
# Stored, or live: the confusion of all val images, rows of pictures, and what is known of the head


def stored(data, frozen, c):
    """The head sees in training the windows that it sees in the test."""
    (train, val, n_classes), decoder, side = data, DECODERS[c.decoder], c.resolution
    cut, stride = partial(decoder.windows, side=side), decoder.stride(side)

    def train_head():
        maps = frozen.maps("train", train, cut).row
        truth_of = partial(truth_windows, source=train, order=others(len(train), c), side=side, stride=stride)
        truths = frozen.keep("train truths", truth_of, len(train), ignore=c.ignore).row
        head = decoder.fit("segmentation", maps, truths, n_classes, loss, c, frozen.device)
        return head, dict(commonest=commonest_of(truths, n_classes), n_train=len(train), iterations=c.iterations,
                          lr=decoder.peak("segmentation", c))

    head, said = head_of(partial(decoder.Head, n_out=n_classes), train_head, f"{n_classes} classes", frozen, c)
    maps = enumerate(frozen.maps("val", val, cut))
    found = ((i, slide(head.predict(views), val.truth(i).shape, side, stride)) for i, views in maps)
    return *tallied(found, data, c), said


def live(frozen, data):
    """As stored, on all ranks: each measures a share of the val images"""
    (train, val, n_classes), c, ranks = data, frozen.c, linked(frozen.ranks)
    decoder = DECODERS[c.decoder]

    def known():
        truths = (train.truth(i) for i in range(0, len(train), -(-len(train) // COUNTED)))
        return dict(commonest=commonest_of(truths, n_classes), n_train=len(train))

    def train_head():
        head, said = decoder.trained(train, others(len(train), c), n_classes, 1, frozen, ranks)
        return head, known() | said

    if released(frozen.task, c):
        head, said = of_file(frozen, n_classes), known()
    else:
        frozen.layers = frozen.layers or decoder.blocks(frozen.model.config.depth)
        head, said = head_of(partial(decoder.Head, n_out=n_classes), train_head, f"{n_classes} classes", frozen, c)
    found = ((i, scores(val.image(i), val.truth(i).shape, head, frozen))
             for i in range(ranks.rank, len(val), ranks.count))
    counts, shown = zip(*ranks.together(lambda: tallied(found, data, c)), strict=True)
    return sum(counts), {i: row for each in shown for i, row in each.items()}, said


def of_file(frozen, n_classes):
    """The head of a released file. Raises ValueError for one of other classes, or another kind."""
    found = load_decoder(frozen.c.head, frozen.model, frozen.layers or None)
    if not isinstance(found, Mask2Former) or found.n_out != n_classes:
        raise ValueError(f"--head {frozen.c.head} has {getattr(found, 'n_out', 'no')} classes, wanted a Mask2Former of "
                         f"{n_classes}, those of {frozen.c.task}")
    frozen.layers = found.layers
    return found.head.to(frozen.device)


@torch.no_grad()
def scores(image, size, head, frozen):
    """
    image C H W -> n H W of a size: the mean over --scales, plain and mirrored, of the softmax of what windows say

    paper:   App. D.10; the softmax is of sums that are no logits, as in the released code
    """
    c, total = frozen.c, 0
    for scale in scales_of(c):
        short = -(-int(c.resolution * scale) // COARSEST) * COARSEST
        side = min(c.resolution, short)
        stride = DECODERS[c.decoder].stride(side)
        for view in (image, image.flip(2)) if c.scales else (image,):
            found = [window_scores(x, head, frozen) for x in windows(view, side, stride, short)]
            found = slide(found, size, side, stride, short).softmax(0)
            total = total + (found if view is image else found.flip(2))
    return total


def window_scores(window, head, frozen):
    found = head(head.see(frozen, [window]))
    return masks.semantic(found.logits[-1], found.masks[-1], window.shape[1:])[0]


def scales_of(c):
    """--scales -> numbers. Raises ValueError."""
    try:
        found = [float(word) for word in c.scales.split(",")] if c.scales else [1.0]
    except ValueError:
        found = []
    if not found or not all(0.1 <= scale <= 10 for scale in found):
        raise ValueError(f"--scales {c.scales}: write multiples of --resolution, from 0.1 to 10, as in 0.9,1,1.1")
    return found

# --------------------------------------------------------------------------------
# The task


def tallied(found, data, c):
    """(i, scores n H W) of val images -> their confusion, summed;  rows of pictures by i"""
    (_, val, n_classes), counts, rows = data, 0, {}
    for i, each in found:
        each, truth = each.argmax(0), torch.from_numpy(val.truth(i)).to(each.device)
        counts = counts + confusion(each, truth, n_classes).cpu()
        if c.out and i < SHOWN:
            rows[i] = [shown(val.image(i)), hues(truth.cpu()), hues(each.cpu())]
    return counts, rows


def run(data, frozen, c):
    counts, shown, said = stored(data, frozen, c) if hasattr(DECODERS[c.decoder], "windows") else frozen.together(
        partial(live, data=data))
    save_pictures(c, [shown[i] for i in sorted(shown)])
    constant = torch.zeros_like(counts)
    constant[:, said["commonest"]] = counts.sum(1)
    said = {name: value for name, value in said.items() if name != "commonest"}
    return dict(**segmentation_scores(counts), chance_miou=segmentation_scores(constant)["miou"], n_classes=data[2],
                n_val=len(data[1]), **said)


def opened(c):
    """As open_segmentation, once the options of a decoder are what they should be. Raises ValueError."""
    scales_of(c)
    if c.decoder == "mask2former":
        if isinstance(reads(c), Channels):
            raise ValueError("--decoder mask2former recolours photos; for --bands and other channels write --decoder "
                             "linear")
        DECODERS[c.decoder].check(c, describe(c.weights))
    elif c.scales or c.init:
        raise ValueError(f"--{'scales' if c.scales else 'init'}: the decoder {c.decoder} does not read it; name "
                         "--decoder mask2former")
    return open_segmentation(c)


def planned(c):
    if c.decoder != "mask2former":
        raise ValueError(f"--plan: {c.decoder} learns from features on disk; it is for decoders of new views, as "
                         "mask2former")
    DECODERS[c.decoder].check(c, describe(c.weights))
    n_classes = len(CLASSES) + 1 if c.data == "shapes" else SETS[c.task].n_classes or MANY
    return DECODERS[c.decoder].planned(c, describe(c.weights), n_classes)


def task(name, layout, *paper, side=512):
    options = (Option("iterations", 40000, "steps of the head", shapes=300, least=1),
               Option("lr", 0.0, "peak; 0 = the decoder's own"),
               Option("ignore", IGNORE, f"a label that counts for nothing, beside {IGNORE}"),
               Option("init", "", "mask2former: head.safetensors of another --out that training begins from"),
               Option("scales", "", "mask2former, at test: multiples of --resolution, as in 0.9,1,1.1, each also "
                                    "mirrored; empty = once"))
    options += IMAGES if name == "segmentation" else ()
    return Task(name, layout, opened, run, wants="maps", metric="miou", sides=(side, 160), options=options,
                decoders=("linear", "mask2former"), released=("mask2former",), plan=planned,
                pictures="image, truth, prediction", paper=paper)


FOLDERS = "{images,annotations}/{training,validation}/"
TASKS = (
    task("segmentation", FOLDERS + ": class numbers from 0"),
    task("ade20k", FOLDERS, Paper("miou", by_size(
        47.0, 48.8, 51.8, 54.9, 54.8, 55.9, 42.7, 44.8, 46.3, 47.8), 512, dict(n_val=2000)),  # Tab. 14
        *(Paper("miou", {"7b": value}, 896, dict(n_val=2000), dict(decoder="mask2former", head=GIVEN, scales=scales))
          for value, scales in ((62.6, ""), (63.0, "0.9,0.95,1,1.05,1.1")))),                  # Tab. 11, App. D.10
    task("cityscapes", "leftImg8bit/, gtFine/*_labelTrainIds.png", Paper("miou", {"7b": 81.1}, 512, dict(n_val=500))),
    task("voc", "JPEGImages/, SegmentationClass[Aug]/, ImageSets/Segmentation/",
         Paper("miou", {"7b": 86.6}, 512, dict(n_val=1449))),                               # Tab. 3
    task("stuff", "{,images/}{train,val}2017/, stuffthingmaps/{train,val}2017/"),
    task("loveda", "{Train,Val}/{Urban,Rural}/{images_png,masks_png}/: 0 = ignored", side=1024),
    task("isaid", "{train,val}/{images,Semantic_masks}/: P*.png, *_instance_color_RGB.png", side=896),
    task("hypersim", "ai_*/images/*_final_preview/, *_geometry_hdf5/, metadata_images_split_scene_v1.csv"),
    task("camvid", FOLDERS + ": 11 = void"))
