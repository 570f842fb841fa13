"""
Match frozen patch features, without training anything. evaluate.py is the command.

    python evaluate.py --task tracking --weights runs/tiny                          videos of the generated `shapes`
    python evaluate.py --task davis --weights runs/s --data DAVIS --resolution 960  JPEGImages/480p, Annotations/480p
    python evaluate.py --task geometry --weights runs/s --data SCAN                 *.color.jpg, *.depth.png, *.pose.txt
    python evaluate.py --task spair --weights runs/s --data SPair-71k               JPEGImages/, PairAnnotation/test

    tracking     the first frame's masks carried through a video; J&F           DINOv3 Tab. 5, App. D.5
    geometry     the same point in two views of a scene; recall                 DINOv3 §6.1.3, after Probe3D
    keypoints    the same part of two things of a kind, in shapes of a thing at two times; recall   DINOv3 App. D.3

A task is (patches, config) -> {metric: number}. Dimension letters: see the top of model.py.
"""

import json
import math
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import shapes
from data import read_image, resize
from features import SHOWN, evenly, folders, hues, images_below, save_pictures
from metrics import IGNORE, boundary, region

VIDEOS = 20          # of shapes, 8 frames each
CONTEXT = 7          # frames before this one that vote, beside the first
RADIUS = 12          # patches: how far from its place a patch is looked for
VOTERS = 5           # most similar patches that vote
TEMPERATURE = 0.2    # of their votes
VAL_LIST = "ImageSets/2017/val.txt"
MATCHES = 1000       # most similar pairs of points of two views that are scored
METRES = 0.05, 0.1, 0.2  # a match is right if it is at most that far from the truth
PAIRS = 60           # videos of shapes whose objects are looked for
NEAR = 0.1           # a keypoint is right if it is at most this share of the object's longer side away

# --------------------------------------------------------------------------------
# Videos


class Video:
    """Frames, and the objects of those that have a truth: len, image(i) -> C H W uint8, truth(i) -> H W or None"""

    def __init__(self, name, frames, masks):
        self.name, self.frames, self.masks = name, frames, masks

    def __len__(self):
        return len(self.frames)

    def image(self, i):
        return read_image(self.frames[i])

    def truth(self, i):
        if self.masks[i] is None:
            return None
        with Image.open(self.masks[i]) as file:
            mask = np.asarray(file)
        return np.where(mask == IGNORE, 0, mask)


class ShapesVideo:
    def __init__(self, index, side):
        self.name, self.index, self.side = f"shapes {index}", index, side

    def __len__(self):
        return 8

    def image(self, i):
        return torch.from_numpy(video(self.index, self.side)[i].image).permute(2, 0, 1)

    def truth(self, i):
        return video(self.index, self.side)[i].instances


@lru_cache(maxsize=2)
def video(index, side, n_frames=8):
    return shapes.video(index, n_frames, side, seed=1001)


def open_videos(c):
    """
    DAVIS, YouTube-VOS and MOSE: JPEGImages/[480p/]NAME/*.jpg, Annotations/[480p/]NAME/*.png, also below train/.

    The videos of ImageSets/2017/val.txt if there is such a list, as DAVIS has; of the others' train a fifth is drawn,
    since the truth of their val is not public. Which ones the paper drew is not known.
    """
    if c.data == "shapes":
        return [ShapesVideo(i, c.resolution) for i in range(c.limit or VIDEOS)]
    images = folders(c, *[f"{top}JPEGImages{end}" for top in ("", "train/") for end in ("/480p", "")])
    masks = Path(str(images).replace("JPEGImages", "Annotations"))
    names, listed = sorted(path.name for path in images.iterdir() if path.is_dir()), Path(c.data, VAL_LIST)
    if listed.is_file():
        names = listed.read_text().split()
    elif c.task in ("youtube-vos", "mose"):
        names = sorted(np.random.default_rng(c.seed).permutation(names)[: round(len(names) / 5)].tolist())
    videos = []
    for name in evenly(names, c.limit):
        frames = sorted(images_below(images / name))
        there = [masks / name / f"{frame.stem}.png" for frame in frames]
        there = [path if path.is_file() else None for path in there]
        first = next((i for i, path in enumerate(there) if path), None)  # what comes before the first truth is not seen
        if first is None:
            raise ValueError(f"--data: {masks / name} has no mask of the frames in {images / name}")
        videos.append(Video(name, frames[first:], there[first:]))
    return videos

# --------------------------------------------------------------------------------
# Tracking


def near(h, w, radius, device):
    """P P bool: which patches lie within a circle of that many patches about each."""
    i, j = (x.flatten().to(device) for x in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    return (i[:, None] - i) ** 2 + (j[:, None] - j) ** 2 <= radius**2


@torch.no_grad()
def propagate(maps, first, device):
    """
    Each patch takes the objects of its 5 most similar patches near its place in the first frame and the 7 before:

        p(patch) = sum over them of softmax(cosine / 0.2) p(neighbour)

    maps   h w D for each frame    first  n_objects h w, of the first frame, sums to 1
    yields  n_objects h w for each frame after the first

    paper:  DINOv3 App. D.5, the row 7, 12, circle, 5, 0.2 of its 18; which row its tables have, it does not say
    """
    h, w = maps[0].shape[:2]
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


def tracking(patches, c):
    """J and F, percent: mean over the frames between first and last, then over all objects of the first frame."""
    scores, shown, still = [], [], []
    for clip in open_videos(c):
        start = torch.from_numpy(clip.truth(0).astype(np.int64))
        ids = [k for k in start.unique().tolist() if k]
        maps = [m for m, in patches(clip.name, clip, patches.whole)]
        labels = torch.stack([start == k for k in [0, *ids]]).float()[None]                    # 1 n_objects H W
        first = F.interpolate(labels, maps[0].shape[:2], mode="nearest-exact")[0].to(patches.device)
        per_object, fixed = {k: [] for k in ids}, {k: [] for k in ids}
        for i, shares in enumerate(propagate(maps, first, patches.device), 1):
            truth = clip.truth(i)
            if truth is None or i == len(clip) - 1:
                continue
            truth = torch.from_numpy(truth.astype(np.int64))
            found = to_pixels(shares, tuple(truth.shape)).cpu()
            for place, k in enumerate(ids, 1):
                per_object[k].append((region(found == place, truth == k), boundary(found == place, truth == k)))
                fixed[k].append(region(start == k, truth == k))
            if c.out and len(shown) < SHOWN and i == (len(clip) - 1) // 2:
                shown.append([clip.image(i), hues(truth), hues(torch.tensor([0, *ids])[found])])
        scores += [np.mean(values, 0) for values in per_object.values() if values]
        still += [np.mean(values) for values in fixed.values() if values]
    save_pictures(c, shown)
    if not scores:
        raise ValueError(f"--data: no video of {c.data} has an object in its first frame and three frames with a truth")
    j, f = 100 * np.mean(scores, 0)
    return dict(j_and_f=float(j + f) / 2, j=float(j), f=float(f), chance_j=100 * float(np.mean(still)),
                n_objects=len(scores), context=CONTEXT, radius=RADIUS, voters=VOTERS, temperature=TEMPERATURE)

# --------------------------------------------------------------------------------
# Geometry


class Scan:
    """
    Views of a scene whose cameras are known: NAME.color.jpg, NAME.depth.png in millimetres (0 = not known),
    NAME.pose.txt 4x4 from camera to world in metres, and one camera-intrinsics.txt, 3x3, for pixels of the depths.
    """
    def __init__(self, c):
        root = Path(c.data)
        self.names = evenly(sorted(str(path)[:-10] for path in root.rglob("*.color.*")), c.limit)
        if len(self.names) < 2 or not (root / "camera-intrinsics.txt").is_file():
            raise ValueError(f"--data: {c.data} has {len(self.names)} images NAME.color.jpg; {c.task} wants two or "
                             "more, each with NAME.depth.png and NAME.pose.txt, and camera-intrinsics.txt")
        self.intrinsics = np.loadtxt(root / "camera-intrinsics.txt")

    def __len__(self):
        return len(self.names)

    def image(self, i):
        return read_image(next(Path(self.names[i]).parent.glob(Path(self.names[i]).name + ".color.*")))

    def points(self, i, grid):
        """Which point of the world the middle of each cell of the grid sees:  h w 3, metres; NaN: depth not known"""
        with Image.open(self.names[i] + ".depth.png") as file:
            depth = np.asarray(file).astype(np.float64) / 1000
        (H, W), (h, w) = depth.shape, grid
        v, u = np.meshgrid((np.arange(h) + 0.5) * H / h, (np.arange(w) + 0.5) * W / w, indexing="ij")
        z = depth[v.astype(int), u.astype(int)]
        rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(self.intrinsics).T        # h w 3
        pose = np.loadtxt(self.names[i] + ".pose.txt")
        world = rays * np.where(z > 0, z, np.nan)[..., None] @ pose[:3, :3].T + pose[:3, 3]
        return torch.from_numpy(world).float()


def nearest_points(x, y):
    """For each row of x the row of y of the largest cosine:  n D, m D -> cosine n, index n"""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    found = [(part @ y.T).max(1) for part in x.split(1024)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


@torch.no_grad()
def geometry(patches, c):
    """
    The 1000 best matches of each two neighbouring views: which share is off by at most 5, 10, 20 cm in the world.

    paper:   DINOv3 App. D.3 has objects, NAVI, and 1, 2, 5 cm; features enlarged 4 times, 1000 matches, as here
    """
    scan, errors = Scan(c), []
    views = []
    for i, (m,) in enumerate(patches("views", scan, patches.whole)):
        x = torch.from_numpy(m).to(patches.device).float().permute(2, 0, 1)[None]              # 1 D h w
        x = F.interpolate(x, scale_factor=4, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
        points = scan.points(i, x.shape[:2]).to(patches.device)
        known = points.isfinite().all(2)
        views.append((x[known], points[known]))                                                # n D,  n 3
        if len(views) > 1:
            (a, at), (b, bt) = views[-2:]
            cosine, match = nearest_points(a, b)
            best = cosine.topk(min(MATCHES, len(cosine))).indices
            errors.append((at[best] - bt[match[best]]).norm(dim=1).cpu())
            views = views[-1:]
    errors = torch.cat(errors)
    recalls = {f"recall_{round(100 * far)}cm": 100 * (errors <= far).float().mean().item() for far in METRES}
    return dict(recall=sum(recalls.values()) / len(METRES), **recalls, n_pairs=len(scan) - 1, matches=len(errors))

# --------------------------------------------------------------------------------
# Keypoints


class Things:
    """The images that pairs of things lie in."""

    def __init__(self, pairs, load):
        self.names, self.load = sorted({name for pair in pairs for name in (pair["a"], pair["b"])}), load

    def __len__(self):
        return len(self.names)

    def image(self, i):
        return self.load(self.names[i])


def shapes_pairs(c):
    """Every object that two frames of a video show, 1/4 of its course apart; keypoints that both show."""
    pairs = []
    for i in range(c.limit or PAIRS):
        first, _, later = video(i, c.resolution, 3)
        for k, (at, bt) in enumerate(zip(first.keypoints, later.keypoints, strict=True), 1):
            rows, cols = np.nonzero(later.instances == k)
            both = (at[:, 2] > 0) & (bt[:, 2] > 0)
            if both.any():
                pairs.append(dict(a=(i, 0), b=(i, 2), at=at[both, :2], bt=bt[both, :2], kind="object",
                                  box=max(np.ptp(rows), np.ptp(cols)) + 1, sides=(c.resolution, c.resolution)))
    return pairs, partial(frame_image, side=c.resolution)


def frame_image(name, side):
    return torch.from_numpy(video(name[0], side, 3)[name[1]].image).permute(2, 0, 1)


def spair_pairs(c):
    """SPair-71k: JPEGImages/CLASS/*.jpg, PairAnnotation/test/*.json"""
    folder, pairs = folders(c, "PairAnnotation/test"), []
    for path in evenly(sorted(folder.glob("*.json")), c.limit):
        x = json.loads(path.read_text())
        left, top, right, bottom = x["trg_bndbox"]
        kind, sides = x["category"], [max(x[f"{which}_imsize"][:2]) for which in ("src", "trg")]
        at, bt = (np.array(x[f"{which}_kps"], float) for which in ("src", "trg"))
        pairs.append(dict(a=f"{kind}/{x['src_imname']}", b=f"{kind}/{x['trg_imname']}", at=at, bt=bt, kind=kind,
                          box=max(right - left, bottom - top), sides=sides))
    return pairs, partial(image_in, folder=folders(c, "JPEGImages"))


def image_in(name, folder):
    return read_image(folder / name)


def squared(image, side):
    """C H W -> padded with white below or to the right to a square, then resized"""
    longest = max(image.shape[1:])
    padding = 0, longest - image.shape[2], 0, longest - image.shape[1]
    return [resize(F.pad(image, padding, value=255), side, side)]


@torch.no_grad()
def keypoints(patches, c):
    """
    Each keypoint's feature, bilinear among patches, is looked for in the other image; the patch of the largest cosine
    is the answer. Right is at most 0.1 of the box's longer side away; percent, mean over the classes.

    paper:   DINOv3 App. D.3, SPair
    differs: a patch stands for its middle, where Probe3D takes its corner
    """
    pairs, load = shapes_pairs(c) if c.data == "shapes" else spair_pairs(c)
    if not pairs:
        raise ValueError(f"--data: {c.data} has no pair of images with keypoints; see the top of matching.py")
    things = Things(pairs, load)
    maps = patches("things", things, partial(squared, side=c.resolution))
    found, place = {}, {name: i for i, name in enumerate(things.names)}
    for pair in pairs:
        a, b = (torch.from_numpy(maps[place[pair[key]]][0]).to(patches.device).float() for key in "ab")  # h w D
        at = torch.as_tensor(pair["at"] / pair["sides"][0] * 2 - 1, device=a.device, dtype=torch.float32)
        asked = F.grid_sample(a.permute(2, 0, 1)[None], at[None, None], padding_mode="border", align_corners=False)
        _, match = nearest_points(asked[0, :, 0].T, b.flatten(0, 1))
        h, w = b.shape[:2]
        answer = torch.stack([(match % w + 0.5) / w, (match // w + 0.5) / h], 1).cpu().numpy() * pair["sides"][1]
        right = np.hypot(*(answer - pair["bt"]).T) <= NEAR * pair["box"]
        found.setdefault(pair["kind"], []).extend(right.tolist())
    recalls = [100 * float(np.mean(right)) for right in found.values()]
    return dict(recall=float(np.mean(recalls)), n_pairs=len(pairs), n_keypoints=sum(map(len, found.values())))
