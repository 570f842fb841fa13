"""
Detection: boxes and classes of objects, from frozen patches and a decoder; COCO's AP, in percent.

    python evaluate.py --task detection --weights runs/tiny --decoder detr                  on the generated `shapes`
    python evaluate.py --task coco --weights 7b.pth --data COCO --stage coco --start heads/head.safetensors --out heads
    python evaluate.py --task coco --weights 7b.pth --data COCO --head coco2017_detr_head.pth --tta linear
    python evaluate.py --task coco_o --weights 7b.pth --data COCO-O --head heads/head.safetensors

Trained on new views in every step, on all ranks. A hundred answers of an image are scored.
paper:   DINOv3 §6.3.1, Tab. 10, App. D.9. Dimension letters: see the top of model.py.
differs: §8.3, Tab. 19 has DIOR by a Faster R-CNN, which is not here: none of its numbers stands beside ours
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv
from torchvision.tv_tensors import BoundingBoxes

from decoders import DECODERS, load_decoder, of_one_name, read
from decoders.detr import FEWEST, Detector
from decoders.fit import everyone, fit, plan, untrained
from decoders.objects import detection_loss, soft_nms
from engine.coco import coco_scores
from engine.features import chosen_layers, describe
from engine.heads import head_of, released
from engine.images import resize
from engine.pictures import SHOWN, framed, named, save_pictures
from engine.ranks import linked
from engine.task import GIVEN, Option, Paper, Task
from engine.views import fitted
from sets.detections import open_detections
from sets.pairs import others

FLIP = 0.5
SMALLEST = 0.6         # of --resolution: short sides of a step's images lie between; 920 of 1536, 1228 of 2048
CUT = 0.6, 1.0         # share of the area of a cut
SCALES = tuple(k / 2048 for k in (1536, 1728, 1920, 2112, 2304, 2496, 2688, 2880))  # of --tta, of --resolution
SCORED = 100           # answers of an image
VIEWED = 300           # answers of a view that are merged

# --------------------------------------------------------------------------------
# What is learned from


def sample(row, rng, source, order, side, patch, alike):
    """
    An image, C H W uint8, and its objects, dict(boxes m 4, labels m), in its pixels, as a step sees them: mirrored half
    of the time; resized, or a part of 60 to 100 % of the area cut out and resized. Without an rng: fitted.

    alike   all as large as `fitted` makes them, so that they go through the network together
    paper:  App. D.9
    """
    image, truth = source.image(row), source.truth(order[row])
    H, W = image.shape[1:]
    boxes = BoundingBoxes(torch.from_numpy(truth.boxes[~truth.crowds]).float(), format="XYXY", canvas_size=(H, W))
    labels = torch.from_numpy(truth.labels[~truth.crowds])
    size = sized(image, side, patch)
    if rng is not None:
        if rng.random() < FLIP:
            image, boxes = tv.horizontal_flip(image), tv.horizontal_flip(boxes)
        if alike or rng.random() < 0.5:
            share = rng.uniform(*CUT) ** 0.5
            h, w = round(share * H), round(share * W)
            top, left = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
            image, boxes = tv.crop(image, top, left, h, w), tv.crop(boxes, top, left, h, w)
        if not alike:
            size = sized(image, max(round(rng.uniform(SMALLEST, 1) * side), FEWEST * patch), patch)
    image = tv.resize(image, size, v2.InterpolationMode.BICUBIC, antialias=True)
    boxes = tv.clamp_bounding_boxes(tv.resize(boxes, size)).as_subclass(torch.Tensor)
    there = (boxes[:, 2:] > boxes[:, :2] + 1).all(1)  # less than a pixel is left of others
    return image.contiguous(), dict(boxes=boxes[there], labels=labels[there])


def sized(image, side, patch):
    """H W that `fitted` gives an image"""
    short = min(image.shape[1:])
    return [-(-x * side // (short * patch)) * patch for x in image.shape[1:]]


def boxes_in(objects):
    return sum(len(each["labels"]) for each in objects)


def begun(head, path):
    """The head with the parameters of a file, ours or released, but for the classes if it has others"""
    stored, own = of_one_name(read(Path(path))[0]), head.state_dict()
    other = [name for name in own if name not in stored or stored[name].shape != tuple(own[name].shape)]
    if strange := [name for name in other if not name.startswith("class_embed")]:
        raise ValueError(f"--start {path} has {strange[0]} of another shape, or not at all; name a head of the same "
                         "decoder, windows and backbone")
    if other:
        print(f"--start {path} has other classes: they begin anew")
    head.load_state_dict(own | {name: stored[name].read() for name in own if name not in other})
    return head


def stage_of(c):
    stages = DECODERS[c.decoder].STAGES
    if c.stage not in stages:
        raise ValueError(f"--stage {c.stage}: choose one of {', '.join(stages)}")
    return stages[c.stage]


def steps_of(c, stage, n):
    return c.iterations or max(stage.epochs * n // stage.recipe.batch, 1)


def train_live(frozen, data, build, ranks):
    c, patch, train, stage = frozen.c, frozen.model.config.patch_size, data.train, stage_of(frozen.c)
    if train is None:
        raise ValueError(f"--data: {c.data} has six domains, and no images to train on; name a --head")
    head = untrained(partial(build, frozen.model.config.width), c)
    head = begun(head, c.start) if c.start else head
    alike = c.data == "shapes"
    views = partial(sample, source=train, order=others(len(train), c), side=c.resolution, patch=patch, alike=alike)
    loss = partial(detection_loss, of_classes=stage.of_classes, giou=stage.giou)
    # others go through one at a time, as in the paper: what pads them would be seen
    asked = replace(c, iterations=steps_of(c, stage, len(train)), batch=c.batch if alike else 1)
    said = fit(head, views, len(train), loss, stage.recipe, asked, frozen, ranks, count=boxes_in)
    names = {str(label): name for label, name in data.names.items()}
    return head, dict(guess=constant(train), names=names, n_train=len(train), **said)


def constant(train):
    """What can be said without looking: of each class the mean box, as shares of the sides, and how common it is"""
    boxes = {}
    for truth in map(train.truth, range(len(train))):
        for box, label in zip(truth.boxes / (truth.size[::-1] * 2), truth.labels.tolist(), strict=True):
            boxes.setdefault(label, []).append(box)
    return {label: [*np.mean(each, 0).tolist(), len(each)] for label, each in sorted(boxes.items())}

# --------------------------------------------------------------------------------
# The task


@torch.no_grad()
def answer(image, frozen, head, best):
    """
    C H W uint8 -> boxes n 4 in its pixels, scores n, labels n, the SCORED best: of the whole image, or of all its views

    paper:   App. D.9: eight sizes, each and its mirror image
    differs: Soft-NMS of the VIEWED best of each view
    """
    c, patch, found = frozen.c, frozen.model.config.patch_size, []
    for scale in SCALES if c.tta else (1,):
        for mirrored in (False, True)[: 1 + bool(c.tta)]:
            size = sized(image, round(scale * c.resolution), patch)
            view = resize(image, *size)
            last = head(head.see(frozen, [view.flip(2) if mirrored else view])).layers[-1]
            each = best(last.logits[0], last.boxes[0], size, VIEWED if c.tta else SCORED)
            if mirrored:
                left, top, right, bottom = each["boxes"].unbind(1)
                each["boxes"] = torch.stack([size[1] - right, top, size[1] - left, bottom], 1)
            shares = each["boxes"] / each["boxes"].new_tensor(size[::-1] * 2)
            found.append(each | dict(boxes=shares * shares.new_tensor(tuple(image.shape[:0:-1]) * 2)))
    if c.tta:
        boxes, scores, labels = (torch.cat([each[key] for each in found]) for key in ("boxes", "scores", "labels"))
        found = [soft_nms(boxes, scores, labels, c.tta)]
    return [found[0][key][:SCORED].cpu().numpy() for key in ("boxes", "scores", "labels")]


def guessed(guess, size):
    """The same answers for every image: `constant`'s"""
    rows = np.array([row for row in guess.values()])
    return rows[:, :4] * (size[::-1] * 2), rows[:, 4] / rows[:, 4].sum(), np.array([int(label) for label in guess])


def answering(frozen, data, ranks):
    """A released head, or one of ours;  what is known of it"""
    c, decoder = frozen.c, DECODERS[frozen.c.decoder]
    if released(frozen.task, c):
        found = load_decoder(c.head, frozen.model, frozen.layers or None, n_windows=c.windows)
        if not isinstance(found, Detector) or found.head.config.n_classes != data.n_classes:
            raise ValueError(f"--head {c.head} is no detector of {data.n_classes} classes, as {c.data} wants")
        if found.head.config.windows != c.windows:
            raise ValueError(f"--windows {c.windows}: --head {c.head} sees {found.head.config.windows} a side")
        frozen.layers = found.layers
        return found.head.to(frozen.device), dict(names={})
    frozen.layers = decoder.layers_of(frozen.model.config, frozen.layers)
    build = partial(decoder.Head, n_out=data.n_classes, windows=c.windows, n_layers=len(frozen.layers))
    with torch.device("meta"):
        outputs = decoder.outputs(build(frozen.model.config.width).config)
    head, said = head_of(build, partial(train_live, frozen, data, build, ranks), outputs, frozen, c)
    if odd := [label for label in said["names"] if said["names"][label] != data.names.get(int(label))]:
        raise ValueError(f"--head {c.head} calls class {odd[0]} {said['names'][odd[0]]}, {c.data} "
                         f"{data.names.get(int(odd[0]), 'has none of that number')}; name a head of these classes")
    return head, said


def live(frozen, data):
    """{val: answers, and pictures of some}, of all ranks; what is known of the head"""
    ranks = linked(frozen.ranks)
    head, said = answering(frozen, data, ranks)
    return {name: everyone(partial(answered, val=val, frozen=frozen, head=head, names=said["names"]), len(val), ranks)
            for name, val in data.vals.items()}, said


def answered(i, val, frozen, head, names):
    """Image i's answers; of some a row of pictures, with as many answers, the best, as there are objects"""
    image, truth = val.image(i), val.truth(i).boxes
    found = answer(image, frozen, head, DECODERS[frozen.c.decoder].best)
    if not frozen.c.out or i >= SHOWN:
        return found, None
    best = (x[: len(truth)] for x in found)
    return found, [image, framed(image, truth), named(image, *best, names, least=0)]


def run(data, frozen, c):
    found, said = frozen.together(partial(live, data=data))
    guess = said.get("guess") or (constant(data.train) if data.train else None)
    scores, chance, truths = {}, {}, {}
    for name, val in data.vals.items():
        truths[name] = [val.truth(i) for i in range(len(val))]
        scores[name] = coco_scores([each for each, _ in found[name]], truths[name])
        if guess:
            chance[name] = coco_scores([guessed(guess, truth.size) for truth in truths[name]], truths[name])
        if scores[name]["ap"] is None:
            raise ValueError(f"--data: no object in {len(val)} images to measure on; wanted some")
    save_pictures(c, [shown for each in found.values() for _, shown in each if shown][:SHOWN])
    every = [truth for each in truths.values() for truth in each]
    apart = {f"ap_{name}": each["ap"] for name, each in scores.items()} if len(scores) > 1 else {}
    return dict(**mean_of(scores), **apart, **({"chance_ap": mean_of(chance)["ap"]} if chance else {}),
                n_val=len(every), n_boxes=sum(len(truth.labels) for truth in every),
                n_dropped=sum(truth.dropped for truth in every), n_classes=len(data.names),
                **{key: x for key, x in said.items() if key not in ("guess", "names")})


def mean_of(scores):
    """Of the sets; what one of them has no object for is left out"""
    keys = [key for key in next(iter(scores.values())) if all(each[key] is not None for each in scores.values())]
    return {key: float(np.mean([each[key] for each in scores.values()])) for key in keys}


def planned(c):
    """What --plan says, of images half as wide again as high"""
    config, decoder = describe(c.weights), DECODERS[c.decoder]
    layers = decoder.layers_of(config, chosen_layers(c, config))
    with torch.device("meta"):
        head = decoder.Head(config.width, 91, c.windows, len(layers))
    shape = 3, c.resolution, c.resolution if c.data == "shapes" else c.resolution * 3 // 2
    return plan(head, stage_of(c).recipe, replace(c, batch=c.batch if c.data == "shapes" else 1), config, layers, shape)


def opened(c):
    """The data. Raises ValueError also for what the command line alone could tell."""
    if c.tta not in ("", "linear", "quadratic"):
        raise ValueError(f"--tta {c.tta}: write linear or quadratic")
    stage_of(c)
    DECODERS[c.decoder].layers_of(describe(c.weights), [])
    return open_detections(c)


def task(name, layout, *paper, trains=True):
    options = (Option("iterations", 0, "steps of the head; 0 = the stage's epochs", shapes=300),
               Option("lr", 0.0, "peak; 0 = the stage's"),
               Option("stage", "coco", "numbers of the training: small, or the paper's: objects365 at --resolution "
                      "1536, objects365_large, coco", shapes="small"),
               Option("start", "", "a head, ours or released, that training begins with; classes may be others",
                      scored=False),
               Option("windows", 3, "per side, each seen by itself beside the whole image; 0 = the image as it is",
                      shapes=0),
               Option("tta", "", "linear or quadratic: eight sizes and mirror images, merged by this Soft-NMS"))
    return Task(name, layout, opened, run, wants="maps", metric="ap", view=fitted, sides=(2048, 160), options=options,
                decoders=("detr",), plan=planned, trains=trains, released=("detr",),
                pictures="image, truth, as many answers, the best", paper=paper)


COCO = "annotations/instances_{train,val}2017.json, {train,val}2017/"
TASKS = (
    task("detection", COCO + "; or VOC: JPEGImages/, Annotations/*.xml, ImageSets/Main/"),
    task("coco", COCO, *(Paper("ap", {"7b": value}, side, dict(n_val=5000), options)           # Tab. 10; App. D.9
                         for value, side, options in ((65.6, 2048, {}), (65.6, 2048, dict(head=GIVEN)),
                                                      (65.4, 1536, dict(head=GIVEN)),
                                                      (66.1, 2048, dict(head=GIVEN, tta="quadratic"))))),
    task("dior", "JPEGImages-{trainval,test}/, Annotations/[Horizontal Bounding Boxes/]*.xml, [ImageSets/]Main/"),
    task("coco_o", "{cartoon,handmake,painting,sketch,tattoo,weather}/, each as COCO with a val alone", trains=False))
