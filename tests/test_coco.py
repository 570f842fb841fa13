"""engine/coco.py: known answers, which pycocotools gives too, and pycocotools itself where it is installed."""

import contextlib
import io

import numpy as np
import pytest

from engine.coco import Objects, coco_scores


def objects(boxes, labels=None, crowds=None):
    """left, top, width, height"""
    boxes = np.array(boxes, float).reshape(-1, 4) @ [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1.0]]
    n = len(boxes)
    labels, crowds = (np.zeros(n, int) if labels is None else np.array(labels, int),
                      np.zeros(n, bool) if crowds is None else np.array(crowds, bool))
    return Objects(boxes, labels, crowds, (boxes[:, 2:] - boxes[:, :2]).prod(1))


def detections(boxes, scores, labels=None):
    boxes, labels, *_ = objects(boxes, labels)
    return boxes, np.array(scores, float), labels


FOUND = [detections([[0, 0, 100, 100], [200, 200, 50, 50]], [0.9, 0.8]), detections([[10, 10, 64, 100]], [0.7])]


def test_known_answers():
    truths = [objects([[0, 0, 100, 100]]), objects([[10, 10, 100, 100]])]
    scores = coco_scores(FOUND, truths)
    assert [scores[name] / 100 for name in ("ap", "ap50", "ap75")] == pytest.approx([.6039604, .8349835, .5049505])
    assert scores["ap_small"] is None and scores["ap_medium"] is None
    assert scores["ap_large"] == pytest.approx(65.34653)  # what is wrong in image 1 is not large


def test_a_crowd_is_neither_right_nor_wrong():
    truths = [objects([[0, 0, 100, 100], [150, 150, 150, 150]], crowds=[0, 1]), objects([[10, 10, 100, 100]])]
    scores = coco_scores(FOUND, truths)
    assert [scores[name] / 100 for name in ("ap", "ap50", "ap75")] == pytest.approx([.6534653, 1, .5049505])


def test_nothing_found_and_nothing_there():
    truths = [objects([[0, 0, 100, 100]]), objects([])]
    nothing = [detections([], []), detections([], [])]
    assert coco_scores(nothing, truths)["ap"] == 0
    assert coco_scores(FOUND, [objects([]), objects([])])["ap"] is None
    perfect = [detections([[0, 0, 100, 100]], [0.1]), detections([], [])]
    assert coco_scores(perfect, truths)["ap"] == pytest.approx(100)
    assert coco_scores([perfect[0], detections([[0, 0, 9, 9]], [0.05])], truths)["ap"] == pytest.approx(100)
    assert coco_scores([perfect[0], detections([[0, 0, 9, 9]], [0.2])], truths)["ap"] == pytest.approx(50)


def test_a_hundred_of_a_class_in_an_image_count():
    many = [[200, 200, 5, 5]] * 99
    for n, score in (99, 1 / 100), (100, 0):
        found = [detections([*many[:1] * n, [0, 0, 100, 100]], [0.9] * n + [0.1])]
        assert coco_scores(found, [objects([[0, 0, 100, 100]])])["ap"] == pytest.approx(100 * score)


def random_set(seed):
    rng = np.random.default_rng(seed)
    found, truths = [], []
    for _ in range(12):
        m, size = rng.integers(0, 7), rng.choice([8, 40, 150], (7, 1))
        truth = np.hstack([rng.uniform(0, 300, (7, 2)), size * rng.uniform(0.5, 1.5, (7, 2))])[:m].round(1)
        labels, crowds = rng.integers(0, 4, m), rng.random(m) < 0.15
        near = np.repeat(truth, 3, 0) + np.repeat(truth[:, 2:], 3, 0).repeat(2, 1) * rng.normal(0, 0.06, (3 * m, 4))
        far = np.hstack([rng.uniform(0, 300, (6, 2)), rng.uniform(5, 100, (6, 2))])
        guessed = np.concatenate([np.repeat(labels, 3), rng.integers(0, 5, 6)])
        scores = rng.random(3 * m + 6).round(2)  # with ties
        found.append(detections(np.vstack([near, far]), scores, guessed))
        truths.append(objects(truth, labels, crowds))
    return found, truths


def pycocotools_scores(found, truths):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    def listed(boxes, k):
        low, high = boxes[k, :2], boxes[k, 2:]
        return [*low.tolist(), *(high - low).tolist()]
    notes = [dict(image_id=i, category_id=int(t.labels[k]), bbox=listed(t.boxes, k), area=float(t.areas[k]),
                  iscrowd=int(t.crowds[k])) for i, t in enumerate(truths) for k in range(len(t.labels))]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dict(images=[dict(id=i) for i in range(len(truths))], categories=[dict(id=k) for k in range(5)],
                            annotations=[note | dict(id=k + 1) for k, note in enumerate(notes)])
        coco.createIndex()
        results = coco.loadRes([dict(image_id=i, category_id=int(labels[k]), bbox=listed(boxes, k),
                                     score=float(scores[k]))
                                for i, (boxes, scores, labels) in enumerate(found) for k in range(len(scores))])
        judge = COCOeval(coco, results, "bbox")
        judge.evaluate(), judge.accumulate(), judge.summarize()
    return judge.stats[:6]


SETS = {seed: random_set(seed) for seed in range(6)}
PYCOCOTOOLS = {  # by pycocotools 2.0.11; measured: equal to 1.1e-16
    0: (0.3980274585, 0.6076643656, 0.4387733679, 0.5976910720, 0.1702541133, 0.6572854785),
    1: (0.3887031974, 0.5687976542, 0.4960104111, 0.5632496464, 0.2699901419, 0.5547050330),
    2: (0.3691116010, 0.5959582992, 0.3904371299, 0.5764424538, 0.3118462313, 0.5751384960),
    3: (0.3965645505, 0.6072221893, 0.4357274251, 0.4510371433, 0.4766730169, 0.6430225880),
    4: (0.3913112874, 0.6001194809, 0.4417427559, 0.4751599624, 0.3911640838, 0.5587407230),
    5: (0.4153573903, 0.7110271134, 0.4724256295, 0.4041959541, 0.4203088166, 0.6327557756),
}


@pytest.mark.parametrize("seed", SETS)
def test_random_sets(seed):
    scores = coco_scores(*SETS[seed])
    ours = [-1 if x is None else x / 100 for x in scores.values()]
    assert ours == pytest.approx(PYCOCOTOOLS[seed], abs=1e-10)


@pytest.mark.parametrize("seed", SETS)
def test_pycocotools_says_so(seed):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed; its answers stand in the test above")
    assert pycocotools_scores(*SETS[seed]) == pytest.approx(PYCOCOTOOLS[seed], abs=1e-10)
