"""engine/mixture.py: what a mixture may look like, exact shares, and a run on one: two ranks, killed, resumed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import CONFIG
from test_train import MICRO, rows, torchrun

import train
from data import Batches, loader
from engine.mixture import apportion, read_mixture
from engine.order import Order
from engine.sources import open_source

# --------------------------------------------------------------------------------
# How it is written


@pytest.mark.parametrize("text, parts", [
    ("A*0.7,B*0.3", [("A", 45_875, 0), ("B", 19_661, 0)]),
    ("A*7, B*3", [("A", 45_875, 0), ("B", 19_661, 0)]),
    ("A*0.1!,B*0.7,C*0.3", [("A", 0, 100), ("B", 45_875, 0), ("C", 19_661, 0)]),
    ("A*0.25!,B*0.75!", [("A", 0, 250), ("B", 0, 750)]),
    ("a-{000..012}.tar*1,/b*c/d*1e-3", [("a-{000..012}.tar", 65_471, 0), ("/b*c/d", 65, 0)]),
    ("shapes*1", [("shapes", 65_536, 0)]),
])
def test_words(text, parts):
    assert read_mixture(text) == parts


@pytest.mark.parametrize("text", ["shapes", "a,b", "photos/{0..3}.tar", "list.txt"])
def test_no_mixture(text):
    assert read_mixture(text) is None


def test_what_exists_is_no_mixture(tmp_path):
    (tmp_path / "A*0.7,B*0.3").mkdir()
    assert read_mixture(tmp_path / "A*0.7,B*0.3") is None
    (tmp_path / "wids.json").write_text('{"wids_version": 1}')
    assert read_mixture(tmp_path / "wids.json") is None


def test_json_is_relative_to_its_folder(tmp_path):
    parts = [dict(path="a, b", share=0.1, pure=True), dict(path="/c", share=3), dict(path="shapes", share=1)]
    (tmp_path / "mixture.json").write_text(json.dumps(parts))
    assert read_mixture(tmp_path / "mixture.json") == [(str(tmp_path / "a, b"), 0, 100), ("/c", 49_152, 0),
                                                       ("shapes", 16_384, 0)]


@pytest.mark.parametrize("text, says", [
    ("A*0.7,*0.3", "a part has no path; write A"),
    ("A*0.7,,B*0.3", "'a part' of the mixture has no share; write A"),
    ("A*0.7,B", "'B' of the mixture has no share"),
    ("photos/*.tar", "'photos/[*].tar' of the mixture has no share"),
    ("A*0.7,B*0.3!!", "'B[*]0.3!!' of the mixture has no share"),
    ("A*nan,B*1", "A has the share nan; it must be a number from 0 on"),
    ("A*-1,B*2", "A has the share -1"),
    ("A*0,B*0", r"1000 steps in 1000 of A\*0, B\*0 are mixed, and the shares in them add up to 0; write"),
    ("A*0,B*1", r"the share of A in A\*0, B\*1, 0, is nothing: at least one sample in 65,536, or one step in 1,000"),
    ("A*1e-6,B*1", "the share of A in .*, 1e-06, is nothing"),
    ("A*0.0001!,B*1", "the share of A in .*, 0.0001, is nothing"),
    ("A*0.7!,B*0.5!", r"the pure shares of A\*0.7!, B\*0.5! add up to 1.2; at most 1, all steps"),
    ("A*1!,B*0.5", "0 steps in 1000 of .* are mixed, and the shares in them add up to 0.5"),
    ("A*0.5!", "500 steps in 1000 of .* are mixed, and the shares in them add up to 0"),
    ("[]", "1000 steps in 1000 of .* are mixed"),
    ("[3]", 'no mixture .*; write .{"path": "A", "share": 0.1, "pure": true}, ...]'),
    ('[{"path": "A"}]', "no mixture .KeyError.'share'"),
    ("[", "no mixture"),
])
def test_mistakes_are_one_line(tmp_path, text, says):
    if text.startswith("["):
        (tmp_path / "x.json").write_text(text)
        text = tmp_path / "x.json"
    with pytest.raises(ValueError, match=says) as error:
        read_mixture(text)
    assert "\n" not in str(error.value) and str(error.value).startswith("--data")


def test_a_part_that_is_not_there_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--data: no image in .*empty or below it"):
        open_source(f"shapes*1,{tmp_path}/empty*1", 4)
    with pytest.raises(ValueError, match="--data: .*gone does not exist"):
        open_source(f"shapes*1,{tmp_path}/gone*1", 4)


def test_shares_are_rounded_where_most_is_lost():
    assert apportion([1, 1, 1], 10) == [4, 3, 3] and apportion([0.5, 0.25, 0.25], 1000) == [500, 250, 250]
    rng = np.random.default_rng(0)
    for shares in rng.random((50, 7)):
        found = apportion(shares.tolist(), 65_536)
        assert sum(found) == 65_536 and np.abs(found - shares / shares.sum() * 65_536).max() < 1

# --------------------------------------------------------------------------------
# As a source


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(5):
        pixels = np.full((40, 50, 3), 40 * i, np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"photos/{i}.png")
    return tmp_path / "photos"


def test_parts_stand_one_after_the_other(photos):
    both = open_source(f"{photos}*0.5,shapes*0.5", 3, seed=1)
    assert len(both) == 8 and both.load(4)[0, 0, 0] == 160 and both.load(5).shape == (3, 96, 96)
    assert [both.name(i) for i in (0, 4, 5, 7)] == [f"{photos}/0.png", f"{photos}/4.png", "shapes 0", "shapes 2"]
    with pytest.raises(ValueError, match="a mixture has no labels, asked for .*/0.png; name one of its parts"):
        both.label(0)


def test_its_digest_is_of_parts_and_shares(photos):
    digests = [open_source(text, 3).digest() for text in (
        f"{photos}*0.5,shapes*0.5", f"{photos}*1,shapes*1", f"{photos}*0.5,shapes*0.6", f"shapes*0.5,{photos}*0.5",
        f"{photos}*0.5!,shapes*0.5")]
    assert digests[0] == digests[1] and len(set(digests)) == 4


def test_a_mixture_of_one_is_that_source(photos):
    """The same images in the same order as without the mixture."""
    one, alone = (Order(open_source(text), 3, 4) for text in (f"{photos}*2", str(photos)))
    assert [list(one(step, i)) for step in range(9) for i in range(4)] == [
        list(alone(step, i)) for step in range(9) for i in range(4)]

# --------------------------------------------------------------------------------
# Trained on


def test_two_ranks_are_one_and_any_number_of_workers(photos):
    """Of pure and of mixed steps, each rank draws its samples, each worker its steps."""
    both = open_source(f"{photos}*0.3!,{photos}*0.2,shapes*0.8", 12)
    whole, *halves = (Batches(CONFIG, both, first, n) for first, n in ((0, 8), (0, 4), (4, 4)))
    plain = [whole[step] for step in range(6)]
    sizes = {int((batch["indices"] < 5).sum()) for batch in plain}
    assert 8 in sizes and len(sizes) > 1
    for step, batch in enumerate(plain):
        parts = [half[step] for half in halves]
        assert torch.equal(torch.cat([part["indices"] for part in parts]), batch["indices"])
        crops = [part["global_crops"].unflatten(0, (2, 4)) for part in parts]
        assert torch.equal(torch.cat(crops, 1).flatten(0, 1), batch["global_crops"])
    for a, b in zip(loader(whole, range(2, 6), 2), plain[2:], strict=True):
        assert torch.equal(a["indices"], b["indices"]) and torch.equal(a["local_crops"], b["local_crops"])


def losses(out):
    return [(row["step"], row["loss"]) for row in rows(out)]


def test_left_in_the_middle_of_a_mixture_and_resumed(photos, tmp_path):
    words = [*MICRO, "--data", f"{photos}*0.3!,{photos}*0.2,shapes*0.8", "--steps", "4", "--lr_warmup", "1"]
    assert train.main([*words, "--out", str(tmp_path / "whole")])
    assert not train.main([*words, "--out", str(tmp_path / "parts"), "--stop_after", "2"])
    assert train.main(["--out", str(tmp_path / "parts"), "--resume"])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 4
    with pytest.raises(ValueError, match="shapes[*]0.7 does not hold the images that"):
        train.main(["--out", str(tmp_path / "parts"), "--resume", "--steps", "5", "--data",
                    f"{photos}*0.3!,{photos}*0.2,shapes*0.7"])


def test_folder_and_list_have_the_same_losses(photos, tmp_path):
    listed = photos.parent / "list.csv"
    listed.write_text("path\n" + "".join(f"photos/{name}\n" for name in open_source(photos).paths))
    for out, data in dict(folder=photos, list=listed).items():
        assert train.main([*MICRO, "--steps", "3", "--data", str(data), "--out", str(tmp_path / out)])
    assert losses(tmp_path / "folder") == losses(tmp_path / "list")


@pytest.mark.long
def test_two_processes_have_the_losses_of_one_on_a_mixture(photos, tmp_path):
    words = ["--data", f"{photos}*0.3!,{photos}*0.2,shapes*0.8", "--group", "4", "--koleo_group", "4"]
    train.main([*MICRO, *words, "--out", str(tmp_path / "one")])
    two = torchrun(tmp_path / "two", *words)
    for (step, loss), row in zip(losses(tmp_path / "one"), two, strict=True):
        assert row["loss"] == pytest.approx(loss, abs=5e-5) and row["step"] == step
