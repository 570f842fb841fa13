"""
Keypoints: the same part of two things of a kind, without any training; in shapes of one thing at two times; recall.

    python evaluate.py --task keypoints --weights runs/tiny                         on the generated `shapes`
    python evaluate.py --task spair --weights runs/s --data SPair-71k               JPEGImages/, PairAnnotation/test

paper: DINOv3 App. D.3, SPair, after Probe3D. Dimension letters: see the top of model.py.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from engine.match import nearest_points
from engine.pictures import MATCHED, SHOWN, connected, save_pictures
from engine.task import NORM, Paper, Task, by_size
from engine.views import squared
from sets.pairs import evenly
from sets.things import open_pairs

NEAR = 0.1           # a keypoint is right if it is at most this share of the object's longer side away


@torch.no_grad()
def matched(k, frozen, pairs, places, maps):
    """Where the keypoints of pair k are found, n 2, x and y in shares of the side: by the common protocol, by ours"""
    pair = pairs[k]
    a, b = (torch.from_numpy(maps[places[pair[key]]][0]).to(frozen.device).float() for key in "ab")  # h w D
    start = torch.as_tensor(pair["at"] / pair["sides"][0], device=a.device, dtype=torch.float32)
    a, (h, w), found = F.normalize(a, dim=2).permute(2, 0, 1)[None], b.shape[:2], []
    for middles in False, True:
        asked = F.grid_sample(a, start[None, None] * 2 - 1, padding_mode="border", align_corners=not middles)
        _, match = nearest_points(asked[0, :, 0].T, b.flatten(0, 1))
        corner = torch.stack([match % w, match // w], 1) + 0.5 * middles
        found.append((corner / torch.tensor([w, h], device=a.device)).cpu().numpy())
    return found


def run(data, frozen, c):
    """
    Each keypoint's feature, bilinear among patches of unit length, is looked for in the other image; the patch of the
    largest cosine is the answer. Right is at most 0.1 of the box's longer side away; percent, mean over the classes.

    returns  recall, as it is commonly measured: the grid's outermost middles stand for the image's edges, and a patch
             for its upper left corner;  recall_middles: a patch stands for its middle, in both

    paper:   DINOv3 App. D.3, SPair, the better of --norm true and false;  differs: which pairs of a class are drawn
    """
    (pairs, things), found, rows = data, {}, []
    places, shown = {name: i for i, name in enumerate(things.names)}, evenly(range(len(pairs)), SHOWN)
    answer = partial(matched, pairs=pairs, places=places, maps=frozen.maps(f"things {c.seed}", things))
    for k, ends in enumerate(frozen.each(f"matches {c.seed}", answer, len(pairs))):
        pair = pairs[k]
        right = [np.hypot(*(end * pair["sides"][1] - pair["bt"]).T) <= NEAR * pair["box"] for end in ends]
        found.setdefault(pair["kind"], []).append(np.stack(right))                             # 2 n
        if c.out and k in shown:
            images = [frozen.view(things.image(places[pair[key]]))[0] for key in "ab"]
            start, end = (torch.as_tensor(x).flip(1) for x in (pair["at"] / pair["sides"][0], ends[1]))
            rows.append([connected(*images, start, end, right[1])])
    save_pictures(c, rows, MATCHED)
    classes = [np.concatenate(right, 1) for right in found.values()]
    recall, middles = (100 * float(x) for x in np.mean([right.mean(1) for right in classes], 0))
    return dict(recall=recall, recall_middles=middles, n_pairs=len(pairs), n_keypoints=sum(x.shape[1] for x in classes))


def task(name, layout, *paper):
    return Task(name, layout, open_pairs, run, wants="maps", metric="recall", view=squared, sides=(1024, 480),
                control="patches", pictures="two images and their matches", paper=paper, options=(NORM,))


TASKS = (
    task("keypoints", "JPEGImages/CLASS/, PairAnnotation/test/*.json"),
    task("spair", "JPEGImages/CLASS/, PairAnnotation/test/*.json",
         Paper("recall", by_size(50.4, 55.2, 57.2, 61.2, 56.3, 58.7), 1024, dict(n_pairs=18 * 200))))  # Tab. 14
