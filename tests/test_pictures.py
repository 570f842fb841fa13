"""engine/pictures.py: matches in their colours, boxes where they are, rows in one file."""

import numpy as np
import torch
from PIL import Image

from engine import pictures
from engine.explore import HEAT
from tasks import TASKS


def test_lines_are_green_where_right_and_red_where_not():
    grey = torch.full((3, 60, 90), 128, dtype=torch.uint8)
    start, end = torch.tensor([[0.25, 0.5], [0.75, 0.5]]), torch.tensor([[0.25, 0.1], [0.75, 0.9]])
    sheet = pictures.connected(grey, grey, start, end, torch.tensor([True, False]), 200).int()
    assert sheet.shape == (3, 200, 600)
    for row, column, brightest in (50, 150, 1), (50, 330, 1), (150, 150, 0), (150, 570, 0), (50, 240, 1), (150, 360, 0):
        pixel = sheet[:, row, column]
        assert pixel.argmax() == brightest and pixel.max() > 150 > 130 > pixel[1 - brightest]
    assert sheet[:, 100].unique().tolist() == [102]                              # nothing between them; a little darker


def test_apart_takes_the_first_of_those_that_touch():
    points = torch.tensor([[0.5, 0.5], [0.5, 0.51], [0.1, 0.1], [0.9, 0.9], [0.12, 0.1]])
    assert pictures.apart(points, 9) == [0, 2, 3] and pictures.apart(points, 2) == [0, 2]


def test_rows_lie_under_each_other(tmp_path, capsys):
    image, labels = torch.full((3, 8, 12), 7, dtype=torch.uint8), torch.zeros(4, 6, dtype=torch.long)
    row = [image, pictures.hues(labels), pictures.shades(np.ones((8, 8)), 10.0)]
    pictures.save_pictures(TASKS["segmentation"].config(out=str(tmp_path / "new")), [row, row])
    assert "segmentation.png: image, truth, prediction" in capsys.readouterr().out
    with Image.open(tmp_path / "new/segmentation.png") as file:
        assert file.size == (3 * 16, 2 * 12)


def test_a_ruler_says_what_shades_stand_for(tmp_path):
    found = pictures.ruler(8.0, 400)
    assert found.shape == (3, pictures.STRIP, 400)
    for metres in 1.2, 3, 6:  # where no number stands
        shade = pictures.shades(np.full((1, 1), metres), 8.0)[:, 0, 0].int()
        assert (found[:, 0, round(metres / 8 * 400) - 1].int() - shade).abs().max() <= 1
    ends = pictures.shades(np.array([[0, 1e-9, 8, 9]]), 8.0)[:, 0].T.tolist()
    assert ends == [[0, 0, 0], list(HEAT[-1]), list(HEAT[0]), list(HEAT[0])]
    image = torch.zeros(3, 8, 100, dtype=torch.uint8)
    pictures.save_pictures(TASKS["depth"].config(out=str(tmp_path)), [[image, image]], top=8.0)
    with Image.open(tmp_path / "depth.png") as file:
        assert file.size == (208, 12 + pictures.STRIP)
        assert np.array(file)[-pictures.STRIP:, :, 0].tolist() == pictures.ruler(8.0, 208)[0].tolist()


def test_hues_differ_and_what_is_ignored_is_white():
    table = pictures.hues(torch.arange(256)[None])[:, 0].T
    assert len(table.unique(dim=0)) > 200 and table[255].tolist() == [255] * 3


def test_framed_draws_inside_the_box():
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    found = pictures.framed(image, [[5, 4, 15, 14]])
    red = (found[0] == 255).nonzero()
    assert red.min(0).values.tolist() == [4, 5] and red.max(0).values.tolist() == [13, 14]
    assert len(red) == 100 - 36 and image.max() == 0


def test_boxes_with_their_names():
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    boxes, scores, labels = [[10, 20, 50, 50], [0, 0, 5, 5], [60, 5, 85, 55]], [0.9, 0.1, 0.8], [3, 3, 7]
    found = pictures.named(image, boxes, scores, labels, {"3": "dog"})
    colours = [pictures.hues(torch.tensor([[1 + label]]))[:, 0, 0] for label in (3, 7)]
    assert torch.equal(found[:, 49, 11], colours[0]) and torch.equal(found[:, 54, 84], colours[1])
    assert not found[:, :5, :5].any() and not image.any() and not found[:, 45, 20].any()  # not sure; untouched; inside
    assert pictures.named(image, boxes, scores, labels, {}, least=0)[:, :5, :5].any()


def test_points_lie_where_they_are_seen_from():
    """Ahead is up from above, down is down from behind; what is nearer to who looks is in front."""
    points = np.array([[0.0, 0, 2], [1, 0, 2], [0, 1, 2], [0, -1, 2]])
    colours = np.array([[10, 0, 0], [20, 0, 0], [30, 0, 0], [40, 0, 0]], np.uint8)
    view = pictures.cloud(points, colours, np.zeros((1, 3)), pictures.ABOVE, (np.array([0.0, 0, 1]), 2.0), (40, 80))
    red = view[0].int()
    assert red[10, 40] == 40 and red[10, 50] == 20  # of three in one place the highest; a metre to the right
    assert (red == 255).sum() == 40 * 80 - 2 and view[:, 30, 40].tolist() == [255, 0, 0]  # the camera, behind
    front = pictures.cloud(points, colours, np.zeros((0, 3)), np.eye(3), (np.zeros(3), 2.0), (40, 80))[0].int()
    assert [front[20, 40], front[20, 50], front[30, 40], front[10, 40]] == [10, 20, 30, 40]
    for turned in pictures.ABOVE, pictures.ASIDE:
        np.testing.assert_allclose(turned @ turned.T, np.eye(3), atol=1e-4)
        assert np.linalg.det(turned) > 0
    aside = pictures.ASIDE @ np.array([[0.0, 0, 1], [0, 1, 0]]).T
    assert aside[0, 0] > 0 > aside[1, 0] and aside[1, 1] > 0.8  # ahead goes right and up; down goes down


def test_a_cloud_is_that_of_all_frames_in_the_first_ones_axes():
    K = np.array([[40.0, 0, 20], [0, 40, 20], [0, 0, 1]])
    moved = np.eye(4)
    moved[:3, 3] = 1, 0, 0
    depths, images = np.zeros((2, 40, 40)), torch.zeros(2, 3, 40, 40, dtype=torch.uint8)
    depths[:, 19, 19], images[0, 0], images[1, 1] = 4.01, 200, 200
    for first in np.eye(4), np.array([[0, 0, 1, 5], [0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1.0]]):
        window = np.array([0, 0, 2.0]), 4.0
        (above, _), same = pictures.clouds(images, depths, [K, K], [first, first @ moved], window)
        assert same is window
        (row, col), (_, right) = ((above[k] == 200).nonzero()[0].tolist() for k in (0, 1))
        assert (row, col) == (9, 19) and right == 24  # 4 m ahead; 1 m to the right
    _, (middle, half) = pictures.clouds(images, depths, [K, K], [np.eye(4), moved])
    np.testing.assert_allclose(middle, [0.45, -0.05, 4.01], atol=1e-3)
    np.testing.assert_allclose(half, 1.1 * np.linalg.norm([0.55, 0.05, 4.01]), atol=1e-3)  # that of the second camera
