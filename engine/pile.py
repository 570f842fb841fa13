"""
The page of a curation: what was kept and what was not, in numbers and thumbnails; one file, no script, no network.
"""

from html import escape

import numpy as np
import torch

from engine.balance import grouped, kl_to_uniform, sizes_of
from engine.explore import jpeg
from engine.images import resize, shown

SIDE = 96         # pixels of a thumbnail
EACH = 8          # of them in a row
ROWS = 6          # of a section

HEAD = """<!doctype html><html lang=en><meta charset=utf-8><title>TITLE</title>
<meta name=viewport content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark } body { font: .95rem/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem;
padding: 0 1rem } h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin: 2rem 0 .3rem } p { margin: .4rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: .2rem .9rem .2rem 0;
text-align: right } .row { display: flex; flex-wrap: wrap; gap: 3px; margin: .4rem 0; align-items: end }
img { display: block; border-radius: 2px } .kept { outline: 3px solid #2a9d4a; outline-offset: -3px }
small { opacity: .7 }
</style>"""


def page(c, found):
    """
    found    a Curation of curate.py
    returns  ({number of the page: value}, HTML)
    """
    pile, kept = found.pile, set(found.kept.tolist())
    said, out = {}, [HEAD.replace("TITLE", escape(c.out)), f"<h1>{escape(c.out)}</h1>",
                     f"<p>{len(found.kept):,} of {len(pile):,} photos of {escape(str(c.data))}, compared by "
                     f"{escape(c.weights)}. A green frame: in the list."]

    def row(rows, note=""):
        pictures = "".join(thumbnail(pile, int(i), int(i) in kept) for i in rows[:EACH])
        more = f"<small>and {len(rows) - EACH:,} more</small>" if len(rows) > EACH else ""
        out.append(f"<div class=row>{pictures}{more}</div>" + (f"<small>{note}</small>" if note else ""))

    if found.clusters:
        levels = [(each.places, len(each.centroids)) for each in found.clusters]
        chosen = np.isin(found.left, found.clustered).astype(np.int64)
        out.append("<h2>Clusters</h2><p>The Kullback-Leibler divergence of their sizes from equal ones, in nats: 0 = "
                   "all are as large.<table><tr><th>level<th>clusters<th>median size<th>largest<th>KL before<th>KL "
                   "of what was kept")
        after = chosen
        for at, ((places, k), before) in enumerate(zip(levels, sizes_of(levels), strict=True)):
            after = np.bincount(places, after, minlength=k).astype(np.int64)
            numbers = kl_to_uniform(before), kl_to_uniform(after)
            said |= {f"kl_before_{at + 1}": numbers[0], f"kl_after_{at + 1}": numbers[1]}
            out.append(f"<tr><td>{at + 1}<td>{k:,}<td>{int(np.median(before)):,}<td>{before.max():,}"
                       f"<td>{numbers[0]:.3f}<td>{numbers[1]:.3f}")
        out.append("</table>")
        members = grouped(*levels[0])
        order = sorted((rows for rows in members if len(rows)), key=len)
        for title, some in ("Largest clusters", order[::-1][:ROWS]), ("Smallest clusters", order[:ROWS]), (
                "Nothing kept of", [rows for rows in order[::-1] if not chosen[rows].any()][:ROWS]):
            out += [f"<h2>{title}</h2>"] if some else []
            for rows in some:
                near = rows[np.argsort(found.clusters[0].distances[rows], kind="stable")]
                row(found.left[near], f"{len(rows):,} photos, {chosen[rows].sum():,} kept")
    if found.calibration:
        recall = ", ".join(f"{kind} {share:.0%}" for kind, share in found.calibration.recall.items())
        others, wrong = found.calibration.others, found.calibration.wrong
        said |= dict(threshold=found.calibration.threshold, precision=1 - wrong / max(others, 1e-9),
                     recall=float(np.mean([*found.calibration.recall.values()])))
        out.append(f"<h2>Copies</h2><p>Above a cosine of {found.calibration.threshold:.3f} two are copies: of copies "
                   f"that were made of the pile {recall} are found; {others:.1%} of its photos have another one above, "
                   f"of which {wrong / max(others, 1e-9):.0%} are no copies, by estimate.")
    if found.groups:
        out.append(f"<h2>{len(found.groups):,} groups of copies</h2>")
        for rows in sorted(found.groups, key=len, reverse=True)[:ROWS]:
            row(rows, f"{len(rows):,} photos, the first stays")
        said["groups"] = len(found.groups)
    if len(found.tested):
        out.append(f"<h2>{len(found.tested):,} copies of photos to be tested on</h2>")
        row(found.tested)
        said["tested"] = len(found.tested)
    if found.near:
        seeds, rows, cosines = found.near
        out.append(f"<h2>Seeds and what they brought</h2><p>{len(found.retrieved):,} photos, of {len(seeds):,} seeds.")
        for k in np.linspace(0, len(seeds) - 1, min(ROWS, len(seeds))).astype(int):
            out.append(f"<div class=row>{thumbnail(seeds, int(k), False)}<b>&rarr;</b>"
                       + "".join(thumbnail(pile, int(i), True) for i in rows[k][:EACH])
                       + f"<small>cosine {cosines[k][0]:.2f} to {cosines[k][-1]:.2f}</small></div>")
        said["retrieved"] = len(found.retrieved)
    return said, "\n".join(out)


def thumbnail(pile, i, kept, side=SIDE):
    """A picture, its long side so many pixels; what can no longer be read is its name alone"""
    name = escape(pile.name(i))
    try:
        image = pile.load(i)
    except OSError:
        return f"<small>{name}</small>"
    small = shrunk(image, side)
    mark = " class=kept" if kept else ""
    return f'<img{mark} src="{jpeg(shown(torch.as_tensor(small)))}" alt="{name}" title="{name}">'


def shrunk(image, side):
    """C H W -> its long side so many pixels"""
    scale = side / max(image.shape[1:])
    return resize(image, *(max(round(x * scale), 1) for x in image.shape[1:]))
