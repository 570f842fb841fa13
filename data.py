"""
Images in, training batches out. A batch is a function of (seed, step): resumable, and the same for any number of
ranks and workers. Dimension letters: see the top of model.py.

    CropConfig       every number of the augmentation                              DINOv3 App. C; DINOv2 §B.1
    draw_crops       where to cut, and how to recolour: plain numbers, drawn on the host
    cut, augment     crops of uint8, and their colours, all at once, on any device
    draw_masks       which patches the student does not see, exact in number       iBOT; DINOv2 §B.1
    Batches          step -> batch

    python data.py index SHARDS     tars and zips: where each image lies           engine/archives.py
    python data.py stats PHOTOS     what a set of images holds                     engine/stats.py
    python data.py look PHOTOS      what the network will see of it, a picture     engine/look.py
    python data.py tiles RASTERS    GeoTIFFs of any size, in tiles                 engine/tiles.py
"""

import math
import os
import re
import signal
import threading
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import ops
from engine import config as command_line
from engine.colours import (
    APPLY,
    BRIGHTNESS,
    CONTRAST,
    GREY,
    HUE,
    OF_FLOATS,
    OPERATIONS,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARIZE,
)
from engine.images import ImageConfig, resize
from engine.order import Order
from engine.slots import lent

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # save, leave
COMMANDS = dict(index="archives", stats="stats", look="look", tiles="tiles")  # of engine/, by name: they stand on this

# --------------------------------------------------------------------------------
# Crops


@dataclass(frozen=True)
class CropConfig(ImageConfig):
    global_size: int = 256         # [1, 4096]: pixels; G = 2 crops
    local_size: int = 112          # [1, 4096]: pixels
    gram_size: int = 0             # [0, 8192]: pixels of the global crops for a Gram teacher, undistorted; 0 = none
    resolutions: str = ""          # the three drawn for each step: GLOBALxLOCALxGRAM*SHARE,...; empty = the above
    n_local: int = 8               # [0, 64]: L
    global_scale: tuple = (0.32, 1.0)   # (0, 1] rising: share of the image's area
    local_scale: tuple = (0.05, 0.32)   # (0, 1] rising: the same of local crops
    ratio: tuple = (3 / 4, 4 / 3)  # [0.01, 100] rising: width / height of the area cut out
    flip: float = 0.0              # [0, 1]: probability of a horizontal flip
    turns: bool = False            # by 0 to 3 quarters, each as likely: seen from above there is no up
    jitter: float = 0.8            # [0, 1]: probability of: brightness, contrast, saturation, hue in random order
    brightness: float = 0.4        # [0, 1]: factors in 1 +- this
    contrast: float = 0.4          # [0, 1]: the same
    saturation: float = 0.2        # [0, 1]: the same
    hue: float = 0.1               # [0, 0.5]: shift in +- this, of the full circle
    grey: float = 0.2              # [0, 1]: probability
    # Probabilities of a Gaussian blur as the paper means them. The released code applies 1 - p: its weights saw the
    # first global crop never blurred, the second 90 % and locals 50 % of the time.
    blur_global_1: float = 1.0     # [0, 1]: probability, first global crop
    blur_global_2: float = 0.1     # [0, 1]: probability, second global crop
    blur_local: float = 0.5        # [0, 1]: probability, local crops
    blur_sigma: tuple = (0.1, 2.0)  # [0.01, 100] rising: pixels, 9 taps
    solarize: float = 0.2          # [0, 1]: probability, second global crop only; inverts values from 128
    mask_share: float = 0.5        # [0, 1]: share of global crops with masked patches
    mask_ratio: tuple = (0.1, 0.5)  # [0, 1] rising: masked patches, spread evenly over the masked crops

    def at(self, step):
        """
        The config of one step, with the sides that it draws, the same on all ranks.

        paper: §5.1, mixed resolutions; the shares are of the released code
        """
        if not self.resolutions:
            return self
        sides, shares = zip(*read_resolutions(self.resolutions), strict=True)
        drawn = np.random.default_rng([self.seed, 6, step]).choice(len(sides), p=shares)
        return replace(self, **dict(zip(("global_size", "local_size", "gram_size"), sides[drawn], strict=True)))


@cache
def read_resolutions(text):
    """"96x48x192*0.5,160x64x240*0.5" -> [((96, 48, 192), 0.5), ...], the shares of 1. Raises ValueError."""
    found = re.findall(r"(\d+)x(\d+)x(\d+)\*(\d*\.?\d+)", text)
    total = sum(float(share) for *_, share in found)
    if ",".join("x".join(sides) + f"*{share}" for *sides, share in found) != text or not total:
        raise ValueError(f"--resolutions {text}: write sides in pixels and how often, GLOBALxLOCALxGRAM*SHARE, as in "
                         "512x112x768*0.5,768x224x1152*0.5")
    return [(tuple(map(int, sides)), float(share) / total) for *sides, share in found]


def draw_crops(rng, config, height, width):
    """
    What happens to one image, for all its crops: the two global ones, then the local ones.

    returns  boxes   G+L 4, int: top, left, height, width in the image;  flips  G+L, int: of `cut`
             colours  G+L 12, float32: see the columns of engine/colours.py
    """
    n = 2 + config.n_local
    scales = np.array([config.global_scale] * 2 + [config.local_scale] * config.n_local)
    u = rng.random((n, 10, 4))                                        # ten tries each
    area = height * width * (scales[:, :1] + u[..., 0] * (scales[:, 1:] - scales[:, :1]))
    ratio = np.exp(np.log(config.ratio[0]) + u[..., 1] * np.log(config.ratio[1] / config.ratio[0]))
    w, h = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    boxes = np.stack([(u[..., 2] * (height - h + 1)).astype(int), (u[..., 3] * (width - w + 1)).astype(int), h, w], -1)
    boxes = boxes[np.arange(n), fits.argmax(1)]                       # the first that fits
    boxes[~fits.any(1)] = largest_box(height, width, config.ratio)

    u = rng.random((n, 14))
    colours = np.zeros((n, 12), np.float32)
    colours[:, APPLY] = u[:, 0] < config.jitter
    for column, spread in (BRIGHTNESS, config.brightness), (CONTRAST, config.contrast), (SATURATION, config.saturation):
        colours[:, column] = 1 + spread * (2 * u[:, column] - 1)
    colours[:, HUE] = config.hue * (2 * u[:, HUE] - 1)
    colours[:, ORDER] = u[:, ORDER].argsort(1)
    colours[:, GREY] = u[:, 9] < config.grey
    blur = np.array([config.blur_global_1, config.blur_global_2] + [config.blur_local] * config.n_local)
    low, high = config.blur_sigma
    colours[:, SIGMA] = (u[:, 10] < blur) * (low + u[:, 11] * (high - low))
    colours[1, SOLARIZE] = u[1, 12] < config.solarize
    return boxes, (u[:, 13] < config.flip) + 2 * (rng.integers(4, size=n) if config.turns else 0), colours


def largest_box(height, width, ratio):
    """The centred box of an allowed shape that is as large as an extreme image has room for."""
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    w, h = max(w, 1), max(h, 1)
    return (height - h) // 2, (width - w) // 2, h, w


def cut(image, box, flip, size):
    """C H W -> C size size, mirrored if `flip` is odd, then turned by half of it in quarters"""
    if flip > 1:
        return cut(image, box, flip % 2, size).rot90(flip // 2, (1, 2))
    if image.stride()[::2] == (1, 3) and ops.path("cut", image, 0) == "kernel":
        return torch.ops.nanodino.cut(image, box, bool(flip), size)
    top, left, height, width = box
    crop = resize(image[:, top : top + height, left : left + width], size, size)
    return crop.flip(-1) if flip else crop


def cut_all(image, boxes, flips, config):
    """
    All crops of one image: the global ones, the local ones, and those that a Gram teacher sees: the global ones as they
    are cut from the photo, once, at the larger of both sizes. A local crop keeps its middle, of whole patches.

    paper:   DINOv3 §4.3: the Gram teacher sees the crop at another resolution
    differs: 168 px are 10.5 patches of 16: its middle 160 are cut out, where the released code drops the last 8
    """
    c, each = config, list(zip(boxes, flips, strict=True))
    whole = c.local_size // c.patch_size * c.patch_size
    edge = (c.local_size - whole) // 2
    crops = [cut(image, *where, max(c.global_size, c.gram_size)) for where in each[:2]]
    local = [cut(image, *where, c.local_size)[:, edge : edge + whole, edge : edge + whole] for where in each[2:]]
    seen, views = ([resize(crop, side, side) for crop in crops if side] for side in (c.global_size, c.gram_size))
    return seen + local + views

# --------------------------------------------------------------------------------
# Colours: every crop of a batch at once, in levels of 0 to 255 that each operation rounds as Pillow does


def augment(crops, colours, mean, std):
    """
    Colour jitter, grey, blur, solarize, then normalisation: the bytes of Pillow and torchvision, on any device; of
    float crops, which are no RGB photos, OF_FLOATS.

    crops    n C H W, uint8 or float32    colours  n 12, float32, on the host: rows of the table of draw_crops
    returns  n C H W, float32, normalised

    differs: a blur in two passes of 9 taps, not one of 81, is off by one level in 1.2e-5 of the values
    """
    operations, top = (OPERATIONS, 255) if crops.dtype == torch.uint8 else (OF_FLOATS, 1)
    if top == 255 and min(crops.shape[2:]) > 4 and ops.path("colours", crops, 0) == "kernel":
        table = colours.to(crops.device, non_blocking=True)
        return torch.ops.nanodino.colours(crops.contiguous(), table, mean, std)
    x, table = crops.to(torch.float32, copy=True), colours.numpy()
    steps = [((table[:, APPLY] > 0) & (table[:, ORDER][:, turn] == which), 1 + which)
             for turn in range(4) for which in range(4)]
    for chosen, column in steps + [(table[:, column] > 0, column) for column in (GREY, SIGMA, SOLARIZE)]:
        if column in operations and chosen.any():  # known to the host: it waits for no device
            operation, amounts = operations[column]
            rows = send(np.flatnonzero(chosen), torch.int64, x.device)
            amounts = send(amounts(table[chosen, column]), torch.float32, x.device)
            x[rows] = operation(x[rows], amounts[..., None, None, None])
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):  # numbers, not tensors: no copy to the device
        x[:, channel].mul_(1 / (top * s)).add_(-m / s)
    return x


def send(values, dtype, device):
    """An array on a device: by way of pinned memory, for which the host does not wait."""
    here = torch.empty(values.shape, dtype=dtype, pin_memory=device.type == "cuda")
    here.numpy()[...] = values
    return here.to(device, non_blocking=True)

# --------------------------------------------------------------------------------
# Masks


def draw_masks(rng, n, h, w, share, ratio):
    """
    Masks of n crops: int(n share) of them masked, their ratios spread evenly, in random places. The number of masked
    patches is the same for every draw, so all shapes of a training step are constants.

    returns  n P, bool, True = hidden;  1274 in all for n = 32, 16x16 patches, half of them masked at 0.1 to 0.5
    """
    n_masked = int(n * share)
    counts = (h * w * np.linspace(*ratio, n_masked + 1)[1:]).astype(int)
    masks = np.zeros((n, h * w), bool)
    for i, count in zip(rng.permutation(n)[:n_masked], counts, strict=True):
        masks[i] = draw_mask(rng, h, w, count)
    return masks


def draw_mask(rng, h, w, count):
    """Exactly `count` of P patches: rectangles of 4 patches or more while one fits, then single patches."""
    mask = np.zeros((h, w), bool)
    left = count
    while left > 0:
        for area, aspect, top, side in rng.random((10, 4)):
            area = 4 + area * (left - 4)
            aspect = math.exp((2 * aspect - 1) * math.log(0.3))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < rows < h and 0 < columns < w):
                continue
            top, side = int(top * (h - rows + 1)), int(side * (w - columns + 1))
            box = mask[top : top + rows, side : side + columns]
            new = box.size - np.count_nonzero(box)
            if 0 < new <= left:
                box[:] = True
                left -= new
                break
        else:
            break
    mask = mask.ravel()
    mask[rng.permutation(np.flatnonzero(~mask))[:left]] = True
    return mask

# --------------------------------------------------------------------------------
# Batches


class Batches(Dataset):
    """
    batches[step] -> this rank's part of the global batch of that step, a dict of

        global_crops  (G B) C H W   local_crops  (L B) C h w: as they are cut, uint8 or float32
        gram_crops    (G B) C H W, if gram_size   enlarged  images smaller than these
        colours       of these, G B 12, L B 12, ...: colour_batch, on the training device, makes them of the crops
        masks         (G B) P bool  masked  M: where they are True   weights  M: 1 / masked of its image
        indices       B, in the source       broken  [(name, reason)] of unreadable images that others stand in for

    Which image sample i of a step is: see Order.
    config          a CropConfig that also has batch, end, seed, order, group, patch_size, mean, std
    first, samples  what this rank holds of the global batch
    noise           step, first -> what is random in the student's forward, made ahead with the batch: batch["noise"]
    parts           that this rank's samples come in, each of `samples`: batches[step parts + part]
    kept            Batches of the samples that this rank has once ranks have shared theirs: batch["kept"], their masks
    """
    kept = None

    def __init__(self, config, source, first, samples, noise=None, parts=1):
        self.config, self.source, self.first, self.samples = config, source, first, samples
        self.noise, self.parts, self.unreadable = noise, parts, {}
        self.order = Order(source, config.seed, config.batch, config.order)

    def __len__(self):
        return self.config.end * self.parts

    def __getitem__(self, place):
        cuts, colours, indices, broken, enlarged = [], [], [], [], 0
        step, part = divmod(place, self.parts)
        c, first = self.config.at(step), self.first + part * self.samples
        for i in range(first, first + self.samples):
            rng = np.random.default_rng([c.seed, 3, step * c.batch + i])
            index, image = self.read(step, i, broken)
            boxes, flips, colour = draw_crops(rng, c, *image.shape[1:])
            cuts.append(cut_all(image, boxes.tolist(), flips, c))
            colours.append(colour)
            enlarged += min(image.shape[1:]) < c.gram_size
            indices.append(index)
        crops, n = [crop for views in zip(*cuts, strict=True) for crop in views], 2 * self.samples
        end = n + c.n_local * self.samples
        colours = torch.from_numpy(np.stack(colours, axis=1)).split([2, c.n_local])           # G, L of B 12
        batch = dict(global_crops=torch.stack(crops[:n]), indices=torch.tensor(indices), broken=broken)
        none = crops[0].new_empty(0, len(crops[0]), c.local_size, c.local_size)
        batch["local_crops"] = torch.stack(crops[n:end]) if c.n_local else none
        batch["colours"] = [rows.flatten(0, 1) for rows in colours]
        if c.gram_size:
            batch |= dict(gram_crops=torch.stack(crops[end:]), enlarged=enlarged)
            batch["colours"].append(torch.zeros(n, 12))                                        # they have none
        batch |= self.masks(step, first)
        if self.noise:
            batch["noise"] = self.noise(step, first)
        if self.kept is not None:
            batch["kept"] = self.kept.masks(step, self.kept.first)
        return batch

    def read(self, step, i, broken):
        """Sample i of a step; the next in its order stands in for an image that cannot be read."""
        before = len(broken)
        for index in self.order(step, i):
            if index not in self.unreadable:
                try:
                    return index, self.source.load(index)
                except OSError as error:
                    self.unreadable[index] = str(error)
            broken.append((self.source.name(index), self.unreadable[index]))
        raise ValueError(f"--data: none of {len(broken) - before} images in a row can be read; the last: "
                         f"{broken[-1][1]}")

    def masks(self, step, first):
        c = self.config.at(step)
        side = c.global_size // c.patch_size
        groups = range(first // c.group, (first + self.samples - 1) // c.group + 1)
        masks = [draw_masks(np.random.default_rng([c.seed, 4, step, group]), 2 * c.group, side, side,
                            c.mask_share, c.mask_ratio).reshape(2, c.group, -1) for group in groups]
        start = first - groups[0] * c.group
        masks = np.concatenate(masks, axis=1)[:, start : start + self.samples].reshape(2 * self.samples, -1)
        masked = np.flatnonzero(masks)
        weights = 1 / masks.sum(1).clip(1)[masked // masks.shape[1]]
        weights = torch.from_numpy(weights).float()
        return dict(masks=torch.from_numpy(masks), masked=torch.from_numpy(masked), weights=weights)


def colour_batch(batch, config):
    """Replaces the crops by what `augment` makes of them, on the device where they are."""
    rest = dict(batch)
    colours = rest.pop("colours")
    parts = zip(("global_crops", "local_crops", "gram_crops")[: len(colours)], colours, strict=True)
    return rest | {key: augment(batch[key], colours, config.mean, config.std) for key, colours in parts}


def ignore_signals(worker):
    """
    They are for the main process, which still wants this batch; the whole process group gets them. But what that
    process itself sends, at its end, it waits for.
    """
    if not hasattr(signal, "sigwaitinfo"):  # of a system that does not tell who sent it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)

    def obey():
        while signal.sigwaitinfo(STOPS).si_pid != os.getppid():
            pass
        os._exit(0)
    threading.Thread(target=obey, daemon=True).start()


def loader(dataset, steps, workers, **kwargs):
    """dataset[step] for each of `steps`, in order, made ahead by worker processes. Raises ValueError, in one line."""
    try:
        with lent(dataset) as items:
            yield from DataLoader(items if workers else dataset, batch_size=None, sampler=steps, num_workers=workers,
                                  worker_init_fn=ignore_signals, persistent_workers=False, **kwargs)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        # it was killed: often by the system, for want of memory
        raise ValueError(f"--workers {workers}: {str(error).partition(chr(10))[0]}") from error
    except ValueError as error:    # raised in a worker, it comes with a traceback
        raise ValueError(str(error).strip().rpartition("ValueError: ")[2]) from error


def main(argv):
    command = (argv or ["--help"])[0]
    if command in ("--help", "-h"):
        print(__doc__.strip())
        return
    if command not in COMMANDS:
        raise ValueError(f"{command!r} is no command; there are: {', '.join(COMMANDS)}, each before PATH")
    import_module(f"engine.{COMMANDS[command]}").main(argv[1:])


if __name__ == "__main__":
    command_line.run(main)
