"""
Measure frozen patch features, image by image. evaluate.py is the command; matching.py compares images.

    python evaluate.py --task segmentation --weights runs/tiny                      on the generated `shapes`
    python evaluate.py --task ade20k --weights runs/s --data ADE --out pictures     images/, annotations/
    python evaluate.py --task nyu --weights runs/s --data NYU --cache features      train/rgb_*.jpg, train/depth_*.png
    python evaluate.py --task discovery --weights runs/s --data VOC2012             JPEGImages/, Annotations/*.xml

    fit             a linear head on maps of features, by AdamW
    segmentation    a class for every pixel, sliding windows; mIoU                     DINOv3 Tab. 3, App. D.1
    depth           256 bins of depth for every pixel; RMSE                            DINOv3 Tab. 3, App. D.2
    discovery       the main object's box from the graph of patches; CorLoc            Wang et al. 2022, TokenCut

A task is (patches, config) -> {metric: number}. Dimension letters: see the top of model.py.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from operator import attrgetter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import shapes
from engine.features import (
    GENERATED,
    SHOWN,
    Pairs,
    Scenes,
    evenly,
    folders,
    generated,
    hues,
    images_below,
    nearest,
    paired,
    save_pictures,
    scene,
    shades,
    starts,
    windows,
)
from engine.metrics import IGNORE, box_overlap, confusion, depth_scores, segmentation_scores

BATCH = 16              # views of a step
FEW = 5000              # steps: fewer need a larger rate to get anywhere
VOC_LIST = "ImageSets/Main/trainval.txt"
FLAT = 14.0             # metres, no scene of shapes is deeper

# --------------------------------------------------------------------------------
# A linear head


class LinearHead(nn.Module):
    """BatchNorm, then one linear layer on every patch:  list of h w D -> list of n_out h w"""

    def __init__(self, width, n_out, dropout=0.0):
        super().__init__()
        self.dropout, self.norm, self.linear = dropout, nn.BatchNorm1d(width), nn.Linear(width, n_out)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, maps):
        grids = [m.shape[:2] for m in maps]
        if self.training and self.dropout:  # of whole channels, drawn for each view
            maps = [m * F.dropout(m.new_ones(m.shape[2]), self.dropout) for m in maps]
        x = self.linear(self.norm(torch.cat([m.flatten(0, 1) for m in maps])))                 # (views P) n_out
        return [part.T.unflatten(1, grid) for part, grid in zip(x.split([h * w for h, w in grids]), grids, strict=True)]


def enlarge(map, size):
    """C h w -> C H W, bilinear"""
    return F.interpolate(map[None], size, mode="bilinear", align_corners=False)[0]


@dataclass(frozen=True)
class Recipe:
    lr: float                  # peak
    weight_decay: float
    beta2: float
    warmup: float              # share of the steps
    clip: float                # largest gradient norm
    dropout: float = 0.0


def peak(recipe, c):
    return c.lr or recipe.lr * (10 if c.iterations < FEW else 1)


def fit(maps, truths, n_out, loss_of, recipe, c, device):
    """
    A linear head, trained on random batches of views.

    maps     h w D float16 each    truths  H W each: of both only a batch is in memory
    loss_of  (list of n_out h w, list of H W) -> scalars, whose sum is the loss; one at a time is in memory

    paper:  DINOv3 App. D.1, D.2; there every step sees new crops, flips and colours of the images and three learning
            rates are tried; here the features are computed once, from the images as they are
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(c.seed)
        head, lr = LinearHead(maps[0].shape[2], n_out, recipe.dropout).to(device), peak(recipe, c)
        optimizer = torch.optim.AdamW(head.parameters(), lr, (0.9, recipe.beta2), weight_decay=recipe.weight_decay)
        order, warmup = [], max(round(recipe.warmup * c.iterations), 1)
        for step in tqdm(range(c.iterations), desc="head", unit="it", leave=False, disable=None):
            while len(order) < min(BATCH, len(maps)):
                order += torch.randperm(len(maps)).tolist()
            rows, order = order[:BATCH], order[BATCH:]
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / warmup, 1) * (1 + math.cos(math.pi * step / c.iterations)) / 2
            out = head([torch.from_numpy(maps[i]).to(device).float() for i in rows])
            leaves = [logits.detach().requires_grad_() for logits in out]
            for part in loss_of(leaves, [torch.from_numpy(truths[i]).to(device) for i in rows]):
                part.backward()
            optimizer.zero_grad()
            torch.autograd.backward(out, [leaf.grad for leaf in leaves])
            nn.utils.clip_grad_norm_(head.parameters(), recipe.clip)
            optimizer.step()
    return head.eval()


def others(n, c):
    """Whose truth each of n images is trained with: its own, or under --control another's."""
    return np.random.default_rng(c.seed).permutation(n) if c.control else np.arange(n)


# --------------------------------------------------------------------------------
# Semantic segmentation


@dataclass(frozen=True)
class Labels:
    n_classes: int = 0         # 0 = as many as the largest label says
    first: int = 0             # label of class 0; what lies below it is ignored
    void: int = IGNORE         # label that is ignored


SEGMENTATION = dict(segmentation=Labels(), ade20k=Labels(150, first=1), cityscapes=Labels(19), voc=Labels(21),
                    camvid=Labels(11, void=11))
SEGMENTATION_RECIPE = Recipe(lr=1e-3, weight_decay=1e-3, beta2=0.999, warmup=1500 / 40000, clip=math.inf, dropout=0.1)


def read_labels(path, labels):
    """A file of class numbers, palette or grey -> H W uint8, ignored ones 255"""
    with Image.open(path) as file:
        if file.mode not in ("P", "L", "I", "I;16", "1"):
            raise ValueError(f"{path} has mode {file.mode}; wanted class numbers: a grey, or a palette's index")
        truth = np.asarray(file).astype(np.int64)
    out = (truth == labels.void) | (truth == IGNORE) | (truth < labels.first)
    top = int(truth[~out].max(initial=0))
    if labels.n_classes and top >= labels.first + labels.n_classes:
        raise ValueError(f"{path} has label {top}; wanted {labels.n_classes} classes from {labels.first} on")
    return np.where(out, IGNORE, truth - labels.first).astype(np.uint8)


def open_segmentation(c):
    """train, val, number of classes"""
    labels = SEGMENTATION[c.task]
    labels = labels if labels.void != IGNORE else replace(labels, void=c.ignore)
    if c.data == "shapes":
        return *generated(c, attrgetter("semantic")), len(shapes.CLASSES) + 1
    layout = dict(cityscapes=cityscapes_pairs, voc=voc_pairs).get(c.task, label_pairs)
    read = partial(read_labels, labels=labels)
    train, val = (Pairs(layout(c, *split), read) for split in (("training", "train"), ("validation", "val")))
    truths = (part.truth(i) for part in (train, val) for i in range(len(part)))
    return train, val, labels.n_classes or 1 + max(int(truth[truth != IGNORE].max(initial=0)) for truth in truths)


def label_pairs(c, *split):
    """images/training/NAME.jpg, annotations/training/NAME.png; train and val are understood too"""
    images, labels = (folders(c, *[f"{kind}/{name}" for name in split]) for kind in ("images", "annotations"))
    return paired(c, images_below(images), images_below(labels), lambda path: path.stem)


def cityscapes_pairs(c, _, split):
    images = folders(c, f"leftImg8bit/{split}").rglob("*_leftImg8bit.png")
    labels = folders(c, f"gtFine/{split}").rglob("*_gtFine_labelTrainIds.png")
    return paired(c, images, labels, lambda path: path.name.replace("_gtFine_labelTrainIds", "_leftImg8bit"))


def voc_pairs(c, _, split):
    labels, lists = folders(c, "SegmentationClassAug", "SegmentationClass"), folders(c, "ImageSets/Segmentation")
    more = lists / f"{split}aug.txt"  # the 10,582 images that people train on
    names = (more if more.is_file() and labels.name.endswith("Aug") else lists / f"{split}.txt").read_text().split()
    return evenly([(folders(c, "JPEGImages") / f"{name}.jpg", labels / f"{name}.png") for name in names], c.limit)


def segmentation_loss(out, truths):
    """Cross entropy, summed over the pixels that count, over the number of all pixels, as the released code has it."""
    n = sum(truth.numel() for truth in truths)
    for logits, truth in zip(out, truths, strict=True):
        logits = enlarge(logits, truth.shape)[None]
        yield F.cross_entropy(logits, truth[None].long(), ignore_index=IGNORE, reduction="sum") / n


@torch.no_grad()
def label_map(head, maps, size, side, device):
    """The class of every pixel: windows' logits, averaged where they overlap, enlarged to the image's size H W."""
    scale = side / min(size)
    H, W = (max(side, round(x * scale)) for x in size)
    total, visits = 0, torch.zeros(H, W, device=device)
    places = [(y, x) for y in starts(H, side) for x in starts(W, side)]
    for (y, x), logits in zip(places, head([torch.from_numpy(m).to(device).float() for m in maps]), strict=True):
        here = F.pad(enlarge(logits, (side, side)), (x, W - side - x, y, H - side - y))
        total = total + here
        visits[y : y + side, x : x + side] += 1
    return enlarge(total / visits, size).argmax(0)


def truth_windows(i, source, order, side):
    """The truth of image order[i], in the windows of image i -> list of side side"""
    H, W = source.image(i).shape[1:]
    scale = side / min(H, W)
    H, W = max(side, round(H * scale)), max(side, round(W * scale))
    truth = nearest(source.truth(order[i]), (H, W))
    return [truth[y : y + side, x : x + side] for y in starts(H, side) for x in starts(W, side)]


def segmentation(patches, c):
    """paper: DINOv3 Tab. 3, ADE20k: short side 512, windows of 512; the head sees the same windows in training"""
    train, val, n_classes = open_segmentation(c)
    cut, side, device = partial(windows, side=c.resolution), c.resolution, patches.device
    maps = patches("train", train, cut).views
    truth_of = partial(truth_windows, source=train, order=others(len(train), c), side=side)
    truths = patches.keep("train truths", truth_of, len(train)).views
    head = fit(maps, truths, n_classes, segmentation_loss, SEGMENTATION_RECIPE, c, device)
    seen = sum(np.bincount(truth.ravel(), minlength=256) for truth in truths)[:n_classes]
    counts, constant, shown = 0, 0, []
    for i, views in enumerate(patches("val", val, cut)):
        truth = torch.from_numpy(val.truth(i)).to(device)
        found = label_map(head, views, tuple(truth.shape), side, device)
        counts = counts + confusion(found, truth, n_classes)
        constant = constant + confusion(torch.full_like(found, int(seen.argmax())), truth, n_classes)
        if c.out and i < SHOWN:
            shown.append([val.image(i), hues(truth.cpu()), hues(found.cpu())])
    save_pictures(c, shown)
    return dict(**segmentation_scores(counts), chance_miou=segmentation_scores(constant)["miou"], n_classes=n_classes,
                n_train=len(train), n_val=len(val), iterations=c.iterations, lr=peak(SEGMENTATION_RECIPE, c))

# --------------------------------------------------------------------------------
# Depth


@dataclass(frozen=True)
class Depths:
    unit: float = 1000         # what a metre is in the file
    top: float = 10.0          # metres: the last bin; what lies deeper does not count
    scored: tuple = (0, 1, 0, 1)  # shares of height and width: rows from, to, columns from, to
    crop: tuple = ()           # height and width of the middle of the lower edge that is used; empty = all


DEPTH = dict(depth=Depths(), nyu=Depths(scored=(45 / 480, 471 / 480, 41 / 640, 601 / 640)),
             kitti=Depths(256, 80.0, (0.40810811, 0.99189189, 0.03594771, 0.96405229), (352, 1216)))
DEPTH_RECIPE = Recipe(lr=3e-4, weight_decay=1e-4, beta2=0.99, warmup=1 / 3, clip=35)
NEAREST = 0.001   # metres, the first bin
BINS = 256


def read_depth(path, unit):
    """A file of depths -> H W float32, metres; 0 = not known"""
    with Image.open(path) as file:
        return np.asarray(file).astype(np.float32) / unit


def lower_middle(array, crop):
    """The middle columns of the lower rows of C H W or H W."""
    height, width = crop
    left = (array.shape[-1] - width) // 2
    return array[..., array.shape[-2] - height :, left : left + width]


def open_depth(c):
    """train, val, and how depth is kept"""
    form = DEPTH[c.task]
    if c.data == "shapes":
        return *generated(c, attrgetter("depth")), Depths(top=FLAT)
    read = partial(read_depth, unit=form.unit)
    crop = partial(lower_middle, crop=form.crop) if form.crop else None
    return *(Pairs(depth_pairs(c, *split), read, crop) for split in (("train",), ("test", "val"))), form


def depth_pairs(c, *split):
    """train/rgb_NAME.jpg, train/depth_NAME.png; or a list nyu_train.txt, kitti_eigen_train.txt: image, depth, focal"""
    lists = [path for name in split for path in sorted(Path(c.data).glob(f"*{name}.txt"))]
    if not lists:
        files = images_below(folders(c, *split))
        images, depths = ([p for p in files if p.name.startswith(kind)] for kind in ("rgb_", "depth_"))
        return paired(c, images, depths, lambda path: path.stem.partition("_")[2])
    roots = [Path(c.data, name) if Path(c.data, name).is_dir() else Path(c.data) for name in ("input", "gt_depth")]
    rows = [line.split() for line in lists[0].read_text().splitlines() if line.strip()]
    known = [row[:2] for row in rows if len(row) > 1 and row[1] != "None"]
    return evenly([(roots[0] / image.lstrip("/"), roots[1] / depth.lstrip("/")) for image, depth in known], c.limit)


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
        found = enlarge(decode(logits, top)[None], truth.shape)[0]
        g.append((found[known] + 1e-3).log() - (truth[known] + 1e-3).log())
    g = torch.cat(g)
    yield (g.var() + 0.15 * g.mean() ** 2 + 1e-12).sqrt()


def scored_pixels(truth, form):
    (H, W), (top, bottom, left, right) = truth.shape, form.scored
    inside = np.zeros((H, W), bool)
    inside[int(top * H + 0.5) : int(bottom * H + 0.5), int(left * W + 0.5) : int(right * W + 0.5)] = True
    return torch.from_numpy(inside & (truth > NEAREST) & (truth < form.top))


def truth_at(i, source, order, sizes):
    return [nearest(source.truth(order[i]), sizes[i])]


def depth(patches, c):
    """paper: DINOv3 Tab. 3, NYU: the whole image, and at test the mean of it and its mirror image"""
    train, val, form = open_depth(c)
    device, maps = patches.device, patches("train", train, patches.whole).views
    sizes = [(16 * h, 16 * w) for h, w, _ in maps.shapes]
    truth_of = partial(truth_at, source=train, order=others(len(train), c), sizes=sizes)
    truths = patches.keep("train truths", truth_of, len(train)).views
    total = count = 0
    for truth in truths:
        known = truth[(truth > 0) & (truth <= form.top)]
        total, count = total + known.sum(dtype=np.float64), count + known.size
    if not count:
        raise ValueError(f"depth: no train image has a known depth below {form.top} m")
    head = fit(maps, truths, BINS, partial(depth_loss, top=form.top), DEPTH_RECIPE, c, device)
    scores, constant, shown = [], [], []
    for i, views in enumerate(patches("val", val, partial(patches.whole, mirrored=True))):
        truth = val.truth(i)
        with torch.no_grad():
            out = head([torch.from_numpy(m).to(device).float() for m in views])
        plain, mirrored = (decode(x, form.top) for x in out)
        found = enlarge(((plain + mirrored.flip(1)) / 2)[None], truth.shape)[0].clamp(NEAREST, form.top).cpu()
        counted = scored_pixels(truth, form)
        if not counted.any():
            raise ValueError(f"depth: val image {i} has no known depth below {form.top} m; leave it out")
        there = torch.from_numpy(truth)[counted]
        scores.append(depth_scores(found[counted], there))
        constant.append(depth_scores(torch.full_like(there, float(total / count)), there)["rmse"])
        if c.out and i < SHOWN:
            shown.append([val.image(i), shades(truth, form.top), shades(found.numpy(), form.top)])
    save_pictures(c, shown)
    return dict(**{name: float(np.mean([score[name] for score in scores])) for name in scores[0]},
                chance_rmse=float(np.mean(constant)), n_train=len(train), n_val=len(val), iterations=c.iterations,
                lr=peak(DEPTH_RECIPE, c))

# --------------------------------------------------------------------------------
# Object discovery

THRESHOLDS = [i / 20 for i in range(9)]  # of the cosine from which on two patches are joined; the best one is reported
FAINT = 1e-5                             # weight of all other pairs
THUMB = 48                               # pixels a side, to choose scenes by


def scene_boxes(scene):
    """left, top, right, bottom of every object that can be seen, in pixels, the latter two exclusive:  n 4"""
    return instance_boxes(scene.instances)


def instance_boxes(instances):
    """H W, 0 = background, 255 = ignored -> n 4"""
    boxes = []
    for k in np.unique(instances):
        if 0 < k < IGNORE:
            rows, cols = np.nonzero(instances == k)
            boxes.append([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1])
    return np.array(boxes, float).reshape(-1, 4)


def read_boxes(path):
    """VOC's .xml, pixels from 1, both ends inside; or a .png of instances"""
    if path.suffix == ".png":
        with Image.open(path) as file:
            return instance_boxes(np.asarray(file))
    found = [[float(box.find(name).text) for name in ("xmin", "ymin", "xmax", "ymax")]
             for box in ElementTree.parse(path).iter("bndbox")]
    return np.array(found, float).reshape(-1, 4) - (1, 1, 0, 0)


def small_objects(c):
    """Scenes in which no object's box takes near half the image: in others the whole image is a right answer."""
    numbers = (i for i in count() if 0 < largest_share(scene_boxes(scene(i, THUMB, 1001))) < 0.45)
    return Scenes(list(islice(numbers, c.limit or GENERATED[1])), 1001, c.resolution, scene_boxes)


def largest_share(boxes):
    return max(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist(), default=0) / THUMB**2


def open_discovery(c):
    """VOC: JPEGImages/*.jpg, Annotations/*.xml, those of ImageSets/Main/trainval.txt;  DAVIS: every frame"""
    if c.data == "shapes":
        return small_objects(c)
    images, truths = (folders(c, f"{name}/480p", name) for name in ("JPEGImages", "Annotations"))
    files, listed = [path for path in truths.rglob("*") if path.suffix in (".xml", ".png")], Path(c.data, VOC_LIST)
    if listed.is_file():
        names = set(listed.read_text().split())
        files = [path for path in files if path.stem in names]
    roots = {".jpg": images, ".jpeg": images}

    def key(path):
        return path.relative_to(roots.get(path.suffix.lower(), truths)).with_suffix("")

    photos = [path for path in images_below(images) if path.suffix.lower() in roots]
    return Pairs(paired(c, photos, files, key), read_boxes)


def cut_graph(map):
    """
    The normalised cut of the graph of patches, for every threshold:  h w D -> thresholds x [eigenvector P]

        W_ij = 1 if cosine(i, j) > threshold else 0.00001,  d = row sums of W
        (D - W) x = lambda D x,  x of the second smallest lambda
    """
    x = F.normalize(map.flatten(0, 1).double(), dim=1)
    cosine, vectors = x @ x.T, []
    for threshold in THRESHOLDS:
        weight = torch.where(cosine > threshold, 1.0, FAINT).to(x.dtype)
        scale = weight.sum(1).rsqrt()
        laplacian = torch.eye(len(x), dtype=x.dtype, device=x.device) - scale[:, None] * weight * scale
        vectors.append(scale * torch.linalg.eigh(laplacian).eigenvectors[:, 1])
    return vectors


def main_object(vector, grid):
    """
    P -> the patches of the main object, h w bool: those above the mean that are connected to the largest |entry|.
    Should that one lie below the mean, what is below is taken instead.
    """
    x = vector.cpu().numpy().reshape(grid)
    seed = np.unravel_index(np.abs(x).argmax(), grid)
    inside = x > x.mean()
    inside = inside if inside[seed] else ~inside
    object, grown = np.zeros(grid, bool), np.zeros(grid, bool)
    grown[seed] = True
    while (grown != object).any():  # grow by the four neighbours until nothing changes
        object = grown
        wide = np.pad(object, 1)
        grown = (wide[1:-1, 1:-1] | wide[2:, 1:-1] | wide[:-2, 1:-1] | wide[1:-1, 2:] | wide[1:-1, :-2]) & inside
    return object


def discovery(patches, c):
    """
    CorLoc, percent of the images where the box of the main object overlaps a true one by half, at the best threshold.

    differs: images are resized to whole patches, not padded
    """
    source, hits, whole, shown = open_discovery(c), [], [], []
    for i, (m,) in enumerate(patches("images", source, patches.whole)):
        truth, image = source.truth(i), source.image(i)
        if not len(truth):
            continue
        (H, W), (h, w) = image.shape[1:], m.shape[:2]
        found = []
        for vector in cut_graph(torch.from_numpy(m).to(patches.device)):
            rows, cols = np.nonzero(main_object(vector, (h, w)))
            found.append(np.array([cols.min() * W / w, rows.min() * H / h, (cols.max() + 1) * W / w,
                                   (rows.max() + 1) * H / h]))
        hits.append([box_overlap(box, truth).max() >= 0.5 for box in found])
        whole.append(box_overlap((0, 0, W, H), truth).max() >= 0.5)
        if c.out and len(shown) < SHOWN:
            best = found[int(np.mean(hits, 0).argmax())]
            shown.append([image, framed(image, truth), framed(image, [best])])
    save_pictures(c, shown)
    scores = 100 * np.mean(hits, 0)
    return dict(corloc=float(scores.max()), threshold=THRESHOLDS[int(scores.argmax())], n_images=len(hits),
                whole_image_corloc=100 * float(np.mean(whole)))


def framed(image, boxes):
    image = image.clone()
    for left, top, right, bottom in np.asarray(boxes).round().astype(int).tolist():
        for rows, cols in (((top, bottom), (left, left + 2)), ((top, bottom), (right - 2, right)),
                           ((top, top + 2), (left, right)), ((bottom - 2, bottom), (left, right))):
            image[:, max(rows[0], 0) : rows[1], max(cols[0], 0) : cols[1]] = torch.tensor([255, 0, 0])[:, None, None]
    return image
