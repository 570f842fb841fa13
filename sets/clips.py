"""
Videos to classify: files, folders of frames, or moving `shapes`; and which of their frames a network sees.

    open_clips    train and val: {train,val}/CLASS/*.mp4, or {train,val}.csv: path label; or as they are downloaded:
                  UCF101 with its ucfTrainTestlist/, SSv2 with its labels/, K400 with its annotations/
    Clip          one of them: frames of chosen numbers, their times
    Samples       T frames of each of many clips, as Frozen.maps wants images
    sampled       a training view: T frames at times of its own, in a square of its own
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import shapes
from data import CropConfig, cut, draw_crops, loader
from engine.chunks import Computed
from engine.images import read_image, resize
from engine.task import skip
from sets.pairs import GENERATED, evenly, folders, images_below, lines

EXTENSIONS = {".avi", ".mp4", ".webm", ".mkv"}
RATE = 25            # frames a second of a folder of frames
CROP = CropConfig(n_local=0, global_scale=(0.4, 1.0))  # of training views: share of the frame's area


@dataclass(frozen=True)
class Clip:
    source: object       # Path of a video file or of a folder of frames, or arguments of shapes.video
    label: int
    times: np.ndarray    # seconds, one for each frame

    def frames(self, chosen):
        """The frames of these numbers, in ascending order, each C H W uint8"""
        if isinstance(self.source, tuple):
            scenes = shapes.video(*self.source)
            return [torch.from_numpy(scenes[k].image).permute(2, 0, 1) for k in chosen]
        if self.source.is_dir():
            files = stills(self.source)
            return [read_image(files[k]) for k in chosen]
        return film(self.source, chosen)[1]


def stills(folder):
    return sorted(images_below(folder), key=lambda file: (len(file.name), file.name))          # 9.jpg before 10.jpg


def film(path, chosen):
    """Seconds of all frames, and the chosen ones, each C H W uint8; for one that is damaged stands one before it."""
    try:
        import av
    except ImportError as error:
        raise ValueError("video: PyAV is not installed; pip install -e .[eval]") from error
    stamps, found, n, why = [], {}, 0, "no frame in it"
    try:
        with av.open(str(path)) as file:
            stream = file.streams.best("video")
            for packet in file.demux(stream) if stream else ():
                if packet.size and not packet.is_discard:  # .avi may know the order of decoding alone
                    stamps.append(packet.dts if packet.pts is None else packet.pts)
                for frame in packet.decode() if n <= chosen[-1] else ():
                    if n == 0 or n in chosen:
                        found[n] = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                    n += 1
    except av.FFmpegError as error:
        why = error.strerror
    if not found:
        raise OSError(f"{path}: {why}")
    if n <= chosen[-1]:
        print(f"{path}: only {n} frames can be read; an earlier one stands for each that is missing")
    times = np.float32(np.sort(stamps) - min(stamps)) * float(stream.time_base)
    return times, [found[max(i for i in found if i <= k)] for k in chosen]


def opened(row):
    """(path, label) -> Clip; raises OSError if its first frame cannot be read."""
    path, label = row
    if not path.is_dir():
        return Clip(path, label, film(path, [0])[0])
    if not stills(path):
        raise OSError(f"{path}: no image in it")
    read_image(stills(path)[0])
    return Clip(path, label, np.arange(len(stills(path))) / RATE)


def ucf101(root, split):
    """Split 1, lines CLASS/v_CLASS_g08_c01.avi, with or without a number; None if the set is another"""
    table = root / f"ucfTrainTestlist/{'train' if split == 'train' else 'test'}list01.txt"
    if table.is_file():
        names = [line.split()[0] for line in lines(table, "CLASS/NAME.avi")]
        return [(root / "UCF-101" / name, name.split("/")[0]) for name in names]


def ssv2(root, split):
    """Objects with id and template, whose brackets are no part of the class; None if the set is another"""
    split = "validation" if split == "val" else split
    for table in root / f"labels/{split}.json", root / f"something-something-v2-{split}.json":
        if table.is_file():
            try:
                rows = [(row["id"], row["template"].translate({ord("["): None, ord("]"): None}))
                        for row in json.loads(table.read_text())]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"--data: {table} is not SSv2's: {type(error).__name__} {error}; wanted objects with "
                                 "id and template") from error
            return [(root / f"20bn-something-something-v2/{name}.webm", label) for name, label in rows]


def k400(root, split):
    """
    Rows label,youtube_id,time_start,time_end; None if the set is another. Some of its videos are no longer to be had:
    those are skipped.
    """
    for table in root / f"annotations/{split}.csv", root / f"{split}.csv":
        if table.is_file() and table.read_text().startswith("label,youtube_id,time_start,time_end"):
            rows = list(csv.DictReader(table.read_text().splitlines()))
            rows = [(root / split / f"{row['youtube_id']}_{int(row['time_start']):06}_{int(row['time_end']):06}.mp4",
                     row["label"]) for row in rows]
            gone = [path for path, _ in rows if not path.is_file()]
            if gone:
                skip(f"{len(gone)} clips of {table} that are not there; the first: {gone[0]}", len(gone))
            return [row for row in rows if row[0].is_file()]


def listed(c, split):
    """(path, class) of each clip: a known set's list, lines "path label" of SPLIT.csv, or what lies in SPLIT/CLASS/"""
    for known in ucf101, ssv2, k400:
        if (rows := known(Path(c.data), split)) is not None:
            return rows
    table = Path(c.data, f"{split}.csv")
    if not table.is_file():
        return [(path, path.parent.name) for path in sorted(folders(c, split).glob("*/*"))
                if path.suffix.lower() in EXTENSIONS or path.is_dir()]
    rows = [line.rsplit(maxsplit=1) for line in lines(table, "path label")]
    if short := [row[0] for row in rows if len(row) == 1]:
        raise ValueError(f"--data: {table} has a line {short[0]!r}; wanted: path label")
    return [(Path(c.data, path), label) for path, label in rows]


def open_clips(c, n_frames):
    """Train clips, val clips, names of the classes; n_frames of each of shapes. What cannot be read is skipped."""
    if c.data == "shapes":  # 8 frames a second; the label is the main object's class
        splits = [[Clip((i, n_frames, c.resolution, seed), shapes.scene(i, 16, seed).label, np.arange(n_frames) / 8)
                   for i in range(c.limit or n)] for n, seed in zip(GENERATED, (1000, 1001), strict=True)]
        return *splits, shapes.CLASSES
    rows, splits = [listed(c, split) for split in ("train", "val")], []
    classes = sorted({name for _, name in rows[0]}, key=lambda name: (len(name) * name.isdecimal(), name))
    strange = sorted({name for _, name in rows[1]} - set(classes))[:5]
    if strange or len(classes) < 2:
        raise ValueError(f"--data: {c.data} has in train {len(classes)} classes, wanted two; in val others: {strange}")
    missing = [path for part in rows for path, _ in part if not path.exists()]
    if missing:
        raise ValueError(f"--data: the lists of {c.data} name {len(missing)} clips that are not there; the first: "
                         f"{missing[0]}")
    for part in rows:
        part = [(path, classes.index(label)) for path, label in evenly(part, c.limit)]
        splits.append([*tqdm(loader(Computed(opened), part, c.workers), "clips", len(part), leave=False, disable=None)])
    errors = [clip for clips in splits for clip in clips if isinstance(clip, Exception)]
    for error in errors:
        if isinstance(error, ValueError):
            raise error
        skip(f"unreadable {error}")
    splits = [[clip for clip in clips if isinstance(clip, Clip)] for clips in splits]
    if min(n := [len(clips) for clips in splits]) < 2:
        raise ValueError(f"--data: {c.data} has {n} readable clips in train, val; wanted two of each")
    return *splits, classes


def uniform(clip, T, first=0, step=1):
    """First, last, and uniform between: T frames, some twice if there are fewer; one of `step` views that interleave"""
    return clip, np.linspace(0, len(clip.times) - 1, T * step).round().astype(int)[first::step]


def squares(frames, side, at):
    """The largest squares of frames, resized; 0, 0.5, 1: all frames' left (or top) ones, middle ones, right ones"""
    (H, W), found = frames[0].shape[1:], []
    for share in at:
        top, left = int(share * max(H - W, 0)), int(share * max(W - H, 0))
        found += [resize(x[:, top : top + min(H, W), left : left + min(H, W)], side, side) for x in frames]
    return found


class Samples:
    """Views as Frozen.maps wants images: len, image(i) -> T frames, each C H W uint8;  times, views T, seconds"""

    def __init__(self, views):
        self.views = views
        self.times = torch.tensor(np.array([clip.times[chosen] for clip, chosen in views])).float()

    def __len__(self):
        return len(self.views)

    def image(self, i):
        clip, chosen = self.views[i]
        return clip.frames(chosen)


def sampled(place, clips, T, side, seed):
    """
    (epoch, number of a clip) -> T frames at random, in order, each C side side uint8, one box for all; their times T

    paper: DINOv3 App. D.6: 40 to 100 % of the area; no flip: some classes are directions
    """
    clip, rng = clips[place[1]], np.random.default_rng([seed, *place])
    chosen = np.sort(rng.choice(len(clip.times), T, replace=len(clip.times) < T))
    frames = clip.frames(chosen)
    (box, _), *_ = draw_crops(rng, CROP, *frames[0].shape[1:])
    return [cut(frame, box, False, side) for frame in frames], clip.times[chosen]


def whole(place, views, side, at):
    """(any, number of a view) -> its frames in `squares`, (len(at) T) of them; their times T"""
    clip, chosen = views[place[1]]
    return squares(clip.frames(chosen), side, at), clip.times[chosen]
