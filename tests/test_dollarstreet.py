"""sets/dollarstreet.py, tasks/dollarstreet.py: a miniature as published; buckets, regions, hits; heads."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_labels import photo, write

import evaluate
from engine.features import load
from engine.images import read_image
from engine.task import SKIPPED
from sets import dollarstreet as sets
from tasks import TASKS

ROWS = [  # income, region, topics
    (30, "af", "toothbrushes"), (89.9, "as", "['toothbrushes', 'stoves']"), (90.1, "am", "stoves"),
    (1807, "eu", "Stoves"), (1809, "eu", "beds"), (20000, "af", "toothbrushes"), (500, "as", "street view")]


@pytest.fixture
def street(tmp_path):
    with (tmp_path / "images_v2.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "country.name", "region.id", "topics", "income", "imageRelPath"])
        for k, (income, region, topics) in enumerate(ROWS):
            write(tmp_path / f"assets/{k}/{k}.jpg", photo(k, (64, 80)))
            table.writerow([k, "Nowhere", region, topics, income, f"assets/{k}/{k}.jpg"])
    (tmp_path / "map.json").write_text(json.dumps(dict(toothbrushes=[3], stoves=[4, 5], beds=[6])))
    SKIPPED.clear()
    return tmp_path


def config(street, **more):
    return TASKS["dollarstreet"].config(data=str(street), **dict(topics=str(street / "map.json")) | more)


@pytest.mark.parametrize("income, name", [(0.5, "low"), (89, "low"), (91, "medium"), (1800, "medium"), (1815, "high"),
                                          (1e6, "high")])
def test_buckets_of_income(income, name):
    assert sets.bucket(income) == name == sets.INCOMES[min(max(math.floor(math.log(income) / 3 + 0.5), 1), 3) - 1]


def test_photos_and_what_is_in_them(street, capsys):
    found = sets.open_street(config(street)).photos
    assert [photo.income for photo in found] == ["low", "low", "medium", "medium", "high", "high"]
    assert [photo.region for photo in found] == ["africa", "asia", "americas", "europe", "europe", "africa"]
    assert [sorted(photo.labels) for photo in found] == [[3], [3, 4, 5], [4, 5], [4, 5], [6], [3]]
    assert "skipped 1 photos of topics that" in capsys.readouterr().out and [*SKIPPED.values()] == [1]


@pytest.mark.parametrize("file, old, new, says", [
    ("images_v2.csv", "region.id", "region", "has no column region.id, or no row; wanted imageRelPath, income"),
    ("images_v2.csv", ",30,", ",-3,", "has income '-3' and region 'af' of assets/0/0.jpg; wanted USD a month"),
    ("images_v2.csv", ",af,", ",xx,", "and region 'xx' of assets/0/0.jpg; wanted USD a month, and af, as, am or eu"),
    ("images_v2.csv", "assets/3/3", "assets/3/4", "assets/3/4.jpg is not there; wanted all that"),
    ("map.json", "{", "", "map.json cannot be read .*; wanted JSON, {topic: .numbers of the classifier's labels"),
    ("map.json", "[3]", "[]", "map.json has a topic without labels"),
    ("map.json", "[3]", "[\"a\"]", "map.json cannot be read")])
def test_mistakes_are_one_line(street, file, old, new, says):
    text = (street / file).read_text()
    assert old in text
    (street / file).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=says) as error:
        sets.open_street(config(street))
    assert "\n" not in str(error.value)


def test_the_list_of_all_photos_is_read_where_parts_of_it_lie_beside(street):
    """As published: beside images_v2.csv two of its parts, for a split of ImageNet's classes"""
    for part in "train", "test":
        (street / f"images_v2_imagenet_{part}.csv").write_text("a")
    assert len(sets.open_street(config(street))) == 6
    (street / "images_v2.csv").rename(street / "mine.csv")
    with pytest.raises(ValueError, match="has 3 csv files; wanted images_v2.csv, or one that lists the photos"):
        sets.open_street(config(street))
    for path in street.glob("images*.csv"):
        path.unlink()
    assert len(sets.open_street(config(street))) == 6


def run(street, head, *more):
    words = f"--task dollarstreet --weights untrained:tiny --data {street} --topics {street}/map.json --head {head}"
    return evaluate.evaluate(evaluate.configure([*words.split(), "--device", "cpu", "--workers", "0", "--resolution",
                                                 "64", *more]))


@pytest.mark.parametrize("own", [True, False])
def test_hits_by_income_and_by_region(street, tmp_path, own):
    """By a head of --task linear, or a released one: five of 40 labels, looked up by hand"""
    if own:
        words = "--task linear --weights untrained:tiny --limit 24 --iterations 2 --device cpu --workers 0 --out"
        evaluate.main([*words.split(), str(tmp_path / "out")])
        head = tmp_path / "out/head.safetensors"
        weight, bias = (load_file(head)[f"linear.{name}"] for name in ("weight", "bias"))
    else:
        head, width = tmp_path / "head.pth", load("untrained:tiny").config.width
        weight, bias = torch.randn(40, 2 * width, generator=torch.Generator().manual_seed(1)), torch.zeros(40)
        torch.save(dict(weight=weight, bias=bias), head)
    found, vit, hits = run(street, head), load("untrained:tiny"), []
    mean, std = (torch.tensor(v)[:, None, None] for v in (vit.config.mean, vit.config.std))
    photos = sets.open_street(config(street)).photos
    for each in photos:
        image = TASKS["dollarstreet"].view(read_image(each.path), 64, 16)[0]
        with torch.no_grad():
            features = vit(((image / 255 - mean) / std)[None])
        scores = torch.cat([features.cls[0], features.patches[0].mean(0)]) @ weight.T + bias
        hits.append(bool(each.labels & set(scores.argsort(descending=True)[:5].tolist())))
    assert 0 < sum(hits) < 6 or own
    assert found["hit_rate"] == pytest.approx(100 * np.mean(hits)) and found["n_val"] == 6
    assert found["income_low"] == pytest.approx(100 * np.mean(hits[:2]))
    assert found["region_europe"] == pytest.approx(100 * np.mean(hits[3:5])) and found["n_region_africa"] == 2


def test_heads_that_do_not_fit(street, tmp_path):
    torch.save(dict(weight=torch.zeros(9, 5), bias=torch.zeros(9)), tmp_path / "a.pth")
    torch.save(dict(weight=torch.zeros(6, 256), bias=torch.zeros(6)), tmp_path / "b.pth")
    for head, says in (("a.pth", "a.pth is no classifier of 256 features, class token and mean patch"),
                       ("b.pth", "map.json has label 6; the classifier of --head has 6, from 0")):
        with pytest.raises(ValueError, match=says):
            run(street, tmp_path / head)
    with pytest.raises(ValueError, match="--head is missing: dollarstreet has nothing to train on"):
        evaluate.configure(f"--task dollarstreet --weights untrained:tiny --data {street}".split())
