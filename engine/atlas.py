"""
What lies near what, to be looked at: pages that need no server and no network, of a file of vectors.

    neighbours    a query and the nearest to it, .html or .png
    copies        groups of copies, side by side
    chart         a map: two principal components, a picture under the pointer, colours of folders
    principal     the plane of the map and what it holds of the variance
"""

import json
import math
import os
import re
from functools import partial
from html import escape

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import loader
from engine.chunks import Computed
from engine.config import whole
from engine.explore import jpeg
from engine.images import shown
from engine.look import INK, above, beside, line, padded
from engine.pile import HEAD, shrunk, thumbnail

SIDE, GAP = 192, 12  # pixels of a neighbour, and around it
ROWS = 1 << 14       # vectors at a time
GROUPS, EACH = 300, 12  # of copies on a page, and of pictures in one; the list has all
COLOURS = ("#4477cc", "#ee8833", "#22a06b", "#d5404f", "#8a5fd0", "#c9a400", "#e070b5", "#2fb3c7", "#9a6a3a", "#8fb339",
           "#6f8fae", "#b04a8f")  # of folders; chosen by eye, on white and on black

# --------------------------------------------------------------------------------
# Lists of pictures


def neighbours(path, file, query, picture, rows, cosines):
    """
    path     .html or .png, written whole or not at all
    file     Vectors    query  a name, or words    picture  C H W as it was read, None of words    rows  nearest first
    """
    with whole(path) as new:
        if path.suffix == ".png":
            tiles = [tile(None if picture is None else shown(picture), f"query: {query}", "")]
            tiles += [tile(loaded(file, i), file.name(i), f"{cosine:.4f}")
                      for i, cosine in zip(rows, cosines, strict=True)]
            columns = math.ceil((1.5 * len(tiles)) ** 0.5)
            sheet = above(*(beside(*tiles[k : k + columns]) for k in range(0, len(tiles), columns)), gap=GAP)
            Image.fromarray(padded(sheet, sheet.shape[0] + GAP, sheet.shape[1] + GAP, GAP)).save(new, "PNG")
            return
        asked = "" if picture is None else f'<img src="{jpeg(shrunk(shown(picture), SIDE))}">'
        found = "".join(figure(file, i, f"{cosine:.4f}") for i, cosine in zip(rows, cosines, strict=True))
        new.write_text(f"{head(query)}<h1>{escape(query)}</h1><div class=row>{asked}</div><p>The nearest of "
                       f"{len(file):,} images of {escape(str(file.path))}, and the cosine.</p><div class=row>{found}"
                       "</div>", encoding="utf-8", errors="replace")


def tile(image, name, note):
    """C H W uint8, or None -> SIDE SIDE 3 and two lines below"""
    picture = np.empty((0, SIDE, 3), np.uint8) if image is None else shrunk(image, SIDE).permute(1, 2, 0).numpy()
    return above(padded(picture, SIDE, SIDE), line(name, SIDE, INK, end=True), line(note or " ", SIDE))


def loaded(file, i):
    try:
        return file.load(i)
    except OSError:
        return None  # its name stands for it


def head(title):
    return HEAD.replace("TITLE", escape(title)) + (
        "<style>figure { margin: 0 .5rem .7rem 0 } figcaption { font-size: .8rem; opacity: .8; max-width: 12rem; "
        "overflow-wrap: anywhere }</style>")


def figure(file, i, note, kept=False, side=SIDE):
    """A picture, a word on it, and the end of its path"""
    name = os.sep.join(file.name(i).split(os.sep)[-2:])
    return f"<figure>{thumbnail(file, i, kept, side)}<figcaption>{note} {escape(name)}</figcaption></figure>"


def copies(path, file, groups, cosines, threshold, found):
    """
    groups   [rows of one picture, the one that stays first]    cosines  [of each to the first]
    found    Calibration, or None: the threshold was given
    """
    out = [head(str(file.path)), f"<h1>{len(groups):,} groups of copies in {escape(str(file.path))}</h1>",
           f"<p>Two are copies from a cosine of {threshold:.4f} on. A green frame stays, the others can go."]
    if found:
        recall = ", ".join(f"{kind} {share:.0%}" for kind, share in found.recall.items())
        out.append(f"<p>Measured: of copies that were made of these photos {recall} are found; {found.wrong:.1%} of "
                   "the photos have a neighbour above that is none, by estimate.")
    for rows, near in list(zip(groups, cosines, strict=True))[:GROUPS]:
        pictures = [figure(file, int(i), f"{near[k]:.4f}" if k else "stays", not k, 128)
                    for k, i in enumerate(rows[:EACH])]
        more = f"<small>and {len(rows) - EACH:,} more</small>" if len(rows) > EACH else ""
        out.append(f"<div class=row>{''.join(pictures)}{more}</div>")
    if len(groups) > GROUPS:
        out.append(f"<p>and {len(groups) - GROUPS:,} more groups, in the list")
    with whole(path) as new:
        new.write_text("\n".join(out), encoding="utf-8", errors="replace")

# --------------------------------------------------------------------------------
# The map


def principal(x):
    """
    x        N D, of what [first:end] gives
    returns  mean D, axes D 2 of the largest variance, float64, largest entry positive;  their share of the variance
    """
    N, D = x.shape
    total, products = np.zeros(D), np.zeros((D, D))
    for first in tqdm(range(0, N, ROWS), "components", leave=False, disable=None):
        part = x[first : first + ROWS].astype(np.float64)
        total += part.sum(0)
        products += part.T @ part
    mean = total / N
    values, vectors = np.linalg.eigh(products / N - np.outer(mean, mean))
    axes = vectors[:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), [0, 1]])
    return mean, axes, float(values[-2:].sum() / max(values.clip(0).sum(), 1e-30))


def chart(path, file, x, points, side, workers):
    """
    x        N D, of length 1    points, side  at most so many images, their pictures' pixels
    returns  the map's share of the variance, images on it
    """
    mean, axes, share = principal(x)
    rows = np.unique(np.linspace(0, len(file) - 1, min(points, len(file))).round().astype(int))
    at = np.concatenate([(x[first : first + ROWS] - mean) @ axes for first in range(0, len(file), ROWS)])[rows]
    at = (at - (at.max(0) + at.min(0)) / 2) / max(np.ptp(at, axis=0).max(), 1e-12)         # the longer side is 1
    pictures = []
    if side:
        ahead = loader(Computed(partial(small, file=file, side=side)), rows.tolist(), workers)
        pictures = ["" if isinstance(each, Exception) else each for each in
                    tqdm(ahead, "pictures", len(rows), unit="img", leave=False, disable=None)]
    names = within([file.name(i) for i in rows])
    kinds, of = by_folder(names)
    data = dict(x=at[:, 0].round(5).tolist(), y=(-at[:, 1]).round(5).tolist(), of=of, kinds=kinds, colours=COLOURS,
                names=names, pictures=pictures)
    words = dict(TITLE=escape(f"{len(rows):,} of {len(file):,} images of {file.path}"),
                 NOTE=f"Two principal components of {x.shape[1]} dimensions, {share:.0%} of their variance",
                 DATA=json.dumps(data).replace("<", "\\u003c"))  # no </script>
    with whole(path) as new:
        new.write_text(re.sub("|".join(words), lambda found: words[found[0]], TEMPLATE), encoding="utf-8",
                       errors="replace")
    return share, len(rows)


def small(i, file, side):
    return jpeg(shrunk(file.load(i), side), 75)


def within(names):
    """Paths without the folder that all of them lie in"""
    folders = [os.path.dirname(name) for name in names]
    above = os.path.commonpath(folders) if len({*map(os.path.isabs, names)}) == 1 else ""
    return [os.path.relpath(name, above) for name in names] if above else names


def by_folder(names):
    """
    The folders, as deep as there are colours for them; if there are too many at once, the largest ones and others.

    names    relative paths    returns  [folder], the folder of each name, an index
    """
    folders, depth = [os.path.dirname(name).split(os.sep) for name in names], 1
    deepest = max(map(len, folders))
    while depth < deepest and len({tuple(each[: depth + 1]) for each in folders}) <= len(COLOURS):
        depth += 1
    found = [os.sep.join(each[:depth]) or "." for each in folders]
    kinds, counts = np.unique(found, return_counts=True)
    if len(kinds) > len(COLOURS):
        largest = set(kinds[np.argsort(-counts, kind="stable")[: len(COLOURS) - 1]])
        found = [each if each in largest else "others" for each in found]
        kinds = sorted(largest) + ["others"]
    place = {kind: k for k, kind in enumerate(kinds)}
    return [str(kind) for kind in kinds], [place[each] for each in found]


TEMPLATE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src data: 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --page: #faf9f7; --ink: #1d1a24; --soft: #66616f; --line: #dedbe3 }
@media (prefers-color-scheme: dark) { :root { --page: #131118; --ink: #ece9f2; --soft: #a29dae; --line: #35313f } }
* { box-sizing: border-box; margin: 0 }
body { height: 100vh; display: grid; grid-template: auto 1fr / 1fr auto; background: var(--page); color: var(--soft);
       font: .9rem/1.45 system-ui, sans-serif }
header { grid-column: 1 / 3; padding: .9rem 1.2rem; border-bottom: 1px solid var(--line) }
h1 { font-size: 1.05rem; font-weight: 500; color: var(--ink) }
#view { position: relative; min-width: 0; min-height: 0; overflow: hidden }
canvas { position: absolute; inset: 0; width: 100%; height: 100%; touch-action: none; cursor: crosshair }
canvas:focus-visible { outline: 3px solid #3d7eff; outline-offset: -3px }
nav { width: 14rem; overflow: auto; padding: .8rem; border-left: 1px solid var(--line) }
nav button { display: flex; gap: .5rem; width: 100%; padding: .2rem .3rem; border: 0; border-radius: 4px; font: inherit;
             text-align: left; color: var(--ink); background: none; cursor: pointer; overflow-wrap: anywhere }
nav button:hover { background: var(--line) } nav button[aria-pressed=false] { opacity: .35 }
nav i { flex: none; width: .8rem; height: .8rem; margin-top: .25rem; border-radius: 50% }
nav span { margin-left: auto; color: var(--soft); font-variant-numeric: tabular-nums }
#card { position: absolute; display: none; pointer-events: none; max-width: 16rem; padding: .5rem; border-radius: 6px;
        background: var(--page); border: 1px solid var(--line); box-shadow: 0 4px 18px #0004; overflow-wrap: anywhere;
        color: var(--ink); font-size: .8rem }
#card img { display: block; width: 12rem; max-width: 100%; margin-bottom: .3rem; border-radius: 3px }
</style>
<header><h1>TITLE</h1><p>NOTE. <b>Point</b> at a dot to see it; <b>wheel</b> or <b>+ &minus;</b> zooms, <b>drag</b> or
arrow keys move, <b>0</b> shows all; far in, dots are pictures. A folder can be switched off, or, by a double click, be
alone.</p></header>
<div id="view"><canvas tabindex="0" role="application" aria-label="map of images; arrow keys move, plus and minus zoom">
</canvas><div id="card"></div></div><nav id="legend"></nav>
<script type="application/json" id="data">DATA</script><script>
const data = JSON.parse(document.getElementById("data").textContent), n = data.x.length
const canvas = document.querySelector("canvas"), pen = canvas.getContext("2d"), card = document.getElementById("card")
const on = data.kinds.map(() => true), images = [], MOST = 150  // pictures that are drawn at once
const colours = data.colours.map(each => each.match(/\\w\\w/g).reduceRight((bgr, x) => bgr << 8 | parseInt(x, 16), 0))
let layer, zoom = 1, middle = [0, 0], W = 1, H = 1, at = -1, drag = null, waiting = 0
const scale = () => zoom * Math.min(W, H) * .86
const place = i => [(data.x[i] - middle[0]) * scale() + W / 2, (data.y[i] - middle[1]) * scale() + H / 2]
const later = () => { waiting ||= requestAnimationFrame(draw) }
function picture(i) {  // null until the browser has decoded it
  if (!images[i]) Object.assign(images[i] = new Image(), { onload: later, src: data.pictures[i] })
  return images[i].complete && images[i].naturalWidth ? images[i] : null
}
function dots(shown, radius, ratio) {  // pixel by pixel: without a GPU, thousands of arcs take longer than a frame
  const w = canvas.width, h = canvas.height
  if (!w || !h) return
  if (layer?.width !== w || layer.height !== h) layer = pen.createImageData(w, h)
  const pixels = new Uint32Array(layer.data.buffer).fill(0)
  for (const [i, left, top] of shown) {
    const x = left * ratio - .5, y = top * ratio - .5, reach = radius + .5, colour = colours[data.of[i]]
    for (let v = Math.max(0, Math.ceil(y - reach)); v < Math.min(h, y + reach); v++)
      for (let u = Math.max(0, Math.ceil(x - reach)); u < Math.min(w, x + reach); u++) {
        const alpha = 204 * Math.min(1, reach - Math.sqrt((u - x) ** 2 + (v - y) ** 2)), at = v * w + u
        if (alpha > 0 && alpha >= pixels[at] >>> 24) pixels[at] = colour | alpha << 24  // the last one is on top
      }
  }
  pen.putImageData(layer, 0, 0)
}
function draw() {
  waiting = 0
  const ratio = devicePixelRatio || 1, radius = Math.min(7, 2.2 + Math.log2(Math.max(zoom, 1)) * .7)
  const shown = []
  for (let i = 0; i < n; i++) {
    if (!on[data.of[i]]) continue
    const [x, y] = place(i)
    if (x > -60 && y > -60 && x < W + 60 && y < H + 60) shown.push([i, x, y])
  }
  const large = data.pictures.length && shown.length <= MOST
  dots(shown, radius * ratio, ratio)
  pen.setTransform(ratio, 0, 0, ratio, 0, 0)
  for (const [i, x, y] of large ? shown : []) {
    const image = data.pictures[i] && picture(i)
    if (!image) continue
    const w = image.naturalWidth, h = image.naturalHeight
    pen.fillStyle = data.colours[data.of[i]]
    pen.fillRect(x - w / 2 - 2, y - h / 2 - 2, w + 4, h + 4)
    pen.drawImage(image, x - w / 2, y - h / 2)
  }
  if (at >= 0 && on[data.of[at]]) {
    const [x, y] = place(at)
    pen.beginPath()
    pen.arc(x, y, radius + 3, 0, 7)
    pen.lineWidth = 2
    pen.strokeStyle = getComputedStyle(document.body).color
    pen.stroke()
  }
}
function nearest(x, y) {  // within 24 pixels, of what is shown
  let best = -1, least = 24 ** 2
  for (let i = 0; i < n; i++) {
    if (!on[data.of[i]]) continue
    const [a, b] = place(i), d = (a - x) ** 2 + (b - y) ** 2
    if (d < least) [best, least] = [i, d]
  }
  return best
}
function show(i, x, y) {
  if (i !== at) {
    at = i
    card.style.display = i < 0 ? "none" : "block"
    card.replaceChildren()
    if (i >= 0 && data.pictures[i]) card.append(Object.assign(new Image(), { src: data.pictures[i], alt: "" }))
    if (i >= 0) card.append(data.names[i])
    later()
  }
  card.style.left = `${Math.max(4, x + 240 > W ? x - 235 : x + 16)}px`
  card.style.top = `${Math.max(4, y + 240 > H ? y - 235 : y + 16)}px`
}
function enlarge(factor, x = W / 2, y = H / 2) {  // what lies under x, y stays there
  const before = scale()
  zoom = Math.max(.5, Math.min(4000, zoom * factor))
  middle = middle.map((m, k) => m + ([x - W / 2, y - H / 2][k]) * (1 / before - 1 / scale()))
  later()
}
function move(x, y) {
  middle = [middle[0] - x / scale(), middle[1] - y / scale()]
  later()
}
canvas.onwheel = e => {
  e.preventDefault()
  enlarge(Math.exp(-e.deltaY * (e.deltaMode ? .05 : .0015)), e.offsetX, e.offsetY)
}
const touches = new Map()  // two fingers zoom
canvas.onpointerdown = e => { touches.set(e.pointerId, [e.offsetX, e.offsetY]); canvas.setPointerCapture(e.pointerId) }
canvas.onpointerup = canvas.onpointercancel = e => touches.delete(e.pointerId)
canvas.onpointerleave = () => show(-1, 0, 0)
canvas.onpointermove = e => {
  const old = touches.get(e.pointerId), here = [e.offsetX, e.offsetY]
  if (!old) return show(nearest(...here), ...here)
  const others = [...touches].filter(([id]) => id !== e.pointerId).map(([, p]) => p)
  if (others.length) {
    const far = p => Math.hypot(p[0] - others[0][0], p[1] - others[0][1]) || 1
    enlarge(far(here) / far(old), ...others[0])
  } else move(here[0] - old[0], here[1] - old[1])
  touches.set(e.pointerId, here)
}
canvas.onkeydown = e => {
  const by = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[e.key]
  if (e.ctrlKey || e.metaKey || e.altKey) return
  if (by) move(...by)
  else if (e.key === "+" || e.key === "=") enlarge(1.4)
  else if (e.key === "-") enlarge(1 / 1.4)
  else if (e.key === "0") { [zoom, middle] = [1, [0, 0]]; later() }
  else return
  e.preventDefault()
}
data.kinds.forEach((kind, k) => {
  const [button, dot, count] = ["button", "i", "span"].map(tag => document.createElement(tag))
  dot.style.background = data.colours[k]
  count.textContent = data.of.filter(each => each === k).length.toLocaleString()
  button.append(dot, kind, count)
  button.onclick = () => { on[k] = !on[k]; press() }
  button.ondblclick = () => {  // alone; again: all
    const alone = on.every((x, j) => x === (j === k))
    on.forEach((_, j) => on[j] = alone || j === k)
    press()
  }
  document.getElementById("legend").append(button)
})
function press() {
  ;[...document.getElementById("legend").children].forEach((each, k) => each.ariaPressed = on[k])
  later()
}
new ResizeObserver(() => {
  [W, H] = [canvas.clientWidth, canvas.clientHeight]
  Object.assign(canvas, { width: W * (devicePixelRatio || 1), height: H * (devicePixelRatio || 1) })
  later()
}).observe(canvas)
press()
</script>"""
