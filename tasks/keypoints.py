"""
Keypoints: the same part of two things of a kind, without any training; in shapes of one thing at two times; recall.

    python evaluate.py --task keypoints --weights runs/tiny                         on the generated `shapes`
    python evaluate.py --task spair --weights runs/s --data SPair-71k               JPEGImages/, PairAnnotation/test

paper: DINOv3 App. D.3, SPair, after Probe3D. Dimension letters: see the top of model.py.
"""

import numpy as np
import torch
import torch.nn.functional as F

from engine.match import nearest_points
from engine.pictures import MATCHED, SHOWN, connected, save_pictures
from engine.task import Paper, Task, by_size
from engine.views import squared
from sets.pairs import evenly
from sets.things import open_pairs

NEAR = 0.1           # a keypoint is right if it is at most this share of the object's longer side away


@torch.no_grad()
def run(data, frozen, c):
    """
    Each keypoint's feature, bilinear among patches of unit length, is looked for in the other image; the patch of the
    largest cosine is the answer. Right is at most 0.1 of the box's longer side away; percent, mean over the classes.

    paper:   DINOv3 App. D.3, SPair
    differs: a patch stands for its middle, where Probe3D takes its corner for answers and the grid's outermost middles
             for the image's edges; which pairs of a class are drawn
    """
    (pairs, things), found, rows = data, {}, []
    maps = frozen.maps(f"things {c.seed}", things)
    place, shown = {name: i for i, name in enumerate(things.names)}, evenly(range(len(pairs)), SHOWN)
    for k, pair in enumerate(pairs):
        a, b = (torch.from_numpy(maps[place[pair[key]]][0]).to(frozen.device).float() for key in "ab")  # h w D
        start = torch.as_tensor(pair["at"] / pair["sides"][0], device=a.device, dtype=torch.float32)
        a = F.normalize(a, dim=2).permute(2, 0, 1)[None]
        asked = F.grid_sample(a, start[None, None] * 2 - 1, padding_mode="border", align_corners=False)
        _, match = nearest_points(asked[0, :, 0].T, b.flatten(0, 1))
        h, w = b.shape[:2]
        end = torch.stack([(match % w + 0.5) / w, (match // w + 0.5) / h], 1).cpu()
        right = np.hypot(*(end.numpy() * pair["sides"][1] - pair["bt"]).T) <= NEAR * pair["box"]
        found.setdefault(pair["kind"], []).extend(right.tolist())
        if c.out and k in shown:
            images = [frozen.view(things.image(place[pair[key]]))[0] for key in "ab"]
            rows.append([connected(*images, start.cpu().flip(1), end.flip(1), right)])
    save_pictures(c, rows, MATCHED)
    recalls = [100 * float(np.mean(right)) for right in found.values()]
    return dict(recall=float(np.mean(recalls)), n_pairs=len(pairs), n_keypoints=sum(map(len, found.values())))


def task(name, layout, *paper):
    return Task(name, layout, open_pairs, run, wants="maps", metric="recall", view=squared, sides=(1024, 480),
                control="patches", pictures="two images and their matches", paper=paper)


TASKS = (
    task("keypoints", "JPEGImages/CLASS/, PairAnnotation/test/*.json"),
    task("spair", "JPEGImages/CLASS/, PairAnnotation/test/*.json",
         Paper("recall", by_size(50.4, 55.2, 57.2, 61.2, 56.3, 58.7), 1024, dict(n_pairs=18 * 200))))  # Tab. 14
