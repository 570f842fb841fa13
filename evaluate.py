"""
Measure frozen features.

    python evaluate.py --task knn --weights runs/tiny                             on the generated `shapes`
    python evaluate.py --task linear --weights runs/s --data PHOTOS               PHOTOS/train/CLASS, PHOTOS/val/CLASS
    python evaluate.py --task knn --weights pixels --data PHOTOS                  floor: 16x16 pixels as features
    python evaluate.py --task knn --weights untrained:s --data PHOTOS             floor: the network before training

    extract   images -> features, once, in order                  resize 256, crop 224, as everyone does
    knn       weighted vote of the nearest training images        DINOv3 Tab. 1; Wu et al. 2018
    linear    logistic regression by SGD, many rates at once      DINOv3 App. D

Prints a table, and last one line of JSON. Dimension letters: see the top of model.py.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

import config as command_line
from data import loader, open_source, resize
from model import SIZES, ViT, build
from weights import load_backbone


@dataclass(frozen=True)
class EvaluateConfig:
    task: str = ""             # knn, linear
    weights: str = ""          # a run's folder, a weights file, pixels, or untrained:SIZE
    data: str = "shapes"       # a folder with train/CLASS/... and val/CLASS/..., or shapes
    size: str = ""             # s, b, convnext_t, ...: stop if the weights are of another
    resolution: int = 0        # pixels of the square that the network sees; 0 = 224 for photos, 80 for shapes
    batch: int = 64            # images at a time
    limit: int = 0             # images of each split, evenly spaced; 0 = all (shapes: 2000 train, 500 val)
    device: str = "auto"       # auto, cpu, cuda, mps
    workers: int = 1           # processes that read images
    iterations: int = 12500    # linear: SGD steps
    linear_batch: int = 1024   # linear: samples of a step
    seed: int = 0              # linear: order of the samples

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
        if name not in SIZES:
            raise ValueError(f"--weights {weights}: unknown size {name!r}; choose one of {', '.join(SIZES)}")
        vit = build(lambda: ViT(SIZES[name])).eval()
    else:
        vit = load_backbone(weights, size or None)
    return vit, (vit.config.mean, vit.config.std)


class Prepared(Dataset):
    """
    source[i] as the network wants it: short side to 256/224 of the resolution, centre crop; uint8, and its label.
    An image that cannot be read comes as its error.
    """
    def __init__(self, source, resolution):
        self.source, self.resolution = source, resolution

    def __getitem__(self, i):
        try:
            return centre_crop(self.source.load(i), self.resolution), self.source.label(i)
        except OSError as error:
            return str(error), -1

    def __len__(self):
        return len(self.source)


def centre_crop(image, side):
    """C H W uint8 -> C side side: the short side becomes side * 256/224, then the middle is cut out."""
    H, W = image.shape[1:]
    scale = round(side * 256 / 224) / min(H, W)
    image = resize(image, max(side, round(H * scale)), max(side, round(W * scale)))
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    return image[:, top : top + side, left : left + side]


@torch.no_grad()
def extract(model, normalisation, source, chosen, c, device):
    """
    Features of the chosen images, in float32 on the host, in order.

    returns  cls  n D,  mean patch  n D (pixels: no columns),  labels  n;  unreadable images are left out, and named
    """
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in normalisation)
    stream = loader(Prepared(source, c.resolution), chosen, c.workers, prefetch_factor=c.batch if c.workers else None)
    found, waiting, unreadable = [], [], []

    def run():
        images, labels = zip(*waiting, strict=True)
        x = (torch.stack(images).to(device).float() / 255 - mean) / std                        # B 3 H W
        features = model(x)
        cls, patches = (features, x[:, 0, 0, :0]) if isinstance(features, torch.Tensor) else \
            (features.cls, features.patches.mean(1))                                           # B D each
        found.append((cls.float().cpu(), patches.float().cpu(), torch.tensor(labels)))
        waiting.clear()

    for image, label in tqdm(stream, total=len(chosen), desc="features", unit="img", leave=False, disable=None):
        if label < 0:
            unreadable.append(image)
            continue
        waiting.append((image, label))
        if len(waiting) == c.batch:
            run()
    if waiting:
        run()
    for error in unreadable:
        print(f"skipped unreadable {error}")
    if not found:
        raise ValueError(f"--data: none of {len(chosen)} images could be read; the first: {unreadable[0]}")
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def open_splits(c):
    """Train and val sources with the same classes, and the images to take of each."""
    if c.data == "shapes":
        n_train, n_val = (c.limit, c.limit) if c.limit else (2000, 500)
        sources = open_source("shapes", n_train, seed=1000), open_source("shapes", n_val, seed=1001)
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
    return [(source, evenly(len(source), c.limit)) for source in sources]


def evenly(n, limit):
    """All of n indices, or `limit` of them, evenly spaced, so that folders sorted by class stay balanced."""
    return range(n) if not limit or limit >= n else [i * n // limit for i in range(limit)]

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


def linear(train, val, n_classes, c, device):
    """
    A linear classifier on cls and mean patch, one for each learning rate, trained side by side; val picks the rate.

    returns  top-1 of the best rate, in percent, and the rate

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
    with torch.no_grad():
        logits = torch.addmm(bias, torch.cat(val[:2], dim=1).to(device), weight).unflatten(1, (R, n_classes))
        top1 = (logits.argmax(-1) == val[2].to(device)[:, None]).float().mean(0) * 100         # rates
    best = top1.argmax().item()
    return dict(top1=top1[best].item(), lr=RATES[best])


TASKS = dict(knn=knn, linear=linear)


def evaluate(c):
    """Runs one task; returns its line of JSON as a dict."""
    start = time.perf_counter()
    if c.task not in TASKS:
        raise ValueError(f"--task {c.task or '(none)'}: choose one of {', '.join(TASKS)}")
    for name, least in dict(batch=1, linear_batch=1, iterations=1, limit=0, resolution=0, workers=0).items():
        if getattr(c, name) < least:
            raise ValueError(f"--{name} is {getattr(c, name)}; it must be at least {least}")
    if not c.weights:
        raise ValueError("--weights is missing: a run's folder, a weights file, pixels, or untrained:SIZE")
    device = command_line.choose_device(c.device)
    model, normalisation = load_model(c.weights, c.size)
    splits = open_splits(c)
    sets = [extract(model.to(device), normalisation, source, chosen, c, device) for source, chosen in splits]
    metrics = TASKS[c.task](*sets, len(splits[0][0].classes), c, device)
    return dict(task=c.task, weights=c.weights, data=c.data, **metrics, resolution=c.resolution,
                n_train=len(sets[0][0]), n_val=len(sets[1][0]), seconds=round(time.perf_counter() - start, 1))


def configure(argv):
    values, words = command_line.read_words(argv, command_line.types(EvaluateConfig()))
    if words:
        raise ValueError(f"{words[0]!r} is not an option; write --field value")
    c = command_line.apply(EvaluateConfig(), values)
    side = c.resolution or (80 if c.data == "shapes" else 224)
    return command_line.replace(c, resolution=side)


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip(), command_line.describe(EvaluateConfig()), sep="\n\n")
        return
    result = evaluate(configure(argv))
    for name, value in result.items():
        print(f"{name:12} {value:.2f}" if isinstance(value, float) else f"{name:12} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    command_line.run(main)
