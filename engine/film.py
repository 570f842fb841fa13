"""
Videos, redrawn frame by frame, of any length. Needs PyAV.

    is_film     whether a file's name says that it is one
    redrawn     a video -> another, each of whose frames a function has drawn
"""

from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
CODECS = "libx264", "mpeg4"  # the first that is there
RATE = 25                    # frames a second, of a file that does not say
CRF = "18"                   # quality of H.264: hardly a difference can be seen


def is_film(name):
    return Path(name).suffix.lower() in SUFFIXES


def player():
    try:
        import av
    except ImportError as error:
        raise ValueError("videos: PyAV is not installed; pip install -e .[eval]") from error
    return av


def frames(file, av, path):
    """C H W uint8, one after the other; a line for a file that ends before its time"""
    n = 0
    try:
        for frame in file.decode(video=0):
            yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            n += 1
    except av.FFmpegError as error:
        if n:
            tqdm.write(f"{path}: damaged after {n} frames ({error.strerror}); the rest is left out")
    if not n:
        raise ValueError(f"{path}: no frame in it can be read")


def redrawn(path, out, draw):
    """
    Writes the video OUT, as fast as the one at PATH. One frame is in memory; sound is left out.

    draw     C H W uint8 -> H W 3 uint8, of one size; an odd row or column is cut
    returns  (frames, width, height);  raises ValueError: no PyAV, no video
    """
    av, out = player(), Path(out)
    new = out.with_name(f"{out.stem}.new{out.suffix}")
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise ValueError(f"{path}: there is no video in it")
            stream, pictures = file.streams.video[0], frames(file, av, path)
            first = draw(next(pictures))
            bar = tqdm(desc="frames", total=stream.frames or None, unit="img", leave=False, disable=None)
            with bar:
                n, size = write(new, av, stream.average_rate or RATE, chain([first], map(draw, pictures)), bar)
        new.replace(out)
    except av.FFmpegError as error:
        raise ValueError(f"{path}: {error.strerror}; wanted a video") from error
    finally:
        new.unlink(missing_ok=True)
    return n, *size


def write(path, av, rate, pictures, bar):
    """-> how many, and (width, height)"""
    n, stream = 0, None
    with av.open(str(path), "w") as file:
        for picture in pictures:
            picture = np.ascontiguousarray(picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2])
            if stream is None:
                codec = next(name for name in CODECS if name in av.codecs_available)
                stream = file.add_stream(codec, rate=rate, options={"crf": CRF} if codec == CODECS[0] else {})
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            n += 1
            bar.update()
        file.mux(stream.encode())
    return n, (stream.width, stream.height)
