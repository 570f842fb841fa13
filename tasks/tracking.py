"""
Tracking, without any training: the first frame's masks carried through a video by similar patches; J and F.

    python evaluate.py --task tracking --weights runs/tiny                          videos of the generated `shapes`
    python evaluate.py --task davis --weights runs/s --data DAVIS --resolution 960  JPEGImages/480p, Annotations/480p

paper: DINOv3 §6.1.5, Tab. 5, App. D.5. Dimension letters: see the top of model.py.
"""

import math
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F

from engine.metrics import boundary, region
from engine.pictures import SHOWN, hues, save_pictures
from engine.task import Paper, Task, by_size, skip
from engine.views import fitted
from sets.videos import open_videos

CONTEXT = 7          # frames before this one that vote, beside the first
RADIUS = 12          # patches: how far from its place a patch is looked for
VOTERS = 5           # most similar patches that vote
TEMPERATURE = 0.2    # of their votes


def near(h, w, radius, device):
    """P P bool: which patches lie within a circle of that many patches about each."""
    i, j = (x.flatten().to(device) for x in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    return (i[:, None] - i) ** 2 + (j[:, None] - j) ** 2 <= radius**2


@torch.no_grad()
def propagate(maps, first, device):
    """
    Each patch takes the objects of its 5 most similar patches near its place in the first frame and the 7 before:

        p(patch) = sum over them of softmax(cosine / 0.2) p(neighbour)

    maps    h w D for each frame, each looked at once    first  n_objects h w, of the first frame, sums to 1
    yields  n_objects h w for each frame after the first

    paper:   DINOv3 App. D.5, the row 7, 12, circle, 5, 0.2 of its 18; which row its tables have, it does not say
    differs: 5 vote, where the paper lets all vote that are as similar as the fifth
    """
    h, w = first.shape[1:]
    allowed, objects = near(h, w, RADIUS, device), first.flatten(1).T                          # P P,  P n_objects
    unit = (F.normalize(torch.from_numpy(m).to(device).float().flatten(0, 1), dim=1) for m in maps)  # P D each
    seen = [(next(unit), objects)]  # the first, then the latest
    for x in unit:
        best, votes = [], []
        for other, shares in seen:
            cosine, at = (x @ other.T).masked_fill(~allowed, -math.inf).topk(min(VOTERS, h * w))  # P 5
            best.append(cosine)
            votes.append(shares[at])                                                           # P 5 n_objects
        best, places = torch.cat(best, 1).topk(min(VOTERS, h * w))
        votes = torch.cat(votes, 1).gather(1, places[..., None].expand(-1, -1, objects.shape[1]))
        found = ((best / TEMPERATURE).softmax(1)[..., None] * votes).sum(1)                    # P n_objects
        seen = seen[:1] + (seen[1:] + [(x, found)])[-CONTEXT:]
        yield found.T.unflatten(1, (h, w))


def to_pixels(shares, size):
    """n_objects h w -> H W: enlarged, each object's shares stretched to 0..1, the largest taken"""
    x = F.interpolate(shares[None], size, mode="bilinear", align_corners=False)[0]
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return ((x - low) / (high - low)).nan_to_num(0).argmax(0)


def follow(i, frozen, videos):
    """
    One video -> n_objects frames 3: J, F, and J of an object that stays where it was, of those of the first frame, in
    the frames between first and last that have a truth;  H W uint8: the objects found at half time, from 1
    """
    clip, half = videos[i], np.zeros((0, 0), np.uint8)
    start = torch.from_numpy(clip.truth(0).astype(np.int64))
    ids, maps, scores = [k for k in start.unique().tolist() if k], frozen.walk(clip), []
    ahead = next(maps)
    labels = torch.stack([start == k for k in [0, *ids]]).float()[None]                        # 1 n_objects H W
    first = F.interpolate(labels, ahead.shape[:2], mode="nearest-exact")[0].to(frozen.device)
    for t, shares in enumerate(propagate(chain([ahead], maps), first, frozen.device), 1):
        truth = clip.truth(t)
        if truth is None or t == len(clip) - 1:
            continue
        truth = torch.from_numpy(truth.astype(np.int64))
        found = to_pixels(shares, tuple(truth.shape)).cpu()
        pairs = [(found == place, truth == k, start == k) for place, k in enumerate(ids, 1)]
        scores.append([(region(x, right), boundary(x, right), region(still, right)) for x, right, still in pairs])
        half = found.byte().numpy() if t == (len(clip) - 1) // 2 else half
    return [np.array(scores).reshape(-1, len(ids), 3).swapaxes(0, 1), half]


def run(videos, frozen, c):
    """J and F, percent: mean over the frames between first and last, then over all objects of the first frame."""
    scores, shown = [], []
    for clip, (values, half) in zip(videos, frozen.each("scores", partial(follow, videos=videos), len(videos), size=1),
                                    strict=True):
        ids = [k for k in np.unique(clip.truth(0)).tolist() if k]
        for k in () if values.shape[1] else ids:
            skip(f"object {k} of {clip.name}: no frame between the first and the last has a truth")
        scores += list(values.mean(1)) if values.shape[1] else []
        if c.out and len(shown) < SHOWN and half.size:
            middle = (len(clip) - 1) // 2
            shown.append([clip.image(middle), hues(torch.from_numpy(clip.truth(middle).astype(np.int64))),
                          hues(torch.tensor([0, *ids])[torch.from_numpy(half).long()])])
    save_pictures(c, shown)
    if not scores:
        raise ValueError(f"--data: no video of {c.data} has an object in its first frame and three frames with a truth")
    j, f, still = (100 * float(x) for x in np.mean(scores, 0))
    return dict(j_and_f=(j + f) / 2, j=j, f=f, chance_j=still, n_objects=len(scores), context=CONTEXT, radius=RADIUS,
                voters=VOTERS, temperature=TEMPERATURE)


def task(name, layout, *paper):
    return Task(name, layout, open_videos, run, wants="maps", metric="j_and_f", view=fitted, sides=(480, 480),
                control="patches", pictures="frame, truth, prediction", paper=paper)


FOLDERS = "{JPEGImages,Annotations}/[480p/]NAME/"
TASKS = (
    task("tracking", FOLDERS),
    task("davis", FOLDERS + ", ImageSets/2017/val.txt", Paper("j_and_f", by_size(
        72.7, 75.5, 77.2, 79.9, 79.3, 79.7), 960, dict(n_objects=61))),                        # Tab. 14
    task("youtube-vos", "the same below train/; a fifth is drawn"),
    task("mose", "the same below train/; a fifth is drawn"))
