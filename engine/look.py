"""
What the network will see of a set of images: one step's batch as a picture.

    python data.py look PHOTOS                                       of the recipe `tiny`, to look.png
    python data.py look PHOTOS --size s --stage highres --step 40    train.py's options choose the recipe
    python data.py look PHOTOS --size l --images 8 --out l.png

A band for each image: the photo with the areas of its crops; beside it each crop, above as it is cut, below as the
network gets it. Patches that are masked are hatched: hidden from the student, seen by the teacher.

    views      a step's batch, image by image
    band       one of these, as pictures side by side
    picture    all of them
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import Batches, colour_batch, draw_crops
from engine import config as command_line
from engine.channels import reader
from engine.colours import APPLY, GREY, SIGMA, SOLARIZE
from engine.images import resize, shown
from engine.sources import open_source
from engine.stats import read_line

TILE = 256                                               # pixels: the side of a global crop, at most
GAP, APART, MARGIN = 6, 24, 28                           # pixels: between tiles, between columns, around all
TEXT, TITLE = 13, 20                                     # pixels: of letters
PAPER, INK, SOFT = (250, 249, 247), (29, 26, 36), (102, 97, 111)
BOXES = (255, 110, 30), (30, 160, 255), (255, 255, 255)  # first and second global crop, local crops
HIDDEN = (84, 30, 120)                                   # what a mask is hatched in


@dataclass(frozen=True)
class LookConfig:
    out: str = "look.png"      # the .png to write; its folder is made
    step: int = 0              # [0, 1e7]: of the run, whose batch it is
    images: int = 4            # [1, 64]: of the batch, the first ones

# --------------------------------------------------------------------------------
# What is in a batch


def views(c, source, step, n):
    """
    The first n images of a step's batch: a dict each of

        name, part of a mixture in words, photo C H W, boxes G+L 4, flips G+L, colours G+L 12, masks G P bool
        global, local, gram    two of k C H W: crops as they are cut, and as the network gets them; if there are

    returns  those;  [(name, reason)] of the images that others stand in for
    """
    batch = Batches(c, source, 0, n)[step]
    c, seen = c.at(step), colour_batch(batch, c)
    kinds = [kind for kind in ("global", "local", "gram") if len(batch.get(f"{kind}_crops", ()))]
    found = []
    for i, index in enumerate(batch["indices"].tolist()):
        photo, rng = source.load(index), np.random.default_rng([c.seed, 3, step * c.batch + i])  # as Batches draws
        view = dict(zip(("boxes", "flips", "colours"), draw_crops(rng, c, *photo.shape[1:]), strict=True))
        view |= {kind: (batch[f"{kind}_crops"][i::n], visible(seen[f"{kind}_crops"][i::n], c)) for kind in kinds}
        found.append(view | dict(name=source.name(index), part=part_of(source, index), photo=photo,
                                 masks=batch["masks"][i::n]))
    return found, batch["broken"]


def part_of(source, index):
    """"part 2 of 3, ", of a mixture"""
    if not hasattr(source, "sources"):
        return ""
    return f"part {source.sources.index(source.at(index)[0]) + 1} of {len(source.sources)}, "


def visible(crops, c):
    """The network's input, n C H W float32 -> n 3 H W uint8, its normalisation undone"""
    mean, std = (torch.tensor(v)[:, None, None] for v in (c.mean, c.std))
    return shown(crops * std + mean)

# --------------------------------------------------------------------------------
# The picture. All its parts are H W 3 uint8.


def band(view, c):
    """The columns of one image: what they are, and each as a picture."""
    side = magnified(c.global_size, c)
    photo = outlined(view, 2 * side)
    names = line(view["name"], photo.shape[1], INK, end=True), line(sides(view, c), photo.shape[1])
    columns = {"areas of the crops": above(photo, *names)}
    cut, seen = ([tile(crop, side) for crop in crops] for crops in view["global"])
    seen = [hatched(each, mask) for each, mask in zip(seen, view["masks"], strict=True)]
    cut, seen = ([edged(*each) for each in zip(tiles, BOXES[:2], strict=True)] for tiles in (cut, seen))
    notes = [told(*each) for each in zip(view["flips"], view["colours"], strict=True)][:2]
    seen = [above(each, line(note, side)) for each, note in zip(seen, notes, strict=True)]
    small = magnified(view["local"][0].shape[-1], c) if "local" in view else side
    rows = max(1, round(side / small))
    height = max(side, rows * (small + GAP) - GAP)
    columns[f"global crops, {c.global_size} px"] = above(grid(cut, 1, height), grid(seen, 1))
    if "local" in view:
        cut, seen = (grid([tile(crop, small) for crop in crops], rows, height) for crops in view["local"])
        columns[f"local crops, {view['local'][0].shape[-1]} px"] = above(cut, seen)
    if "gram" in view:  # without colours: what is cut is seen
        columns[f"the Gram teacher's, {c.gram_size} px"] = grid(
            [edged(tile(crop, side), colour) for crop, colour in zip(view["gram"][1], BOXES[:2], strict=True)], 1)
    return columns


def picture(found, c, title):
    """All images' bands, a title above."""
    bands = [band(view, c) for view in found]
    parts = []
    for k, columns in enumerate(bands):
        widest = [max(each[name].shape[1] for each in bands) for name in columns]
        if k == 0:
            parts.append(beside(*map(line, columns, widest), gap=APART))
        parts.append(beside(*(padded(each, 0, width) for each, width in zip(columns.values(), widest, strict=True)),
                            gap=APART))
    body = above(*parts, gap=APART)
    head = above(line(title, body.shape[1], INK, TITLE),
                 line("Above: crops as they are cut. Below: as the network gets them; hatched patches are hidden from "
                      "the student.", body.shape[1]))
    body = above(head, body, gap=APART)
    return padded(body, body.shape[0] + MARGIN, body.shape[1] + MARGIN, MARGIN)


def magnified(side, c):
    """Pixels in the picture of a side in the network: whole multiples, where they fit; a pixel stays one."""
    return side * (TILE // c.global_size) if c.global_size <= TILE else max(1, round(side * TILE / c.global_size))


def tile(crop, side):
    """C H W -> side side 3: enlarged without smoothing, which would feign resolution"""
    crop = shown(crop)
    larger = side > crop.shape[1] and side % crop.shape[1] == 0
    crop = F.interpolate(crop[None], (side, side), mode="nearest-exact")[0] if larger else resize(crop, side, side)
    return crop.permute(1, 2, 0).numpy()


def outlined(view, most):
    """The photo, as large as fits, and the areas of its crops."""
    H, W = view["photo"].shape[1:]
    factor = most / max(H, W)
    image = Image.fromarray(resize(shown(view["photo"]), max(1, round(H * factor)), max(1, round(W * factor)))
                            .permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(image, "RGBA")
    for k in range(len(view["boxes"]) - 1, -1, -1):  # the global ones on top
        top, left, height, width = view["boxes"][k] * factor
        box = round(left), round(top), round(left + width) - 1, round(top + height) - 1
        pen.rectangle(box, outline=(0, 0, 0, 160), width=4 if k < 2 else 3)
        pen.rectangle([x + s for x, s in zip(box, (1, 1, -1, -1), strict=True)], outline=BOXES[min(k, 2)],
                      width=2 if k < 2 else 1)
    return np.array(image)


def hatched(picture, mask):
    """H H 3, P bool -> the same with masked patches dark and striped"""
    n, side = round(len(mask) ** 0.5), len(picture)
    at = np.arange(side) * n // side
    inside = mask.numpy().reshape(n, n)[at][:, at]
    stripes = (np.arange(side)[:, None] + np.arange(side)) // 3 % 3 == 0
    strength = np.where(inside, np.where(stripes, 0.95, 0.65), 0)[..., None]
    return (picture * (1 - strength) + np.array(HIDDEN) * strength).astype(np.uint8)


def edged(picture, colour):
    picture = picture.copy()
    picture[:3] = picture[-3:] = picture[:, :3] = picture[:, -3:] = colour
    return picture


def told(flip, colours):
    """What happened to a crop, in words."""
    words = [word for word, so in (("flip", flip % 2), (f"turned {flip // 2 * 90} degrees", flip // 2),
                                   ("colour", colours[APPLY]), ("grey", colours[GREY]),
                                   (f"blur {colours[SIGMA]:.1f} px", colours[SIGMA]),
                                   ("solarize", colours[SOLARIZE])) if so]
    return ", ".join(words) or "as it is"


def sides(view, c):
    """Of the photo; and by how much the crop that needs it most is enlarged, which adds no detail."""
    cut = (max(c.global_size, c.gram_size), view["boxes"][:2]), (c.local_size, view["boxes"][2:])
    most = max(side / box[2:].min() for side, boxes in cut for box in boxes)
    enlarged = f"; crops enlarged up to {most:.1f} times" if most > 1.05 else ""
    return f"{view['part']}{view['photo'].shape[2]} x {view['photo'].shape[1]} pixels{enlarged}"


def line(text, width, colour=SOFT, size=TEXT, end=False):
    """A line of text of this width; one that is longer loses its end, or, if that matters most, its beginning."""
    font = letters(size)
    text = text.encode("utf-8", "replace").decode()
    while font.getlength(text) > width and len(text) > 1:
        text = "…" + text[2:] if end else text[:-2] + "…"
    strip = Image.new("RGB", (width, round(1.4 * size)), PAPER)
    ImageDraw.Draw(strip).text((0, 0), text, colour, font)
    return np.array(strip)


@cache
def letters(size):
    return ImageFont.load_default(size)


def padded(picture, height, width, before=0):
    H, W = picture.shape[:2]
    out = np.full((max(H, height) + before, max(W, width) + before, 3), PAPER, np.uint8)
    out[before : before + H, before : before + W] = picture
    return out


def above(*parts, gap=GAP):
    width = max(part.shape[1] for part in parts)
    parts = [padded(part, part.shape[0] + gap * (k < len(parts) - 1), width) for k, part in enumerate(parts)]
    return np.concatenate(parts)


def beside(*parts, gap=GAP):
    return above(*(part.swapaxes(0, 1) for part in parts), gap=gap).swapaxes(0, 1)


def grid(tiles, rows, height=0):
    """Down, then to the right."""
    return padded(beside(*(above(*tiles[k : k + rows]) for k in range(0, len(tiles), rows))), height, 0)

# --------------------------------------------------------------------------------


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip(), command_line.describe(LookConfig()), sep="\n\n")
        return
    own, c = read_line(argv, LookConfig())
    if Path(own.out).suffix != ".png":
        raise ValueError(f"--out {own.out}: it is a picture; name a file that ends in .png")
    command_line.writable(own.out, folder=False)
    source, n = open_source(c.data, c.n_shapes, c.seed, reader(c, c)), min(own.images, c.batch)
    found, broken = views(c, source, own.step, n)
    for name, reason in dict.fromkeys(broken):
        print(f"another image stands in for {name}: {reason}")
    what = f"{c.data}: images 1 to {n} of the {c.batch:,} of step {own.step:,}, --size {c.size} --stage {c.stage}"
    sheet = picture(found, c.at(own.step), what)
    Path(own.out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(own.out)
    print(f"wrote {own.out}: {what}; {sheet.shape[1]}x{sheet.shape[0]} pixels")
