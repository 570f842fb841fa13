"""
Patch features beside others of the same images: of two networks, of several resolutions, of a run's kept steps.

    on_grid          a map, bicubically, on another grid
    cosines          of all patches to the one under a point
    most_different   where two networks' similarities differ most, a few points apart
    consistency      of a map with a finer one                               DINOv3 Fig. 4, 17
    draw_sizes       PCA of each resolution, and how consistent each is: the picture
    kept_steps       a run's checkpoints that hold its teacher
    turned_like      colours of one step as those of another, by a rotation
    save_frames      pictures, one after the other, as a GIF

A map is h w D. Dimension letters: see the top of model.py.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from engine.checkpoint import saved

APART = 0.2     # of both sides: least distance of points that are shown
SECONDS = 0.7   # of a frame

# --------------------------------------------------------------------------------
# Two networks


def on_grid(map, grid):
    """h w D -> of another grid; without antialiasing, as the Gram teacher's map is resized."""
    if map.shape[:2] == tuple(grid):
        return map
    return F.interpolate(map.permute(2, 0, 1)[None], grid, mode="bicubic")[0].permute(1, 2, 0)


def cosines(map, patch):
    """h w, of every patch to the one in this row and column."""
    unit = F.normalize(map, dim=-1)
    return (unit @ unit[patch]).numpy()


def most_different(a, b, n=3):
    """n points x, y, shares of the sides, of patches whose cosines to all others differ most, the first most of all."""
    h, w = a.shape[:2]
    x, y = (F.normalize(m.flatten(0, 1), dim=-1) for m in (a, b))                              # P D each
    differ = torch.cat([(some @ x.T - other @ y.T).square().mean(1) for some, other in zip(
        x.split(1024), y.split(1024), strict=True)])                                           # P
    points = []
    for i in differ.argsort(descending=True).tolist():
        point = (i % w + 0.5) / w, (i // w + 0.5) / h
        if all(math.dist(point, other) >= APART for other in points):
            points.append(point)
        if len(points) == n:
            break
    return points


def signed_colours(x):
    """h w in -1..1 -> h w 3 in 0..1: blue below 0, white, red above"""
    x = np.clip(x, -1, 1)[..., None]
    return np.where(x < 0, 1 + x * (1 - np.array([0.13, 0.4, 0.67])), 1 - x * (1 - np.array([0.7, 0.09, 0.17])))

# --------------------------------------------------------------------------------
# Several resolutions


def consistency(map, finest):
    """Mean cosine of a map's patches, bicubically on the finest map's grid, to those."""
    return F.cosine_similarity(on_grid(map, finest.shape[:2]), finest, dim=-1).mean().item()


def draw_sizes(path, names, sizes, photos, colours, curves):
    """
    Writes the picture: a row for each image, of it and the colours of each size; below, the curves.

    photos  H W 3 each    colours  of each image, of each size: h w 3    curves  of each image, of each size
    raises  ValueError without matplotlib
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('curves are drawn by matplotlib, which is not installed; pip install -e ".[demo]"') from error
    columns = 1 + len(sizes)
    figure = Figure(figsize=(2.6 * columns, 2.7 * len(names) + 2.6), dpi=110, layout="constrained")
    grid = figure.add_gridspec(len(names) + 1, columns)
    for row, (photo, each) in enumerate(zip(photos, colours, strict=True)):
        for column, picture in enumerate([photo, *each]):
            axis = figure.add_subplot(grid[row, column])
            axis.imshow(picture, interpolation="nearest", aspect="auto", extent=(0, photo.shape[1], photo.shape[0], 0))
            axis.set(aspect="equal")
            axis.set_axis_off()
            h, w = picture.shape[:2]
            axis.set_title(f"{sizes[column - 1]} px, {h}x{w} patches" if column else names[row], fontsize=9, loc="left")
    axis = figure.add_subplot(grid[-1, :])
    for name, curve in zip(names, curves, strict=True):
        axis.plot(sizes, curve, marker="o", label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size}" for size in sizes])
    axis.set_title(f"mean cosine of patches with those at {sizes[-1]} px, on its grid", fontsize=10, loc="left")
    axis.set_xlabel("pixels of the short side", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path)

# --------------------------------------------------------------------------------
# A run's kept steps


def kept_steps(run):
    """[(step, file of the teacher)] of what a run has kept, oldest first. Raises ValueError for fewer than two."""
    found = sorted((step, folder / "teacher.safetensors") for step, folder in saved(run)
                   if (folder / "teacher.safetensors").is_file())
    if len(found) < 2:
        raise ValueError(f"RUN {run} has kept {len(found)} steps; two or more are wanted: train with --keep_every N")
    return found


def turned_like(scores, other):
    """n 3 scores on principal components, turned to lie as near to other scores of the same patches as can be."""
    u, _, v = torch.linalg.svd(scores.T @ other)
    return scores @ (u @ v)


def save_frames(path, frames):
    """GIF of [(words, H W 3 uint8)], the words above each, the last one for longer."""
    pictures = []
    for words, frame in frames:
        sheet = Image.new("RGB", (frame.shape[1], frame.shape[0] + 22), "white")
        sheet.paste(Image.fromarray(frame), (0, 22))
        ImageDraw.Draw(sheet).text((4, 4), words, fill="black")
        pictures.append(sheet)
    durations = [1000 * SECONDS] * (len(pictures) - 1) + [3000 * SECONDS]
    pictures[0].save(Path(path), save_all=True, append_images=pictures[1:], duration=durations, loop=0)
