"""sets/rankings.py: a pickle that runs nothing, pairs of one stem, Met's lists."""

import builtins
import json
import pickle

import numpy as np
import pytest

import evaluate
from sets import rankings
from tasks import TASKS


def test_a_pickle_runs_nothing(tmp_path):
    with (tmp_path / "gnd_roxford5k.pkl").open("wb") as file:
        pickle.dump(dict(gnd=builtins.print), file)
    with pytest.raises(ValueError, match="gnd_.*pkl cannot be used: ValueError wants to run builtins.print"):
        evaluate.main(["--task", "retrieval", "--weights", "pixels", "--data", str(tmp_path), "--device", "cpu"])


def write_gnd(root, name="gnd_roxford5k.pkl", protocol=2, pickled=None, **changes):
    """Two queries and three images that are there."""
    groups = dict(bbx=[0.0, 0.0, 9.0, 9.0], easy=[0], hard=np.array([1]), junk=np.array([], np.int64))
    truth = dict(qimlist=["q", "r"], imlist=["a", "b", "c"], gnd=[groups, groups]) | changes
    (root / "jpg").mkdir(exist_ok=True)
    for image in "qrabc":
        (root / f"jpg/{image}.jpg").touch()
    (root / name).write_bytes(pickled or pickle.dumps(truth, protocol=protocol))


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_numbers_of_any_protocol(protocol, tmp_path):
    square = np.array([[2, 0], [1, 1]], "i4", order="F")
    groups = dict(easy=square, hard=[np.int64(1)], junk=np.array([1.0, 2.0], ">f8"))
    write_gnd(tmp_path, protocol=protocol, gnd=[groups, groups])
    queries, images, truths = rankings.revisited(tmp_path)
    assert [path.stem for path in queries.paths + images.paths] == list("qrabc")
    assert [[truths[1][name].tolist() for name in ("easy", "hard", "junk")]] == [[[2, 0, 1, 1], [1], [1, 2]]]


class Forged:
    """numpy's own way to build an array of objects from eight bytes, which are taken for an address."""
    def __reduce__(self):
        build = np.zeros(1).__reduce__()
        return *build[:2], (1, (1,), np.dtype("O"), False, b"12345678")


@pytest.mark.parametrize("changes, says", [
    (dict(gnd=[dict(easy=Forged(), hard=[], junk=[])] * 2), "holds an array of 'O8'; it should hold numbers alone"),
    (dict(gnd=[dict(easy=np.array(["x"]), hard=[], junk=[])] * 2), "holds an array of 'U1'"),
    (dict(gnd=[dict(easy=[0], hard=[])] * 2), "KeyError 'junk'; wanted qimlist, imlist, and gnd with easy, hard"),
    (dict(gnd=[dict(easy=[3], hard=[], junk=[])] * 2), "wanted a truth for each query, which names images by their"),
    (dict(gnd=[dict(easy=[0], hard=[], junk=[])]), "has 2 queries, 1 truths and 3 images"),
    (dict(gnd=[dict(easy=[], hard=[], junk=[0])] * 2), "has no easy or hard image of any query"),
    (dict(imlist=["a", "b", "d"]), "gnd_roxford5k.pkl names 1 of 3 files that are not there; the first: .*d.jpg"),
    (dict(pickled=b"no pickle"), "gnd_roxford5k.pkl cannot be used: "),
    (dict(pickled=pickle.dumps(np.zeros(2), 2)[:-9] + b"."), "gnd_roxford5k.pkl cannot be used: ")])
def test_a_forged_pickle_is_refused_before_weights_are_loaded(changes, says, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *words: 1 / 0)
    write_gnd(tmp_path, **changes)
    with pytest.raises(ValueError, match=says) as error:
        evaluate.main(["--task", "retrieval", "--weights", "pixels", "--data", str(tmp_path), "--device", "cpu"])
    assert "\n" not in str(error.value)


def test_two_truths_are_one_too_many(tmp_path):
    for name in "gnd_roxford5k.pkl", "gnd_rparis6k.pkl":
        write_gnd(tmp_path, name)
    with pytest.raises(ValueError, match="has gnd_roxford5k.pkl and gnd_rparis6k.pkl; give each set a folder"):
        rankings.revisited(tmp_path)


def test_pairs_have_one_stem(tmp_path, capsys):
    for folder, names in ("new", "bca.png"), ("old", "abd.jpg"):
        (tmp_path / folder).mkdir()
        for name in names[:3]:
            (tmp_path / folder / f"{name}{names[3:]}").touch()
    new, old = rankings.amstertime(tmp_path)
    assert [path.name for path in new.paths] == ["a.png", "b.png"] and [path.name for path in old.paths] == [
        "a.jpg", "b.jpg"]
    assert capsys.readouterr().out.startswith("skipped 2 images that are in one of new/ and old/ only; the first: ")
    for path in (tmp_path / "new").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="have no two images of one name; wanted AmsterTime's pairs"):
        rankings.amstertime(tmp_path)


@pytest.mark.parametrize("lists", ["", "ground_truth/"])
def test_met_knows_who_is_of_no_exhibit(lists, tmp_path):
    """As it is downloaded, or its lists beside images/; a list that names what is not there is refused."""
    c = TASKS["met"].config(data=str(tmp_path), limit=2)
    with pytest.raises(ValueError, match="has no MET_database.json, nor has its ground_truth/; met wants it, valset"):
        rankings.met(c)
    rows = [dict(path="MET/0/a.jpg", id=3), dict(path="b.jpg", MET_id=None), dict(path="c.jpg", MET_id=5),
            dict(path="d.jpg")]
    (tmp_path / "images/MET/0").mkdir(parents=True)
    (tmp_path / lists).mkdir(exist_ok=True)
    for row in rows:
        (tmp_path / "images" / row["path"]).touch()
    for name in "MET_database", "valset", "testset":
        (tmp_path / f"{lists}{name}.json").write_text(json.dumps(rows[:: 1 if name == "valset" else 3]))
    database, val, _ = rankings.met(c)
    assert database[1] == [3, -1] and val[1] == [3, 5] and val[0].paths[1] == tmp_path / "images/c.jpg"
    (tmp_path / "images/d.jpg").unlink()
    with pytest.raises(ValueError, match="MET_database.json names 1 of 2 files that are not there; the first: .*d.jpg"):
        rankings.met(c)
    (tmp_path / f"{lists}valset.json").write_text("[{}]")
    (tmp_path / "images/d.jpg").touch()
    with pytest.raises(ValueError, match="valset.json cannot be used: KeyError 'path'; wanted a list of objects"):
        rankings.met(c)


def test_the_control_shuffles():
    c = TASKS["met"].config
    assert rankings.shuffled(range(9), c()) == list(range(9)) != rankings.shuffled(range(9), c(control=True))
    assert sorted(rankings.shuffled(range(9), c(control=True))) == list(range(9))
