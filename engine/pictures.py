"""
What --out gets: rows of pictures, C H W uint8 each.

    hues, shades    class numbers and depths as colours        framed       boxes
    outlined        segments, coloured by their classes        named        boxes with their classes and scores
    connected       two views and what was matched             entitled     a title below
    clouds, cloud   points in space, from two sides, from one
    save_pictures   rows in one file                           ruler        the metres that shades stand for
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from engine.cameras import points_of
from engine.explore import HEAT
from engine.images import resize, shown, unit
from engine.metrics import IGNORE, PER
from engine.views import scaled

SHOWN = 8            # images that --out gets
SURE = 0.3           # score from which on a box is drawn; chosen by eye
STRIP = 14           # pixels of a title's height
LINES = 30           # matches that a picture shows
ABOVE = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # who looks down: ahead of the camera is up
ASIDE = np.array([[0.8, 0, 0.6], [0.3, 0.866, -0.4], [-0.5196, 0.5, 0.6928]])  # 37 degrees to the left, 30 down
MATCHED = "two views; a match is green if it is right, red if not"


def hues(labels):
    """Class numbers H W -> C H W uint8: far hues for near numbers; 0 is dark, what is ignored is white."""
    k = torch.arange(256)[:, None]
    table = 128 + 100 * torch.cos(2 * math.pi * (k * 0.618 + torch.tensor([0, 1 / 3, 2 / 3])))
    table *= 1 - 0.35 * (k // 8 % 2)
    table[0], table[IGNORE] = 30, 255
    return table.to(torch.uint8)[labels.long()].permute(2, 0, 1)


def shades(depths, top):
    """Metres H W -> C H W uint8: near is bright; not known is black."""
    near, at = 1 - np.clip(depths / top, 0, 1) ** 0.5, np.linspace(0, 1, len(HEAT))
    colours = [np.where(depths > 0, np.interp(near, at, channel), 0) for channel in np.transpose(HEAT)]
    return torch.from_numpy(np.rint(np.stack(colours)).astype(np.uint8))


def ruler(top, width):
    """C STRIP width uint8: the shades of 0 to `top` metres, and what they stand for"""
    metres = np.linspace(top / width, top, width)[None].repeat(STRIP, 0)
    strip = Image.fromarray(shades(metres, top).permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(strip)
    for share, anchor, ink in (0, "la", "black"), (0.25, "ma", "white"), (0.5, "ma", "white"), (1, "ra", "white"):
        pen.text((3 + share * (width - 6), 1), f"{share * top:g} m", ink, anchor=anchor)
    return torch.from_numpy(np.array(strip)).permute(2, 0, 1)


def outlined(image, segments):
    """C H W uint8, and class x 1000 + number H W: half image, half the class's hue; white lines between segments"""
    segments = torch.as_tensor(segments)
    edges = torch.zeros(segments.shape, dtype=torch.bool)
    for axis in 0, 1:
        differs = segments.diff(dim=axis) != 0
        edges |= F.pad(differs, (0, 0, 1, 0) if axis == 0 else (1, 0))
    mixed = (image.float() + hues((segments // PER).clamp(max=IGNORE)).float()) / 2
    return torch.where(edges, 255, mixed).to(torch.uint8)


def network_input(vit, image):
    """C H W -> 1 C H W float32, normalised as in training, on the network's device."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (vit.config.mean, vit.config.std))
    return ((unit(image[None]) - mean) / std).to(next(vit.parameters()).device)


def side_by_side(image, colours):
    """C H W, and in 0..1 h w 3, or h w for HEAT -> both H W 3 uint8. No smoothing: it would feign resolution."""
    if colours.ndim == 2:
        at = np.linspace(0, 1, len(HEAT))
        colours = np.stack([np.interp(colours, at, channel) / 255 for channel in np.transpose(HEAT)], -1)
    colours = torch.from_numpy(np.rint(colours * 255).astype(np.uint8)).permute(2, 0, 1)
    colours = F.interpolate(colours[None], image.shape[1:], mode="nearest-exact")[0]
    return [each.permute(1, 2, 0).numpy().copy() for each in (shown(image), colours)]


def framed(image, boxes):
    image = image.clone()
    for left, top, right, bottom in np.asarray(boxes).round().astype(int).tolist():
        for rows, cols in (((top, bottom), (left, left + 2)), ((top, bottom), (right - 2, right)),
                           ((top, top + 2), (left, right)), ((bottom - 2, bottom), (left, right))):
            image[:, max(rows[0], 0) : rows[1], max(cols[0], 0) : cols[1]] = torch.tensor([255, 0, 0])[:, None, None]
    return image


def named(image, boxes, scores, labels, names, least=SURE):
    """
    C H W uint8 with the boxes n 4, left, top, right, bottom, whose scores reach `least`, in their labels' colours, n;
    names  {label, as text: name}
    """
    picture, sure = Image.fromarray(image.permute(1, 2, 0).numpy()), np.flatnonzero(np.asarray(scores) >= least)[::-1]
    pen = ImageDraw.Draw(picture)
    rows = (np.asarray(x)[sure].tolist() for x in (boxes, scores, labels))
    for (left, top, right, bottom), score, label in zip(*rows, strict=True):  # the best is drawn last
        colour = tuple(hues(torch.tensor([[1 + label % 200]]))[:, 0, 0].tolist())
        words, at = f"{names.get(str(label), label)} {score:.2f}", (left + 3, top + 2)
        pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=colour, width=2)
        pen.rectangle(pen.textbbox(at, words), fill=colour)
        pen.text(at, words, "black" if sum(colour) > 300 else "white")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def apart(points, count, least=0.06):
    """Of n 2 points, each that lies at least so far from those taken before it: up to `count` indices"""
    chosen = []
    for k, point in enumerate(points):
        if len(chosen) < count and all((point - points[chosen]).norm(dim=1) >= least):
            chosen.append(k)
    return chosen


def connected(a, b, start, end, right, side=400):
    """
    Two views side by side, and a line for each match: green if it is right, red if not.

    a, b   C H W uint8, of one shape    start, end  n 2, row and column as shares of the sides    right  n bool
    returns  C side 2W uint8
    """
    a, b = (scaled(view, 2 * side) for view in (a, b))  # twice as large as asked, so that lines get smooth
    H, W = a.shape[1:]
    sheet = Image.fromarray((torch.cat([a, b], 2) * 0.8).to(torch.uint8).permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(sheet, "RGBA")
    for (y0, x0), (y1, x1), fine in zip(start.tolist(), end.tolist(), right.tolist(), strict=True):
        ends, colour = ((x0 * W, y0 * H), (x1 * W + W, y1 * H)), (70, 230, 120) if fine else (255, 70, 60)
        pen.line(ends, fill=(*colour, 170), width=4)
        for x, y in ends:
            pen.ellipse((x - 9, y - 9, x + 9, y + 9), fill=colour, outline=(0, 0, 0, 160), width=2)
    return resize(torch.from_numpy(np.array(sheet)).permute(2, 0, 1), H // 2, W)


def clouds(images, depths, intrinsics, poses, window=None):
    """
    All points that the frames of a scene show, from above and from where ASIDE stands.

    images      F 3 H W uint8    depths  F H W, 0 = not known    intrinsics, poses  F 3 3 and F 4 4 of each frame
    window      middle 3, and half of the pictures' height: of another one's; None = as these points want it
    returns     two pictures C H W uint8, the window
    """
    each = [points_of(*frame) for frame in zip(depths, intrinsics, poses, strict=True)]
    ways = np.linalg.inv(poses[0])
    points, cameras = ((ways[:3, :3] @ x.T).T + ways[:3, 3]
                       for x in (np.concatenate([found for found, _ in each]), np.array(poses)[:, :3, 3]))
    colours = np.concatenate([image.numpy()[:, there].T for image, (_, there) in zip(images, each, strict=True)])
    if window is None:
        middle = np.median(points, 0)
        most, cams = (np.linalg.norm(x - middle, axis=1) for x in (points, cameras))
        window = middle, 1.1 * max(np.quantile(most, 0.9), cams.max())
    return [cloud(points, colours, cameras, turned, window, images[0].shape[1:]) for turned in (ABOVE, ASIDE)], window


def cloud(points, colours, cameras, turned, window, size):
    """
    Points in space as from far away, what is nearer in front; cameras as red squares.

    points n 3, colours n 3 uint8, cameras m 3    axes right, down, ahead    turned  3 3: what they are for who looks
    window   middle 3, and half of the picture's height in the points' unit    size  H W, pixels
    returns  C H W uint8, white where nothing is
    """
    (middle, half), (H, W) = window, size
    picture, scale = np.full((H, W, 3), 255, np.uint8), H / 2 / half

    def places(x):
        x = (x - middle) @ turned.T * scale
        col, row = np.floor(x[:, 0] + W / 2), np.floor(x[:, 1] + H / 2)
        return row.astype(int), col.astype(int), x[:, 2], (row >= 0) & (row < H) & (col >= 0) & (col < W)
    row, col, far, there = places(points)
    order = np.argsort(-far)
    order = order[there[order]]  # of points in one place the last is painted: the nearest
    picture[row[order], col[order]] = colours[order]
    for y, x in zip(*places(cameras)[:2], strict=True):
        picture[max(y - 1, 0) : max(y + 2, 0), max(x - 1, 0) : max(x + 2, 0)] = 255, 0, 0
    return torch.from_numpy(picture).permute(2, 0, 1)


def entitled(picture, title, colour=(255, 255, 255), right=""):
    """H W 3 uint8 -> the same above a strip of this colour that has the title, cut where the picture ends"""
    strip, ink = Image.new("RGB", (picture.shape[1], STRIP), tuple(colour)), "black" if sum(colour) > 300 else "white"
    ImageDraw.Draw(strip).text((3, 1), title, ink)
    ImageDraw.Draw(strip).text((picture.shape[1] - 3, 1), right, ink, anchor="ra")
    return np.concatenate([picture, np.array(strip)])


def save_pictures(c, rows, shown="image, truth, prediction", top=0):
    """Rows of C H W uint8, image, truth, prediction, to OUT/TASK.png.    top  metres: a ruler for shades"""
    if not rows:
        return
    height, width = rows[0][0].shape[1:]
    tiles = [[F.interpolate(each[None], (height, width), mode="nearest-exact")[0] for each in row] for row in rows]
    sheet = torch.cat([torch.cat([F.pad(tile, (0, 4, 0, 4), value=255) for tile in row], 2) for row in tiles], 1)
    if top:
        sheet = torch.cat([sheet, ruler(top, sheet.shape[2])], 1)
    Path(c.out).mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(Path(c.out, f"{c.task}.png"))
    print(f"wrote {Path(c.out, f'{c.task}.png')}: {shown}")
