"""tasks/discovery.py: an oracle's box is found, noise's is not; the cut against scipy, the object by its component."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import eigh
from scipy.ndimage import label
from test_evaluate import run
from test_labels import write
from test_segmentation import Oracle, Source

from engine.chunks import index, read
from engine.task import SKIPPED
from engine.views import padded
from tasks import TASKS, discovery


def test_oracle_discovers():
    rng, boxes = np.random.default_rng(0), []
    for _ in range(6):
        top, left = rng.integers(0, 9, 2)
        boxes.append(np.array([[left, top, left + 5, top + 7]], float))

    def filled(box):
        (left, top, right, bottom), out = box[0].astype(int), np.zeros((16, 16, 2))
        out[..., 0], out[top:bottom, left:right] = 1, (0, 1)
        return out

    c = TASKS["discovery"].config(resolution=16)
    assert discovery.run(Source(boxes), Oracle(filled), c)["corloc"] == 100
    assert discovery.run(Source(boxes), Oracle(filled, noise=True), c)["corloc"] < 40


@pytest.mark.parametrize("grid", [(5, 6), (1, 2), (9, 12)])
def test_cut_is_scipys_generalised_eigenvector(grid):
    """Correlation at least 1 - 4e-16 measured, if two eigenvalues are not one: 5 of 9 by 12 are."""
    x = torch.randn(*grid, 8, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(x.flatten(0, 1).double(), dim=1)
    for threshold, ours in zip((0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4), discovery.cut_graph(x), strict=True):
        weight = np.where((unit @ unit.T).numpy() > threshold, 1.0, 1e-5)
        degree = np.diag(weight.sum(1))
        exact = eigh(degree - weight, degree, subset_by_index=[1, 1])[1][:, 0]
        assert abs(np.corrcoef(ours.numpy(), exact)[0, 1]) > 1 - 1e-13


@pytest.mark.parametrize("seed", range(4))
def test_main_object_is_the_seeds_component(seed):
    x = np.random.default_rng(seed).normal(size=(7, 9))
    at = np.unravel_index(np.abs(x).argmax(), x.shape)
    inside = x > x.mean()
    parts = label(inside if inside[at] else ~inside)[0]
    np.testing.assert_array_equal(discovery.main_object(torch.tensor(x.ravel()), (7, 9)), parts == parts[at])


@pytest.mark.parametrize("height, corloc", [(14, 100), (15, 0)])
def test_an_overlap_of_a_half_is_enough(height, corloc):
    """The box found is 5 x 7: 35 of 70 are a half, of 75 they are not."""
    def filled(box):
        out = np.zeros((16, 16, 2))
        out[..., 0], out[1:8, 2:7] = 1, (0, 1)
        return out

    c = TASKS["discovery"].config(resolution=16)
    assert discovery.run(Source([np.array([[2.0, 1, 7, 1 + height]])]), Oracle(filled), c)["corloc"] == corloc


HERE = SimpleNamespace(device=torch.device("cpu"))


def test_boxes_are_in_pixels_of_an_image_as_large_as_it_is():
    """An object of 2 by 3 patches, from row 1 and column 2, in 4 by 6 patches of 16 pixels, the last ones padded."""
    m, image = np.zeros((4, 6, 2)), torch.zeros(3, 60, 90)
    m[..., 0], m[1:3, 2:5] = 1, (0, 1)
    source = Source([None])
    source.image = lambda i: image
    (found,) = discovery.boxes_at(0, HERE, [[m]], source, side=0, patch=16)
    assert found.tolist() == [[32, 16, 80, 48]] * 9
    (found,) = discovery.boxes_at(0, HERE, [[m]], source, side=30, patch=8)     # half as large: 8 pixels
    assert found.tolist() == [[32, 16, 80, 48]] * 9
    m[:] = (1, 0)
    m[2:, 4:] = (0, 1)
    (found,) = discovery.boxes_at(0, HERE, [[m]], source, side=0, patch=16)
    assert found.tolist() == [[64, 32, 90, 60]] * 9                                            # what was padded is none


COLOURS = np.array([(20, 20, 200), (200, 40, 20), (20, 200, 20)], np.uint8)


def davis(root):
    """A video of 6 frames, 120 x 210 pixels, in which one of two objects moves."""
    for i in range(6):
        mask = np.zeros((120, 210), np.uint8)
        mask[20:75, 10 + 15 * i : 85 + 15 * i], mask[90:112, 5:40] = 1, 2
        for kind, end in ("JPEGImages", "jpg"), ("Annotations", "png"):
            write(root / f"{kind}/480p/dog/{i:05}.{end}", COLOURS[mask] if end == "jpg" else mask)
    return TASKS["discovery"].config(data=str(root), workers=0)


class Masks:
    """Features that are the masks themselves, one-hot, a patch by its middle pixel."""
    device, view = torch.device("cpu"), partial(padded, side=0, patch=16)

    def maps(self, name, source):
        truths = [np.asarray(Image.open(path)) for _, path in source.paths]
        truths = [np.pad(truth, [(0, -side % 16) for side in truth.shape])[8::16, 8::16] for truth in truths]
        return [[np.eye(3)[truth].astype(np.float16)] for truth in truths]

    def each(self, name, function, n, **about):
        return [function(i, self) for i in range(n)]


def test_oracle_discovers_in_davis(tmp_path):
    """The larger object of each frame is found where features are masks: of such features the cut loses nothing."""
    c = davis(tmp_path)
    found = discovery.run(TASKS["discovery"].open(c), Masks(), c)
    assert found["corloc"] == 100 and found["n_images"] == 6 and found["whole_image_corloc"] == 0


def test_frames_are_seen_as_large_as_they_are(tmp_path, capsys):
    """The whole command: colours tell the masks apart; 120 x 210 pixels are 8 x 14 patches, the last ones padded."""
    c = davis(tmp_path)
    found = run(capsys, "--task", "discovery", "--weights", "pixels", "--data", c.data, "--cache", tmp_path / "cache")
    assert (found["resolution"], found["n_images"], found["skipped"]) == (0, 6, 0) and found["corloc"] > 80
    maps = [read(*place) for path in (tmp_path / "cache").glob("*/*") for place in index(path).values()]
    assert {m.shape for m in maps if m.ndim == 3} == {(8, 14, 48)}


def test_photos_without_an_object_are_counted():
    SKIPPED.clear()
    c, boxes = TASKS["discovery"].config(resolution=16), [np.array([[2.0, 2, 9, 9]]), np.zeros((0, 4))]
    found = discovery.run(Source(boxes), Oracle(lambda box: np.ones((16, 16, 2))), c)
    assert found["n_images"] == 1 and list(SKIPPED.items()) == [("image 1: no object in it is marked", 1)]
    with pytest.raises(ValueError, match="none of 1 images of shapes has a box"):
        discovery.run(Source(boxes[1:]), Oracle(lambda box: np.ones((16, 16, 2))), c)
