"""data.py stats: sets whose numbers are known by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from engine import stats
from engine.sources import Folder, open_source
from recipes import RECIPES


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache / "nanodino"


def save(path, width, height, colour, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path, **options)


@pytest.fixture
def photos(tmp_path):
    """Two classes: a dark one and its two copies, a bright one; one turned, one grey; three that cannot be read."""
    root = tmp_path / "photos"
    save(root / "a/dark.png", 10, 10, (0, 51, 0))
    for copy in "a/same.png", "b/same.png":
        (root / copy).parent.mkdir(exist_ok=True)
        (root / copy).write_bytes((root / "a/dark.png").read_bytes())
    save(root / "b/bright.png", 40, 20, (255, 51, 0))
    turned = Image.Exif()
    turned[0x0112] = 6
    save(root / "b/turned.png", 30, 120, (255, 51, 102), exif=turned)
    Image.new("L", (200, 100), 0).save(root / "b/grey.bmp")
    (root / "a/empty.jpg").touch()
    (root / "a/text.jpg").write_text("no picture")
    (root / "b/short.png").write_bytes((root / "b/bright.png").read_bytes()[:60])
    return root


def measured(source, tmp_path, workers=0):
    return list(stats.collect(source, range(len(source)), tmp_path / "memory.jsonl", workers))


def summary(root, tmp_path, size="tiny", **options):
    source = open_source(root, 20)
    return stats.summarize(measured(source, tmp_path, **options), source, RECIPES[size])


def run(capsys, *words):
    """The lines that `data.py stats` prints, and its last one as an object."""
    data.main(["stats", *map(str, words), "--workers", "0"])
    lines = capsys.readouterr().out.splitlines()
    return lines[:-1], json.loads(lines[-1])

# --------------------------------------------------------------------------------
# Known by hand


def test_a_set_known_by_hand(photos, tmp_path):
    found = summary(photos, tmp_path)
    assert (found["images"], found["unreadable"], found["of"]) == (6, 3, 9)
    assert found["mean"] == pytest.approx([2 / 6, 5 * 0.2 / 6, 0.4 / 6], abs=1e-15)  # an image counts once
    var = 2 / 6 - 4 / 36, 5 * 0.04 / 6 - (1 / 6) ** 2, 0.16 / 6 - (0.4 / 6) ** 2
    assert found["std"] == pytest.approx(np.sqrt(var).tolist(), abs=1e-15)
    # upright: 10x10 three times, 40x20, 120x30, 200x100
    assert list(found["width"].values()) == [10, 10, 10, 10, 120, 200, 200]
    assert list(found["height"].values()) == [10, 10, 10, 10, 30, 100, 100]
    assert found["short_side"] == found["height"] and found["ratio"]["100"] == 4.0
    assert found["formats"] == dict(PNG=5, BMP=1) and found["modes"] == dict(RGB=5, L=1) and found["turned"] == 1
    assert found["classes"] == dict(a=2, b=4)
    assert found["bytes"] == sum(path.stat().st_size for path in photos.rglob("*.*")
                                 if path.name not in ("empty.jpg", "text.jpg", "short.png"))
    assert found["duplicates"] == 2
    assert found["duplicate_names"] == [[str(photos / each) for each in ("a/dark.png", "a/same.png", "b/same.png")]]
    assert [name.partition(":")[0] for name in found["unreadable_names"]] == [
        str(photos / each) for each in ("a/empty.jpg", "a/text.jpg", "b/short.png")]


def test_mean_and_std_are_those_of_numpy(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(5, 24, 18, 3), dtype=np.uint8)
    for i, each in enumerate(pixels):
        Image.fromarray(each).save(tmp_path / f"{i}.png")
    found = summary(tmp_path, tmp_path)
    x = pixels.reshape(-1, 3) / 255
    assert np.abs(found["mean"] - x.mean(0)).max() < 1e-14  # measured: 3e-16
    assert np.abs(found["std"] - x.std(0)).max() < 1e-14    # measured: 3e-16


def test_other_levels_are_shares_of_the_brightest():
    class Source(Folder):
        def __init__(self, image):
            self.image = image

        def load(self, i):
            return self.image

        def label(self, i):
            raise ValueError("none")

        raw = property()  # as of a source without files

    for image in torch.full((2, 4, 5), 65535 // 5, dtype=torch.uint16), torch.full((2, 4, 5), 0.2):
        found = stats.measure(Source(image), 0)
        assert found["sum"] == pytest.approx([4.0, 4.0]) and found["square"] == pytest.approx([0.8, 0.8])
        assert "label" not in found and "bytes" not in found


def test_generated_images_have_no_files(tmp_path):
    found = summary("shapes", tmp_path)
    assert found["images"] == 20 and sum(found["classes"].values()) == 20 and len(found["classes"]) == 12
    assert set(found["width"].values()) == {96} and "bytes" not in found and "duplicates" not in found


class Both:
    """Two sources as a mixture has them: of its parts one has files."""

    def __init__(self, *sources):
        self.sources = sources

    def at(self, i):
        n = len(self.sources[0])
        return (self.sources[0], i) if i < n else (self.sources[1], i - n)

    def __len__(self):
        return sum(map(len, self.sources))

    def load(self, i):
        source, row = self.at(i)
        return source.load(row)

    def name(self, i):
        source, row = self.at(i)
        return source.name(row)

    def label(self, i):
        raise ValueError("a mixture has none")


def test_of_a_mixture_those_with_files_are_counted(photos, tmp_path):
    source, alone = Both(open_source("shapes", 3), Folder(photos)), summary(photos, tmp_path)
    found = stats.summarize(measured(source, tmp_path), source, RECIPES["tiny"])
    assert found["images"] == 9 and "classes" not in found
    for name in "bytes", "formats", "modes", "turned", "duplicates", "duplicate_names", "unreadable_names":
        assert found[name] == alone[name]


def test_workers_find_the_same(photos, tmp_path):
    assert summary(photos, tmp_path, workers=2) == summary(photos, tmp_path)


def test_many_images_are_taken_by_parts():
    line = dict(width=4, height=2, sum=[8.0], square=[8.0])
    good, errors = stats.columns([dict(i=i) | (line if i % 3 else dict(error=f"{i}: why")) for i in range(25_000)])
    assert len(errors) == 8334 and errors[1] == "3: why"
    assert good["i"].tolist() == [i for i in range(25_000) if i % 3] and (good["width"] == 4).all()
    assert good["sum"].shape == (16_666, 1) and (good["bytes"] == -1).all()
    assert stats.columns([dict(i=0, error="why")] * 10_001)[0] == {}


def test_a_set_of_which_nothing_can_be_read(tmp_path):
    (tmp_path / "only.jpg").touch()
    with pytest.raises(ValueError, match=r"^--data: none of 1 images can be read; the first: .*only\.jpg"):
        summary(tmp_path, tmp_path)

# --------------------------------------------------------------------------------
# Crops


def crops_of(c, width=100, height=100):
    return [(crop["kind"], crop["side"]) for crop in stats.enlarged(np.array([width]), np.array([height]), c)]


def test_crops_of_recipes():
    assert [side for _, side in crops_of(RECIPES["tiny"])] == [96, 48]
    assert crops_of(RECIPES["7b"]) == [("global", 256), ("local", 112)]
    _, c = stats.read_line(["shapes", "--stage", "highres", "--size", "s"], stats.StatsConfig())
    assert crops_of(c) == [("global", 768), ("local", 336), ("gram", 1152)]
    _, c = stats.read_line(["shapes", "--n_local", "0"], stats.StatsConfig())
    assert crops_of(c) == [("global", 96)]


def test_how_many_crops_are_enlarged():
    """Areas of a square are drawn evenly from a third to all: of 96 to 48 px, those below half are too small."""
    c = replace(RECIPES["tiny"], global_scale=(0.2, 1.0), local_scale=(0.05, 0.2), ratio=(1.0, 1.0))
    sides = np.full(1500, 124)                                    # 0.6 of its area is 96 px
    found = {crop["kind"]: crop for crop in stats.enlarged(sides, sides, c)}
    assert found["global"]["enlarged"] == pytest.approx(0.5, abs=0.03)  # measured: 0.500; sigma 0.009
    share = (47.5**2 / 124**2 - 0.05) / 0.15                      # 0.645: sides are rounded
    assert found["local"]["enlarged"] == pytest.approx(share, abs=0.02)       # measured: 0.641; sigma 0.005
    assert found["global"]["smaller"] == 0
    width, height = np.array([95, 96, 10_000]), np.array([200, 200, 47])
    assert [crop["smaller"] for crop in stats.enlarged(width, height, c)] == [2, 1]
    assert stats.enlarged(np.array([48]), np.array([48]), c)[0]["enlarged"] == 1

# --------------------------------------------------------------------------------
# Interrupted calls


class Stops(Folder):
    """A folder that is interrupted once, at its 40th image."""

    def __init__(self, root, at=40):
        super().__init__(root)
        self.at, self.loaded = at, []

    def load(self, i):
        if i == self.at:
            self.at = None
            raise KeyboardInterrupt
        self.loaded.append(i)
        return super().load(i)


def test_an_interrupted_call_is_gone_on_with(tmp_path, capsys):
    for i in range(50):
        save(tmp_path / f"photos/{i:02}.png", 4, 4, (i, i, i))
    source, memory = Stops(tmp_path / "photos"), tmp_path / "cache/memory.jsonl"
    with pytest.raises(KeyboardInterrupt):
        stats.collect(source, range(50), memory)
    assert "stopped after 32 of 50 images" in capsys.readouterr().out
    assert len(memory.read_text().splitlines()) == 32
    with open(memory, "a") as file:
        file.write('{"i": 32, "wid')  # as a kill leaves it
    source.loaded.clear()
    found = list(stats.collect(source, range(50), memory))
    assert source.loaded == list(range(32, 50)) and "going on after 32 of 50" in capsys.readouterr().out
    assert found == measured(Folder(tmp_path / "photos"), tmp_path)
    assert not memory.exists(), "a whole call leaves nothing: the images may change"


def test_rows_of_another_sample_are_left_out(tmp_path):
    for i in range(4):
        save(tmp_path / f"photos/{i}.png", 4, 4, (i, i, i))
    source, memory = Folder(tmp_path / "photos"), tmp_path / "memory.jsonl"
    memory.write_text('3\n{"i": 9}\n')
    assert [found["i"] for found in stats.collect(source, [1, 3], memory)] == [1, 3]


def test_a_cache_that_cannot_be_written_is_gone_without(photos, tmp_path):
    (tmp_path / "file").touch()
    source = Folder(photos)
    assert len(list(stats.collect(source, range(9), tmp_path / "file/memory.jsonl"))) == 9


def test_sets_of_the_same_names_have_memories_of_their_own(tmp_path, cache):
    for root in "one", "two":
        save(tmp_path / root / "x.png", 4, 4, "red")
    one, two = Folder(tmp_path / "one"), Folder(tmp_path / "two")
    assert one.digest() == two.digest()
    paths = [stats.memory_of(root, source, limit) for root, source, limit in (
        (tmp_path / "one", one, 0), (tmp_path / "two", two, 0), (tmp_path / "one", one, 5))]
    assert len(set(paths)) == 3 and {path.parent for path in paths} == {cache}

# --------------------------------------------------------------------------------
# The command


def test_the_command(photos, cache, capsys):
    lines, found = run(capsys, photos, "--size", "s")
    text = "\n".join(lines)
    assert lines[0] == f"{photos}: 6 images, {found['bytes'] / 1000:.3g} kB"
    for said in ("unreadable      3", "duplicates      2", "formats         PNG 5, BMP 1", "a/dark.png = ",
                 "stored as       RGB 5, L 1; 1 turned upright", "classes         2: b 4, a 2",
                 "--mean 0.333,0.167,0.067 --std 0.471,0.075,0.149", "the recipe has 0.485,0.456,0.406 and 0.229",
                 "global crops    224 px: 6 images are smaller; 100 % of these crops are enlarged"):
        assert said in text, said
    assert list(cache.glob("stats-*")) == [] and found["seconds"] > 0
    assert found["crops"][1] == dict(kind="local", side=96, smaller=5, enlarged=1.0)


def test_a_sample(photos, capsys):
    lines, found = run(capsys, photos, "--limit", 4)
    assert found["images"] + found["unreadable"] == 4 and found["of"] == 9
    assert lines[0].startswith(f"{photos}, a sample of 4 of its 9 images: ")
    assert run(capsys, photos, "--limit", 4)[1]["mean"] == found["mean"]
    assert run(capsys, photos, "--limit", 9)[0][0].startswith(f"{photos}: 6 images")


def test_names_that_are_no_text(tmp_path, capsys):
    save(tmp_path / "fine.png", 4, 4, "red")
    with open(bytes(tmp_path) + b"/n\xe4me.jpg", "wb") as file:
        file.write(b"no picture")
    lines, found = run(capsys, tmp_path)
    assert r"n\udce4me.jpg" in "\n".join(lines).encode().decode() and found["unreadable"] == 1


def test_many_names_are_cut(tmp_path, capsys):
    for i in range(5):
        (tmp_path / f"{i}.jpg").touch()
    save(tmp_path / "fine.png", 4, 4, "red")
    lines, found = run(capsys, tmp_path)
    assert len(found["unreadable_names"]) == 5
    assert [line.strip() for line in lines[1:7]][4] == "..." and "3.jpg" not in "\n".join(lines)


@pytest.mark.parametrize(("words", "said"), [
    ("stats", "PATH: none; name one set of images"), ("stats a b", "PATH: a b; name one"),
    ("stats a --data b", "PATH: a; name one"), ("stats a --limt 3", "unknown option --limt; did you mean --limit?"),
    ("stats a --limit -1", r"--limit is -1; it must be in \[0, 1e10\]"),
    ("stats /nowhere", "--data: /nowhere does not exist"),
    ("stat a", "'stat' is no command; there are: index, stats, look"),
    ("stats shapes --local_size 8", "--local_size 8: the image is smaller than a patch")])
def test_mistakes(words, said):
    with pytest.raises(ValueError, match="^" + said):
        data.main(words.split())


def test_help(capsys):
    for words, said in ([], "python data.py look"), (["--help"], "stats PHOTOS"), (["stats", "--help"], "--limit"):
        data.main(words)
        assert said in capsys.readouterr().out


def test_amounts():
    assert [stats.amount(n) for n in (999, 1234, 30_935_279, 5.2e16)] == ["999 bytes", "1.23 kB", "30.9 MB",
                                                                          "5.2e+04 TB"]
