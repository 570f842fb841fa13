"""
Object discovery, without any training: the main object's box from the graph of an image's patches; CorLoc.

    python evaluate.py --task discovery --weights runs/tiny                       on the generated `shapes`
    python evaluate.py --task discovery --weights runs/s --data VOC2012           JPEGImages/, Annotations/*.xml

    cut_graph      the normalised cut of the graph of patches           Wang et al. 2022, TokenCut
    main_object    the side of the cut that holds its largest entry
    run            how often that box overlaps a true one by half       DINOv3 App. D

Dimension letters: see the top of model.py.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from engine.metrics import box_overlap
from engine.pictures import SHOWN, framed, save_pictures
from engine.task import Task, skip
from engine.views import padded
from sets.boxes import open_discovery

THRESHOLDS = [i / 20 for i in range(9)]  # of the cosine from which on two patches are joined; the best one is reported
FAINT = 1e-5                             # weight of all other pairs
EXACT = 1e-9                             # largest residual of an eigenvector of unit length, relative to its eigenvalue


def cut_graph(map):
    """
    The normalised cut of the graph of patches, for every threshold:  h w D -> thresholds x [eigenvector P]

        W_ij = 1 if cosine(i, j) > threshold else 0.00001,  d = row sums of W
        (D - W) x = lambda D x,  x of the second smallest lambda
    """
    map = map.cpu() if map.device.type == "mps" else map  # which has no float64
    x = F.normalize(map.flatten(0, 1).double(), dim=1)
    cosine, vectors = x @ x.T, []
    for threshold in THRESHOLDS:
        weight = torch.where(cosine > threshold, 1.0, FAINT).to(x.dtype)
        scale = weight.sum(1).rsqrt()
        laplacian = torch.eye(len(x), dtype=x.dtype, device=x.device) - scale[:, None] * weight * scale
        vectors.append(scale * second(laplacian, F.normalize(1 / scale, dim=0)))
    return vectors


def second(laplacian, first):
    """
    The eigenvector of the second smallest eigenvalue of P P, symmetric, whose smallest is 0 with the eigenvector
    `first`: Lanczos' iteration on the inverse, 0 moved out of the way; new vectors are orthogonal to all before.
    """
    inverse = torch.linalg.inv(laplacian + 2 * torch.outer(first, first))  # no eigenvalue is above 2
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(first), dtype=first.dtype, generator=generator).to(first.device)
    basis, images, v = [], [], F.normalize(v - first * (first @ v), dim=0)
    while True:
        basis.append(v)
        images.append(inverse @ v)
        Q = torch.stack(basis)                                                                 # k P
        residual = images[-1] - Q.T @ (Q @ images[-1])
        residual = residual - first * (first @ residual) - Q.T @ (Q @ residual)
        last = len(basis) == len(first) - 1 or residual.norm() < 1e-12 * images[-1].norm()
        if last or len(basis) % 8 == 0:
            A = torch.stack(images)
            values, vectors = torch.linalg.eigh(Q @ A.T)
            found = vectors[:, -1] @ Q
            if last or (vectors[:, -1] @ A - values[-1] * found).norm() < EXACT * values[-1]:
                return found
        v = F.normalize(residual, dim=0)


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


def boxes_at(i, frozen, maps, source, side, patch):
    """Of the main object of image i, at each threshold:  thresholds 4, in pixels; what was padded is no part of it"""
    (m,), (H, W) = maps[i], source.image(i).shape[1:]
    (h, w), found, scale = m.shape[:2], [], min(H, W) / side if side else 1
    cell = -(-round(H / scale) // patch) * patch / h * scale                                   # pixels of the image
    for vector in cut_graph(torch.from_numpy(m).to(frozen.device)):
        rows, cols = np.nonzero(main_object(vector, (h, w)))
        box = cols.min() * cell, rows.min() * cell, (cols.max() + 1) * cell, (rows.max() + 1) * cell
        found.append(np.minimum(box, (W, H, W, H)))
    return [np.array(found)]


def run(source, frozen, c):
    """
    CorLoc, percent of the images where the box of the main object overlaps a true one by half, at the best threshold.

    paper:   DINOv3 §6.1.4, App. D.4, TokenCut: images as large as they are, padded to whole patches;
    --resolution scales them
    """
    hits, whole, shown = [], [], []
    boxes = partial(boxes_at, maps=frozen.maps("images", source), source=source, **frozen.view.keywords)
    for i, (found,) in enumerate(frozen.each("boxes", boxes, len(source), thresholds=THRESHOLDS)):
        truth, image = source.truth(i), source.image(i)
        if not len(truth):
            skip(f"image {i}: no object in it is marked")
            continue
        hits.append([box_overlap(box, truth).max() >= 0.5 for box in found])
        whole.append(box_overlap((0, 0, *image.shape[:0:-1]), truth).max() >= 0.5)
        if c.out and len(shown) < SHOWN:
            best = found[int(np.mean(hits, 0).argmax())]
            shown.append([image, framed(image, truth), framed(image, [best])])
    save_pictures(c, shown)
    if not hits:
        raise ValueError(f"--data: none of {len(source)} images of {c.data} has a box; wanted objects that are marked")
    scores = 100 * np.mean(hits, 0)
    return dict(corloc=float(scores.max()), threshold=THRESHOLDS[int(scores.argmax())], n_images=len(hits),
                whole_image_corloc=100 * float(np.mean(whole)))


TASK = Task("discovery", "VOC: JPEGImages/, Annotations/*.xml; COCO-20k; DAVIS: {JPEGImages,Annotations}/480p/",
            open_discovery, run, wants="maps", metric="corloc", view=padded, sides=(0, 160), control="patches",
            pictures="image, true boxes, the box found")
