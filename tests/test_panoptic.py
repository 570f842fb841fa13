"""tasks/panoptic.py: an oracle has a PQ of 100; one that confuses objects has less; from one end to the other."""

import json

import numpy as np
import pytest
import torch

import evaluate
from decoders.mask2former import Answers
from sets.panoptics import open_panoptic
from tasks import TASKS, panoptic


class Oracle:
    """A head that knows the truth of scenes, in the order in which they come; `merged`: objects of a class as one"""

    def __init__(self, scenes, merged=False):
        self.truths, self.merged = iter([scenes.truth(i) for i in range(len(scenes))]), merged

    def see(self, frozen, images):
        return images

    def __call__(self, images):
        truth = next(self.truths)
        truth = truth // 1000 * 1000 if self.merged else truth
        codes = np.unique(truth)
        logits = torch.eye(14)[torch.from_numpy(codes // 1000)][None] * 20
        near = torch.from_numpy(np.stack([truth == code for code in codes])).float()[None] * 20 - 10
        return Answers((logits,), (near,))


def scored(merged):
    c = TASKS["panoptic"].config(limit=6, resolution=64, seed=3)
    _, val, form = open_panoptic(c)
    frozen, head, counts = type("F", (), dict(c=c)), Oracle(val, merged), 0
    for i in range(len(val)):
        truth = val.truth(i)
        found = panoptic.segments_of(val.image(i), truth.shape, head, frozen, form.stuff)
        counts = counts + panoptic.panoptic_counts(found, truth, 13)
    return panoptic.panoptic_scores(counts, form.stuff), val


def test_an_oracle_and_one_that_merges_objects():
    perfect, val = scored(merged=False)
    assert perfect == pytest.approx(dict(pq=100, sq=100, rq=100, pq_things=100, pq_stuff=100))
    several = [np.unique(val.truth(i)[val.truth(i) > 999] // 1000, return_counts=False) for i in range(len(val))]
    n_objects = [len(np.unique(val.truth(i)[val.truth(i) > 999])) for i in range(len(val))]
    assert sum(n_objects) > sum(map(len, several))  # else nothing could be merged
    assert scored(merged=True)[0]["pq"] < 99


def test_from_one_end_to_the_other(tmp_path, capsys):
    words = ["--task", "panoptic", "--weights", "untrained:tiny", "--limit", 3, "--resolution", 64, "--workers", 0,
             "--device", "cpu"]

    def run(*more):
        evaluate.main([*map(str, words), *map(str, more)])
        return json.loads(capsys.readouterr().out.splitlines()[-1])
    found = run("--iterations", 2, "--out", tmp_path)
    assert (found["n_classes"], found["n_val"]) == (13, 3) and 0 <= found["pq"] <= 100
    again = run("--head", tmp_path / "head.safetensors")
    assert again["pq"] == found["pq"] and (tmp_path / "panoptic.png").is_file()
    planned = run("--plan", "--memory", 24, "--batch", 8)
    assert planned["parameters_of_decoder"] > 7e5 and planned["total_bytes"] < 1e9
    with pytest.raises(ValueError, match="--resolution 48: mask2former wants a multiple of 32"):
        run("--resolution", 48)
