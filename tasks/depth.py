"""
Monocular depth: bins of depth for every pixel, from frozen patches and a decoder.

    python evaluate.py --task depth --weights runs/tiny                                   on the generated `shapes`
    python evaluate.py --task nyu --weights runs/s --data NYU --cache features     train/rgb_*.jpg, train/depth_*.png
    python evaluate.py --task nyu --weights runs/s --data NYU --decoder dpt --out heads
    python evaluate.py --task relative --weights runs/s --data SYNTHETIC --out heads           scale and shift forgiven
    python evaluate.py --task eth3d --weights runs/s --data ETH3D --head heads/head.safetensors

    stored    linear: the features of all images once, on disk
    live      dpt: those of new views in every step, on all ranks

Absolute: RMSE in metres. Relative: mean relative error, of depth that least squares have brought to the truth's scale
and shift; trained on synthetic depths, measured on photos it never saw.

paper: DINOv3 §6.1.2, Tab. 3, App. D.2; relative: §6.3.3, Tab. 12, App. D.11. Dimension letters: see the top of
model.py.
"""

from functools import partial

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from decoders import DECODERS, load_depth
from decoders.depth import absolute_loss, aligned, evenly, known, mean_of_bins, relative_loss
from decoders.fit import everyone, fit, plan, untrained
from engine.crops import truths_on
from engine.features import chosen_layers, describe
from engine.heads import head_of, released
from engine.metrics import depth_scores
from engine.pictures import SHOWN, save_pictures, shades
from engine.ranks import linked
from engine.sliding import resized
from engine.task import Option, Paper, Task, by_size
from engine.views import fitted, mirrored, nearest
from sets.depths import NEAREST, SETS, open_depth, scored_pixels
from sets.pairs import others

BINS = 256               # of the linear decoder; others have their own number
TURN = 2.5               # degrees at most, one way or the other
GAMMA, BRIGHTNESS, TINT = 0.1, 0.25, 0.1  # factors of 1 +- this; gamma is an exponent
CROP = 416 / 480, 544 / 640               # shares of height and width that a step sees
HALF = 0.5               # how often an image is turned, mirrored, recoloured
BLUR, NOISE, JITTER = 2.0, 0.05, 0.4      # relative: pixels, share of the range, factors of 1 +- this; chosen by eye
CHANCE = {False: ("rmse",), True: ("abs_rel", "delta1")}  # scores of a constant that are printed
HUE = 0.1                # the same, of a turn

# --------------------------------------------------------------------------------
# Loss


def decode(logits, top):
    """... n h w -> metres ... h w"""
    return mean_of_bins(logits, evenly(NEAREST, top, logits.shape[-3]))


def depth_loss(out, truths, top):
    """Of answers n h w and truths H W, of any sizes, taken together"""
    found = [resized(decode(logits, top)[None], truth.shape)[0].flatten()
             for logits, truth in zip(out, truths, strict=True)]
    truth = torch.cat([truth.flatten() for truth in truths])
    yield absolute_loss(torch.cat(found), truth, known(truth, top))


def mean_of(truths, top):
    """Metres, over the pixels whose depth is known. Raises ValueError if there are none."""
    total = count = 0
    for truth in truths:
        found = truth[(truth > 0) & (truth <= top)]
        total, count = total + found.sum(dtype=np.float64), count + found.size
    if not count:
        raise ValueError(f"depth: no train image has a known depth below {top} m")
    return float(total / count)

# --------------------------------------------------------------------------------
# What is learned from, stored or live


def train_stored(frozen, train, form, decoder, c):
    maps = frozen.maps("train", train).row
    truths = truths_on(maps, train, others(len(train), c), frozen)
    mean = mean_of(truths, form.top)
    head = decoder.fit("depth", maps, truths, BINS, partial(depth_loss, top=form.top), c, frozen.device)
    return head, dict(mean_depth=mean, n_train=len(train), iterations=c.iterations, lr=decoder.peak("depth", c))


def seen(row, rng, source, order, size, patch, relative=False):
    """
    An image, C H W uint8, and its truth, H W, as a step sees them: of `size`, and if there is an rng turned, mirrored,
    recoloured and cut.

    paper:   App. D.2; numbers of the released code. Relative: App. D.11
    differs: gamma is of values in 0 to 1, there in 0 to 255
    """
    image, truth = tv.resize(source.image(row), size, InterpolationMode.BICUBIC, antialias=True), \
        torch.from_numpy(nearest(source.truth(order[row]), size))
    if rng is None:
        return image, truth
    turn, flip, recolour = rng.random(3) < HALF
    if turn:
        angle = rng.uniform(-TURN, TURN)
        image = tv.rotate(image, angle, InterpolationMode.BILINEAR)
        truth = tv.rotate(truth[None], angle, InterpolationMode.NEAREST)[0]                    # 0, not known, at edges
    if flip:
        image, truth = image.flip(2), truth.flip(1)
    h, w = cut(size, patch)
    top, left = rng.integers(size[0] - h + 1), rng.integers(size[1] - w + 1)
    image, truth = image[:, top : top + h, left : left + w], truth[top : top + h, left : left + w]
    if recolour:
        image = (disturbed if relative else recoloured)(image, rng)
    return image.contiguous(), truth.contiguous()


def recoloured(image, rng):
    gamma, gain, tint = (1 + spread * rng.uniform(-1, 1, n) for spread, n in ((GAMMA, 1), (BRIGHTNESS, 1), (TINT, 3)))
    x = (image / 255) ** gamma.item() * torch.from_numpy(gain * tint).float()[:, None, None]
    return (255 * x).round().clamp(0, 255).to(torch.uint8)


def disturbed(image, rng):
    """
    Its histogram stretched or made even, its colours another's, blurred and noisy: each of them or not.

    paper: App. D.11 names them, without numbers: synthetic images are too clean
    """
    stretch, even, jitter, blur, noise = rng.random(5) < HALF
    if stretch or even:
        image = (tv.equalize if even else tv.autocontrast)(image)
    if jitter:
        gain, contrast, saturation = 1 + JITTER * rng.uniform(-1, 1, 3)
        image = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(image, gain), contrast), saturation)
        image = tv.adjust_hue(image, HUE * rng.uniform(-1, 1))
    if blur:
        image = tv.gaussian_blur(image, 2 * round(2 * BLUR) + 1, rng.uniform(0.1, BLUR))
    if noise:
        x = image + 255 * rng.uniform(0, NOISE) * torch.from_numpy(rng.standard_normal(image.shape)).float()
        image = x.round().clamp(0, 255).to(torch.uint8)
    return image


def cut(size, patch):
    """H W that a step sees, of images of H W"""
    return tuple(max(round(share * n / patch), 1) * patch for share, n in zip(CROP, size, strict=True))


def known_loss(out, truths, top):
    return sum(depth_loss(out, truths, top)) if any(known(truth, top).sum() > 1 for truth in truths) else out.sum() * 0


def forgiving_loss(out, truths, form):
    """Relative, of answers n h w and truths H W, all of one size"""
    truths = torch.stack(truths)
    return relative_loss(resized(decode(out, form.bins), truths.shape[1:]), truths, known(truths, form.top))


def train_live(frozen, train, form, decoder, ranks):
    c, width, patch = frozen.c, frozen.model.config.width, frozen.model.config.patch_size
    size = tuple(fitted(train.image(0), c.resolution, patch)[0].shape[1:])
    order = others(len(train), c)
    mean = mean_of((train.truth(i) for i in range(len(train))), form.top)
    head = untrained(partial(decoder.Head, width), c)
    views = partial(seen, source=train, order=order, size=size, patch=patch, relative=form.relative)
    loss = partial(forgiving_loss, form=form) if form.relative else partial(known_loss, top=form.bins)
    said = fit(head, views, len(train), loss, decoder.recipe(width, form.relative), c, frozen, ranks)
    return head, dict(mean_depth=mean, n_train=len(train), **said)

def planned(c):
    """What --plan says, for images three quarters as high as wide"""
    config, decoder = describe(c.weights), DECODERS[c.decoder]
    if hasattr(decoder, "windows"):
        raise ValueError(f"--plan: {c.decoder} learns from features on disk; it is for decoders of new views, as dpt")
    with torch.device("meta"):
        head = decoder.Head(config.width)
    shape = 3, *cut((c.resolution, c.resolution if c.data == "shapes" else c.resolution * 4 // 3), config.patch_size)
    recipe = decoder.recipe(config.width, SETS[c.task].relative)
    return plan(head, recipe, c, config, decoder.layers_of(config, chosen_layers(c, config)), shape)

# --------------------------------------------------------------------------------
# The task


def outputs(form, n):
    return f"{n} bins to {form.bins} m"


def stored(frozen, data, c):
    """-> the head, what is known of it, and its answers for each val image: plain and mirrored"""
    (train, val, form), decoder = data, DECODERS[c.decoder]
    head, said = head_of(partial(decoder.Head, n_out=BINS), partial(train_stored, frozen, train, form, decoder, c),
                         outputs(form, BINS), frozen, c)
    maps = frozen.maps("val", val, frozen.seen(mirrored))
    return [measured(i, [decode(x, form.bins) for x in head.predict(views)], val, form, said, c)
            for i, views in enumerate(maps)], said


def live(frozen, data):
    """As stored, on all ranks: each measures a share of the val images"""
    (train, val, form), ranks = data, linked(frozen.ranks)
    answer, said = answering(frozen, train, form, ranks)

    @torch.no_grad()
    def scores(i):
        views = frozen.network_input(frozen.seen(mirrored)(val.image(i)))
        return measured(i, answer(frozen.network(views, frozen.layers)), val, form, said, frozen.c)
    return everyone(scores, len(val), ranks), said


def answering(frozen, train, form, ranks):
    """Features -> metres B h w, by a released head, or one of ours;  what is known of it"""
    c, decoder = frozen.c, DECODERS[frozen.c.decoder]
    if released(frozen.task, c):
        found = load_depth(c.head, frozen.model, frozen.layers)
        frozen.layers, head = found.layers, found.head.to(frozen.device)
        return (lambda features: mean_of_bins(head(features), found.bins, found.least)), {}
    frozen.layers = decoder.layers_of(frozen.model.config, frozen.layers)
    head, said = head_of(decoder.Head, partial(train_live, frozen, train, form, decoder, ranks),
                         outputs(form, decoder.sized(frozen.model.config.width).n_out), frozen, c)
    return (lambda features: decode(head(features), form.bins)), said


def measured(i, views, val, form, said, c):
    """
    Scores of the mean of an image's answer and its mirror image's, metres; of a constant: the mean depth of what was
    trained on, or, where scale and shift are forgiven, of the image itself. And a row of pictures
    """
    truth = val.truth(i)
    plain, mirror = views
    counted = scored_pixels(truth, form)
    if not counted.any():
        raise ValueError(f"depth: val image {i} has no known depth below {form.top} m; leave it out")
    there = torch.from_numpy(truth)[counted]
    found = resized(((plain + mirror.flip(1)) / 2)[None], truth.shape)[0].cpu()
    if form.relative:
        found, constant = aligned(found, torch.from_numpy(truth), counted), there.double().mean().item()
    else:
        constant = said.get("mean_depth", there.double().mean().item())
    found = found.clamp(NEAREST, form.top)
    chance = depth_scores(torch.full_like(there, constant), there)
    shown = [val.image(i), shades(truth, form.top), shades(found.numpy(), form.top)] if c.out and i < SHOWN else None
    return depth_scores(found[counted], there) | {f"chance_{x}": chance[x] for x in CHANCE[form.relative]}, shown


def run(data, frozen, c):
    """The whole image, and at test the mean of it and its mirror image"""
    found, said = stored(frozen, data, c) if hasattr(DECODERS[c.decoder], "windows") else frozen.together(
        partial(live, data=data))
    save_pictures(c, [shown for _, shown in found if shown], top=data[2].top)
    said = {name: value for name, value in said.items() if name != "mean_depth"}
    return dict(**{name: float(np.mean([scores[name] for scores, _ in found])) for name in found[0][0]},
                n_val=len(data[1]), **said)


ITERATIONS = Option("iterations", 38400, "steps of the head", shapes=300, least=1)


def task(name, layout, *paper, **more):
    options = more.pop("options", (ITERATIONS, Option("lr", 0.0, "peak; 0 = the decoder's own")))
    more = dict(metric="rmse", sides=(480, 160), decoders=("linear", "dpt")) | more
    return Task(name, layout, open_depth, run, wants="maps", lower=True, view=fitted, options=options,
                released=("dpt",), plan=planned, pictures="image, truth, prediction, metres", paper=paper, **more)


def relative(name, layout, abs_rel=None, delta1=None, n_val=0):
    """paper: Tab. 12; App. D.11: 160,000 steps are those of Depth Anything V2"""
    options = ITERATIONS._replace(default=160000), Option("lr", 0.0, "peak; 0 = the decoder's own")
    paper = [Paper(metric, {"7b": value}, 768, dict(n_val=n_val))
             for metric, value in (("abs_rel", abs_rel), ("delta1", delta1)) if n_val]
    return task(name, layout, *paper, metric="abs_rel", sides=(768, 160), decoders=("dpt",), options=options,
                trains=not n_val)


FOLDERS = "{train,test}/{rgb_NAME.jpg,depth_NAME.png}"
TASKS = (
    task("depth", FOLDERS),
    task("nyu", FOLDERS + ", or nyu_{train,test}.txt", Paper("rmse", by_size(
        0.403, 0.399, 0.373, 0.352, 0.352, 0.309, 0.448, 0.432, 0.420, 0.403), 480, dict(n_val=654))),  # Tab. 14
    task("kitti", "kitti_eigen_{train,test}.txt, input/, gt_depth/",
         Paper("rmse", {"7b": 2.346}, 352, dict(n_val=652)), sides=(352, 160)),                # Tab. 3; native
    relative("relative", FOLDERS),
    relative("nyu_relative", "nyu_test.txt, or filename_list_test.txt, or test/", 0.043, 0.980, 654),
    relative("kitti_relative", "kitti_eigen_test.txt, input/, gt_depth/", 0.073, 0.967, 652),
    relative("eth3d", "eth3d_filename_list.txt, rgb/, depth/", 0.054, 0.975, 454),
    relative("scannet", "scannet_val_sampled_list_800_1.txt, SCENE/{color,depth}/", 0.044, 0.981, 800),
    relative("diode", "diode_val_all_filename_list.txt, {indoors,outdoor}/", 0.256, 0.822, 771))
