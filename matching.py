"""
Match frozen patch features, without training anything. evaluate.py is the command.

    python evaluate.py --task tracking --weights runs/tiny                          videos of the generated `shapes`
    python evaluate.py --task davis --weights runs/s --data DAVIS --resolution 960  JPEGImages/480p, Annotations/480p
    python evaluate.py --task rgbd --weights runs/s --data SCAN                     *.color.jpg, *.depth.png, *.pose.txt
    python evaluate.py --task spair --weights runs/s --data SPair-71k               JPEGImages/, PairAnnotation/test

    tracking     the first frame's masks carried through a video; J&F           DINOv3 Tab. 5, App. D.5
    geometry     rgbd: the same point in two views of a scene; see navi.py      DINOv3 §6.1.3, after Probe3D
    keypoints    the same part of two things of a kind, in shapes of a thing at two times; recall   DINOv3 App. D.3
    connected    two views side by side, with what was matched, as --out draws them

A task is (patches, config) -> {metric: number}. Dimension letters: see the top of model.py.
"""

import json
import math
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import shapes
from data import read_image, resize
from engine.features import SHOWN, evenly, folders, hues, images_below, save_pictures, scaled
from engine.metrics import IGNORE, boundary, region

VIDEOS = 20          # of shapes, 8 frames each
CONTEXT = 7          # frames before this one that vote, beside the first
RADIUS = 12          # patches: how far from its place a patch is looked for
VOTERS = 5           # most similar patches that vote
TEMPERATURE = 0.2    # of their votes
VAL_LIST = "ImageSets/2017/val.txt"
MATCHES = 1000       # most similar pairs of points of two views that are scored
METRES = 0.05, 0.1, 0.2  # a match is right if it is at most that far from the truth
PAIRS = 60           # videos of shapes whose objects are looked for
OF_CLASS = 200       # pairs of a class of SPair
NEAR = 0.1           # a keypoint is right if it is at most this share of the object's longer side away
LINES = 30           # matches that a picture shows
MATCHED = "two views; a match is green if it is right, red if not"

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


def tracking(patches, c):
    """J and F, percent: mean over the frames between first and last, then over all objects of the first frame."""
    scores, shown, still = [], [], []
    for clip in open_videos(c):
        start = torch.from_numpy(clip.truth(0).astype(np.int64))
        ids = [k for k in start.unique().tolist() if k]
        maps = patches(clip.name, clip, patches.whole)
        labels = torch.stack([start == k for k in [0, *ids]]).float()[None]                    # 1 n_objects H W
        first = F.interpolate(labels, maps[0][0].shape[:2], mode="nearest-exact")[0].to(patches.device)
        per_object, fixed = {k: [] for k in ids}, {k: [] for k in ids}
        for i, shares in enumerate(propagate((m for m, in maps), first, patches.device), 1):
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
    Views of a scene whose cameras are known: NAME.color.jpg, NAME.depth.png in millimetres (0, 65535 = not known),
    NAME.pose.txt 4x4 from camera to world in metres, and one camera-intrinsics.txt, 3x3, for pixels of the depths.
    """
    def __init__(self, c):
        root, self.name = Path(c.data), "views"
        self.names = evenly(sorted(str(path)[:-10] for path in root.rglob("*.color.*")), c.limit)
        if len(self.names) < 2 or not (root / "camera-intrinsics.txt").is_file():
            raise ValueError(f"--data: {c.data} has {len(self.names)} images NAME.color.jpg; {c.task} wants two or "
                             "more, each with NAME.depth.png and NAME.pose.txt, and camera-intrinsics.txt")
        missing = [name + end for name in self.names for end in (".depth.png", ".pose.txt")
                   if not Path(name + end).is_file()]
        if missing:
            raise ValueError(f"--data: {missing[0]} is not there; every NAME.color.jpg wants one beside it")
        self.intrinsics = np.loadtxt(root / "camera-intrinsics.txt")
        self.pairs = [(i, i + 1) for i in range(len(self.names) - 1)]

    def __len__(self):
        return len(self.names)

    def image(self, i):
        return read_image(next(Path(self.names[i]).parent.glob(Path(self.names[i]).name + ".color.*")))

    def points(self, i, grid):
        """Which point of the world the middle of each cell of the grid sees:  h w 3, metres; NaN: depth not known"""
        with Image.open(self.names[i] + ".depth.png") as file:
            depth = np.asarray(file).astype(np.float64)
        (H, W), (h, w) = depth.shape, grid
        v, u = np.meshgrid((np.arange(h) + 0.5) * H / h, (np.arange(w) + 0.5) * W / w, indexing="ij")
        z = depth[v.astype(int), u.astype(int)]
        z[(z == 0) | (z == 65535)] = np.nan
        pose = np.loadtxt(self.names[i] + ".pose.txt")
        return torch.from_numpy(unproject(z / 1000, v, u, self.intrinsics) @ pose[:3, :3].T + pose[:3, 3]).float()


def unproject(z, v, u, intrinsics):
    """Depths h w at rows v and columns u, in pixels -> h w 3 in the camera's metres: right, down, ahead"""
    return np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T * z[..., None]


def nearest_points(x, y):
    """For each row of x the row of y of the largest cosine:  n D, m D -> cosine n, index n"""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    found = [(part @ y.T).max(1) for part in x.split(1024)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def known_points(m, points, device):
    """h w D, enlarged 4 times, where points(grid) knows the place -> features n D, metres n 3, row and column n 2"""
    x = torch.from_numpy(m).to(device).float().permute(2, 0, 1)[None]                          # 1 D h w
    x = F.interpolate(x, scale_factor=4, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    points = points(grid=x.shape[:2]).to(device)
    known = points.isfinite().all(2)
    return x[known], points[known], (known.nonzero().cpu() + 0.5) / torch.tensor(x.shape[:2])


@torch.no_grad()
def match_views(patches, c, views, metres):
    """
    The 1000 most similar matches of each pair of views: which share is off by at most so many metres.

    views    len, image(i) -> C H W uint8, points(i, grid) -> h w 3, name, pairs of indices
    returns  recall at each distance, and their mean; ceiling: that mean if each of these points had been matched to
             the nearest that the other view has; all in percent
    """
    maps, errors, least, rows = patches(views.name, views, patches.whole), [], [], []
    shown = evenly(range(len(views.pairs)), SHOWN)
    for k, pair in enumerate(views.pairs):
        (a, at, start), (b, bt, end) = (
            known_points(maps[i][0], partial(views.points, i), patches.device) for i in pair)
        if not (len(a) and len(b)):
            print(f"skipped pair {k}: one of its views has no point whose place is known")
            continue
        cosine, match = nearest_points(a, b)
        best = cosine.topk(min(MATCHES, len(cosine))).indices                                  # n
        match = match[best]
        errors.append((at[best] - bt[match]).norm(dim=1).cpu())
        least.append(torch.cdist(at[best], bt, compute_mode="donot_use_mm_for_euclid_dist").amin(1).cpu())
        if c.out and k in shown:
            start, end = start[best.cpu()], end[match.cpu()]
            few = apart(start, LINES)
            rows.append([connected(*map(views.image, pair), start[few], end[few], errors[-1][few] <= metres[1])])
    save_pictures(c, rows, MATCHED)
    if not errors:
        raise ValueError(f"--data: no pair of views in {c.data} has a point whose place is known in both")
    n_pairs, errors, least = len(errors), torch.cat(errors), torch.cat(least)
    recalls = {f"recall_{round(100 * far)}cm": 100 * (errors <= far).float().mean().item() for far in metres}
    ceiling = [100 * (least <= far).float().mean().item() for far in metres]
    return dict(recall=sum(recalls.values()) / len(metres), **recalls, ceiling=sum(ceiling) / len(metres),
                n_pairs=n_pairs, matches=len(errors))


def geometry(patches, c):
    """
    Each two neighbouring views of a scan: the 1000 best matches, at 5, 10, 20 cm.

    paper:   DINOv3 App. D.3 has objects, at 1, 2, 5 cm: see navi.py
    """
    return match_views(patches, c, Scan(c), METRES)

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
    """SPair-71k: JPEGImages/CLASS/*.jpg, PairAnnotation/test/*.json; up to 200 pairs of each class, drawn."""
    notes, pairs, rng = {}, [], np.random.default_rng(c.seed)
    for path in sorted(folders(c, "PairAnnotation/test").glob("*.json")):
        note = json.loads(path.read_text())
        notes.setdefault(note["category"], []).append(note)
    drawn = [each[k] for each in notes.values() for k in sorted(rng.permutation(len(each))[:OF_CLASS])]
    for x in evenly(drawn, c.limit):
        left, top, right, bottom = x["trg_bndbox"]
        kind, sides = x["category"], [max(x[f"{which}_imsize"][:2]) for which in ("src", "trg")]
        at, bt = (np.array(x[f"{which}_kps"], float) for which in ("src", "trg"))  # what both images show
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
    Each keypoint's feature, bilinear among patches of unit length, is looked for in the other image; the patch of the
    largest cosine is the answer. Right is at most 0.1 of the box's longer side away; percent, mean over the classes.

    paper:   DINOv3 App. D.3, SPair
    differs: a patch stands for its middle, where Probe3D takes its corner for answers and the grid's outermost middles
             for the image's edges; which pairs of a class are drawn
    """
    pairs, load = shapes_pairs(c) if c.data == "shapes" else spair_pairs(c)
    if not pairs:
        raise ValueError(f"--data: {c.data} has no pair of images with keypoints; see the top of matching.py")
    things, see = Things(pairs, load), partial(squared, side=c.resolution)
    maps, found, rows = patches(f"things {c.seed}", things, see), {}, []
    place, shown = {name: i for i, name in enumerate(things.names)}, evenly(range(len(pairs)), SHOWN)
    for k, pair in enumerate(pairs):
        a, b = (torch.from_numpy(maps[place[pair[key]]][0]).to(patches.device).float() for key in "ab")  # h w D
        start = torch.as_tensor(pair["at"] / pair["sides"][0], device=a.device, dtype=torch.float32)
        a = F.normalize(a, dim=2).permute(2, 0, 1)[None]
        asked = F.grid_sample(a, start[None, None] * 2 - 1, padding_mode="border", align_corners=False)
        _, match = nearest_points(asked[0, :, 0].T, b.flatten(0, 1))
        h, w = b.shape[:2]
        end = torch.stack([(match % w + 0.5) / w, (match // w + 0.5) / h], 1).cpu()
        right = np.hypot(*(end.numpy() * pair["sides"][1] - pair["bt"]).T) <= NEAR * pair["box"]
        found.setdefault(pair["kind"], []).extend(right.tolist())
        if c.out and k in shown:
            images = [see(things.image(place[pair[key]]))[0] for key in "ab"]
            rows.append([connected(*images, start.cpu().flip(1), end.flip(1), right)])
    save_pictures(c, rows, MATCHED)
    recalls = [100 * float(np.mean(right)) for right in found.values()]
    return dict(recall=float(np.mean(recalls)), n_pairs=len(pairs), n_keypoints=sum(map(len, found.values())))

# --------------------------------------------------------------------------------
# Pictures


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
