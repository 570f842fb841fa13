"""data.py look: what is drawn is what a step trains on."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import Batches, colour_batch, cut_all
from engine import look
from engine.sources import Folder, open_source
from recipes import RECIPES

TINY = replace(RECIPES["tiny"], batch=8, group=4, patch_size=8)
GRAM = replace(TINY, global_size=32, local_size=20, gram_size=64, gram_teacher="self", n_local=2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(60, 40), (40, 60), (50, 50), (300, 30)]):
        Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8)).save(root / f"{i}.png")
    return root


def same(picture, crop):
    return np.array_equal(picture, crop.permute(1, 2, 0).numpy())

# --------------------------------------------------------------------------------
# Views


@pytest.mark.parametrize("c", [TINY, GRAM], ids=["tiny", "gram"])
def test_views_are_those_of_the_step(photos, c):
    source = Folder(photos)
    found, broken = look.views(c, source, 3, 3)
    batch = colour_batch(Batches(c, source, 0, c.batch)[3], c)    # as a run has it
    assert len(found) == 3 and broken == []
    for i, view in enumerate(found):
        assert view["name"] == source.name(batch["indices"][i])
        assert torch.equal(view["photo"], source.load(batch["indices"][i]))
        assert torch.equal(view["masks"], batch["masks"][i :: c.batch])
        kinds = ("global", "local", "gram")[: 2 + (c.gram_size > 0)]
        cut = cut_all(view["photo"], view["boxes"].tolist(), view["flips"], c)
        for kind in kinds:
            crops = batch[f"{kind}_crops"][i :: c.batch]
            as_cut, as_seen = view[kind]
            assert len(as_cut) == len(as_seen) == len(crops)
            assert torch.equal(as_cut, torch.stack([cut.pop(0) for _ in as_cut]))
            mean, std = (torch.tensor(v)[:, None, None] for v in (c.mean, c.std))
            back = (as_seen / 255 - mean) / std
            assert (back - crops).abs().max() < 1e-5              # measured: 9e-7
        assert cut == [] and ("gram" in view) == (c.gram_size > 0)


def test_without_local_crops_there_are_none(photos):
    found, _ = look.views(replace(TINY, n_local=0), Folder(photos), 0, 1)
    assert "local" not in found[0] and list(look.band(found[0], replace(TINY, n_local=0))) == [
        "areas of the crops", "global crops, 96 px"]

def test_the_part_of_a_mixture_is_named(photos):
    one, two = open_source("shapes", 4), Folder(photos)
    mixture = SimpleNamespace(sources=[one, two], at=lambda i: (one, i) if i < 4 else (two, i - 4))
    assert [look.part_of(mixture, i) for i in (3, 4)] == ["part 1 of 2, ", "part 2 of 2, "]
    assert look.part_of(one, 3) == ""

# --------------------------------------------------------------------------------
# Pictures


def test_a_band_shows_every_crop(photos):
    c = GRAM
    view = look.views(c, Folder(photos), 0, 2)[0][1]
    columns = look.band(view, c)
    assert list(columns) == ["areas of the crops", "global crops, 32 px", "local crops, 16 px",
                             "the Gram teacher's, 64 px"]
    side, edge, block = 256, 3, 262                               # block: two local crops, one below the other
    globals_ = columns["global crops, 32 px"]
    for k in range(2):
        left = k * (side + look.GAP)
        cut = globals_[:side, left : left + side]
        assert (cut[:edge] == look.BOXES[k]).all() and (cut[:, -edge:] == look.BOXES[k]).all()
        assert np.array_equal(cut[4::8, 4::8], view["global"][0][k].permute(1, 2, 0).numpy())  # a pixel is 8x8
        seen = globals_[block + look.GAP :][:side, left : left + side][4::8, 4::8]
        hidden = view["masks"][k].view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
        now = view["global"][1][k].permute(1, 2, 0).numpy()
        assert np.array_equal(seen[~hidden], now[~hidden]) and (seen[hidden] != now[hidden]).any(1).all()
    small = side // 2
    for half, crops in zip((0, block + look.GAP), view["local"], strict=True):
        for k in range(2):
            place = columns["local crops, 16 px"][half + k * (small + look.GAP) :][:small, :small]
            assert np.array_equal(place[4::8, 4::8], crops[k].permute(1, 2, 0).numpy())
    gram = columns["the Gram teacher's, 64 px"][:side, : 2 * side + look.GAP]
    assert np.array_equal(gram[6::4, 6::4][:60, :60], view["gram"][1][0].permute(1, 2, 0).numpy()[1:61, 1:61])


def test_areas_are_outlined():
    view = dict(photo=torch.zeros(3, 50, 100, dtype=torch.uint8), boxes=np.array([[0, 0, 50, 50], [10, 50, 20, 30],
                                                                                  [5, 60, 40, 20]]))
    picture = look.outlined(view, 200)
    assert picture.shape == (100, 200, 3)
    for (x, y), colour in {(1, 50): 0, (98, 50): 0, (101, 30): 1, (158, 30): 1, (130, 21): 1, (130, 58): 1,
                           (140, 11): 2, (121, 80): 2}.items():
        assert tuple(picture[y, x]) == look.BOXES[colour], (x, y)
    assert (picture[60, 105:118] == 0).all()


@pytest.mark.parametrize(("side", "shown", "local"), [(96, 192, 192), (224, 224, 96), (256, 256, 96), (300, 256, 82),
                                                      (512, 256, 48), (32, 256, 768), (2, 256, 96 * 128)])
def test_sides_are_whole_multiples_where_they_fit(side, shown, local):
    c = replace(TINY, global_size=side)
    assert look.magnified(side, c) == shown and look.magnified(96, c) == local


def test_enlarging_is_told():
    c = replace(TINY, global_size=96, gram_size=0, local_size=48)
    boxes = np.array([[0, 0, 95, 99], [0, 0, 97, 98], [0, 0, 20, 40]])
    view = dict(part="part 1 of 2, ", photo=torch.zeros(3, 50, 100), boxes=boxes)
    assert look.sides(view, c) == "part 1 of 2, 100 x 50 pixels; crops enlarged up to 2.4 times"
    assert look.sides(view, replace(c, local_size=20)) == "part 1 of 2, 100 x 50 pixels"
    assert "up to 3.0 times" in look.sides(view, replace(c, gram_size=288))


def test_what_happened_is_told():
    row = np.zeros(12, np.float32)
    assert look.told(False, row) == "as it is"
    row[[0, 9, 10, 11]] = 1, 1, 1.26, 1
    assert look.told(True, row) == "flip, colour, grey, blur 1.3 px, solarize"


def test_lines_are_cut():
    fits, cut, path = (look.line(*each) for each in (("ab", 100), ("a" * 99 + "b", 100), ("a" * 99 + "b", 100)))
    assert fits.shape == cut.shape == (18, 100, 3) and (fits < 200).any()
    path = look.line("a" * 99 + "b", 100, end=True)
    assert not np.array_equal(path, cut) and not (cut[:, -1] < 200).any() and not (path[:, -1] < 200).any()
    assert (look.line("n\udce4me", 100) < 200).any()  # a name that is no text


def test_parts_are_put_together():
    a, b = np.zeros((2, 3, 3), np.uint8), np.zeros((4, 1, 3), np.uint8)
    paper = np.array(look.PAPER)
    both = look.above(a, b, gap=5)
    assert both.shape == (11, 3, 3) and (both[2:7] == paper).all() and (both[7:, 1:] == paper).all()
    both = look.beside(a, b, gap=5)
    assert both.shape == (4, 9, 3) and (both[2:, :3] == paper).all() and (both[:, 8] == 0).all()
    tiles = [np.full((2, 2, 3), k, np.uint8) for k in range(5)]
    grid = look.grid(tiles, 2)
    assert grid.shape == (2 * 2 + look.GAP, 3 * 2 + 2 * look.GAP, 3)
    assert [grid[y, x, 0] for x in (0, 8, 16) for y in (0, 8)] == [0, 1, 2, 3, 4, paper[0]]

# --------------------------------------------------------------------------------
# The command


def test_the_command(photos, tmp_path, capsys):
    out = tmp_path / "new/look.png"
    data.main(["look", str(photos), "--images", "2", "--step", "7", "--out", str(out), "--n_local", "3"])
    said = capsys.readouterr().out
    assert f"wrote {out}: {photos}: images 1 to 2 of the 32 of step 7, --size tiny --stage pretrain; " in said
    width, height = Image.open(out).size
    assert said.strip().endswith(f"{width}x{height} pixels")
    assert width == 2 * look.MARGIN + (2 * 192) + look.APART + (2 * 192 + look.GAP) + look.APART + 2 * 96 + look.GAP


def test_an_image_that_cannot_be_read_is_told(tmp_path, capsys):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "fine.png")
    for i in range(3):
        (tmp_path / f"{i}.png").touch()
    data.main(["look", str(tmp_path), "--images", "3", "--out", str(tmp_path / "out/look.png")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) and all("stands in for" in line for line in lines[:-1]) and len(lines) > 1


def test_stages_need_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn, band = [], look.band
    monkeypatch.setattr(look, "band", lambda view, c: drawn.extend(columns := band(view, c)) or columns)
    data.main("look shapes --n_shapes 4 --stage highres --images 1".split())
    assert drawn[1:] == ["global crops, 160 px", "local crops, 64 px", "the Gram teacher's, 240 px"]  # drawn in step 0
    assert "--stage highres" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["look.png"], "no run's folder is made"


@pytest.mark.parametrize(("words", "said"), [
    ("shapes --out look.jpg", "--out look.jpg: it is a picture; name a file that ends in .png"),
    ("shapes --images 0", r"--images is 0; it must be in \[1, 64\]"), ("", "PATH: none"),
    ("shapes --out FOLDER/look.png", "--out FOLDER/look.png"), ("shapes --sze s", "unknown option --sze")])
def test_mistakes(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").touch()
    with pytest.raises(ValueError, match="^" + said):
        data.main(["look", *words.split()])


def test_no_more_images_than_the_batch_has(capsys, tmp_path):
    source = open_source("shapes", 4)
    assert len(look.views(TINY, source, 0, 2)[0]) == 2
    data.main(["look", "shapes", "--n_shapes", "4", "--batch", "2", "--group", "2", "--koleo_group", "2", "--images",
               "5", "--out", str(tmp_path / "x.png")])
    assert "images 1 to 2 of the 2 of" in capsys.readouterr().out
