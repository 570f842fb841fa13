"""explore.py: what the page computes from its 8-bit numbers are the cosines of the features, in a real browser too."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from chromium import CHROMIUM, titled
from PIL import Image

from engine.explore import ERROR, HEAT, compress, page

NODE = shutil.which("node")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosines(maps):
    """n n float64"""
    x = np.concatenate([m.double().numpy().reshape(-1, m.shape[-1]) for m in maps])
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def written(maps, names=("a.jpg", "b.jpg")):
    """The page of these maps, one image of 8 pixels a patch for each, and what is embedded in it."""
    images = [torch.full((3, 8 * m.shape[0], 8 * m.shape[1]), 60 * i + 90, dtype=torch.uint8)
              for i, m in enumerate(maps)]
    html, d, error = page(maps, images, names[: len(maps)])
    return html, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


TWO = [normal(4, 6, 32) + 1, normal(5, 3, 32, seed=1) + 1]  # two images whose features share a mean: cosines near 0.5

# --------------------------------------------------------------------------------
# Compression


@pytest.mark.parametrize("D, rank, want", [(24, 24, 24), (300, 300, 300), (300, 40, 64), (768, 80, 96), (99, 9, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_keep_the_cosines(D, rank, want, dtype):
    maps = [(normal(9, 20, rank, seed=i) @ normal(rank, D, seed=9) + 3).to(dtype) for i in range(2)]
    before = [m.clone() for m in maps]
    codes, scale, error = compress(maps)
    assert codes.shape == (360, want) and codes.dtype == torch.int8 and codes.abs().max() == 127
    codes = codes.numpy().astype(float)
    wrong = abs(scale**2 * codes @ codes.T - cosines(maps)).max()
    assert error <= wrong + 1e-6 and wrong < 1.5 * error < 1.5 * ERROR  # every second patch is measured
    assert wrong < 0.02                                                 # measured: 0.004 to 0.010
    assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=True))


def test_no_direction_of_large_features_takes_the_bits():
    """Two features 100 times the others, as before a final norm; a plain scale for all would leave those at 0."""
    maps = [normal(8, 8, 64) * torch.where(torch.arange(64) < 2, 100.0, 1.0)]
    assert compress(maps)[2] < 0.01                                     # measured: 0.005


def test_flat_and_empty_features_pass():
    codes, scale, error = compress([torch.ones(2, 3, 8), torch.zeros(1, 1, 8)])
    assert error < 0.01 and (codes[-1] == 0).all() and (codes[0] == codes[5]).all()

# --------------------------------------------------------------------------------
# The page


def test_page_holds_all_and_asks_for_nothing():
    html, data = written(TWO, ["</script><b>&\u00e9.jpg", "b.jpg"])
    assert [image["name"] for image in data["images"]] == ["</script><b>&\u00e9.jpg", "b.jpg"]
    assert html.count("</script>") == 2 and "<b>&" not in html
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|srcset|fetch\(", html.replace("// ", ""))
    assert "default-src data: 'unsafe-inline'" in html  # the browser refuses, too
    for image, m, grey in zip(data["images"], TWO, (90, 150), strict=True):
        assert (image["h"], image["w"]) == m.shape[:2] and image["aspect"] == m.shape[1] / m.shape[0]
        with Image.open(io.BytesIO(base64.b64decode(image["photo"].partition(",")[2]))) as photo:
            assert photo.size == (8 * m.shape[1], 8 * m.shape[0]) and abs(np.asarray(photo).mean() - grey) < 2
    codes = np.concatenate([np.frombuffer(base64.b64decode(image["codes"]), np.int8) for image in data["images"]])
    codes = codes.reshape(-1, data["d"]).astype(float)
    assert abs(data["scale"] ** 2 * codes @ codes.T - cosines(TWO)).max() < 0.01
    assert written(TWO)[0] == written(TWO)[0]


@pytest.mark.skipif(not NODE, reason="needs node")
def test_the_pages_arithmetic_in_node():
    html, data = written(TWO)
    script = re.search(r"<script>(.*)function place", html, re.S)[1]
    stub = f"const document = {{ getElementById: () => ({{ textContent: {json.dumps(json.dumps(data))} }}) }}\n"
    decode = "for (const image of images) image.codes = Int8Array.from(atob(image.codes), c => c.charCodeAt(0))\n"
    show = "console.log(JSON.stringify([compare({ image: 1, row: 3, column: 2 }).map(all => [...all]), palette]))"
    run = subprocess.run([NODE, "-"], input=stub + script + decode + show, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    got, palette = json.loads(run.stdout)
    assert abs(np.concatenate(got) - cosines(TWO)[24 + 3 * 3 + 2]).max() < 0.01
    at = np.linspace(0, 1, len(HEAT))
    want = [np.interp(np.linspace(0, 1, 256), at, channel) for channel in np.transpose(HEAT)]
    assert np.allclose(palette, np.transpose([*want, np.full(256, 255)]))


DRIVER = """
const views = [...document.querySelectorAll(".view")], seen = []
window.requestAnimationFrame = draw => { draw() }  // at once: the page is dumped when this script ends
function see(act) {
  act?.()
  const pixels = views.map(view => [...view.querySelector("canvas").getContext("2d").getImageData(0, 0, 3, 1).data])
  seen.push({ value: $("value").textContent, where: $("where").textContent, pixels, live: $("where").ariaLive,
    low: $("ticks").firstChild.textContent, matches: images.map(image => image.match.textContent) })
}
const pointer = (type, i, row, column) => () => {
  const box = views[i].getBoundingClientRect()
  views[i].dispatchEvent(new PointerEvent(type, { clientX: box.left + (column + 0.5) / images[i].w * box.width,
    clientY: box.top + (row + 0.5) / images[i].h * box.height }))
}
const press = (i, key) => () => views[i].dispatchEvent(new KeyboardEvent("keydown", { key }))
see()
see(pointer("pointermove", 1, 4, 0))
see(pointer("click", 0, 0, 0))
see(pointer("pointermove", 1, 3, 2))
see(press(1, "ArrowLeft"))
see(press(1, "Escape"))
see(press(0, "ArrowUp"))
see(() => $("whole").click())
for (const i of [0, 1, 1]) see(pointer("click", i, 1, 2))
document.title = JSON.stringify(seen)"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_in_chromium(tmp_path):
    (tmp_path / "page.html").write_text(written(TWO)[0], encoding="utf-8")
    start, moved, pinned, read, key, free, up, whole, *clicks = titled(tmp_path / "page.html", DRIVER)
    exact = cosines(TWO)

    def is_near(text, value):
        return abs(float(text.split()[-1].replace("\u2212", "-")) - value) < 0.016  # rounded to two digits, 8 bits

    assert start["where"] == "row 3, column 4 of a.jpg" and start["matches"][0] == ""
    query = 24 + 4 * 3
    assert moved["where"] == "row 5, column 1 of b.jpg" and moved["value"] == "1.00" and moved["live"] == "off"
    assert is_near(moved["matches"][0], exact[query, :24].max()) and moved["matches"][1] == ""
    assert is_near(moved["low"], exact[query].min())
    assert pinned["where"] == "row 1, column 1 of a.jpg (pinned)" and pinned["pixels"][0][:4] == [*HEAT[-1], 255]
    assert read["where"] == "row 4, column 3 of b.jpg\nto row 1, column 1 of a.jpg"
    assert is_near(read["value"], exact[0, 24 + 3 * 3 + 2]) and read["pixels"] == pinned["pixels"]
    assert is_near(key["value"], exact[0, 24 + 3 * 3 + 1]) and key["live"] == "polite"
    assert free["where"] == "row 4, column 2 of b.jpg" and free["pixels"] != pinned["pixels"]
    assert up["where"] == "row 2, column 4 of a.jpg"  # another image starts in its middle
    assert whole["low"] == "\u22121.00" and whole["where"] == up["where"]
    level = (exact[9, :3] + 1) / 2
    want = [np.interp(level, np.linspace(0, 1, len(HEAT)), channel) for channel in np.transpose(HEAT)]
    assert abs(np.reshape(whole["pixels"][0], (3, 4))[:, :3] - np.transpose(want)).max() < 4
    there = "row 2, column 3 of "  # a click elsewhere moves the pin, one on it lets go
    assert [each["where"] for each in clicks] == [f"{there}a.jpg (pinned)", f"{there}b.jpg (pinned)", f"{there}b.jpg"]
