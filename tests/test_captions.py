"""sets/captions.py: every layout gives images and texts; tasks/captions.py: recalls by loops, mistakes."""

import json
import sys
import tarfile
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from speaking import Colours, photo
from test_evaluate import run

import evaluate
import shapes
from engine.task import SKIPPED
from sets.captions import open_captions
from tasks import TASKS, captions

TEXTS = dict(red=["a red wall", "all is red"], blue=["a blue wall"])


def photos(folder):
    for name in TEXTS:
        photo(folder / f"{name}.png", name)
    return folder


def write(root, layout):
    """TEXTS as this layout has them; returns what --data names"""
    if layout == "beside":
        photos(root / "a")
        for name, texts in TEXTS.items():
            (root / f"a/{name}.txt").write_text("\n".join(texts))
        return root
    if layout == "list":
        photos(root / "images")
        rows = [dict(image=f"images/{name}.png", captions=texts) for name, texts in TEXTS.items()]
        (root / "captions.json").write_text(json.dumps(rows))
        return root
    if layout == "coco":
        photos(root / "val2017")
        held = dict(images=[dict(id=k, file_name=f"{name}.png") for k, name in enumerate(TEXTS)],
                    annotations=[dict(image_id=k, caption=text) for k, texts in enumerate(TEXTS.values())
                                 for text in texts])
        (root / "annotations").mkdir()
        (root / "annotations/captions_val2017.json").write_text(json.dumps(held))
        return root / "annotations/captions_val2017.json"
    rows = [(f"{name}.png", text) for name, texts in TEXTS.items() for text in texts]
    if layout == "tar":
        for name, texts in TEXTS.items():
            photos(root / "raw")
            (root / f"raw/{name}.txt").write_text("\n".join(texts))
            with tarfile.open(root / f"{name}.tar", "w") as tar:
                for kind in "png", "txt":
                    tar.add(root / f"raw/{name}.{kind}", f"0/{name}.{kind}")
        return root
    if layout == "zip":
        photos(root / "raw")
        with zipfile.ZipFile(root / "0.zip", "w", zipfile.ZIP_DEFLATED) as packed:
            for name, texts in TEXTS.items():
                packed.write(root / f"raw/{name}.png", f"0/{name}.png")
                packed.writestr(f"0/{name}.txt", "\n".join(texts))
        return root / "0.zip"
    photos(root / "Images")
    if layout == "token":
        path = root / "results.token"
        path.write_text("".join(f"{name}#{k}\t{text}\n" for k, (name, text) in enumerate(rows)))
    else:
        path = root / "captions.csv"
        path.write_text("image,caption\n" + "".join(f'{name},"{text}"\n' for name, text in rows))
    return path


@pytest.mark.parametrize("layout", ["beside", "list", "coco", "tar", "zip", "token", "csv"])
def test_layouts(layout, tmp_path):
    source = open_captions(write(tmp_path, layout))
    found = {source.name(i).rpartition("/")[2].partition(".")[0]: i for i in range(len(source))}
    assert {name: source.captions(i) for name, i in found.items()} == TEXTS
    assert source.load(found["red"])[0].float().mean() > 200 > source.load(found["blue"])[0].float().mean()
    assert [source.label(i) for i in (0, 1)] == [0, 1] and len(open_captions(write_path(tmp_path, layout), 1)) == 1


def write_path(root, layout):
    return root if layout in ("beside", "list", "tar") else next(
        path for path in root.rglob("*") if path.suffix in (".json", ".token", ".csv", ".zip"))


def test_parquet(tmp_path, monkeypatch):
    """By way of pyarrow, or of what stands in for it here"""
    photos(tmp_path)
    (tmp_path / "a.parquet").touch()
    rows = [dict(path=f"{name}.png", captions=texts) for name, texts in TEXTS.items()]
    table = SimpleNamespace(to_pylist=lambda: rows)
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(
        ArrowException=KeyError, parquet=SimpleNamespace(read_table=lambda path: table)))
    source = open_captions(tmp_path / "a.parquet")
    assert [source.captions(i) for i in range(2)] == list(TEXTS.values())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pyarrow is not installed, to read .*a.parquet; pip install pyarrow"):
        open_captions(tmp_path / "a.parquet")


def test_shapes_say_what_they_show():
    source = open_captions("shapes", n_shapes=3, seed=7)
    scene = shapes.scene(2, 96, 7)
    assert len(source) == 3 and source.captions(2) == [scene.caption] and source.label(2) == scene.label
    assert torch.equal(source.load(2).permute(1, 2, 0), torch.from_numpy(scene.image))
    assert open_captions("shapes", n_shapes=3, seed=8).digest() != source.digest()


def test_what_has_no_caption_is_named_and_left_out(tmp_path, capsys):
    SKIPPED.clear()
    photos(tmp_path)
    photo(tmp_path / "green.png", "green")
    rows = [dict(image="red.png", captions=["a", " ", ""]), dict(image="green.png", captions=[]),
            dict(image="gone.png", captions=["b"])]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    assert len(open_captions(tmp_path)) == 1 and sum(SKIPPED.values()) == 4
    said = capsys.readouterr().out
    assert "skipped 2 empty captions of" in said and "skipped 1 images of" in said
    assert "skipped 1 images that" in said and "gone.png" in said


def test_a_digest_is_of_names_and_captions(tmp_path):
    one = open_captions(write(tmp_path / "a", "list")).digest()
    assert one == open_captions(write(tmp_path / "b", "list")).digest()
    (tmp_path / "a/captions.json").write_text((tmp_path / "a/captions.json").read_text().replace("wall", "hall"))
    assert one != open_captions(tmp_path / "a").digest()


@pytest.mark.parametrize("name, text, says", [
    ("captions.json", "[", "captions.json has no captions that are understood"),
    ("captions.json", '{"images": []}', "has no captions that are understood .KeyError"),
    ("captions.json", '[{"image": "red.png", "words": 1}]', "has columns image, words; wanted one of caption"),
    ("a.csv", "image,words\nred.png,x\n", "has columns image, words; wanted one of caption"),
    ("a.csv", "image,caption\n", "has no image with a caption; wanted one of the layouts"),
    ("a.csv", "image,caption\ngone.png,x\n", "has no image with a caption"),
    ("a.csv", b"\xff\xfe\x00", "a.csv cannot be read: .*; wanted captions in UTF-8"),
    ("a.tar", "no tar", "a.tar .*has no image with a caption"),
    ("a.tar", "?" * 999, "a.tar cannot be read: byte 0: no header of a tar; wanted a tar or a zip"),
    ("a.xml", "", "a.xml is none of .json, .csv"),
    (".", None, "has no image with a caption"),
    ("nowhere", None, "nowhere does not exist; name captions")])
def test_mistakes_in_files(name, text, says, tmp_path):
    photos(tmp_path)
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=says):
        open_captions(tmp_path if name == "captions.json" else tmp_path / name)


def test_a_broken_image_in_a_tar_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    (tmp_path / "a.txt").write_text("x")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.jpg", "a.jpg"), tar.add(tmp_path / "a.txt", "a.txt")
    with pytest.raises(OSError, match="a.tar/a.jpg: cannot identify"):
        open_captions(tmp_path / "a.tar").load(0)

# --------------------------------------------------------------------------------
# The task


def test_recalls_are_loops():
    """Two texts of one image, none of another: found if any of its own is near enough"""
    g = torch.Generator().manual_seed(0)
    images, words = (F.normalize(torch.randn(n, 3, generator=g), dim=1) for n in (12, 24))
    owner = torch.tensor([k % 11 for k in range(24)])
    found = captions.recalls(images, words, owner)
    for k in 1, 5, 10:
        ranked = [(-(words @ image)).argsort().tolist()[:k] for image in images]
        hits = [any(owner[j] == i for j in near) for i, near in enumerate(ranked)]
        assert found[f"image_to_text_{k}"] == pytest.approx(100 * sum(hits) / 12)
        hits = [owner[j] in (-(images @ word)).argsort().tolist()[:k] for j, word in enumerate(words)]
        assert found[f"text_to_image_{k}"] == pytest.approx(100 * sum(hits) / 24)
    assert 0 < found["image_to_text_1"] < 100


@pytest.fixture
def speaking(monkeypatch):
    monkeypatch.setitem(TASKS, "captions", replace(captions.TASK, network=lambda backbone, c: Colours()))


WORDS = "--task", "captions", "--weights", "pixels", "--resolution", 32


def test_who_knows_the_words_finds_them(speaking, tmp_path, capsys):
    found = run(capsys, *WORDS, "--data", write(tmp_path, "list"))
    assert (found["image_to_text_1"], found["text_to_image_1"], found["n_images"], found["n_captions"]) == (
        100, 100, 2, 3)
    assert run(capsys, *WORDS, "--data", tmp_path, "--captions", 1)["n_captions"] == 2
    assert run(capsys, *WORDS, "--data", tmp_path, "--control", "--seed", 0)["text_to_image_1"] < 100


def test_all_images_are_wanted(speaking, tmp_path):
    data = write(tmp_path, "list")
    (tmp_path / "images/red.png").write_text("no image")
    with pytest.raises(ValueError, match="1 images of .* cannot be read; ranks would be wrong"):
        evaluate.main([*map(str, WORDS), "--device", "cpu", "--workers", "0", "--data", str(data)])


def test_the_papers_numbers():
    coco = dict(n_images=5000, n_captions=25000, image_to_text_1=1.0, text_to_image_1=1.0)
    c = captions.TASK.config(data="COCO", resolution=384)
    assert captions.TASK.beside(c, "l", coco) == dict(paper_image_to_text_1=63.7, paper_text_to_image_1=45.6)
    assert captions.TASK.beside(c, "b", coco) == captions.TASK.beside(c, "l", coco | dict(n_captions=25010)) == {}
    zeroshot = dict(top1=1.0, n_val=50000, n_classes=1000)
    c = TASKS["zeroshot"].config(data="IMAGENET", resolution=384)
    assert TASKS["zeroshot"].beside(c, "l", zeroshot) == dict(paper_top1=82.3)
    for change in dict(templates="plain"), dict(names="x"):
        assert TASKS["zeroshot"].beside(replace(c, **change), "l", zeroshot) == {}
    c = TASKS["openvocab"].config(data="ADE", resolution=512, set="ade20k")
    assert TASKS["openvocab"].beside(c, "l", dict(miou=1.0, n_val=2000, n_classes=150)) == dict(paper_miou=24.7)
