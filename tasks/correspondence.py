"""
Correspondence: the same point of a scene, or of an object, in two views of it, without any training; recall in cm.

    python evaluate.py --task rgbd --weights runs/s --data SCAN         *.color.jpg, *.depth.png, *.pose.txt
    python evaluate.py --task navi --weights runs/s --data navi_v1      OBJECT/wild_set/annotations.json

paper: DINOv3 §6.1.3, Tab. 4, App. D.3, after Probe3D. Dimension letters: see the top of model.py.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from engine.match import nearest_points
from engine.pictures import LINES, MATCHED, SHOWN, apart, connected, save_pictures
from engine.task import NORM, Paper, Task, by_size, skip
from engine.views import fitted
from sets.navi import Objects
from sets.pairs import evenly
from sets.scans import Scan

MATCHES = 1000       # most similar pairs of points of two views that are scored


def known_points(m, points, device):
    """h w D, enlarged 4 times, where points(grid) knows the place -> features n D, metres n 3, row and column n 2"""
    x = torch.from_numpy(m).to(device).float().permute(2, 0, 1)[None]                          # 1 D h w
    x = F.interpolate(x, scale_factor=4, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    points = points(grid=x.shape[:2]).to(device)
    known = points.isfinite().all(2)
    return x[known], points[known], (known.nonzero().cpu() + 0.5) / torch.tensor(x.shape[:2])


@torch.no_grad()
def matched(k, frozen, views, maps):
    """
    Of pair k, its most similar matches, n of them: metres that each is off by; that it would be off by, had it been
    matched to the nearest point;  both ends n 2, row and column.    n is 0 if a view has no point whose place is known
    """
    (a, at, start), (b, bt, end) = (
        known_points(maps[i][0], partial(views.points, i), frozen.device) for i in views.pairs[k])
    if not (len(a) and len(b)):
        return [np.zeros(0, np.float32)] * 2 + [np.zeros((0, 2), np.float32)] * 2
    cosine, match = nearest_points(a, b)
    best = cosine.topk(min(MATCHES, len(cosine))).indices                                      # n
    match = match[best]
    least = torch.cdist(at[best], bt, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    found = (at[best] - bt[match]).norm(dim=1), least, start[best.cpu()], end[match.cpu()]
    return [x.float().cpu().numpy() for x in found]


def run(views, frozen, c, metres):
    """
    The 1000 most similar matches of each pair of views: which share is off by at most so many metres.

    views    len, image(i) -> C H W uint8, points(i, grid) -> h w 3, name, pairs of indices
    returns  recall at each distance, and their mean; ceiling: that mean if each of these points had been matched to
             the nearest that the other view has; all in percent
    """
    errors, least, rows, shown = [], [], [], evenly(range(len(views.pairs)), SHOWN)
    answer = partial(matched, views=views, maps=frozen.maps(views.name, views))
    for k, (off, nearest, *ends) in enumerate(frozen.each(f"matches {views.name}", answer, len(views.pairs))):
        if not len(off):
            skip(f"pair {k}: one of its views has no point whose place is known")
            continue
        errors.append(torch.from_numpy(off))
        least.append(torch.from_numpy(nearest))
        if c.out and k in shown:
            start, end = map(torch.from_numpy, ends)
            few = apart(start, LINES)
            images = map(views.image, views.pairs[k])
            rows.append([connected(*images, start[few], end[few], errors[-1][few] <= metres[1])])
    save_pictures(c, rows, MATCHED)
    if not errors:
        raise ValueError(f"--data: no pair of views in {c.data} has a point whose place is known in both")
    n_pairs, errors, least = len(errors), torch.cat(errors), torch.cat(least)
    recalls = {f"recall_{round(100 * far)}cm": 100 * (errors <= far).float().mean().item() for far in metres}
    ceiling = [100 * (least <= far).float().mean().item() for far in metres]
    return dict(recall=sum(recalls.values()) / len(metres), **recalls, ceiling=sum(ceiling) / len(metres),
                n_pairs=n_pairs, matches=len(errors))


SCENES = Task(  # each two neighbouring views of a scan; the paper has objects
    "rgbd", "NAME.{color.jpg,depth.png,pose.txt}, camera-intrinsics.txt", Scan,
    partial(run, metres=(0.05, 0.1, 0.2)), wants="maps", metric="recall", view=fitted, sides=(480, 480),
    control="patches", pictures="two views and their matches", shapes=False, options=(NORM,))

# differs: which pairs are drawn; the paper has the better of --norm true and false; a square that
#          would leave the photo is moved into it, and depth is read at each point's place
# Not run on NAVI itself: its text does not say how the camera's axes lie. Were they others, `ceiling` would be low.
OBJECTS = Task(
    "navi", "OBJECT/wild_set/annotations.json", Objects,
    partial(run, metres=(0.01, 0.02, 0.05)), wants="maps", metric="recall", view=fitted, sides=(512, 512),
    control="patches", pictures="two photos and their matches", shapes=False, options=(NORM,),
    paper=(Paper("recall", by_size(56.3, 57.1, 58.8, 62.3, 63.3, 64.4), 512, {}),))            # Tab. 14
TASKS = SCENES, OBJECTS
