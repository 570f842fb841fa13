"""sets/rooms.py: every point lies on a face, all frames of a room see the same one, and its number says all of it."""

import numpy as np

from engine.cameras import points_of
from sets import rooms
from sets.rooms import FRAMES, Room, cast, draw_room, rendered

SIZE = 24, 32


def off(box, points):
    """How far points n 3 are from a box's surface, metres"""
    axes = rooms.turn(np.degrees(box.yaw), 1)
    beyond = np.abs((points - box.middle) @ axes) - box.half  # n 3; inside it is below 0
    return np.where((beyond <= 0).all(1), -beyond.max(1), np.linalg.norm(beyond.clip(0), axis=1))


def test_every_point_lies_on_a_face():
    for number in range(3):
        room = Room(number, 7, SIZE)
        boxes = rendered(number, 7, SIZE)[0].boxes
        assert len(room) == FRAMES and len(boxes) > 8
        for i in range(len(room)):
            points, there = points_of(room.depth(i), room.intrinsics, room.poses[i])
            assert there.all()
            assert np.min([off(box, points) for box in boxes], 0).max() < 1e-5                 # measured: 1.4e-6
            between = (points + 9 * room.poses[i][:3, 3]) / 10, (points * 9 + room.poses[i][:3, 3]) / 10
            for some in between:  # and nothing hides it: on its way there are no boxes
                beyond = [np.abs((some - box.middle) @ rooms.turn(np.degrees(box.yaw), 1)) - box.half for box in boxes]
                assert (beyond[0] < 0).all() and all((each.max(1) > 0).all() for each in beyond[1:])


def test_a_ray_by_hand():
    """A box of 2 metres stands 4 metres ahead in a room of 20, turned by 45 degrees: its edge is at 4 - sqrt 2."""
    face = [None] * 6
    boxes = [rooms.Box(np.zeros(3), np.full(3, 10.0), 0.0, face),
             rooms.Box(np.array([0, 0, 4.0]), np.ones(3), np.pi / 4, face)]
    rays = np.array([[0.001, 0, 1], [0, 0, -2], [-1, 0, 0], [0, 0.3, 1]]).T
    far, faces, places = cast(boxes, np.zeros(3), rays)
    np.testing.assert_allclose(far, [4 - 2**0.5, 5, 10, 4 - 2**0.5], atol=3e-3)
    assert faces[0] // 6 == 1 and faces[1:3].tolist() == [4, 0]  # low along ahead; low along right
    np.testing.assert_allclose(places[:, 1:3], 0, atol=1e-6)
    assert faces[3] // 6 == 1 and abs(places[1, 3] - 0.3 * (4 - 2**0.5)) < 2e-3


def test_frames_see_one_room():
    """Points of the first frame that another frame sees, too, have there the colours that they have here."""
    differ, shuffled = [], []
    for number in range(4):
        room = Room(number, 7, (48, 64))
        points, _ = points_of(room.depth(0), room.intrinsics, room.poses[0])
        here = room.image(0).numpy().reshape(3, -1)
        for i in range(1, len(room)):
            there = (points - room.poses[i][:3, 3]) @ room.poses[i][:3, :3]
            u, v = (there @ room.intrinsics.T)[:, :2].T / there[:, 2].clip(1e-6)
            seen = (there[:, 2] > 0) & (u >= 0) & (u < 64) & (v >= 0) & (v < 48)
            row, col = v[seen].astype(int), u[seen].astype(int)
            near = np.abs(room.depth(i)[row, col] - there[seen, 2]) < 0.03
            one, two = here[:, seen][:, near].astype(int), room.image(i).numpy()[:, row[near], col[near]].astype(int)
            differ.append(np.abs(one - two).mean())
            shuffled.append(np.abs(one - np.random.default_rng(0).permutation(two, axis=1)).mean())
    assert np.mean(differ) < 0.12 * np.mean(shuffled)                                          # measured: 0.07


def test_a_room_is_its_number():
    first, again, other = (Room(number, seed, SIZE).image(2) for number, seed in ((3, 1), (3, 1), (3, 2)))
    rendered.cache_clear()
    assert (Room(3, 1, SIZE).image(2) == first).all() and (again == first).all() and (other != first).any()
    a, b = (draw_room(np.random.default_rng([1, 3]), 4 / 3) for _ in range(2))
    assert (a.poses == b.poses).all() and len(a.boxes) == len(b.boxes)


def test_cameras_are_apart_and_stand_clear():
    for number in range(20):
        view = draw_room(np.random.default_rng([5, number]), 4 / 3)
        R = view.poses[:, :3, :3]
        np.testing.assert_allclose(R @ R.transpose(0, 2, 1), np.broadcast_to(np.eye(3), R.shape), atol=1e-6)
        at = view.poses[:, :3, 3]
        assert np.linalg.norm(at - at.mean(0), axis=1).min() > 0.01
        assert (np.abs(at) < view.boxes[0].half).all()
        assert min(off(box, at).min() for box in view.boxes[1:]) > 0.4 - 1e-9
