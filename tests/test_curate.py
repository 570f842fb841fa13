"""A pile of photos becomes a list: what stays, what goes, and that the same pile gives the same list."""

import csv
import json
import shutil

import numpy as np
import pytest
from forks import start
from PIL import Image

import curate
import shapes
from data import Batches
from engine import kmeans, near
from engine.sources import open_source
from recipes import RECIPES, replace

N = 60
WORDS = ["--weights", "pixels", "--resolution", "16", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 scenes; three of them three times, once as JPEG, once a little lighter; one that is no image"""
    folder = tmp_path_factory.mktemp("pile")
    for i in range(N):
        image = Image.fromarray(shapes.scene(i, 48, 0).image)
        path = folder / shapes.CLASSES[i % 3] / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        if i in (7, 20, 33):
            image.save(folder / f"copy{i}.jpg", quality=60)
            image.point(lambda x: min(x + 4, 255)).save(folder / f"light{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def run(photos, out, *words):
    curate.main([str(photos), *WORDS, "--out", str(out), *words])
    return out.read_text().splitlines()


def test_what_is_kept_is_what_data_reads(photos, tmp_path, capsys):
    names = run(photos, tmp_path / "kept.txt", "--keep", "20", "--levels", "12,4")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(names) == len(set(names)) == 20 == said["kept"]
    assert said["n"] == N + 7 and said["unreadable"] == 1 and said["copies"] == 0
    assert said["kl_after_2"] < said["kl_before_2"] and said["kl_after_1"] < said["kl_before_1"]
    source = open_source(str(tmp_path / "kept.txt"))
    assert len(source) == 20 and source.load(3).shape[0] == 3
    batch = Batches(replace(RECIPES["tiny"], batch=4, group=4, patch_size=16), source, 0, 4)[0]
    assert batch["broken"] == []


def test_names_are_relative_below_the_list(photos, tmp_path):
    pile = tmp_path / "pile"
    shutil.copytree(photos, pile)
    names = run(pile, tmp_path / "kept.txt", "--keep", "9")
    assert all(name.startswith("pile/") for name in names) and len(open_source(str(tmp_path / "kept.txt"))) == 9
    away = run(pile, tmp_path / "elsewhere.txt", "--keep", "9")
    assert names == away
    (tmp_path / "sub").mkdir()
    assert all(name.startswith(str(pile)) for name in run(pile, tmp_path / "sub/kept.txt", "--keep", "9"))


def test_a_pile_in_another_order_is_the_same_pile(photos, tmp_path):
    """as a list, forwards and shuffled; with copies, whose features are equal, too"""
    names = sorted(str(path) for path in photos.rglob("*.*"))
    shutil.copy(photos / "copy7.jpg", tmp_path / "again.jpg")
    names.append(str(tmp_path / "again.jpg"))
    kept = []
    for seed in range(3):
        path = tmp_path / f"{seed}.txt"
        path.write_text("\n".join(np.random.default_rng(seed).permutation(names)))
        kept.append(run(path, tmp_path / f"kept{seed}.csv", "--keep", "25", "--levels", "12,4", "--dedup"))
    assert kept[0] == kept[1] == kept[2]


def test_two_ranks_keep_what_one_keeps(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(kmeans, "ROWS", 256)
    words = ["--keep", "20", "--levels", "12,4", "--dedup"]
    one = run(photos, tmp_path / "one.txt", *words)

    def main(argv):
        curate.main([str(photos), *WORDS, *words, "--out", str(tmp_path / "two.txt")])
    group = start(tmp_path / "run", ranks=2, base=[], main=main)
    assert group.wait()[0] == [0, 0], group.text()[-3000:]
    assert (tmp_path / "two.txt").read_text().splitlines() == one


def test_one_of_each_group_of_copies_stays(photos, tmp_path, capsys):
    names = run(photos, tmp_path / "once.txt", "--dedup", "--threshold", "0.95")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["copies"] == 6 and said["groups"] == 3 and len(names) == N
    for i in (7, 20, 33):
        assert sum(str(i) in name.rpartition("/")[2] and ("copy" in name or "light" in name or f"/{i:03}" in name)
                   for name in names) == 1


def test_the_threshold_is_measured_on_copies_of_the_pile(photos, tmp_path, capsys):
    run(photos, tmp_path / "once.txt", "--dedup")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.5 < said["threshold"] < 1 and 0 < said["recall"] <= 1 and 0.5 < said["precision"] <= 1


def test_what_is_to_be_tested_on_goes_with_all_its_copies(photos, tmp_path, capsys):
    """a chain: the lighter one is near the photo itself alone (0.995), which is near the JPEG (0.991; they: 0.988)"""
    seen = tmp_path / "test"
    seen.mkdir()
    shutil.copy(photos / "copy7.jpg", seen)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(seen / "other.png")
    names = run(photos, tmp_path / "kept.txt", "--against", str(seen), "--threshold", "0.989")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tested"] == 3
    assert len(names) == N + 3 and not any(name.endswith(("/007.png", "copy7.jpg", "light7.png")) for name in names)


def test_seeds_bring_the_nearest(photos, tmp_path, capsys):
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    for i in (3, 11):
        Image.fromarray(shapes.scene(i, 48, 0).image).save(seeds / f"{i}.png")
    names = run(photos, tmp_path / "like.txt", "--like", str(seeds), "--each", "1")
    assert sorted(name[-7:] for name in names) == ["003.png", "011.png"]
    rows = run(photos, tmp_path / "both.csv", "--like", str(seeds), "--each", "2", "--keep", "10")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    table = list(csv.DictReader(rows))
    assert {row["origin"] for row in table} == {"clustered", "retrieved"} and len(table) == said["kept"] <= 14
    assert said["retrieved"] == 4
    assert all(float(row["distance"]) >= 0 and int(row["cluster"]) >= 0 for row in table)
    mixture = json.loads((tmp_path / "both.json").read_text())
    assert [part.get("pure", False) for part in mixture] == [False, False, True] and mixture[2]["share"] == 0.1
    assert mixture[0]["share"] == pytest.approx(10 / 14)
    source = open_source(str(tmp_path / "both.json"))
    assert len(source) == 10 + 4 + 2
    Batches(replace(RECIPES["tiny"], batch=4, group=4, patch_size=16), source, 0, 4)[0]


def test_plan_says_what_it_takes_and_starts_nothing(photos, tmp_path, capsys):
    curate.main([str(photos), "--weights", "untrained:tiny", "--resolution", "16", "--out", str(tmp_path / "kept.txt"),
                 "--keep", "20", "--levels", "12,4", "--dedup", "--plan"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "67 photos, vectors of 128: 1.72e-05 GB on disk, and once in memory, of one rank"
    assert said[1].startswith("clusters 12 (again, of the 2 nearest), 4: ") and "TFLOP at most" in said[1]
    assert said[2].startswith("copies: ") and len(said) == 3 and not [*tmp_path.iterdir()]


def test_parquet(photos, tmp_path):
    pytest.importorskip("pyarrow")
    curate.main([str(photos), *WORDS, "--out", str(tmp_path / "kept.parquet"), "--keep", "9"])
    assert len(open_source(str(tmp_path / "kept.parquet"))) == 9


def test_stages_that_are_kept_are_not_made_again(photos, tmp_path, monkeypatch):
    cache = ["--cache", str(tmp_path / "cache")]
    one = run(photos, tmp_path / "one.txt", "--keep", "20", "--levels", "12,4", *cache)
    for name in "kmeans", "lloyd":
        monkeypatch.setattr(kmeans, name, None)
    monkeypatch.setattr(curate.Frozen, "tokens_of", None)
    assert run(photos, tmp_path / "two.txt", "--keep", "20", "--levels", "12,4", *cache) == one
    fewer = run(photos, tmp_path / "fewer.txt", "--keep", "8", "--levels", "12,4", *cache)
    assert len(fewer) == 8
    with pytest.raises(TypeError):  # another level is not there
        run(photos, tmp_path / "three.txt", "--keep", "20", "--levels", "12,5", *cache)


def test_a_run_that_was_stopped_goes_on_to_the_same_list(photos, tmp_path, monkeypatch):
    """Between levels, and within the features; a list is whole or not there."""
    words = ["--keep", "20", "--levels", "12,4", "--cache", str(tmp_path / "cache")]
    whole = run(photos, tmp_path / "whole.txt", *words[:4])
    real = kmeans.kmeans

    def stop(vectors, k, *rest, **more):
        if k == 4:
            raise KeyboardInterrupt
        return real(vectors, k, *rest, **more)
    monkeypatch.setattr(kmeans, "kmeans", stop)
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "kept.txt", *words)
    assert not (tmp_path / "kept.txt").exists() and len([*(tmp_path / "cache").rglob("*.safetensors")]) >= 3
    monkeypatch.setattr(kmeans, "kmeans", real)
    assert run(photos, tmp_path / "kept.txt", *words) == whole


def test_the_page_shows_and_needs_nothing_else(photos, tmp_path):
    seeds = tmp_path / "<seeds>"
    seeds.mkdir()
    Image.fromarray(shapes.scene(3, 48, 0).image).save(seeds / "3.png")
    run(photos, tmp_path / "kept.txt", "--keep", "20", "--levels", "12,4", "--dedup", "--threshold", "0.95", "--like",
        str(seeds), "--against", str(seeds))
    html = (tmp_path / "kept.html").read_text()
    for title in "Clusters", "Largest clusters", "Smallest clusters", "3 groups of copies", "Seeds and what they":
        assert title in html, title
    assert "http" not in html and "<script" not in html and "<seeds>" not in html and "&lt;seeds&gt;" in html
    assert html.count("<img class=kept") > 5 and html.count("data:image/jpeg;base64,") > 20


@pytest.mark.parametrize("words, message", [
    (["--keep", "1000"], "--keep 1000: .* has 66 photos that can be read; keep fewer"),
    (["--keep", "64", "--dedup", "--threshold", "0.95"], "--keep 64: 60 of 66 photos are left without copies"),
    (["--keep", "9", "--levels", "4,12"], "--levels 4,12: write numbers of clusters that fall"),
    (["--keep", "9", "--levels", "12,12"], "that fall"), (["--keep", "9", "--levels", "70"], "of 66 photos at most"),
    (["--keep", "9", "--levels", "12,x"], "that fall"), (["--keep", "9", "--levels", "12,0"], "that fall"),
    ([], "nothing to choose by"), (["--levels", "4", "--dedup"], "--levels 4: of clusters, which --keep N"),
    (["--keep", "9", "--threshold", "0.5"], "--threshold 0.5: of copies"),
    (["--keep", "9", "--resolution", "17"], "--resolution 17: write whole patches"),
    (["--keep", "9", "--weights", "untrained:huge"], "unknown size 'huge'"),
    (["--keep", "9", "--out", "x.json"], "--out x.json: name a list"), (["--keep", "9", "more"], "'more' is not an"),
    (["--keep", "9", "--like", "/nowhere"], "/nowhere does not exist")])
def test_bad_input_is_one_line(photos, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        curate.main([str(photos), *WORDS, "--out", str(tmp_path / "kept.txt"), *words])
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"]


def test_a_list_that_exists_is_not_replaced_unasked(photos, tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("mine")
    with pytest.raises(ValueError, match="kept.txt exists; name another, or --overwrite"):
        run(photos, path, "--keep", "9")
    assert path.read_text() == "mine"
    assert len(run(photos, path, "--keep", "9", "--overwrite")) == 9


def test_piles_that_are_none(tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "one/a.png")
    with pytest.raises(ValueError, match="has one photo; there is nothing to choose"):
        run(tmp_path / "one", tmp_path / "kept.txt", "--keep", "1")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "one/b.png")
    with pytest.raises(ValueError, match="pixels sees no difference between any two of 2 photos of"):
        run(tmp_path / "one", tmp_path / "kept.txt", "--keep", "1")
    with pytest.raises(ValueError, match="shapes 0 is no file, and a list cannot name it"):
        run("shapes", tmp_path / "kept.txt", "--keep", "1")


def test_features_that_are_not_finite_are_named(photos, tmp_path, monkeypatch):
    real = curate.Frozen.tokens_of

    def broken(self, views):
        cls, patches = real(self, views)
        cls[-1] = np.nan
        return cls, patches
    monkeypatch.setattr(curate.Frozen, "tokens_of", broken)
    with pytest.raises(ValueError, match=r"\.png: pixels says nothing of it that is finite"):
        run(photos, tmp_path / "kept.txt", "--keep", "9")


@pytest.mark.long
def test_planted_copies_are_found(tmp_path, capsys, monkeypatch):
    """200 of 2,000 scenes, each recoloured, cropped or as JPEG"""
    rng, folder = np.random.default_rng(0), tmp_path / "pile"
    folder.mkdir()
    for i in range(2000):
        image = shapes.scene(i, 48, 0).image
        Image.fromarray(image).save(folder / f"{i:05}.png")
        if i < 200:
            kind = ("jpeg", "halved", "recoloured")[i % 3]
            Image.fromarray(near.copies(rng, image)[kind]).save(folder / f"{i:05}_copy.png")
    names = run(folder, tmp_path / "once.txt", "--dedup")
    kept = {name.rpartition("/")[2] for name in names}
    found = sum(not {f"{i:05}.png", f"{i:05}_copy.png"} <= kept for i in range(200))
    assert found == 2200 - len(names) > 100                                               # measured: 128, none wrong
