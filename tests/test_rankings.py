"""sets/rankings.py: a pickle that runs nothing, pairs of one stem, Met's lists."""

import builtins
import json
import pickle

import numpy as np
import pytest
from PIL import Image

import evaluate
from sets import rankings
from tasks import TASKS


def test_a_pickle_runs_nothing(tmp_path):
    with (tmp_path / "gnd_roxford5k.pkl").open("wb") as file:
        pickle.dump(dict(gnd=builtins.print), file)
    with pytest.raises(ValueError, match="gnd_.*pkl wants to run builtins.print"):
        evaluate.main(["--task", "retrieval", "--weights", "pixels", "--data", str(tmp_path), "--device", "cpu"])


def test_pairs_have_one_stem(tmp_path):
    for folder, names in ("new", "bca.png"), ("old", "abd.jpg"):
        (tmp_path / folder).mkdir()
        for name in names[:3]:
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / folder / f"{name}{names[3:]}")
    new, old = rankings.amstertime(tmp_path)
    assert [path.name for path in new.paths] == ["a.png", "b.png"] and [path.name for path in old.paths] == [
        "a.jpg", "b.jpg"]


def test_met_knows_who_is_of_no_exhibit(tmp_path):
    c = TASKS["met"].config(data=str(tmp_path), limit=2)
    with pytest.raises(ValueError, match="has no MET_database.json; met wants it, valset.json"):
        rankings.met(c)
    rows = [dict(path="a.jpg", id=3), dict(path="b.jpg", MET_id=None), dict(path="c.jpg", MET_id=5), dict(path="d.jpg")]
    for name in "MET_database", "valset", "testset":
        (tmp_path / f"{name}.json").write_text(json.dumps(rows[:: 1 if name == "valset" else 3]))
    database, val, _ = rankings.met(c)
    assert database[1] == [3, -1] and val[1] == [3, 5] and val[0].paths[1] == tmp_path / "images/c.jpg"


def test_the_control_shuffles():
    c = TASKS["met"].config
    assert rankings.shuffled(range(9), c()) == list(range(9)) != rankings.shuffled(range(9), c(control=True))
    assert sorted(rankings.shuffled(range(9), c(control=True))) == list(range(9))
