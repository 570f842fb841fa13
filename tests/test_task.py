"""engine/task.py: a task's config, the paper's number beside its own, and tasks/: what every record must have."""

from dataclasses import replace

import pytest

from decoders import DECODERS
from engine.task import GIVEN, SKIPPED, EvaluateConfig, Option, Paper, Task, by_size, skip
from engine.views import fitted
from tasks import TASKS

TASK = Task("dance", "FILES", None, None, wants="maps", metric="steps",
            options=(Option("lr", 0.5, "peak", shapes=2.0),),
            paper=(Paper("steps", by_size(1.0, None, 3.0), 64, dict(n_val=9)),))


def test_a_config_has_the_common_fields_and_the_tasks_own():
    c = TASK.config(data="PHOTOS", limit=3)
    assert (c.task, c.data, c.limit, c.lr, c.layers) == ("dance", "PHOTOS", 3, 0.5, "")
    assert TASK.config().lr == 2.0 and isinstance(c, EvaluateConfig) and not hasattr(c, "out")
    assert replace(TASK, pictures="a dancer").config().out == ""
    with pytest.raises(TypeError):
        TASK.config(shots=1)
    with pytest.raises(AttributeError):
        c.lr = 1


def test_the_papers_number_stands_beside_what_was_measured_like_it():
    c, found = TASK.config(data="PHOTOS", resolution=64), dict(steps=7.0, n_val=9)
    assert TASK.beside(c, "s", found) == dict(paper_steps=1.0) and TASK.beside(c, "b", found) == dict(paper_steps=3.0)
    for size in "s+", "7b", "tiny", "":
        assert TASK.beside(c, size, found) == {}
    for change in dict(resolution=80), dict(lr=1.0), dict(control=True), dict(limit=2):
        assert TASK.beside(replace(c, **change), "s", found) == {}
    assert TASK.beside(c, "s", dict(steps=7.0, n_val=8)) == TASK.beside(c, "s", dict(rmse=1.0, n_val=9)) == {}


def test_a_protocol_may_want_other_options():
    task = replace(TASK, paper=(Paper("steps", {"s": 4.0}, 64, {}, dict(lr=1.0, layers=GIVEN)),))
    c = task.config(data="PHOTOS", resolution=64)
    assert task.beside(replace(c, lr=1.0, layers="3"), "s", dict(steps=7.0)) == dict(paper_steps=4.0)
    for change in dict(lr=1.0), dict(layers="3"), dict(lr=2.0, layers="3"), {}:
        assert task.beside(replace(c, **change), "s", dict(steps=7.0)) == {}


@pytest.mark.parametrize("name, side, options, number", [
    ("ade20k", 896, dict(decoder="mask2former", head="x"), dict(paper_miou=62.6)),
    ("ade20k", 896, dict(decoder="mask2former", head="x", scales="0.9,0.95,1,1.05,1.1"), dict(paper_miou=63.0)),
    ("ade20k", 896, dict(decoder="mask2former", head="x", scales="1,2"), {}),
    ("ade20k", 896, dict(decoder="mask2former"), {}), ("ade20k", 512, dict(head="x"), {}),
    ("ade20k", 512, {}, dict(paper_miou=55.9)),
    ("coco", 2048, {}, dict(paper_ap=65.6)), ("coco", 1536, dict(head="x"), dict(paper_ap=65.4)),
    ("coco", 2048, dict(head="x", tta="quadratic"), dict(paper_ap=66.1)), ("coco", 1536, dict(tta="quadratic"), {})])
def test_numbers_of_the_large_decoders(name, side, options, number):
    c = TASKS[name].config(data="DATA", resolution=side, **options)
    found = dict(miou=1.0, n_val=2000) if name == "ade20k" else dict(ap=1.0, n_val=5000)
    assert TASKS[name].beside(c, "7b", found) == number


def test_settings_are_those_that_the_metrics_do_not_name():
    c = TASK.config(resolution=64)
    assert TASK.settings(c, dict(lr=3.0)) == dict(resolution=64, batch=64, limit=0, precision="auto", control=False,
                                                  seed=0, layers="")
    assert TASK.settings(c, {})["lr"] == 2.0


def test_out_must_be_writable(tmp_path):
    (tmp_path / "file").touch()
    task = replace(TASK, pictures="a dancer")
    task.check(task.config(out=str(tmp_path / "new/folder")))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="--out .*/file/below: no folder can be written there .Not a directory.; name"):
        task.check(task.config(out=str(tmp_path / "file/below")))


def test_skipped_is_named_and_counted_once(capsys):
    SKIPPED.clear()
    for _ in range(2):
        skip("3 photos; the first: a.jpg", 3)
        skip("unreadable b.jpg")
    assert sum(SKIPPED.values()) == 4 and capsys.readouterr().out.count("skipped 3 photos; the first: a.jpg\n") == 2


def test_a_network_of_the_tasks_own_has_no_blocks_to_choose():
    own = replace(TASK, network=lambda backbone, c: backbone)
    assert hasattr(TASK.config(), "layers") and not hasattr(own.config(), "layers")


@pytest.mark.parametrize("name", TASKS)
def test_records_are_whole(name):
    """What --help prints is there, options are of one type everywhere, views and decoders exist."""
    task = TASKS[name]
    assert task.name == name and task.layout and task.metric and task.wants in ("tokens", "maps")
    assert task.control in ("truth", "patches") and all(isinstance(side, int) and side >= 0 for side in task.sides)
    assert task.sides[1] > 0 or not task.shapes
    assert set(task.decoders) <= DECODERS.keys() and (
        task.view is not fitted or task.wants == "maps" or task.sides[0] == 0)
    kinds = {option.name: type(option.default) for other in TASKS.values() for option in other.all_options()}
    common = EvaluateConfig.__dataclass_fields__
    for option in task.all_options():
        assert option.note and option.name not in common and type(option.default) is kinds[option.name]
        assert option.shapes is None or type(option.shapes) is kinds[option.name]
    assert all(row.values and row.side > 0 for row in task.paper)


def test_the_papers_numbers():
    """Facts of the paper: Tab. 14 for ViT-S and the 7B."""
    wanted = dict(ade20k=(47.0, 55.9), nyu=(0.403, 0.309), davis=(72.7, 79.7), navi=(56.3, 64.4), spair=(50.4, 58.7))
    for name, numbers in wanted.items():
        row, *_ = TASKS[name].paper
        assert (row.values["s"], row.values["7b"]) == numbers
    assert [row.values["l"] for row in TASKS["linear"].paper] == [90.2, 88.1, 74.8]
    assert {name: TASKS[name].paper[0].side for name in ("ade20k", "davis", "navi", "spair")} == dict(
        ade20k=512, davis=960, navi=512, spair=1024)
