"""engine/film.py: as many frames, as fast, of what a function drew; damaged, missing and impossible ones."""

import sys

import av
import numpy as np
import pytest

from engine.film import is_film, redrawn


def film(path, n, size=(24, 40), rate=10):
    """n frames, the k-th of the grey 50 + 20 k, and again from 10 on"""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for k in range(n):
            frame = np.full((*size, 3), 50 + 20 * (k % 10), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def grey(path):
    """The mean of each frame, and their rate"""
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24").mean() for frame in file.decode(video=0)], \
            file.streams.video[0].average_rate


def negative(image):
    return np.pad(255 - image.permute(1, 2, 0).numpy(), ((0, 5), (0, 3), (0, 0)))


def test_a_video_becomes_a_video(tmp_path):
    film(tmp_path / "a.mp4", 6)
    assert redrawn(tmp_path / "a.mp4", tmp_path / "b.mp4", negative) == (6, 42, 28)  # 43x29 pixels, made even
    found, rate = grey(tmp_path / "b.mp4")
    area = 24 * 40 / (28 * 42)
    assert rate == 10 and np.allclose(found, [area * (205 - 20 * k) for k in range(6)], atol=4)  # measured: 2.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
    assert is_film("X.MP4") and not is_film("x.png")


def test_what_is_left_of_a_damaged_one(tmp_path, capfd):
    film(tmp_path / "a.mkv", 50, (128, 128))
    whole = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    n, *_ = redrawn(tmp_path / "a.mkv", tmp_path / "b.mp4", negative)
    assert 1 <= n < 50 and len(grey(tmp_path / "b.mp4")[0]) == n


@pytest.mark.parametrize("content", [b"no video", None])
def test_no_video(content, tmp_path):
    if content:
        (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ValueError, match="a.mp4: .*; wanted a video"):
        redrawn(tmp_path / "a.mp4", tmp_path / "b.mp4", negative)
    assert not list(tmp_path.glob("b*"))


def test_nothing_is_left_of_a_video_that_could_not_be_drawn(tmp_path):
    film(tmp_path / "a.mp4", 80)
    (tmp_path / "b.mp4").write_bytes(b"older")
    left = [75]  # more than the encoder looks ahead

    def draw(image):
        left[0] -= 1
        if not left[0]:
            raise ValueError("no")
        return negative(image)
    with pytest.raises(ValueError, match="^no$"):
        redrawn(tmp_path / "a.mp4", tmp_path / "b.mp4", draw)
    assert (tmp_path / "b.mp4").read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 2


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"videos: PyAV is not installed; pip install -e .\[eval\]"):
        redrawn(tmp_path / "a.mp4", tmp_path / "b.mp4", negative)
