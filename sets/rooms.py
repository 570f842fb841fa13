"""
Rooms: an endless set of posed frames, generated. A room is a function of its number: boxes with painted faces, seen by
cameras that look about from places near one another; depth and poses are exact by construction.

    Room         len, image(i), depth(i), poses, intrinsics: what a scan on disk has, too
    draw_room    its boxes and cameras
    cast         rays -> how far they go, and which face they meet where

A box has its own axes: right, down, ahead, turned about the vertical. Metres.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

import shapes
from engine.cameras import matrix_of_fov

FRAMES = 5                   # views of a room
AROUND = 0.5, 0.25, 0.5      # metres: cameras stand so far from their middle, at most
TURNS = 18.0, 9.0, 4.0       # degrees: yaw, pitch and roll of a camera, beside the room's, at most
FINE = 2                     # rays a side of a pixel, for colours
SLABS, FURNITURE = 8, 10     # pictures on walls, boxes on the floor
CLEAR = 0.4                  # metres: no box is so near to a camera


class Box(NamedTuple):
    middle: np.ndarray       # 3
    half: np.ndarray         # 3, of its sides
    yaw: float               # radians
    faces: list              # of each axis, low and high: (pattern, two RGB, scale, phase)


class View(NamedTuple):
    boxes: list              # the room itself first, seen from within
    poses: np.ndarray        # n 4 4, camera to world
    fov: np.ndarray          # 2, radians: across, and down


def turn(degrees, axis):
    """3 3, about one of the axes: 0 right, 1 down, 2 ahead"""
    (c, s), out = shapes.turn(np.radians(degrees)), np.eye(3)
    i, j = [k for k in range(3) if k != axis]
    out[[i, j], [i, j]], out[i, j], out[j, i] = c, s if axis == 1 else -s, -s if axis == 1 else s
    return out


def face(rng, bold):
    """The paint of a face: a texture of the background, or the bold structure of a class"""
    patterns = [pattern for *_, pattern in shapes.STRUCTURES] if bold else list(shapes.TEXTURES.values())
    colours = shapes.paint(rng, 0.1 if bold else 0.4, 0.25)[1]
    pattern, shade = patterns[rng.integers(len(patterns))], rng.uniform(0.75, 1)
    return pattern, shade * np.array(colours), rng.uniform(0.8, 1.8), rng.uniform(-4, 4, 2)


def box(rng, middle, half, yaw=0.0, bold=True):
    return Box(np.array(middle, float), np.array(half, float), yaw, [face(rng, bold) for _ in range(6)])


def draw_room(rng, ratio):
    """ratio  of the frames' width to their height"""
    half = rng.uniform((2, 1.25, 2), (3.5, 1.6, 3.5))
    boxes = [box(rng, (0, 0, 0), half, bold=False)]
    for _ in range(SLABS):
        axis, side, thin = int(rng.integers(2)) * 2, rng.choice((-1, 1)), rng.uniform(0.02, 0.1)
        extent, at = rng.uniform(0.3, 0.7, 3), rng.uniform(-0.8, 0.8, 3) * half * (1, 0.5, 1)
        extent[axis], at[axis] = thin, side * (half[axis] - thin)
        boxes.append(box(rng, at, extent))
    for _ in range(FURNITURE):
        extent, at = rng.uniform((0.2, 0.25, 0.2), (0.6, 0.9, 0.6)), rng.uniform(-0.9, 0.9, 3) * half
        at[1] = half[1] - extent[1]
        boxes.append(box(rng, at, extent, rng.uniform(0, 3)))
    middle, yaw, pitch = rng.uniform(-0.4, 0.4, 3) * half, rng.uniform(0, 360), rng.uniform(-12, 12)
    poses = np.tile(np.eye(4), (FRAMES, 1, 1))
    for pose in poses:
        angles = rng.uniform(-1, 1, 3) * TURNS
        pose[:3, :3] = turn(yaw + angles[0], 1) @ turn(pitch + angles[1], 0) @ turn(angles[2], 2)
        pose[:3, 3] = middle + rng.uniform(-1, 1, 3) * AROUND
    clear = [min(np.linalg.norm(poses[:, :3, 3] - each.middle, axis=1)) > np.linalg.norm(each.half) + CLEAR
             for each in boxes[1:]]
    across = rng.uniform(0.9, 1.2)
    fov = np.array([across, 2 * np.arctan(np.tan(across / 2) / ratio)])
    return View(boxes[:1] + [each for each, is_clear in zip(boxes[1:], clear, strict=True) if is_clear], poses, fov)


def cast(boxes, origin, rays):
    """origin 3, rays 3 n -> how many times its length each ray goes n;  face n; place on it 2 n, metres"""
    rays = rays.astype(np.float32)
    n, square = rays.shape[1], (rays * rays).sum(0)
    far, faces, places = np.full(n, np.inf, np.float32), np.zeros(n, int), np.zeros((2, n), np.float32)
    for k, each in enumerate(boxes):
        way = (each.middle - origin).astype(np.float32)
        past = way @ way - (way @ rays) ** 2 / square  # of the middle, squared: how near the ray's line comes
        near = np.flatnonzero(past <= each.half @ each.half) if k else np.arange(n)
        axes, half = turn(np.degrees(each.yaw), 1).astype(np.float32), each.half[:, None].astype(np.float32)
        o, d = -(axes.T @ way)[:, None], axes.T @ rays[:, near]
        d = np.where(np.abs(d) < 1e-9, np.float32(1e-9), d)
        ends = (-half - o) / d, (half - o) / d                                                 # 3 n each
        enter, leave = np.minimum(*ends), np.maximum(*ends)
        t, axis = (enter.max(0), enter.argmax(0)) if k else (leave.min(0), leave.argmin(0))
        hit = np.flatnonzero((t < far[near]) & (t > 0) & (t <= leave.min(0)))
        near, t, axis, at = near[hit], t[hit], axis[hit], o + t[hit] * d[:, hit]
        far[near], faces[near] = t, 6 * k + 2 * axis + (at[axis, np.arange(len(axis))] > 0)
        places[:, near] = np.where(axis == 0, at[2], at[0]), np.where(axis == 1, at[2], at[1])
    return far, faces, places


def colours(boxes, faces, places):
    """3 n in 0 to 1"""
    out = np.empty((3, len(faces)), np.float32)
    for k in np.unique(faces):
        pattern, colour, scale, phase = boxes[k // 6].faces[k % 6]
        here, bold = faces == k, pattern not in shapes.TEXTURES.values()
        mix = pattern(*(places[:, here] * scale + phase[:, None]).astype(np.float32))
        one, two = colour[:, :, None]
        out[:, here] = one + (two - one) * (np.clip(0.5 + 8 * mix, 0, 1) if bold else mix)
    return out


def rays_of(size, fov):
    """3 (H W): through the middles of pixels, of length 1 along the camera's axis"""
    v, u = np.mgrid[: size[0], : size[1]].reshape(2, -1) + 0.5
    return np.linalg.inv(matrix_of_fov(fov, size)) @ np.stack([u, v, np.ones_like(u)])


@lru_cache(maxsize=1024)
def rendered(number, seed, size):
    """The room of that number: its View; image n 3 H W uint8, depth n H W float32 of each frame"""
    (H, W), view = size, draw_room(np.random.default_rng([seed, number]), size[1] / size[0])
    images, depths = [], []
    for pose in view.poses:
        R, origin = pose[:3, :3], pose[:3, 3]
        _, faces, places = cast(view.boxes, origin, R @ rays_of((H * FINE, W * FINE), view.fov))
        picture = colours(view.boxes, faces, places).reshape(3, H, FINE, W, FINE).mean((2, 4))
        images.append(np.clip(255 * picture + 0.5, 0, 255).astype(np.uint8))
        depths.append(cast(view.boxes, origin, R @ rays_of(size, view.fov))[0].reshape(size))
    return view, np.stack(images), np.stack(depths)


class Room:
    """Posed frames of one generated room."""

    def __init__(self, number, seed, size):
        self.key = number, seed, size
        self.intrinsics = matrix_of_fov(rendered(*self.key)[0].fov, size)

        self.names = [f"room {number}, frame {i}" for i in range(FRAMES)]

    poses = property(lambda self: rendered(*self.key)[0].poses)

    def __len__(self):
        return FRAMES

    def image(self, i):
        return torch.from_numpy(rendered(*self.key)[1][i])

    def depth(self, i):
        return rendered(*self.key)[2][i]
