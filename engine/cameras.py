"""
Cameras: poses as numbers, angles between them, points in the space that they see. NumPy, float64.

    rotation, quaternion   3 3 from w x y z, and back
    encode, decode         poses and fields of view as 9 numbers each, as VGGT's camera head has them
    matrix_of_fov, fov_of  intrinsics 3 3 from fields of view, and back
    unproject              depths -> points
    seen_in_first          where the middles of patches are seen again
    scale_of               the mean distance of all points: what a scene's metres are divided by
    pair_angles            of every two cameras: how far their relative rotation and direction are off
    auc                    area under the curve of pairs that are right, over the threshold

Axes of a camera are right, down, ahead; a pose 4 4 is from camera to world, in metres.
"""

from itertools import combinations

import numpy as np

STILL = 1e-3   # of the scene's scale: two cameras that are nearer than that have no direction
HIDDEN = 0.05  # share of its distance by which something else is nearer, from which on a point is not seen


def rotation(q):
    """Unit quaternion w x y z -> 3 3"""
    w, v = q[0], q[1:]
    cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def quaternion(R):
    """3 3 -> w x y z of unit length, w >= 0: the eigenvector of Bar-Itzhack's matrix, exact for every angle"""
    (a, b, c), (d, e, f), (g, h, i) = R
    K = np.array([[a + e + i, h - f, c - g, d - b], [h - f, a - e - i, b + d, c + g],
                  [c - g, b + d, e - a - i, f + h], [d - b, c + g, f + h, i - a - e]])
    q = np.linalg.eigh(K)[1][:, -1]
    return q if q[0] >= 0 else -q


def encode(poses, fov, scale=1.0):
    """
    poses n 4 4, fov 2 -> n 9: of the way from the first camera's axes to each camera's, x -> R x + t: t / scale,
    quaternion of R; then the field of view across and down, radians

    paper: VGGT, Wang et al. 2025: 9 numbers of each camera; the first camera's axes are the world's
    """
    ways = np.linalg.inv(poses) @ poses[0]
    return np.stack([np.concatenate([way[:3, 3] / scale, quaternion(way[:3, :3]), fov]) for way in ways])


def decode(codes):
    """n 9, the quaternions of any length -> poses n 4 4, camera to the first one's axes;  fov n 2"""
    ways = np.tile(np.eye(4), (len(codes), 1, 1))
    for way, code in zip(ways, codes.astype(float), strict=True):
        way[:3, :3], way[:3, 3] = rotation(code[3:7] / max(np.linalg.norm(code[3:7]), 1e-9)), code[:3]
    return np.linalg.inv(ways), codes[:, 7:].astype(float)


def matrix_of_fov(fov, size):
    """fov 2, across and down; H W -> intrinsics 3 3, for pixels whose middles are at + 0.5"""
    H, W = size
    return np.array([[W / 2 / np.tan(fov[0] / 2), 0, W / 2], [0, H / 2 / np.tan(fov[1] / 2), H / 2], [0, 0, 1]])


def fov_of(intrinsics, size):
    H, W = size
    return 2 * np.arctan([W / 2 / intrinsics[0, 0], H / 2 / intrinsics[1, 1]])


def unproject(z, v, u, intrinsics):
    """Depths h w at rows v and columns u, in pixels -> h w 3 in the camera's metres: right, down, ahead"""
    return np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T * z[..., None]


def points_of(depth, intrinsics, pose):
    """H W, 0 or nan = not known -> n 3 in the world's metres, of the pixels that are known; H W bool: which"""
    v, u = np.mgrid[: depth.shape[0], : depth.shape[1]] + 0.5
    there = depth > 0
    return unproject(depth, v, u, intrinsics)[there] @ pose[:3, :3].T + pose[:3, 3], there


def seen_in_first(depths, intrinsics, poses, grid):
    """
    F H W, 0 = not known; grid h w of patches -> F h w 2 float32: where the first frame sees the middle of each patch of
    each frame, row and column in -1 to 1;  nan: nowhere, or not known
    """
    size = np.array(depths.shape[1:])
    v, u = ((np.arange(n) + 0.5) * (side / n) for n, side in zip(grid, size, strict=True))
    out = np.full((len(depths), *grid, 2), np.nan, np.float32)
    for depth, pose, row in zip(depths, poses, out, strict=True):
        z = depth[np.ix_(v.astype(int), u.astype(int))]
        way = np.linalg.inv(poses[0]) @ pose
        points = unproject(z, *np.meshgrid(v, u, indexing="ij"), intrinsics) @ way[:3, :3].T + way[:3, 3]  # h w 3
        ahead = points[..., 2] > 0  # of a depth that is not known: the place of the camera, which is seen nowhere
        at = (points[ahead] @ intrinsics.T)[:, 1::-1] / points[ahead][:, 2:]                   # n 2, row and column
        inside = ((at >= 0) & (at < size)).all(1)
        ahead[ahead] = inside
        at = at[inside]
        there = depths[0][tuple(at.astype(int).T)]
        seen = np.abs(there - points[ahead][:, 2]) < HIDDEN * there
        ahead[ahead] = seen
        row[ahead] = at[seen] / size * 2 - 1
    return out


def scale_of(depths, intrinsics, poses):
    """Mean distance of all frames' points from the first camera. Raises ValueError if none is known."""
    points = np.concatenate([points_of(d, intrinsics, pose)[0] for d, pose in zip(depths, poses, strict=True)])
    if not len(points):
        raise ValueError(f"no depth of {len(depths)} frames of a scene is known, so that it has no scale; leave it out")
    return float(np.linalg.norm(points - poses[0][:3, 3], axis=1).mean())


def pair_angles(found, truth, scale=1.0):
    """
    poses n 4 4 twice -> of every pair of cameras: error of the relative rotation, in degrees; of the direction in which
    the one sees the other, in degrees: nan where the truth is STILL, 90 where the answer alone is
    """
    out = []
    for i, j in combinations(range(len(truth)), 2):
        (R, t), (R0, t0) = ((way[:3, :3], way[:3, 3]) for way in (np.linalg.inv(x[j]) @ x[i] for x in (found, truth)))
        cosine = (np.trace(R @ R0.T) - 1) / 2
        sine = np.linalg.norm(R - R0) / np.sqrt(8)                                             # of half the angle
        turned = np.degrees(2 * np.arcsin(np.clip(sine, 0, 1)) if cosine > 0 else np.arccos(np.clip(cosine, -1, 1)))
        out.append((turned, direction(t, t0) if np.linalg.norm(t0) > STILL * scale else np.nan))
    return np.array(out).reshape(-1, 2).T


def direction(a, b):
    """Degrees between two vectors; 90 if one of them is 0"""
    return np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b)), a @ b)) if a.any() and b.any() else 90.0


def auc(errors, top):
    """
    Percent: mean over the thresholds 1, 2, ... top degrees of the share of errors below

    paper: Tab. 13 has AUC@30 of what is larger, the error of rotation or direction, and AUC@5, @10; not how they are
           summed up
    """
    return 100 * float(np.mean([(errors < threshold).mean() for threshold in range(1, top + 1)]))
