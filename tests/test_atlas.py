"""engine/atlas.py: the plane of the map, folders and their colours, pages that need nothing else."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import CHROMIUM, titled
from PIL import Image

from engine import atlas
from engine.atlas import by_folder, principal, within
from engine.near import Calibration

RNG = np.random.default_rng(0)


class Some:
    """Ten images, of which the fourth is gone"""
    path = Path("DATA/<x>.npz")

    def __len__(self):
        return 10

    def name(self, i):
        return f"photos/{'ab'[i % 2]}/<{i}>.jpg"

    def load(self, i):
        if i == 3:
            raise OSError("gone")
        return torch.full((3, 20, 40), 20 * i, dtype=torch.uint8)


def test_the_plane_is_that_of_an_eigendecomposition(monkeypatch):
    monkeypatch.setattr(atlas, "ROWS", 7)
    x = (RNG.normal(size=(50, 6)) * [5, 1, 3, 0.2, 1, 0.1] + 2).astype(np.float32)
    mean, axes, share = principal(x)
    exact = np.cov(x.T.astype(np.float64), bias=True)
    values = np.sort(np.linalg.eigvalsh(exact))[::-1]
    assert np.abs(mean - x.mean(0, dtype=np.float64)).max() < 1e-6      # measured: 2e-15
    assert np.abs(exact @ axes - axes * values[:2]).max() < 1e-9        # measured: 3e-14
    assert share == pytest.approx(values[:2].sum() / values.sum())
    assert (axes[np.abs(axes).argmax(0), [0, 1]] > 0).all()             # one sign, whatever LAPACK gives


def test_folders_are_as_deep_as_there_are_colours():
    names = [f"{a}/{b}/x.jpg" for a in "ab" for b in "cd"]
    assert by_folder(names) == (["a/c", "a/d", "b/c", "b/d"], [0, 1, 2, 3])
    names = [f"{a}/{b}/x.jpg" for a in "ab" for b in range(7)]          # 14 are too many
    assert by_folder(names) == (["a", "b"], [0] * 7 + [1] * 7)
    names = [f"{k:02}/x{j}.jpg" for k in range(20) for j in range(1 + (k == 15))]
    kinds, of = by_folder(names)
    assert len(kinds) == 12 and "15" in kinds and kinds[-1] == "others" and of.count(11) == 9
    assert by_folder(["x.jpg", "a/x.jpg"]) == ([".", "a"], [0, 1])


def test_names_lose_what_they_have_in_common():
    assert within(["/p/a/x.jpg", "/p/b/y.jpg"]) == ["a/x.jpg", "b/y.jpg"]
    assert within(["a/x.jpg", "/p/b/y.jpg"]) == ["a/x.jpg", "/p/b/y.jpg"] and within(["x.jpg", "y.jpg"]) == ["x.jpg",
                                                                                                           "y.jpg"]


def test_the_map_holds_all_it_needs(tmp_path):
    x = RNG.normal(size=(10, 6)).astype(np.float32)
    share, n = atlas.chart(tmp_path / "map.html", Some(), x, 100, 16, 0)
    html = (tmp_path / "map.html").read_text()
    text = re.search(r'id="data">(.*?)</script>', html, re.S)[1]
    data = json.loads(text)
    assert "<" not in text                                               # of a name it could end the script
    assert n == 10 and 0 < share < 1 and "http:" not in html and "10 of 10 images of DATA/&lt;x&gt;.npz" in html
    assert data["names"][:2] == ["a/<0>.jpg", "b/<1>.jpg"] and data["kinds"] == ["a", "b"]
    assert data["of"] == [0, 1] * 5 and data["pictures"][3] == "" and len(data["pictures"]) == 10
    assert all(each.startswith("data:image/jpeg;base64,") for k, each in enumerate(data["pictures"]) if k != 3)
    mean, axes, _ = principal(x)
    at = (x - mean) @ axes * [1, -1]
    found = np.stack([data["x"], data["y"]], 1)
    assert np.ptp(found, axis=0).max() == pytest.approx(1, abs=1e-4) and np.abs(found).max() <= 0.5
    assert np.corrcoef(found.T.ravel(), (at - (at.max(0) + at.min(0)) / 2).T.ravel())[0, 1] > 0.999999
    _, n = atlas.chart(tmp_path / "map.html", Some(), x, 4, 0, 0)
    data = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "map.html").read_text(), re.S)[1])
    assert n == 4 and data["pictures"] == [] and data["names"][-1] == "b/<9>.jpg"


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_map_in_chromium(tmp_path):
    x = RNG.normal(size=(10, 6)).astype(np.float32)
    x[1::2] = x[::2] + 0.04  # of two folders, one partly over the other
    atlas.chart(tmp_path / "map.html", Some(), x, 100, 0, 0)
    data = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "map.html").read_text(), re.S)[1])
    found = titled(tmp_path / "map.html", """
        window.requestAnimationFrame = draw => { draw() }  // at once
        const seen = []
        const see = () => seen.push([...pen.getImageData(0, 0, canvas.width, canvas.height).data])
        ;[W, H] = [canvas.width, canvas.height] = [300, 200]
        draw(); see()
        enlarge(2, 0, 0); draw(); see()
        document.querySelectorAll("nav button")[1].onclick(); see()
        document.title = JSON.stringify({ seen })""")
    all_of, near, one = (np.array(each).reshape(200, 300, 4) for each in found["seen"])
    colours = [[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in atlas.COLOURS[:2]]

    def drawn(zoom, corner, folders):
        """Every pixel of every dot, by its distance from the middle of the dot"""
        out, v, u = np.zeros((200, 300, 4)), *np.mgrid[:200, :300]
        for x, y, k in zip(data["x"], data["y"], data["of"], strict=True):
            side, (left, top) = zoom * 200 * 0.86, corner
            away = np.hypot(u + 0.5 - (x * side + 150 * left), v + 0.5 - (y * side + 100 * top))
            alpha = np.floor(204 * np.clip(2.2 + 0.7 * np.log2(zoom) + 0.5 - away, 0, 1))
            here = (alpha > 0) & (alpha >= out[..., 3]) & (k in folders)
            out[here] = np.concatenate([np.broadcast_to(colours[k], (here.sum(), 3)), alpha[here][:, None]], 1)
        return out

    for picture, want in (all_of, drawn(1, (1, 1), (0, 1))), (near, drawn(2, (2, 2), (0, 1))), (one, drawn(
            2, (2, 2), (0,))):
        assert (picture[..., 3] == 204).sum() > 10 and np.abs(picture[..., 3] - want[..., 3]).max() <= 1
        solid = want[..., 3] == 204                         # a browser keeps colours times alpha
        assert np.abs(picture - want)[solid].max() <= 1


@pytest.mark.long
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_thousands_of_points_take_less_than_a_frame(tmp_path):
    class Many(Some):
        def __len__(self):
            return 5000
    atlas.chart(tmp_path / "map.html", Many(), RNG.normal(size=(5000, 6)).astype(np.float32), 5000, 0, 0)
    found = titled(tmp_path / "map.html", """
        ;[W, H] = [canvas.width, canvas.height] = [1200, 800]
        const times = [...Array(40)].map((_, k) => {
            const start = performance.now()
            move(k % 3 - 1, 0)
            draw()
            pen.getImageData(600, 400, 1, 1)  // all is drawn
            return performance.now() - start })
        document.title = JSON.stringify({ n, times })""")
    assert found["n"] == 5000 and min(found["times"]) < 16  # measured: 2; as arcs 70; the least, as others run, too


def test_neighbours_as_a_page_and_as_a_picture(tmp_path):
    picture = torch.zeros(3, 30, 20, dtype=torch.uint8)
    atlas.neighbours(tmp_path / "x.html", Some(), "<q>.jpg", picture, [4, 3], [0.9, 0.8])
    html = (tmp_path / "x.html").read_text()
    assert html.count("data:image/jpeg") == 2 and "0.9000 a/&lt;4&gt;.jpg" in html and "<q>" not in html
    assert "http" not in html and "<script" not in html
    atlas.neighbours(tmp_path / "x.png", Some(), "a red square", None, [4, 3, 2, 1, 0], [0.9, 0.8, 0.7, 0.6, 0.5])
    sheet = np.array(Image.open(tmp_path / "x.png"))
    side, gap = atlas.SIDE, atlas.GAP
    assert sheet.shape[1] == 3 * side + 2 * 6 + 2 * gap and sheet.shape[0] > 2 * side    # three in a row, two rows
    row, column = gap + 10, gap + side + 6 + 10
    assert abs(int(sheet[row, column, 0]) - 80) <= 1 and (sheet[row, gap + 10] == atlas_paper()).all()
    assert {path.name for path in tmp_path.iterdir()} == {"x.html", "x.png"}


def atlas_paper():
    from engine.look import PAPER
    return PAPER


def test_copies_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(atlas, "GROUPS", 2)
    monkeypatch.setattr(atlas, "EACH", 3)
    groups = [np.array([4, 5]), np.array([0, 1, 2, 6]), np.array([7, 8])]
    cosines = [np.linspace(1, 0.9, len(rows)) for rows in groups]
    found = Calibration(0.95, dict(jpeg=0.98, mirrored=0.5), 0.03, 0.004)
    atlas.copies(tmp_path / "x.html", Some(), groups, cosines, 0.95, found)
    html = (tmp_path / "x.html").read_text()
    assert "3 groups of copies" in html and "jpeg 98%, mirrored 50%" in html and "0.4% of the photos" in html
    assert html.count("class=kept") == 2 and html.count("stays a/") == 2 and "and 1 more</small>" in html
    assert "and 1 more groups" in html and "0.9000 b/&lt;5&gt;.jpg" in html
    atlas.copies(tmp_path / "x.html", Some(), groups, cosines, 0.95, None)
    assert "Measured" not in (tmp_path / "x.html").read_text()
