"""
Cameras and depth of a scene from a few frames of it at once: VGGT on frozen patches.

    python evaluate.py --task vggt --weights runs/tiny                                 on generated rooms
    python evaluate.py --task vggt --weights runs/s --data SCAN --out heads          *.{color.jpg,depth.png,pose.txt}
    python evaluate.py --task vggt --weights runs/s --data SCANS --frames 8            {train,val}/SCENE/, each as SCAN
    python evaluate.py --task vggt --weights untrained:l --data SCAN --plan --memory 80

Of every two frames of a measured scene: error of their relative rotation, and of the direction in which the one sees
the other; AUC@30 is of the larger of both, in percent. Depth is scaled by one factor for all frames of the scene.

paper:   DINOv3 §6.3.4, Tab. 13, App. D.12
differs: the backbone is frozen; which frames, and how AUC is summed up, are not stated: here at most MOST, evenly
Dimension letters: see the top of model.py.
"""

from functools import partial

import numpy as np
import torch

from decoders import vggt
from decoders.dpt import layers_of
from decoders.fit import everyone, fit, plan, untrained
from engine.cameras import auc, decode, encode, matrix_of_fov, pair_angles, scale_of, seen_in_first
from engine.crops import recoloured
from engine.features import chosen_layers, describe
from engine.heads import head_of
from engine.metrics import depth_scores
from engine.pictures import SHOWN, clouds, save_pictures, shades
from engine.ranks import linked
from engine.sliding import resized
from engine.task import Option, Task
from engine.views import fitted
from sets.pairs import evenly
from sets.posed import drawn, open_posed

MOST = 10                # frames of a scene that are measured, as in VGGT
ROWS = 200               # draws of frames that an epoch has, at least
TOP = 30                 # degrees
SHEET = "frame, depth, prediction; all points from above and from a side: truth, prediction"
MIRROR = np.diag([-1.0, 1, 1, 1])
HALF = 0.5               # how often a scene is mirrored
UNSURE = 0.2             # share of the points, the least sure, that pictures leave out

# --------------------------------------------------------------------------------
# What is learned from


def stacked(images):
    """F 3 H W -> (F 3) H W, as the decoder's `see` takes it"""
    return images.flatten(0, 1)


def truths(frames):
    """dict(cameras F 9, depth F H W), float32, in the scene's own unit;  that unit, metres"""
    scale = scale_of(frames.depths, frames.intrinsics, frames.poses)
    return dict(cameras=torch.from_numpy(encode(frames.poses, frames.fov, scale)).float(),
                depth=torch.from_numpy(frames.depths / scale).float()), scale


def sample(row, rng, scenes, n_frames, size, patch, control, vary):
    """
    Frames of a scene, (F 3) H W uint8, and their truths, with the places F h w 2 of their patches in the first; drawn
    in any order; without an rng: the row's own draw, and as they are.

    control  the truths of other frames    vary  scenes are mirrored half of the time, each frame is recoloured
    """
    order = np.random.default_rng(row) if rng is None else rng
    scene = scenes[row % len(scenes)]
    frames = drawn(scene, order.permutation(len(scene))[:n_frames], size)
    if control:
        other = scenes[order.integers(len(scenes))]
        frames = drawn(other, order.permutation(len(other))[:n_frames], size)._replace(images=frames.images)
    if vary and rng is not None:
        frames = mirrored(frames) if rng.random() < HALF else frames
        frames = frames._replace(images=torch.stack([recoloured(image, rng) for image in frames.images]))
    places = seen_in_first(frames.depths, frames.intrinsics, frames.poses, [side // patch for side in size])
    return stacked(frames.images), truths(frames)[0] | dict(places=torch.from_numpy(places))


def mirrored(frames):
    """What the cameras of the mirror image of the scene would see"""
    K, W = frames.intrinsics.copy(), frames.images.shape[3]
    K[0, 2] = W - K[0, 2]
    return frames._replace(images=frames.images.flip(3), depths=frames.depths[:, :, ::-1],
                           poses=MIRROR @ frames.poses @ MIRROR, intrinsics=K)


def train_live(frozen, scenes, size, ranks):
    c = frozen.c
    head = untrained(partial(vggt.Head, frozen.model.config.width), c)
    views = partial(sample, scenes=scenes, n_frames=c.frames, size=size, patch=frozen.model.config.patch_size,
                    control=c.control, vary=c.data != "shapes")  # there are other rooms enough
    said = fit(head, views, max(len(scenes), ROWS), vggt.loss, vggt.recipe(head.width), c, frozen, ranks)
    return head, dict(n_train=sum(map(len, scenes)), **said)


def planned(c):
    """What --plan says, for images three quarters as high as wide"""
    config = describe(c.weights)
    with torch.device("meta"):
        head = vggt.Head(config.width)
    shape = 3 * c.frames, c.resolution, -(-c.resolution * 4 // (3 * config.patch_size)) * config.patch_size
    layers = layers_of(config, chosen_layers(c, config))
    return plan(head, vggt.recipe(config.width), c, config, layers, shape)

# --------------------------------------------------------------------------------
# The task


def live(frozen, data):
    """[scores of a scene, its angles, a row of pictures], what is known of the head;  each rank has a share of them"""
    (train, val), ranks, c = data, linked(frozen.ranks), frozen.c
    frozen.layers = layers_of(frozen.model.config, frozen.layers)
    size = tuple(fitted(val[0].image(0), c.resolution, frozen.model.config.patch_size)[0].shape[1:])
    head, said = head_of(vggt.Head, partial(train_live, frozen, train, size, ranks), "cameras and depth", frozen, c)

    @torch.no_grad()
    def scores(k):
        frames = drawn(val[k], evenly(range(len(val[k])), MOST), size)
        out = head(head.see(frozen, [stacked(frames.images)]))
        return measured(frames, {name: x[0].cpu() for name, x in out.items()}, bool(c.out) and k < SHOWN)
    return everyone(scores, len(val), ranks), said


def measured(frames, out, shown):
    """One scene: scores of its depths; degrees of its pairs, 2 n; the same, had nothing moved; a row of pictures"""
    truth, scale = truths(frames)
    depth, there = resized(out["depth"], truth["depth"].shape[1:]), truth["depth"] > 0
    metres = torch.from_numpy(frames.depths)[there].double()
    factor = (metres / depth[there]).median().item()
    scores, flat = (depth_scores(x, metres) for x in (factor * depth[there], torch.full_like(metres, metres.median())))
    scores = {name: scores[name] for name in ("abs_rel", "delta1", "rmse")} | dict(chance_abs_rel=flat["abs_rel"])
    poses, fov = decode(out["cameras"].double().numpy())
    angles, still = (pair_angles(x, frames.poses, scale) for x in (poses, np.tile(np.eye(4), (len(poses), 1, 1))))
    return scores, angles, still, pictures(frames, factor, depth, poses, fov, out["confidence"]) if shown else None


def pictures(frames, factor, depth, poses, fov, confidence):
    """The first frame, its depth, the depth found; all points from two sides, by the truth and by what is found"""
    top, size, K = float(frames.depths.max()), tuple(depth.shape[1:]), [frames.intrinsics] * len(poses)
    true, window = clouds(frames.images, frames.depths, K, frames.poses)
    sure = resized(confidence, size) >= np.quantile(confidence, UNSURE)
    poses = poses.copy()
    poses[:, :3, 3] *= factor
    K = [matrix_of_fov(x, size) for x in fov]
    found, _ = clouds(frames.images, (factor * depth * sure).numpy(), K, poses, window)
    return [frames.images[0], shades(frames.depths[0], top), shades(factor * depth[0].numpy(), top), *true, *found]


def run(data, frozen, c):
    found, said = frozen.together(partial(live, data=data))
    scores, angles, still, rows = zip(*found, strict=True)
    rotation, way = np.concatenate(angles, 1)
    known = ~np.isnan(way)
    if not known.any():
        raise ValueError(f"--data: the cameras of each scene of {c.data} stand in one place; {c.task} wants them apart")
    worst = np.maximum(rotation, way)[known]
    save_pictures(c, [row for row in rows if row], SHEET)
    return dict(auc30=auc(worst, TOP), auc10=auc(worst, 10), auc5=auc(worst, 5),
                rotation=float(rotation.mean()), direction=float(way[known].mean()),
                **{f"rotation_{top}": 100 * float((rotation < top).mean()) for top in (5, 15)},
                **{f"direction_{top}": 100 * float((way[known] < top).mean()) for top in (15, 30)},
                chance_rotation=float(np.concatenate(still, 1)[0].mean()),
                **{name: float(np.mean([each[name] for each in scores])) for name in scores[0]},
                n_pairs=len(rotation), n_scenes=len(found), **said)


TASK = Task(
    "vggt", "NAME.{color.jpg,depth.png,pose.txt}, camera-intrinsics.txt; or {train,val}/SCENE/, each so", open_posed,
    run, wants="maps", metric="auc30", decoders=("vggt",), view=fitted, sides=(592, 192), plan=planned,
    options=(Option("frames", 4, "of a scene that a step sees", shapes=3, least=2),
             Option("iterations", 40000, "steps of the head", shapes=1500, least=1),
             Option("lr", 0.0, "peak; 0 = the decoder's own")),
    pictures=SHEET)
