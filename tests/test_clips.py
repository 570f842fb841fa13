"""sets/clips.py: which frames a network sees, the sets' layouts, and files of videos."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.task import SKIPPED
from sets import clips
from tasks import TASKS

C = TASKS["video"].config(resolution=32, workers=0)


def a_clip(n, label=0):
    return clips.Clip(None, label, np.arange(n) / 10)


@pytest.mark.parametrize("n, T, exact", [(16, 16, range(16)), (31, 16, range(0, 31, 2)), (3, 5, [0, 0, 1, 2, 2]),
                                         (1, 4, [0] * 4), (100, 4, [0, 33, 66, 99])])
def test_uniform_has_the_first_and_the_last_frame(n, T, exact):
    assert clips.uniform(a_clip(n), T)[1].tolist() == list(exact)


def test_two_views_interleave_and_span_the_clip():
    (_, a), (_, b) = (clips.uniform(a_clip(64), 16, k, 2) for k in range(2))
    assert a[0] == 0 and b[-1] == 63 and len(a) == len(b) == 16
    assert sorted([*a, *b]) == [x for pair in zip(a, b, strict=True) for x in pair]
    assert [len(clips.uniform(a_clip(5), 16, k, 2)[1]) for k in range(2)] == [16, 16]


@pytest.mark.parametrize("H, W", [(4, 10), (10, 4), (4, 4)])
def test_squares_are_left_middle_right(H, W):
    image = torch.arange(H * W, dtype=torch.uint8).view(1, H, W)
    found = clips.squares([image, image + 100], 4, [0, 0.5, 1])
    for place, start in enumerate((0, 3, 6) if H != W else (0, 0, 0)):
        exact = image[:, :, start : start + 4] if W > H else image[:, start : start + 4]
        assert torch.equal(found[2 * place], exact) and torch.equal(found[2 * place + 1], exact + 100)



def test_a_training_view_is_its_own_in_each_epoch():
    """T frames in order, none twice if there are enough; one box for all of 40 to 100 % of the area, never mirrored"""
    y, x = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")

    class Ramp(clips.Clip):
        def frames(self, chosen):
            return [torch.stack([y, x, torch.full_like(y, k)]).to(torch.uint8) for k in chosen]

    of, shares, seen = [Ramp(None, 0, np.arange(n) / 10) for n in (20, 3)], [], set()
    for epoch in range(60):
        for k, n in enumerate((20, 3)):
            frames, times = clips.sampled((epoch, k), of, 8, 20, 5)
            again, _ = clips.sampled((epoch, k), of, 8, 20, 5)
            assert all(torch.equal(a, b) for a, b in zip(frames, again, strict=True))
            numbers = [int(frame[2, 0, 0]) for frame in frames]
            assert numbers == sorted(numbers) and len(set(numbers)) == 8 if n == 20 else len(set(numbers)) <= 3
            np.testing.assert_allclose(times, np.array(numbers) / 10)
            assert all(torch.equal(frame[:2], frames[0][:2]) for frame in frames)
            down, across = (frames[0][i].float() for i in range(2))
            high, wide = ((ramp.max() - ramp.min()).item() * 20 / 19 for ramp in (down, across))
            assert (across[:, 1:] >= across[:, :-1]).all() and (down[1:] >= down[:-1]).all()
            shares.append(high * wide / 2400)
            seen.add((*numbers, high, wide))
    assert len(seen) > 110 and 0.36 < min(shares) < 0.5 and 0.85 < max(shares) < 1.05

# --------------------------------------------------------------------------------
# Data


def write_frames(folder, grey, n=5):
    folder.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (48, 32), (grey, 10 * i, 0)).save(folder / f"{8 + i}.png")  # 8, 9, 10, 11, 12


def folders_of_frames(root):
    for split in "train", "val":
        for k in range(6):
            write_frames(root / split / ("dark", "light")[k % 2] / f"clip{k}", 20 + 200 * (k % 2) + k)
    return replace(C, data=str(root))


def test_folders_of_frames(tmp_path, capsys, monkeypatch):
    c = folders_of_frames(tmp_path)
    (tmp_path / "train/dark/empty").mkdir()
    (tmp_path / "train/dark/clip0/8.png").write_bytes(b"no image")
    (tmp_path / "val/dark/clip0/notes.txt").write_text("of no importance")
    SKIPPED.clear()
    train, val, classes = clips.open_clips(c, 16)
    said = capsys.readouterr().out
    assert f"skipped unreadable {tmp_path}/train/dark/empty: no image" in said and "8.png" in said
    assert sum(SKIPPED.values()) == 2
    assert classes == ["dark", "light"] and len(train) == 5 and len(val) == 6
    assert val[0].times == pytest.approx(np.arange(5) / 25)
    assert [image[1, 0, 0].item() for image in val[0].frames([0, 2, 4])] == [0, 20, 40]


def test_csv_lists(tmp_path):
    folders_of_frames(tmp_path)
    rows = [f"train/{('dark', 'light')[k % 2]}/clip{k} {(10, 9)[k % 2]}" for k in range(6)]
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n\n")
    (tmp_path / "val" / "with space").symlink_to(tmp_path / "val/dark/clip0")
    (tmp_path / "val.csv").write_text(f"{tmp_path}/val/with space 10\nval/light/clip1 9\n")
    train, val, classes = clips.open_clips(replace(C, data=str(tmp_path)), 16)
    assert classes == ["9", "10"]                                                          # numbers as numbers
    assert [clip.label for clip in train] == [1, 0] * 3 and [clip.label for clip in val] == [1, 0]
    assert len(clips.open_clips(replace(C, data=str(tmp_path), limit=2), 16)[0]) == 2


@pytest.mark.parametrize("train, val, says", [
    ("a 1\nb", "a 1", "train.csv has a line 'b'; wanted: path label"),
    ("a 1\nb 1", "a 1", r"in train 1 classes, wanted two"),
    ("a 1\nb 2", "a 1\nb 7", r"in val others: \['7'\]"),
    ("e/1 1\ne/2 2", "e/1 1\ne/3 2", "the lists of .* name 1 clips that are not there; the first: .*e/3"),
    ("e/1 1\ne/2 2", "e/1 1", r"has \[0, 0\] readable clips in train, val; wanted two of each")])
def test_mistakes(train, val, says, tmp_path):
    (tmp_path / "train.csv").write_text(train)
    (tmp_path / "val.csv").write_text(val)
    for name in "12":
        (tmp_path / "e" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=says):
        clips.open_clips(replace(C, data=str(tmp_path)), 16)


def opened_lists(root, monkeypatch):
    """[(path below root, name of its class)] of train and of val; nobody looks into the files."""
    monkeypatch.setattr(clips, "opened", lambda row: clips.Clip(row[0], row[1], np.arange(5)))
    *parts, classes = clips.open_clips(replace(C, data=str(root)), 16)
    return [[(str(clip.source.relative_to(root)), classes[clip.label]) for clip in part] for part in parts]


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_ucf101_as_downloaded(tmp_path, monkeypatch):
    """Split 1: lines of train end with a number, those of test do not; the other splits are not read."""
    (tmp_path / "ucfTrainTestlist").mkdir()
    names = [f"{name}/v_{name}_g0{g}_c01.avi" for g in (8, 9, 1, 2) for name in ("ApplyLipstick", "BasketballDunk")]
    touch(*(tmp_path / "UCF-101" / name for name in names))
    for name, text in (("classInd", "1 ApplyLipstick\r\n2 BasketballDunk\r\n"), ("trainlist02", "x/y.avi 1\r\n"),
                       ("trainlist01", "".join(f"{name} {1 + i % 2}\r\n" for i, name in enumerate(names[:4]))),
                       ("testlist01", "".join(f"{name}\r\n" for name in names[4:]))):
        (tmp_path / f"ucfTrainTestlist/{name}.txt").write_text(text)
    rows = [(f"UCF-101/{name}", name.split("/")[0]) for name in names]
    assert opened_lists(tmp_path, monkeypatch) == [rows[:4], rows[4:]]


@pytest.mark.parametrize("form", ["labels/{}.json", "something-something-v2-{}.json"])
def test_ssv2_as_downloaded(form, tmp_path, monkeypatch):
    (tmp_path / "labels").mkdir()
    names = "Holding [something]", "Moving [something] up"
    for split, ids in ("train", "1234"), ("validation", "56"):
        rows = [dict(id=i, label="moving a cup up", template=names[int(i) % 2], placeholders=["a cup"]) for i in ids]
        (tmp_path / form.format(split)).write_text(json.dumps(rows))
        touch(*(tmp_path / f"20bn-something-something-v2/{i}.webm" for i in ids))
    train, val = opened_lists(tmp_path, monkeypatch)
    assert train[:2] == [("20bn-something-something-v2/1.webm", "Moving something up"),
                         ("20bn-something-something-v2/2.webm", "Holding something")] and len(val) == 2
    (tmp_path / form.format("train")).write_text('[{"id": "1"}]')
    with pytest.raises(ValueError, match="train.json is not SSv2's: KeyError 'template'; wanted objects with id"):
        opened_lists(tmp_path, monkeypatch)


@pytest.mark.parametrize("folder", ["annotations/", ""])
def test_k400_as_downloaded(folder, tmp_path, monkeypatch, capsys):
    """One clip of train is gone, as some of YouTube's are: it is skipped, and counted."""
    SKIPPED.clear()
    for split in "train", "val":
        rows = [(("abseiling", "air drumming")[i % 2], f"-{split}{i}", 7 + i, 17 + i) for i in range(4)]
        table = tmp_path / f"{folder}{split}.csv"
        touch(table, *(tmp_path / split / f"{name}_{a:06}_{b:06}.mp4" for _, name, a, b in rows[split == "train" :]))
        table.write_text("label,youtube_id,time_start,time_end,split\n" + "".join(
            f'"{label}",{name},{a},{b},{split}\n' for label, name, a, b in rows))
    train, val = opened_lists(tmp_path, monkeypatch)
    assert train[0] == ("train/-train1_000008_000018.mp4", "air drumming") and (len(train), len(val)) == (3, 4)
    assert sum(SKIPPED.values()) == 1 and "that are not there; the first: " in capsys.readouterr().out


def test_pyav_is_named_if_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for name in "ab":
        (tmp_path / f"{name}.mp4").touch()
    (tmp_path / "train.csv").write_text(f"{tmp_path}/a.mp4 1\n{tmp_path}/b.mp4 2")
    (tmp_path / "val.csv").write_text(f"{tmp_path}/a.mp4 1\n{tmp_path}/b.mp4 2")
    with pytest.raises(ValueError, match="PyAV is not installed; pip install -e .\\[eval\\]"):
        clips.open_clips(replace(C, data=str(tmp_path)), 16)


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
def test_video_files(name, tmp_path, capsys):
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install -e .[eval]")
    path = tmp_path / name
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10, options=dict(bf="2", g="4"))  # frames are not stored in their order
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 12 * i, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    clip = clips.opened((path, 3))
    assert clip.label == 3 and clip.times == pytest.approx(np.arange(20) / 10, abs=2e-3)
    frames = clip.frames(chosen := np.array([0, 0, 3, 11, 19]))
    assert [image.shape for image in frames] == [(3, 48, 64)] * 5
    assert [image.float().mean().item() for image in frames] == pytest.approx(12 * chosen, abs=10)
    five, late = clips.film(path, [5, 40])[1]
    assert torch.equal(five, late) and "only 20 frames can be read" in capsys.readouterr().out
    path.write_bytes(b"no video")
    with pytest.raises(OSError, match=f"{path}: Invalid data"):
        clips.opened((path, 3))
