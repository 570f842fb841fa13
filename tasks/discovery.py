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
from engine.task import Task
from engine.views import fitted
from sets.boxes import open_discovery

THRESHOLDS = [i / 20 for i in range(9)]  # of the cosine from which on two patches are joined; the best one is reported
FAINT = 1e-5                             # weight of all other pairs


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


def boxes_at(i, frozen, maps, source):
    """Of the main object of image i, at each threshold:  thresholds 4, in pixels"""
    (m,), (H, W) = maps[i], source.image(i).shape[1:]
    (h, w), found = m.shape[:2], []
    for vector in cut_graph(torch.from_numpy(m).to(frozen.device)):
        rows, cols = np.nonzero(main_object(vector, (h, w)))
        found.append((cols.min() * W / w, rows.min() * H / h, (cols.max() + 1) * W / w, (rows.max() + 1) * H / h))
    return [np.array(found)]


def run(source, frozen, c):
    """
    CorLoc, percent of the images where the box of the main object overlaps a true one by half, at the best threshold.

    differs: images are resized to whole patches, not padded
    """
    hits, whole, shown = [], [], []
    boxes = partial(boxes_at, maps=frozen.maps("images", source), source=source)
    for i, (found,) in enumerate(frozen.each("boxes", boxes, len(source), thresholds=THRESHOLDS)):
        truth, image = source.truth(i), source.image(i)
        if not len(truth):
            continue
        hits.append([box_overlap(box, truth).max() >= 0.5 for box in found])
        whole.append(box_overlap((0, 0, *image.shape[:0:-1]), truth).max() >= 0.5)
        if c.out and len(shown) < SHOWN:
            best = found[int(np.mean(hits, 0).argmax())]
            shown.append([image, framed(image, truth), framed(image, [best])])
    save_pictures(c, shown)
    scores = 100 * np.mean(hits, 0)
    return dict(corloc=float(scores.max()), threshold=THRESHOLDS[int(scores.argmax())], n_images=len(hits),
                whole_image_corloc=100 * float(np.mean(whole)))


TASK = Task("discovery", "VOC: JPEGImages/, Annotations/*.xml; DAVIS: {JPEGImages,Annotations}/480p/", open_discovery,
            run, wants="maps", metric="corloc", view=fitted, sides=(480, 160), control="patches",
            pictures="image, true boxes, the box found")
