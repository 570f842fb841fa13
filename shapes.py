"""
Shapes: an endless data set in one file. A scene is a function of its index and carries every label we evaluate on.

    scene(index)                  one picture: label, semantic, instances, depth, keypoints, caption
    video(index)                  the same objects in motion: a list of scenes whose instance ids agree
    boxes(index)                  left, top, width, height of each object's visible part, as COCO has them; its class
    python shapes.py sheet.png    a contact sheet: image | semantic | instances | depth, and a strip of video

A class is a silhouette AND a surface structure (stars are dotted, bolts zigzagged), so a part of an object shows its
class as fur does; color, light, place, size, roll, tilt, and the pattern's scale, angle and phase do not. The world is
a pinhole camera, a ground and a wall, in metres; an object is an upright bevelled tile on the ground. Depth, occlusion
and shadows are projected exactly; shadows fall on the ground only. Arrays see only + - * / sqrt, rounding, comparison,
and trigonometry is rounded before use: the same bytes on any platform. Letters: a b on an upright tile, u v on it after
its roll, in radii; s t on the ground unfolded with the wall, in metres; rc rs yc ys: cosine and sine of roll and yaw.
"""

import math
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

FOCAL = 1.2     # focal length in image widths: 45 degrees
AREA = 1.9      # of every silhouette, in squared radii: size must not tell the class
REACH = 1.5     # a silhouette's table spans -REACH..REACH radii
TABLE = 128     # side of every table, a power of two
SLIVER = 20     # pixels: an object that shows fewer has no box
MAX_ROLL = 0.5  # radians; beyond 30 degrees another tooth of the gear would be its top keypoint
PALETTE = dict(red=0xCC2E2B, orange=0xF08524, yellow=0xF5D142, green=0x40994D, teal=0x1F8F94, blue=0x335EC7,
               purple=0x7A42A8, pink=0xF294B2, brown=0x73472B, white=0xF2F0E6, black=0x1F1F29, gray=0x8F9199)


@dataclass(frozen=True)
class Scene:
    image: np.ndarray      # H W 3 uint8
    label: int             # class of the main object: the largest; at most one, small, is nearer
    semantic: np.ndarray   # H W uint8, 0 = background, 1 + class
    instances: np.ndarray  # H W uint8, 0 = background, 1.. from near to far, in a video as they stand in scene()
    depth: np.ndarray      # H W float32, metres along the optical axis
    keypoints: np.ndarray  # n_objects 6 3 float32: x, y in pixels (centres at +0.5), 1 if that pixel shows this object
    caption: str           # what can be seen, the main object first


@dataclass(frozen=True)
class Tile:
    kind: int              # class
    x: float               # metres to the right of the camera
    z: float               # metres ahead of it
    radius: float          # metres
    roll: float            # radians in its plane
    yaw: float             # radians about the vertical: the perspective tilt
    names: tuple           # of its two colors
    colors: tuple          # their RGB: on the pattern, between
    pattern: tuple         # of the structure: angle, scale, two phases


@dataclass(frozen=True)
class World:
    horizon: float         # where the ground would end, as a fraction of the image's height
    height: float          # of the camera, metres
    wall: float            # its depth, metres
    light: tuple           # x and z of the direction to the light, for a rise of 1
    film: tuple            # exposure of red, green, blue; vignette; haze
    surfaces: list         # ground, wall: (texture, two RGB, angle, scale, phases)
    debris: list           # flat clutter: (s, t, edges as (cos, sin, distance), RGB)
    tiles: list            # near to far
    main: int              # index of the main one


# --------------------------------------------------------------------------------
# Silhouettes


def turn(angle):
    """cos and sin, rounded so that the last bit of a maths library cannot show"""
    return round(math.cos(angle), 7), round(math.sin(angle), 7)


def arc(x, y, radii, start, stop):
    """points around (x, y), one for each radius, at equal angles in degrees"""
    turns = [turn(math.radians(start + (stop - start) * i / (len(radii) - 1))) for i in range(len(radii))]
    return [(x + r * c, y + r * s) for r, (c, s) in zip(radii, turns, strict=True)]


def xy(text):
    """ "80,-95 .." in hundredths to points"""
    return [(int(x) / 100, int(y) / 100) for x, y in (point.split(",") for point in text.split())]


PETALS = [0.55 + 0.5 * abs(turn(math.pi * i / 16)[0]) for i in range(81)]
OUTLINES = {  # one contour, or two where the second is a hole, then six keypoints; y up, any scale
    "star": ([arc(0, 0, [1, 0.52] * 5 + [1], 90, 450)], arc(0, 0, [0.8] * 5, 90, 378) + [(0, 0)]),
    "heart": ([[(0, -1.05)] + arc(0.5, 0.35, [0.58] * 25, -40, 149) + arc(-0.5, 0.35, [0.58] * 25, 31, 220)],
              xy("-50,60 50,60 -85,20 85,20 0,30 0,-80")),
    "house": ([xy("-80,-95 80,-95 80,15 110,15 75,44 75,100 42,100 42,71 0,105 -110,15 -80,15")],
              xy("-65,-80 65,-80 85,23 -85,23 0,90 58,85")),
    "arrow": ([xy("-115,-36 5,-36 5,-95 120,0 5,95 5,36 -115,36")], xy("-100,-22 -100,22 15,70 15,-70 95,0 10,0")),
    "bolt": ([xy("20,120 -75,-20 -10,-20 -50,-125 75,35 15,35 85,120")],
             xy("22,105 58,105 -50,-8 2,-10 45,20 -30,-84")),
    "fish": ([[(0.2 + 0.95 * x, 0.66 * y) for x, y in arc(0, 0, [1] * 25, 152, -152)] + xy("-120,-68 -100,0 -120,68")],
             xy("98,0 20,50 20,-50 -50,0 -106,45 -106,-45")),
    "bottle": ([xy("-62,-115 62,-115") + arc(0.24, 0.1, [0.38] * 9, 0, 80) + xy("25,80 36,80 36,115 -36,115 -36,80")
                + xy("-25,80") + arc(-0.24, 0.1, [0.38] * 9, 100, 180)],
               xy("-48,-100 48,-100 45,15 -45,15 0,98 0,-40")),
    "gear": ([arc(0, 0, [1, 1, 1, 0.7, 0.7, 0.7] * 6 + [1], 80, 440), arc(0, 0, [0.3] * 25, 0, 360)],
             arc(0, 0, [0.85] * 6, 90, 390)),
    "flower": ([arc(0, 0, PETALS, 90, 450)], arc(0, 0, [0.85] * 5, 90, 378) + [(0, 0)]),
    "mug": ([xy("-95,-90 40,-90") + arc(0.4, 0, [0.65] * 25, -90, 90) + xy("40,90 -95,90"),
             arc(0.52, 0, [0.32] * 25, -90, 90)], xy("-80,-75 25,-75 25,75 -80,75 94,0 -25,0")),
    "moon": ([arc(0, 0, [1] * 25, 48.7, 311.3) + arc(0.45, 0, [0.78] * 25, 285.6, 74.4)],
             xy("36,85 36,-85 -10,85 -10,-85 -60,45 -60,-45")),
    "cross": ([xy("40,105 40,40 105,40 105,-40 40,-40 40,-105 -40,-105 -40,-40 -105,-40 -105,40 -40,40 -40,105")],
              xy("0,90 90,0 0,-90 -90,0 0,0 30,30")),
}  # fmt: skip
CLASSES = tuple(OUTLINES)


@cache
def outline(kind):
    """(contours, keypoints) of a class, each float64 n 2, centred and scaled to AREA"""
    contours, points = OUTLINES[CLASSES[kind]]
    contours, points = [np.array(c) for c in contours], np.array(points)
    area = [abs((c * np.roll(c[:, ::-1], 1, 0) * (1, -1)).sum()) / 2 for c in contours]
    middle, scale = (contours[0].min(0) + contours[0].max(0)) / 2, math.sqrt(AREA / (area[0] - sum(area[1:])))
    return [np.round((c - middle) * scale, 6) for c in contours], np.round((points - middle) * scale, 6)


@cache
def silhouette_table(kind):
    """signed distance to the outline of a class, in radii, negative inside: TABLE TABLE"""
    x = (np.arange(TABLE) / TABLE * 2 - 1) * REACH
    y, nearest, inside = x[:, None], 9.0, False
    for contour in outline(kind)[0]:
        for (ax, ay), (bx, by) in zip(contour, np.roll(contour, 1, 0), strict=True):
            dx, dy = bx - ax, by - ay
            along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-12), 0, 1)
            nearest = np.minimum(nearest, (x - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2)
            # even-odd rule: does a ray to the right cross this edge?
            inside = inside ^ (((ay > y) != (by > y)) & (x < ax + (y - ay) * dx / (dy or 1)))
    return (np.sqrt(nearest) * np.where(inside, -1, 1)).astype(np.float32)


def bilinear(table, u, v):
    """the table at column u, row v, in cells, wrapping; its side is a power of two"""
    i, j, side = np.floor(u), np.floor(v), len(table)
    u, v, i, j = u - i, v - j, i.astype(np.int32) & (side - 1), j.astype(np.int32) & (side - 1)
    right, j, below = (i + 1) & (side - 1), j * side, ((j + 1) & (side - 1)) * side
    a, b, c, d = (table.take(k) for k in (j + i, j + right, below + i, below + right))
    a += u * (b - a)
    c += u * (d - c)
    return a + v * (c - a)


# --------------------------------------------------------------------------------
# Surfaces: structures of the classes, and textures of the background, which are of other families


@cache
def noise_table():
    """fractal value noise that tiles, in 0..1: TABLE TABLE"""
    rng, total = np.random.default_rng(0), 0
    for n, weight in ((4, 0.4), (8, 0.3), (16, 0.2), (32, 0.1)):
        at = np.arange(TABLE, dtype=np.float32) * (n / TABLE)
        at = np.floor(at) + (at % 1) ** 2 * (3 - 2 * (at % 1))  # smoothstep hides the lattice
        total = total + weight * bilinear(rng.random((n, n), dtype=np.float32), *np.meshgrid(at, at))
    return (total - total.min()) / (total.max() - total.min())


def noise(u, v): return bilinear(noise_table(), u, v)
def tone(cell): return noise_table().take(cell.astype(np.int32) * 1237 % TABLE**2)  # one number for each cell
def fold(x): return np.abs(x - np.rint(x))  # distance to the nearest integer
def chess(parity, *edges): return np.minimum.reduce(edges) * (1 - 2 * (parity % 2))  # cells of alternating sign


def scallops(u, v):
    row = np.floor(v)
    here, above = 2.2 * fold(u + row / 2) ** 2, 2.2 * fold(u + row / 2 + 0.5) ** 2
    return 0.11 - np.minimum(np.abs(v - row - here), np.abs(v - row - 1 - above))


STRUCTURES = (  # in the order of CLASSES: adjective, periods per radius, distance into the pattern in periods
    ("dotted", 2.8, lambda u, v: 0.3 - np.sqrt(fold(u) ** 2 + fold(v) ** 2)),
    ("checked", 3.2, lambda u, v: chess(np.floor(u) + np.floor(v), fold(u), fold(v))),
    ("brick", 6.0, lambda u, v: np.minimum(2 * fold(u / 2 + np.floor(v) / 2), fold(v)) - 0.11),
    ("striped", 2.5, lambda u, v: 0.25 - fold(v)),
    ("zigzag", 4.5, lambda u, v: 0.65 * (0.25 - fold(v + 1.2 * fold(u)))),
    ("scaly", 3.8, scallops),
    ("woven", 1.9, lambda u, v: 0.12 - fold(2 * np.where((np.floor(u) + np.floor(v)) % 2, u, v)) / 2),
    ("pleated", 2.5, lambda u, v: 0.25 - fold(u)),
    ("ringed", 6.0, lambda u, v: 0.25 - fold(4 * np.sqrt(fold(u / 4) ** 2 + fold(v / 4) ** 2))),
    ("ribbed", 6.0, lambda u, v: 0.25 - fold(v)),
    ("stippled", 6.0, lambda u, v: 0.3 - np.sqrt(fold(u) ** 2 + fold(v) ** 2)),
    ("pinstriped", 6.0, lambda u, v: 0.25 - fold(u)),
)
TEXTURES = {  # of s, t to 0..1
    "grainy": lambda s, t: noise(40 * s, 40 * t),
    "cloudy": lambda s, t: noise(7 * s, 10 * t),
    "marbled": lambda s, t: 1 - 2 * fold(1.6 * noise(12 * s, 12 * t) + 0.2 * s),
    "paved": lambda s, t: np.minimum(1, 25 * np.minimum(fold(s), fold(t)))
    * (0.2 + 0.8 * tone(np.floor(s) + 31 * np.floor(t))),
    "planked": lambda s, t: np.minimum(1, 20 * fold(3 * s))
    * (0.2 + 0.5 * tone(np.floor(3 * s)) + 0.3 * noise(60 * s, 4 * t)),
}


# --------------------------------------------------------------------------------
# Layout: everything about a scene but its resolution


def rise(kind, roll):
    """height of a tile's centre above its lowest point, in radii"""
    points, (c, s) = outline(kind)[0][0], turn(roll)
    return -float((points[:, 0] * s + points[:, 1] * c).min())


def paint(rng, mute=0.0, contrast=0.22):
    """two palette colors that differ in luminance: (names, RGBs in 0..1)"""
    while True:
        names = [list(PALETTE)[i] for i in rng.choice(len(PALETTE), 2, replace=False)]
        one, two = ([(PALETTE[n] >> bits & 255) / 255 + rng.uniform(-0.07, 0.07) for bits in (16, 8, 0)] for n in names)
        if abs(sum(w * (a - b) for w, a, b in zip((0.3, 0.6, 0.1), one, two, strict=True))) > contrast:
            return names, [[c * (1 - mute) + 0.5 * mute for c in rgb] for rgb in (one, two)]


def tile(rng, x, z, radius, kind=None):
    """a tile of the class, or of any, painted, seen at x on the image"""
    drawn, roll, yaw = int(rng.integers(len(CLASSES))), rng.uniform(-MAX_ROLL, MAX_ROLL), rng.uniform(-0.4, 0.4)
    kind = drawn if kind is None else kind
    pattern = rng.uniform((-0.15, 0.88, -4, -4), (0.15, 1.12, 4, 4)).tolist()
    return Tile(kind, x * z / FOCAL, z, radius, roll, yaw, *paint(rng, contrast=0.35), pattern)


def scrap(rng, near, wall):
    """a flat polygon of 3 to 5 edges: no class looks like it"""
    t, x, first = rng.uniform((0.5 * near, -0.5, 0), (1.7 * wall, 0.5, 6.3)).tolist()
    n, z = int(rng.integers(3, 6)), min(t, wall)
    edges = [(*turn(first + 6.2832 / n * (i + rng.uniform(-0.3, 0.3))), z * rng.uniform(0.01, 0.09)) for i in range(n)]
    return x * z / FOCAL, t, edges, paint(rng, 0.2, 0)[1][0]


def layout(rng):
    near, horizon, x, y = rng.uniform((2, 0.2, -0.4, 0.2), (3.5, 0.42, 0.4, 0.8)).tolist()
    size = math.sqrt(rng.uniform(0.35, 0.9) / AREA)  # radius of the main object on the image, from the share it covers
    main = tile(rng, x, near, size * near / FOCAL)
    height = near * (y + rise(main.kind, main.roll) * size - horizon) / FOCAL  # puts such a tile on the ground
    wall, tiles = near * rng.uniform(2.4, 4), [main]
    for _ in range(rng.integers(1, 5)):
        z, radius = rng.uniform(1.2, 1.9) * near, main.radius * rng.uniform(0.7, 1.1)
        room = {p: min(abs(p - t.x / t.z * FOCAL) / (radius / z + t.radius / t.z) for t in tiles)
                for p in rng.uniform(-0.5, 0.5, 4).tolist()}  # fmt: skip
        company = main.kind if rng.random() < 0.9 else None  # things of a kind flock together
        tiles.append(tile(rng, max(room, key=room.get), z, radius, company))
    if rng.random() < 0.4:  # a small one before the main object's left or right
        x += rng.choice((-1, 1)) * size * rng.uniform(0.7, 1.1)
        tiles.append(tile(rng, float(x), near * rng.uniform(0.72, 0.85), main.radius * rng.uniform(0.3, 0.38)))
    tiles.sort(key=lambda t: t.z)
    light = rng.uniform(-0.9, 0.9), float(rng.choice((-1, 1, 1)) * rng.uniform(0.6, 1.2))
    exposure = (rng.uniform(0.9, 1.25) * rng.uniform(0.92, 1.08, 3)).tolist()
    film = *exposure, rng.uniform(0, 0.6), rng.uniform(0.1, 0.5)
    surfaces = [(list(TEXTURES)[rng.integers(len(TEXTURES))], paint(rng, 0.6, 0.0)[1], rng.uniform(-3, 3),
                 rng.uniform(1.4, 2.8) / near, rng.uniform(0, 9, 2).tolist()) for _ in range(2)]  # fmt: skip
    debris = [scrap(rng, near, wall) for _ in range(rng.integers(3, 8))]
    return World(horizon, height, wall, light, film, surfaces, debris, tiles, tiles.index(main))


def moved(tile, path, time):
    """the tile elsewhere on its curve on the ground, its roll and yaw swinging"""
    sx, sz, roll, yaw = (turn(3.14159 * (path[i] + time * (1 + 0.5 * path[i + 4])))[1] for i in range(4))
    x, z = tile.x + 0.6 * tile.radius * sx, tile.z * (1 + 0.12 * sz)
    return replace(tile, x=x, z=z, roll=MAX_ROLL * roll, yaw=0.4 * yaw)


# --------------------------------------------------------------------------------
# Rendering


def project(world, tile, points):
    """points n 2 of a tile's silhouette to the image: x and y n, as fractions of its side"""
    (rc, rs), (yc, ys), (u, v) = turn(tile.roll), turn(tile.yaw), points.T
    z, up = tile.z + tile.radius * ys * (u * rc - v * rs), rise(tile.kind, tile.roll) + u * rs + v * rc
    x, y = tile.x + tile.radius * yc * (u * rc - v * rs), world.height - tile.radius * up
    return 0.5 + FOCAL * x / z, world.horizon + FOCAL * y / z


def upright(tile, a, b):
    """(u, v, signed distance to the silhouette in radii) of the points a b of a tile's plane"""
    (c, s), k = turn(tile.roll), TABLE / 2 / REACH
    u, v = a * c + b * s, b * c - a * s
    cells = (np.clip((w + REACH) * k, 0, TABLE - 2) for w in (u, v))
    return u, v, bilinear(silhouette_table(tile.kind), *cells)


def blend(image, color, alpha):
    for channel, value in zip(image, color, strict=True):
        channel += alpha * (value - channel)


def background(world, x, y):
    """image 3 H W and depth H W of the ground and of the wall unfolded from it"""
    size, foot = len(x), world.horizon + FOCAL * world.height / world.wall  # the wall's lower edge on the image
    z = FOCAL * world.height / (np.maximum(y, foot) - world.horizon)
    s, t = (x - 0.5) * z[:, None] / FOCAL, z + np.maximum(foot - y, 0) * world.wall / FOCAL
    image, row = np.empty((3, size, size), np.float32), int((y < foot).sum())
    for part, surface in zip((slice(row, None), slice(0, row)), world.surfaces, strict=True):
        texture, (one, two), angle, scale, phase = surface
        (c, sn), u, v = turn(angle), s[part] * scale, t[part, None] * scale
        mix = TEXTURES[texture](u * c - v * sn + phase[0], u * sn + v * c + phase[1]) - 0.5
        step = z[part, None] * scale / FOCAL / size * (z[part, None] / world.height if part.start else 1)
        mix = 0.5 + mix / (1 + (10 * step) ** 2)  # what a pixel's step cannot resolve turns gray
        for k in range(3):
            image[k, part] = one[k] + (two[k] - one[k]) * mix
    for s0, t0, edges, color in world.debris:
        reach = 2.5 * max(edge[2] for edge in edges)  # generous: corners reach farther than edges
        top, bottom = np.searchsorted(-t, (-t0 - reach, -t0 + reach))
        if top < bottom:
            ends = [np.searchsorted(s[i], (s0 - reach, s0 + reach)) for i in (top, bottom - 1)]
            rows, cols = slice(top, bottom), slice(np.min(ends), np.max(ends))
            ds, dt = s[rows, cols] - s0, (t[rows] - t0)[:, None]
            out = np.maximum.reduce([ds * c + dt * sn - d for c, sn, d in edges])
            blend(image[:, rows, cols], color, np.clip(0.5 - out * FOCAL * size / z[rows, None], 0, 1))
    image[:, row:] *= shadows(world, s[row:], z[row:, None])
    return image, np.repeat(z[:, None], size, 1)


def shadows(world, s, z):
    """the share of light that reaches the ground at s, z"""
    light, (lx, lz) = np.ones_like(s), world.light
    for tile in world.tiles:
        yc, ys = turn(tile.yaw)
        ds, dz = s - tile.x, z - tile.z
        h = (ys * ds - yc * dz) / (lz * yc - lx * ys)  # the ray to the light meets the tile's plane at this height
        a, b = (yc * (ds + h * lx) + ys * (dz + h * lz)) / tile.radius, h / tile.radius - rise(tile.kind, tile.roll)
        near = ((np.abs(a) < REACH) & (np.abs(b) < REACH)).any(1).nonzero()[0]
        if len(near):
            rows = slice(near[0], near[-1] + 1)
            out = upright(tile, a[rows], b[rows])[2]
            light[rows] = np.minimum(light[rows], 1 - 0.55 * np.clip(0.5 - out / 0.15, 0, 1))
    return light


def draw(world, number, image, depth, semantic, instances, x, y):
    """paint one object, in place, where it is nearer than what is there"""
    tile, size = world.tiles[number - 1], len(x)
    edges = (np.array(project(world, tile, outline(tile.kind)[0][0])) * size).clip(-2, size + 2)
    (left, top), (right, bottom) = edges.min(1).astype(int) - 1, edges.max(1).astype(int) + 2
    rows, cols = slice(max(top, 0), max(bottom, 0)), slice(max(left, 0), max(right, 0))
    if min(depth[rows, cols].shape) < 2:
        return
    (yc, ys), (lx, _), px = turn(tile.yaw), world.light, (x[cols] - 0.5) / FOCAL
    a = (px * tile.z - tile.x) / (yc - px * ys) / tile.radius  # where the pixel's ray meets the tile's plane
    z = tile.z + tile.radius * ys * a
    b = (world.height - (y[rows, None] - world.horizon) / FOCAL * z) / tile.radius - rise(tile.kind, tile.roll)
    (u, v, out), pixel = upright(tile, a, b), tile.z / (FOCAL * size * tile.radius)
    (_, periods, structure), (angle, scale, *phase) = STRUCTURES[tile.kind], tile.pattern
    (c, s), scale = turn(angle), periods * scale
    ink = structure((u * c - v * s) * scale + phase[0], (u * s + v * c) * scale + phase[1])
    ink = np.clip(0.5 + ink / (scale * pixel), 0, 1)
    down, right = np.gradient(out)
    slope = np.clip(1 + out / 0.14, 0, 1) * (right * lx - down) / pixel  # of the bevel, towards the light
    shade, shine = 0.95 + 0.1 * (a * lx + b) + 0.3 * np.clip(slope, -1.2, 1.2), 0.35 * np.clip(slope - 0.5, 0, 1)
    front = z < depth[rows, cols]
    one, two = tile.colors
    blend(image[:, rows, cols], [(q + (p - q) * ink) * shade + shine for p, q in zip(one, two, strict=True)],
          front * np.clip(0.5 - out / pixel, 0, 1))
    solid = front & (out < 0)
    semantic[rows, cols][solid], instances[rows, cols][solid] = tile.kind + 1, number
    np.copyto(depth[rows, cols], z, where=solid)


def render(world, size):
    x = y = ((np.arange(size) + 0.5) / size).astype(np.float32)
    (image, depth), (semantic, instances) = background(world, x, y), np.zeros((2, size, size), np.uint8)
    for i in sorted(range(len(world.tiles)), key=lambda i: -world.tiles[i].z):
        draw(world, i + 1, image, depth, semantic, instances, x, y)
    *exposure, vignette, haze = world.film
    haze, corners = 0.5 * haze / world.wall * depth, 1 - vignette * ((x - 0.5) ** 2 + (y[:, None] - 0.5) ** 2)
    image += haze * (0.6 - image)
    image *= np.array(exposure, np.float32)[:, None, None] * (255 * corners)
    image = np.clip(image + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()
    keypoints = np.ones((len(world.tiles), 6, 3), np.float32)
    for i, tile in enumerate(world.tiles):
        keypoints[i, :, :2] = np.stack(project(world, tile, outline(tile.kind)[1]), 1) * size
        col, row = np.floor(keypoints[i, :, :2]).astype(int).T
        inside = (np.minimum(col, row) >= 0) & (np.maximum(col, row) < size)
        keypoints[i, :, 2] = inside & (instances[row * inside, col * inside] == i + 1)
    return Scene(image, world.tiles[world.main].kind, semantic, instances, depth, keypoints, caption(world, instances))


def article(words): return ("an " if words[0] in "aeiou" else "a ") + words


def caption(world, instances):
    """such as "a red and white dotted star in front of two striped arrows on paved ground before a cloudy wall" """
    seen = np.bincount(instances.ravel(), minlength=len(world.tiles) + 1)[1:] > instances.size // 500
    main, text = world.tiles[world.main], ""
    for where, ids in ((" in front of ", range(world.main + 1, len(seen))), (" behind ", range(world.main))):
        names = []
        for kind, n in Counter(world.tiles[i].kind for i in ids if seen[i]).items():
            name = f"{STRUCTURES[kind][0]} {CLASSES[kind]}"
            plural = name + ("es" if name[-1] in "hs" else "s")
            names.append(article(name) if n == 1 else f"{('two', 'three', 'four')[n - 2]} {plural}")
        text += where * bool(names) + " and ".join(names)
    name = article(f"{main.names[0]} and {main.names[1]} {STRUCTURES[main.kind][0]} {CLASSES[main.kind]}")
    return f"{name}{text} on {world.surfaces[0][0]} ground before {article(world.surfaces[1][0])} wall"


# --------------------------------------------------------------------------------
# The data set


def world_of(who, index, size, seed):
    for name, value, least in (("size", size, 16), ("index", index, 0), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{who}: {name} is {value}; it must be at least {least}")
    return layout(np.random.default_rng([seed, index]))


def scene(index, size=96, seed=0):
    """the picture number index, size x size; size sets its resolution and nothing else"""
    return render(world_of("scene", index, size, seed), size)


def boxes_of(scene):
    """
    boxes n 4: left, top, width, height in pixels; labels n: classes; areas n: visible pixels; of objects that show at
    least SLIVER pixels, and how many others show some
    """
    found, slivers = [], 0
    for k in np.unique(scene.instances[scene.instances > 0]):
        rows, cols = np.nonzero(scene.instances == k)
        if len(rows) < SLIVER:
            slivers += 1
            continue
        left, top = cols.min(), rows.min()
        found.append([left, top, cols.max() + 1 - left, rows.max() + 1 - top, scene.semantic[rows[0], cols[0]] - 1,
                      len(rows)])
    found = np.array(found, float).reshape(-1, 6)
    return found[:, :4], found[:, 4].astype(int), found[:, 5], slivers


def boxes(index, size=96, seed=0):
    """boxes_of the picture number index"""
    return boxes_of(scene(index, size, seed))


def video(index, n_frames=8, size=96, seed=0):
    """the objects of scene(index), each on a curve of its own; frame k is the same for every n_frames"""
    if n_frames < 1:
        raise ValueError(f"video: n_frames is {n_frames}; it must be at least 1")
    world = world_of("video", index, size, seed)
    paths = np.random.default_rng([seed, index, 1]).uniform(-1, 1, (len(world.tiles), 8)).tolist()
    frames = ([moved(*pair, k / 8) for pair in zip(world.tiles, paths, strict=True)] for k in range(n_frames))
    return [render(replace(world, tiles=tiles), size) for tiles in frames]


def main(path="shapes.png", rows=6, size=160):
    if path in ("-h", "--help"):
        return print(__doc__.strip())
    hues = np.array([0, *PALETTE.values()] + [0xFFFFFF] * 243)[:, None] >> (16, 8, 0) & 255
    sheet = Image.new("RGB", (8 * size, (rows + 1) * (size + 14)), "white")
    for i in range(2 * rows):
        one, left, top = scene(i, size), i % 2 * 4 * size, i // 2 * (size + 14)
        near = np.repeat(255 * one.depth.min() / one.depth[..., None], 3, 2)
        parts = np.concatenate([one.image, hues[one.semantic], hues[one.instances], near], 1).astype(np.uint8)
        sheet.paste(Image.fromarray(parts), (left, top))
        ImageDraw.Draw(sheet).text((left + 3, top + size + 1), one.caption[:100], "black")
    strip = np.concatenate([frame.image for frame in video(0, 8, size)], 1)
    sheet.paste(Image.fromarray(strip), (0, rows * (size + 14)))
    sheet.save(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
