"""
One page to explore frozen patch features in a browser: no server, no network; a file that can be sent as it is.

    HEAT        the colours of a cosine, here and in the pictures of visualize.py
    compress    maps -> int8 numbers whose scalar products are the cosines, up to an error that is measured
    gallery     pictures -> HTML, for visualize.py text
    page        maps, images -> HTML; `python visualize.py explore` writes it

Dimension letters: see the top of model.py; n patches lie in all images together, d numbers are kept of D.
"""

import base64
import io
import json
from html import escape

import torch
import torch.nn.functional as F
from PIL import Image

HEAT = ((13, 8, 26), (55, 24, 90), (115, 32, 125), (181, 47, 127), (235, 83, 94), (255, 142, 64), (255, 200, 79),
        (253, 249, 194))  # CIE lightness 3 to 97 in equal steps: it reads in grey too
WIDTHS = 64, 96, 128      # d, if that is enough:
ERROR = 0.02              # no measured cosine is wrong by more; two digits are read off a page
QUERIES = 256             # evenly spaced patches whose cosines to all others are measured


def compress(maps):
    """
    Unit features, turned, cut and rounded:  cosine(i, j) ~ scale^2 codes[i] . codes[j]

        turned    to the eigenvectors of X^T X, largest first; a rotation keeps every cosine
        cut       to the first of WIDTHS whose error is below ERROR; if none is, all D stay
        rounded   after one more rotation, a random one: no entry stands out, so one scale for the page wastes no bit

    maps      list of h w D, any float dtype
    returns   codes n d int8, scale, error: the largest of QUERIES patches to all n
    """
    x = F.normalize(torch.cat([m.flatten(0, 1) for m in maps]).float(), dim=-1)                # n D
    n, D = x.shape
    vectors = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)                                  # D D
    some = slice(None, None, -(-n // QUERIES))
    exact = x[some] @ x.T                                                                      # queries n
    for d in (*(width for width in WIDTHS if width < D), D):
        mix = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0))).Q
        y = x @ (vectors[:, :d] @ mix)                                                         # n d
        scale = max(y.abs().max().item(), 1e-6) / 127
        codes = (y / scale).round()
        error = (scale**2 * (codes[some] @ codes.T) - exact).abs().max().item()
        if error < ERROR:
            break
    return codes.to(torch.int8), scale, error


def page(maps, images, names):
    """
    maps      list of h w D    images  list of C H W uint8    names  shown below them
    returns   the page's HTML;  d, the numbers kept of each patch;  the largest error of a cosine
    """
    codes, scale, error = compress(maps)
    codes, d, D = codes.split([m.shape[:2].numel() for m in maps]), codes.shape[1], maps[0].shape[2]
    shown = [dict(name=name, h=m.shape[0], w=m.shape[1], aspect=image.shape[2] / image.shape[1], photo=jpeg(image),
                  codes=base64.b64encode(code.numpy().tobytes()).decode())
             for name, m, image, code in zip(names, maps, images, codes, strict=True)]
    note = f"{D} features of a patch, kept as {d} numbers of 8 bits; cosines within {error:.3f}"
    data = json.dumps(dict(images=shown, d=d, scale=scale, heat=HEAT)).replace("<", "\\u003c")  # no </script>
    return TEMPLATE.replace("NOTE", note).replace("DATA", data), d, error


def gallery(rows, names, title):
    """Rows of pictures, H W 3 uint8, one row for each image -> a page: HTML, no script"""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
             "<style>body { font: .9rem system-ui, sans-serif; margin: 1.5rem } img { width: 15rem; margin: 2px } "
             "h1 { font-size: 1.2rem; font-weight: 500 }</style>", f"<h1>{escape(title)}</h1>"]
    for name, pictures in zip(names, rows, strict=True):
        parts += [f"<p>{escape(name)}<br>",
                  *(f'<img src="{jpeg(torch.from_numpy(each).permute(2, 0, 1))}">' for each in pictures)]
    return "\n".join(parts)


def jpeg(image, quality=90):
    """C H W uint8 -> a data URL"""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

# --------------------------------------------------------------------------------
# The page. Its state is a cursor, which pointer and keys move, and a query, which follows it until it is pinned.


TEMPLATE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Patch similarity</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src data: 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --page: #faf9f7; --ink: #1d1a24; --soft: #66616f; --line: #dedbe3; --heat: .6 }
@media (prefers-color-scheme: dark) { :root { --page: #131118; --ink: #ece9f2; --soft: #a29dae; --line: #35313f } }
* { box-sizing: border-box; margin: 0; min-width: 0; font-variant-numeric: tabular-nums }
body { min-height: 100vh; display: flex; flex-direction: column; max-width: 110rem; margin: auto; color: var(--soft);
       padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 0; background: var(--page); font: .9rem/1.45 system-ui, sans-serif }
h1, b, figcaption :first-child, #value { color: var(--ink); font-weight: 500 } h1 { font-size: 1.3rem }
main { flex: 1; display: flex; flex-wrap: wrap; gap: 1.3rem; place-content: center; padding: 1.2rem 0 }
figure { flex: var(--aspect) 1 calc(var(--aspect) * 17rem); max-width: calc(var(--aspect) * max(15rem, 100vh - 17rem)) }
figcaption { display: flex; justify-content: space-between; gap: 1rem; padding-top: .45rem; white-space: nowrap }
figcaption :first-child, #where { overflow: hidden; text-overflow: ellipsis } figcaption :last-child { flex: none }
.view { position: relative; aspect-ratio: var(--aspect); cursor: crosshair; touch-action: manipulation }
:focus-visible { outline: 3px solid #3d7eff; outline-offset: 3px; border-radius: 3px }
img, canvas { position: absolute; width: 100%; height: 100%; border-radius: 3px }
canvas { image-rendering: pixelated; opacity: var(--heat) } i { position: absolute; pointer-events: none }
.cursor { box-shadow: 0 0 0 1px #000, 0 0 0 2px #fff } .query { box-shadow: 0 0 0 2px #fff, 0 0 0 3.5px #000 }
.pinned .query { box-shadow: 0 0 0 2px #000, 0 0 0 4.5px #fff, 0 0 0 6px #000 }
.best { box-shadow: 0 0 0 1px #000, 0 0 0 3px #fff, 0 0 0 4px #000; border-radius: 50% }
footer { position: sticky; bottom: 0; z-index: 1; background: var(--page); border-top: 1px solid var(--line);
         display: flex; flex-wrap: wrap; gap: .7rem 2.2rem; align-items: center; padding: .8rem 0; margin-top: .7rem }
#value { font-size: 1.9rem; min-width: 4.7rem; line-height: 1 }
#where { flex: 1 1 13rem; margin-left: -1.6rem; min-height: 2.9em; white-space: pre; align-content: center }
#scale { flex: 2 1 16rem; max-width: 34rem; font-size: .8rem }
#bar { position: relative; height: 14px; border-radius: 7px; margin-bottom: .3rem; border: 1px solid var(--line) }
#needle { top: -4px; width: 4px; height: 20px; margin: 0 -2px; background: var(--ink); outline: 2px solid var(--page) }
#ticks, label { display: flex; justify-content: space-between; gap: .5rem } input { accent-color: #b52f7f }
</style>
<h1>Patch similarity</h1>
<p>Colour: cosine to the outlined patch. <b>Point</b> at a patch or move with the <b>arrow keys</b>; <b>click</b>,
<b>tap</b> or <b>Enter</b> pins it, <b>Esc</b> lets go. A ring is the best match in another image.</p>
<main id="views"><noscript>This page computes in the browser: it needs JavaScript.</noscript></main><p>NOTE</p>
<footer><span id="value"></span><output id="where"></output>
<div id="scale"><div id="bar"><i id="needle"></i></div><p id="ticks"><a></a><a></a><a></a><a></a><a></a></p></div>
<label>colours <input type="range" max=1 step=.01 value=.6 oninput="views.style.setProperty('--heat', value)"></label>
<label><input id="whole" type="checkbox" oninput="draw()"> scale from \N{MINUS SIGN}1</label>
</footer>
<script type="application/json" id="data">DATA</script><script>
const $ = id => document.getElementById(id)
const make = (tag, properties) => Object.assign(document.createElement(tag), properties)
const { images, d, scale, heat } = JSON.parse($("data").textContent)
let cursor = { image: 0, row: images[0].h >> 1, column: images[0].w >> 1 }, query = cursor, pinned = false, waiting
const same = (a, b) => a.image === b.image && a.row === b.row && a.column === b.column
const index = p => p.row * images[p.image].w + p.column
const digits = x => x.toFixed(2).replace("-", "\N{MINUS SIGN}")
const named = p => `row ${p.row + 1}, column ${p.column + 1} of ${images[p.image].name}`
const palette = Array.from({ length: 256 }, (_, i) => {  // from dark, the least, to bright, 1
  const x = i / 255 * (heat.length - 1), k = Math.min(Math.floor(x), heat.length - 2)
  return [...heat[k].map((low, c) => low + (x - k) * (heat[k + 1][c] - low)), 255]
})
function compare(p) {  // cosines of one patch to all: a list for each image
  const one = images[p.image].codes.subarray(index(p) * d, (index(p) + 1) * d)
  return images.map(({ codes, h, w }) => Float32Array.from({ length: h * w }, (_, i) => {
    let sum = 0
    for (let k = 0, j = i * d; k < d; k++, j++) sum += one[k] * codes[j]
    return Math.max(-1, Math.min(1, sum * scale * scale))
  }))
}
function place(mark, { h, w }, { row, column }, show) {
  Object.assign(mark.style, { display: show ? "" : "none", width: `${100 / w}%`, height: `${100 / h}%`,
    left: `${100 * column / w}%`, top: `${100 * row / h}%` })
}
function draw() {
  if (!pinned) query = cursor
  const cosines = compare(query), value = same(cursor, query) ? 1 : cosines[cursor.image][index(cursor)]
  const low = $("whole").checked ? -1 : Math.min(0.99, ...cosines.map(all => all.reduce((a, b) => Math.min(a, b))))
  const share = x => (x - low) / (1 - low)
  images.forEach((image, i) => {
    const pixels = image.context.createImageData(image.w, image.h), here = i === query.image
    const most = cosines[i].reduce((a, b) => Math.max(a, b)), best = cosines[i].indexOf(most)
    cosines[i].forEach((x, k) => pixels.data.set(palette[Math.round(255 * share(x))], 4 * k))
    image.context.putImageData(pixels, 0, 0)
    place(image.query, image, query, here)
    place(image.cursor, image, cursor, i === cursor.image && !same(cursor, query))
    place(image.best, image, { row: Math.floor(best / image.w), column: best % image.w }, !here)
    image.match.textContent = here ? "" : `best match ${digits(most)}`
  })
  document.body.className = pinned ? "pinned" : ""
  $("value").textContent = digits(value)
  $("where").textContent = named(cursor) + (!pinned ? "" : same(cursor, query) ? " (pinned)" : `\nto ${named(query)}`)
  $("needle").style.left = `${100 * share(value)}%`
  for (const [i, tick] of [...$("ticks").children].entries()) tick.textContent = digits(low + i / 4 * (1 - low))
  waiting = 0
}
function go(event, image, row, column, pin) {  // one frame draws what several events have changed
  const { h, w } = images[image], clamp = (x, n) => Math.max(0, Math.min(n - 1, Math.floor(x)))
  cursor = { image, row: clamp(row, h), column: clamp(column, w) }
  if (pin) [pinned, query] = [!(pinned && same(cursor, query)), cursor]
  $("where").ariaLive = event.type === "keydown" ? "polite" : "off"
  waiting ||= requestAnimationFrame(draw)
}
function point(event, i) {
  const box = images[i].view.getBoundingClientRect(), y = event.clientY - box.top, x = event.clientX - box.left
  go(event, i, y / box.height * images[i].h, x / box.width * images[i].w, event.type === "click")
}
function key(event, i) {
  const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0]
  if (!/^Arrow|^Enter$|^Escape$/.test(event.key) || event.ctrlKey || event.altKey || event.metaKey) return
  event.preventDefault()
  if (event.key === "Escape") pinned = false
  const here = cursor.image === i ? cursor : { row: images[i].h / 2, column: images[i].w / 2 }
  go(event, i, here.row + by[0], here.column + by[1], event.key === "Enter")
}

images.forEach((image, i) => {
  const { name, h, w } = image, ariaLabel = `${name}, ${h} x ${w} patches; arrow keys move, Enter pins`
  const figure = make("figure"), caption = make("figcaption"), canvas = make("canvas", { width: w, height: h })
  image.codes = Int8Array.from(atob(image.codes), c => c.charCodeAt(0))
  image.context = canvas.getContext("2d")
  image.view = make("div", { className: "view", tabIndex: 0, role: "application", ariaLabel, onclick: e => point(e, i),
    onpointermove: e => point(e, i), onkeydown: e => key(e, i) })
  for (const mark of ["best", "cursor", "query"]) image[mark] = make("i", { className: mark })
  image.view.append(make("img", { src: image.photo, alt: "" }), canvas, image.best, image.cursor, image.query)
  caption.append(make("span", { textContent: name, title: name }), image.match = make("span"))
  figure.append(image.view, caption)
  figure.style.setProperty("--aspect", image.aspect)
  $("views").append(figure)
})
$("bar").style.background = `linear-gradient(90deg, ${heat.map(rgb => `rgb(${rgb})`)})`
draw()
</script>"""
