"""
Measure frozen features.

    python evaluate.py --task knn --weights runs/tiny                             on the generated `shapes`
    python evaluate.py --task linear --weights runs/s --data PHOTOS               PHOTOS/train/CLASS, PHOTOS/val/CLASS
    python evaluate.py --task logreg --weights runs/s --data pets:DOWNLOADS       or cub, cars, ...: see finegrained.py
    python evaluate.py --task knn --weights pixels --data PHOTOS                  floor: 16x16 pixels as features
    python evaluate.py --task knn --weights untrained:s --data PHOTOS             floor: the network before training
    python evaluate.py --task knn --weights runs/s --data PHOTOS --control        floor: shuffled labels
    torchrun --nproc-per-node 8 evaluate.py --task ade20k --weights runs/s --data ADE      features from 8 GPUs

    Embedder   images -> features, once, in order                  resize 256, crop 224, as everyone does
    knn        weighted vote of the nearest training images        DINOv3 Tab. 1; Wu et al. 2018
    linear     logistic regression by SGD, many rates at once      DINOv3 App. D
    logreg     logistic regression, to its optimum; voc07: of several classes, 11-point mAP     see logreg.py
    retrieval  ranks by cosine; revisited Oxford and Paris, AmsterTime, or any folders of classes; mAP
    segmentation, ade20k, cityscapes, voc, camvid; depth, nyu, kitti; discovery     see dense.py
    tracking, davis, youtube-vos, mose; rgbd; keypoints, spair                      see matching.py
    navi                                                                            see navi.py
    video, ucf101, ssv2, k400                                                       see video.py

Prints a table, and last one line of JSON. Dimension letters: see the top of model.py.
"""

import json
import signal
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import dense
import finegrained
import matching
import navi
import retrieval
import variants
import video
from convnext import CONVNEXT_SIZES, ConvNeXt
from data import open_source, resize
from engine import config as command_line
from engine.chunks import ALONE, Computed, Folder, Job, index, leading, make, read, serve, start_ranks
from engine.features import Patches, PixelPatches, evenly
from engine.layouts import size_of
from logreg import logreg, voc07
from model import SIZES, ViT, build
from weights import identify, load_backbone


@dataclass(frozen=True)
class EvaluateConfig:
    task: str = ""             # knn, linear, logreg, segmentation, ...: all that the text above names
    weights: str = ""          # a run's folder, a weights file, pixels, or untrained:SIZE
    data: str = "shapes"       # a folder in the layout that the task's set has, NAME:PATH of finegrained.py, or shapes
    size: str = ""             # s, b, convnext_t, ...: stop if the weights are of another
    resolution: int = 0        # pixels: the square's side, dense tasks: the short side; 0 = the task's, see `configure`
    layers: str = ""           # dense tasks: blocks, 0-based, as in 3,5, side by side; empty = the last
    batch: int = 64            # images at a time
    limit: int = 0             # images, clips of each split, evenly spaced; 0 = all, or as many as shapes has
    device: str = "auto"       # auto, cpu, cuda, mps
    workers: int = 1           # processes that read images
    iterations: int = 0        # linear, segmentation, depth: steps; 0 = 12500, 40000, 38400, on shapes 12500, 300, 300
    lr: float = 0.0            # peak. 0 = segmentation 1e-3, depth 3e-4, ten times that below 5000 steps; video: a grid
    linear_batch: int = 1024   # linear: samples of a step
    seed: int = 0              # of the order of samples, the heads, the control
    control: bool = False      # truth that is shuffled, or patches that are: the score must be that of chance
    ignore: int = 255          # segmentation: a label that counts for nothing, beside 255
    shots: int = 0             # knn, linear, logreg: images of each class to train on, drawn 5 times; 0 = all, once
    tests: str = ""            # linear: more sets to score, as in imagenet-r,imagenet-a,real.json; see variants.py
    cache: str = ""            # folder that keeps features, to read or to go on with; empty = TMPDIR, while this runs
    out: str = ""              # dense tasks: folder for a picture of image, truth and prediction

UNTRAINED = SIZES | CONVNEXT_SIZES
TRIES = 5                      # draws of --shots
ROWS = 256                     # images whose class tokens lie in one file, or as many more as fill the last batch

# --------------------------------------------------------------------------------
# Features


class Pixels(torch.nn.Module):
    """The floor under every feature: the image itself, 16x16, normalised."""

    def forward(self, images):
        return F.interpolate(images, (16, 16), mode="bilinear", antialias=True).flatten(1)


def load_model(weights, size):
    """WEIGHTS of the command line -> a network in eval mode, and the name to print."""
    if weights == "pixels":
        return Pixels(), (SIZES["s"].mean, SIZES["s"].std)
    if weights.startswith("untrained:"):
        name = weights.partition(":")[2]
        if name not in UNTRAINED:
            raise ValueError(f"--weights {weights}: unknown size {name!r}; choose one of {', '.join(UNTRAINED)}")
        model = build(lambda: (ViT if name in SIZES else ConvNeXt)(UNTRAINED[name])).eval()
    else:
        model = load_backbone(weights, size or None)
    return model, (model.config.mean, model.config.std)


def labelled(i, source, side, view):
    """An image as the network wants it, C H W uint8, and its label."""
    return view(source.load(i), side), source.label(i)


def centre_crop(image, side):
    """C H W uint8 -> C side side: the short side becomes side * 256/224, then the middle is cut out."""
    H, W = image.shape[1:]
    scale = round(side * 256 / 224) / min(H, W)
    image = resize(image, max(side, round(H * scale)), max(side, round(W * scale)))
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    return image[:, top : top + side, left : left + side]


class Embedder:
    """
    embedder(source, chosen, name, view)    view  C H W uint8, resolution -> what the network sees
    returns  cls  n D,  mean patch  n D (pixels: no columns),  labels  n,  of the chosen images in order, on the host;
             unreadable images are left out, and named

    The features of 256 images are a file: see chunks.py. name  of the split, in --cache
    """
    def __init__(self, model, normalisation, c, device, ranks=ALONE):
        self.model, self.c, self.device, self.ranks = model.to(device), c, device, ranks
        self.mean, self.std = (torch.tensor(v, device=device)[:, None, None] for v in normalisation)

    def __call__(self, source, chosen, name="", view=centre_crop):
        c, chosen = self.c, list(chosen)
        size = -(-ROWS // c.batch) * c.batch
        folder = Folder(self.model, c, dict(name=name, n=len(chosen), size=size))
        dataset = Computed(partial(labelled, source=source, side=c.resolution, view=view))
        job = Job(folder, name or "features", dataset, folder.chunks(chosen, size), Embedder.pack)
        make([job], self, c, self.ranks)
        files = [index(path) for path in job.chunks]
        unreadable = [error for file in files for error in json.loads(read(*file["unreadable"]).tobytes())]
        for error in unreadable:
            print(f"skipped unreadable {error}")
        whole = [file for file in files if read(*file["labels"]).size]
        if not whole:
            raise ValueError(f"--data: none of {len(chosen)} images could be read; the first: {unreadable[0]}")
        return tuple(torch.from_numpy(np.concatenate([read(*file[name]) for file in whole]))
                     for name in ("cls", "patches", "labels"))

    @torch.no_grad()
    def run(self, images):
        x = (torch.stack(images).to(self.device).float() / 255 - self.mean) / self.std         # B 3 H W
        features = self.model(x)
        cls, patches = (features, x[:, 0, 0, :0]) if isinstance(features, torch.Tensor) else \
            (features.cls, features.patches.mean(1))                                           # B D each
        return cls.float().cpu().numpy(), patches.float().cpu().numpy()

    def pack(self, images):
        found, waiting, labels, unreadable = [], [], [], []
        for item in images:
            if isinstance(item, ValueError):
                raise item
            if isinstance(item, OSError):
                unreadable.append(str(item))
                continue
            waiting.append(item[0])
            labels.append(item[1])
            if len(waiting) == self.c.batch:
                found.append(self.run(waiting))
                waiting.clear()
        found += [self.run(waiting)] if waiting else []
        cls, patches = map(np.concatenate, zip(*found, strict=True)) if found else (np.empty((0, 0)),) * 2
        return dict(cls=cls, patches=patches, labels=np.array(labels, np.int64),
                    unreadable=np.frombuffer(json.dumps(unreadable).encode(), np.uint8))


def extract(model, normalisation, source, chosen, c, device):
    """What an Embedder returns, by one process."""
    return Embedder(model, normalisation, c, device)(source, chosen)


def open_splits(c):
    """Train and val sources with the same classes, and the images to take of each."""
    name, colon, root = c.data.partition(":")
    if c.data == "shapes":
        n_train, n_val = (c.limit, c.limit) if c.limit else (2000, 500)
        sources = open_source("shapes", n_train, seed=1000), open_source("shapes", n_val, seed=1001)
    elif colon and name in finegrained.NAMES:
        sources = finegrained.open_known(name, root)
    else:
        for split in ("train", "val"):
            if not Path(c.data, split).is_dir():
                raise ValueError(f"--data: {c.data} has no folder {split}; {c.task} wants train/CLASS/ and val/CLASS/")
        sources = open_source(Path(c.data, "train")), open_source(Path(c.data, "val"))
    train, val = sources
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"--data: train and val of {c.data} have different classes: {', '.join(odd[:5])}")
    if len(train.classes) < 2:
        raise ValueError(f"--data: {c.data}/train has {len(train.classes)} class folders; {c.task} wants at least 2")
    stray = next((path for source in sources for path in getattr(source, "paths", []) if "/" not in path), None)
    if stray:
        raise ValueError(f"--data: {stray} lies in no class folder; folders in train and val name the classes")
    return [(source, evenly(range(len(source)), c.limit)) for source in sources]

# --------------------------------------------------------------------------------
# Tasks: (train cls, patches, labels), (val ...), n classes, config -> {metric: percent}


def knn(train, val, n_classes, c, device, ks=(10, 20, 100, 200), temperature=0.07):
    """
    Each val image is what its nearest training images say, each voting with exp(cosine / temperature).

    returns  top-1 and, from 5 classes up, top-5 for every k, in percent of the val images

    paper:   DINOv3 Tab. 1; the votes are normalised over the largest k, which changes no ranking
    """
    bank, labels = F.normalize(train[0], dim=-1).to(device), train[2].to(device)
    ks = sorted({min(k, len(bank)) for k in ks})
    right, tops = {}, [1, 5] if n_classes >= 5 else [1]
    for cls, truth in zip(val[0].split(256), val[2].to(device).split(256), strict=True):
        similar, near = (F.normalize(cls, dim=-1).to(device) @ bank.T).topk(ks[-1])            # B k
        votes = (similar / temperature).softmax(-1)[..., None] * F.one_hot(labels[near], n_classes)
        votes = votes.cumsum(1)                                                                # B k classes
        for k in ks:
            ranked = votes[:, k - 1].argsort(dim=-1, descending=True, stable=True) == truth[:, None]  # B classes
            for top in tops:
                name = f"top{top}_k{k}"
                right[name] = right.get(name, 0) + ranked[:, :top].sum().item()
    return {name: 100 * count / len(val[0]) for name, count in right.items()}


RATES = [a * 10.0 ** b for b in range(-5, -1) for a in (1, 2, 5)] + [0.1]  # times batch / 256


def linear(train, val, n_classes, c, device, tests=()):
    """
    A linear classifier on cls and mean patch, one for each learning rate, trained side by side; val picks the rate.

    tests    (name, features, Variant) of other sets, which the rate that val picked is applied to
    returns  top-1 of the best rate, in percent, and the rate; top-1 or mCE of the tests

    paper:   DINOv3 App. D: SGD, momentum 0.9, cosine to 0, 10 epochs; there on cls alone, 15 rates, 2 weight decays
    differs: input, rates and steps are the released code's; but features are extracted once, from centre crops, where
             both train on random crops and flips, and val is looked at once, at the end
    """
    x, y = torch.cat(train[:2], dim=1).to(device), train[2].to(device)                         # n F
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
    def logits(split):
        return torch.addmm(bias, torch.cat(split[:2], dim=1).to(device), weight).unflatten(1, (R, n_classes))

    top1 = (logits(val).argmax(-1) == val[2].to(device)[:, None]).float().mean(0) * 100        # rates
    best = top1.argmax().item()
    others = {name: variants.top1(logits(split)[:, best], split[2], variant) for name, split, variant in tests}
    return dict(top1=top1[best].item(), lr=RATES[best], **variants.summary(others))


GLOBAL = dict(knn=knn, linear=linear, logreg=logreg)
FITTED = dict.fromkeys(dense.SEGMENTATION, dense.segmentation) | dict.fromkeys(dense.DEPTH, dense.depth)
FITTED |= dict.fromkeys(("video", "ucf101", "ssv2", "k400"), video.classification)
TRACKING = dict.fromkeys(("tracking", "davis", "youtube-vos", "mose"), matching.tracking)
MATCHING = TRACKING | dict.fromkeys(("keypoints", "spair"), matching.keypoints) | dict(
    rgbd=matching.geometry, navi=navi.navi)
CHOOSING = dict(retrieval=retrieval.retrieval, voc07=voc07)  # on class tokens of images that they choose
TASKS = GLOBAL | CHOOSING | FITTED | dict(discovery=dense.discovery) | MATCHING

# --------------------------------------------------------------------------------
# The program

SIDES = {  # --resolution where none is given: of photos, of shapes
    "global": (224, 80), dense.segmentation: (512, 160), dense.depth: (480, 160), dense.discovery: (480, 160),
    matching.keypoints: (1024, 480), navi.navi: (512, 512), video.classification: (256, 80)}
SIZE_NAMES = "s", "s+", "b", "l", "h+", "7b", "convnext_t", "convnext_s", "convnext_b", "convnext_l"
NO_CONVNEXT = [None] * 4
PAPER = {  # (task, metric): the paper's tables 3, 14, 15 and 22, by size; DAVIS with a short side of 960
    ("linear", "top1_real"): (87.0, 88.0, 89.3, 90.2, 90.3, 90.4, 87.7, 88.7, 89.2, 89.4),
    ("linear", "top1_imagenet-r"): (60.4, 68.8, 76.7, 88.1, 90.0, 91.1, 74.1, 74.1, 78.2, 82.4),
    ("linear", "top1_objectnet"): (50.9, 54.6, 64.1, 74.8, 78.6, 79.0, 58.7, 58.7, 61.3, 65.2),
    ("voc07", "map"): (*[None] * 5, 88.2, *NO_CONVNEXT),
    ("ade20k", "miou"): (47.0, 48.8, 51.8, 54.9, 54.8, 55.9, 42.7, 44.8, 46.3, 47.8),
    ("cityscapes", "miou"): (*[None] * 5, 81.1, *NO_CONVNEXT),
    ("voc", "miou"): (*[None] * 5, 86.6, *NO_CONVNEXT),
    ("nyu", "rmse"): (0.403, 0.399, 0.373, 0.352, 0.352, 0.309, 0.448, 0.432, 0.420, 0.403),
    ("kitti", "rmse"): (*[None] * 5, 2.346, *NO_CONVNEXT),
    ("davis", "j_and_f"): (72.7, 75.5, 77.2, 79.9, 79.3, 79.7, *NO_CONVNEXT),
    ("navi", "recall"): (56.3, 57.1, 58.8, 62.3, 63.3, 64.4, *NO_CONVNEXT),
    ("ucf101", "top1"): (*[None] * 5, 93.5, *NO_CONVNEXT),
    ("ucf101", "top1_tta"): (*[None] * 5, 93.5, *NO_CONVNEXT),
    ("ssv2", "top1"): (*[None] * 5, 70.1, *NO_CONVNEXT),
    ("ssv2", "top1_tta"): (*[None] * 5, 70.8, *NO_CONVNEXT),
    ("k400", "top1"): (*[None] * 5, 87.8, *NO_CONVNEXT),
    ("k400", "top1_tta"): (*[None] * 5, 88.2, *NO_CONVNEXT),
    ("spair", "recall"): (50.4, 55.2, 57.2, 61.2, 56.3, 58.7, *NO_CONVNEXT),
}


def beside(c, model, metrics):
    """{paper_METRIC: what the paper has for a network of this size, with its own data, resolution and steps}"""
    size = size_of(model.config) if c.weights != "pixels" else ""
    found = {}
    for (task, metric), values in PAPER.items():
        known = dict(zip(SIZE_NAMES, values, strict=True)).get(size)
        if task == c.task and metric in metrics and c.data != "shapes" and known is not None:
            found[f"paper_{metric}"] = known
    return found


def evaluate(c):
    """Runs one task; returns its line of JSON as a dict."""
    start = time.perf_counter()
    if c.task not in TASKS:
        raise ValueError(f"--task {c.task or '(none)'}: choose one of {', '.join(TASKS)}")
    for name, least in dict(batch=1, linear_batch=1, iterations=0, limit=0, shots=0, resolution=0, workers=0).items():
        if getattr(c, name) < least:
            raise ValueError(f"--{name} is {getattr(c, name)}; it must be at least {least}")
    if c.tests and (c.task != "linear" or c.data == "shapes"):
        raise ValueError(f"--tests: {c.task} on {c.data} has no use for it; write --task linear and --data IMAGENET")
    if not c.weights:
        raise ValueError("--weights is missing: a run's folder, a weights file, pixels, or untrained:SIZE")
    ranks, device = start_ranks(c.device)
    with redirect_stdout(None if ranks.rank else sys.stdout):
        model, normalisation = load_model(c.weights, c.size)
    if c.task in GLOBAL | CHOOSING:
        worker = Embedder(model, normalisation, c, device, ranks)
    else:
        scattered = c.control and c.task not in FITTED
        worker = Patches(PixelPatches() if c.weights == "pixels" else model, c, device, scattered, ranks)
    if ranks.rank:
        return serve(worker, c, ranks)
    with leading(ranks):
        metrics = measure(worker, c, device)
    return dict(task=c.task, weights=c.weights, data=c.data, **metrics, **beside(c, model, metrics), **settings(c),
                ranks=ranks.count, seconds=round(time.perf_counter() - start, 1))


def settings(c):
    """The options that the task has read, beside those that its metrics name."""
    names = ["resolution", "batch", "limit", "control", "seed"]
    names += ["shots"] if c.task in GLOBAL else ["layers"] if c.task not in CHOOSING else []
    names += dict.fromkeys(dense.SEGMENTATION, ["ignore"]).get(c.task, [])
    names += ["iterations", "linear_batch"] if c.task == "linear" else []
    return {name: getattr(c, name) for name in names}


def measure(worker, c, device):
    if c.task in GLOBAL:
        return measure_images(worker, c, device)
    if c.task in CHOOSING:
        def embed(name, source, chosen, view=None):
            features = worker(source, chosen, name, view or centre_crop)
            return features[0], features[2]

        return CHOOSING[c.task](embed, c)
    if c.task in TRACKING:
        worker.coming = [(clip.name, clip, worker.whole) for clip in matching.open_videos(c)]
    return TASKS[c.task](worker, c)


def measure_images(embedder, c, device):
    """A task on class tokens. --control shuffles the labels of both splits, or tight classes could be guessed."""
    splits = open_splits(c)
    train, val = (embedder(*split, name) for split, name in zip(splits, ("train", "val"), strict=True))
    if c.control:
        rng = np.random.default_rng(c.seed)
        train, val = ((*x[:2], x[2][torch.from_numpy(rng.permutation(len(x[2])))]) for x in (train, val))
    n_classes = len(splits[0][0].classes)
    tests = []
    for path in c.tests.split(",") if c.tests else []:
        for name, variant in variants.open_variants(path, *(source for source, _ in splits)).items():
            chosen = evenly(range(len(variant.source)), c.limit)
            tests.append((name, embedder(variant.source, chosen, f"{path} {name}"), variant))
    found = []
    for rows in few(train[2], c) if c.shots else [slice(None)]:
        part = [x[rows] for x in train]
        found.append(GLOBAL[c.task](part, val, n_classes, c, device, *([tests] if c.task == "linear" else [])))
    metrics = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
    spread = {f"std_{name}": float(np.std([each[name] for each in found])) for name in metrics} if c.shots else {}
    return dict(**metrics, **spread, chance=100 / n_classes, n_train=len(part[0]), n_val=len(val[0]))


def few(labels, c):
    """Rows of `shots` images of each class, five times."""
    for k in range(TRIES):
        order = torch.from_numpy(np.random.default_rng([c.seed, k]).permutation(len(labels)))
        yield torch.cat([order[labels[order] == label][: c.shots] for label in labels.unique()])


def in_patches(side, weights):
    """The next side of whole patches of the network that --weights names; of a file only the shapes are read."""
    name = weights.partition(":")[2]
    if weights in ("", "pixels") or weights.startswith("untrained:"):
        patch = UNTRAINED[name].patch_size if name in UNTRAINED else 16
    else:
        patch = identify(weights).config.patch_size
    return -(-side // patch) * patch


def configure(argv):
    """The command line -> the config, with the task's own resolution and steps where none were given."""
    values, words = command_line.read_words(argv, command_line.types(EvaluateConfig()))
    if words:
        raise ValueError(f"{words[0]!r} is not an option; write --field value")
    c = command_line.apply(EvaluateConfig(), values)
    kind, small = ("global" if c.task in GLOBAL | CHOOSING else TASKS.get(c.task)), c.data == "shapes"
    photos, generated = SIDES.get(kind, (480, 480))
    side = c.resolution or in_patches(generated if small else photos, c.weights)
    steps = {"global": 12500, dense.segmentation: 40000, dense.depth: 38400}.get(kind, 0)
    return command_line.replace(c, resolution=side, iterations=c.iterations or (
        300 if small and kind != "global" else steps))


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip(), command_line.describe(EvaluateConfig()), sep="\n\n")
        return
    result = evaluate(configure(argv))
    if result is None:  # a rank that served
        return
    for name, value in result.items():
        print(f"{name:14} {value:.3f}" if isinstance(value, float) else f"{name:14} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # torchrun's, too: temporary folders go as after Ctrl-C
    command_line.run(main)
