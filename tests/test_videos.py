"""sets/videos.py: lists, the fifth that is drawn, frames before the first mask."""

from dataclasses import replace

import numpy as np
import pytest
from test_tracking import davis, write

from sets import videos
from tasks import TASKS


@pytest.mark.parametrize("top", ["480p", "."])
def test_davis_folder(top, tmp_path):
    c = davis(tmp_path, top=top)
    assert [clip.name for clip in videos.open_videos(c)] == ["cat", "dog"]
    (tmp_path / "ImageSets/2017").mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("dog\n")
    assert [clip.name for clip in videos.open_videos(c)] == ["dog"]
    (tmp_path / f"Annotations/{top}/dog/00000.png").unlink()
    (clip,) = videos.open_videos(c)
    assert len(clip) == 3 and clip.truth(0).sum() == 400                      # nothing is seen before the first truth


def test_a_fifth_of_youtube_vos(tmp_path):
    """Drawn from train, since nobody has the truth of val; the same fifth every time."""
    for name in "abcdefghij":
        for kind, end in ("JPEGImages", "jpg"), ("Annotations", "png"):
            write(tmp_path / f"train/{kind}/{name}/00000.{end}", np.ones((20, 20), np.uint8))
    c = TASKS["youtube-vos"].config(data=str(tmp_path))
    drawn = [[clip.name for clip in videos.open_videos(replace(c, seed=seed))] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 2


@pytest.mark.parametrize("mask, says", [
    (np.zeros((60, 40), np.uint8), "00002.png has mode L and 40x60 pixels; wanted numbers of objects, .* 60x40 pixels"),
    (np.zeros((40, 60, 3), np.uint8), "00002.png has mode RGB and 60x40 pixels; wanted numbers of objects")])
def test_odd_masks_are_named(mask, says, tmp_path):
    c = davis(tmp_path)
    write(tmp_path / "Annotations/480p/dog/00002.png", mask)
    with pytest.raises(ValueError, match=says):
        videos.open_videos(c)


def test_no_video(tmp_path):
    for kind in "JPEGImages", "Annotations":
        (tmp_path / kind).mkdir()
    with pytest.raises(ValueError, match="JPEGImages has no folder of frames; davis wants one for each video"):
        videos.open_videos(TASKS["davis"].config(data=str(tmp_path)))
