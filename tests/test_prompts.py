"""sets/prompts.py: names of classes, CLIP's lists read without importing them, files, mistakes."""

import re
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

import shapes
from sets import prompts
from sets.prompts import LABELS, SCENES, STRUCTURED, label_names, names_of, sentences

METADATA = '''OPENAI_IMAGENET_TEMPLATES = (
    lambda c: f'a bad photo of a {c}.',
    lambda c: f'the {c} of {c}.',
)
IMAGENET_CLASSNAMES = ("tench", "kite (bird of prey)")
'''


@pytest.fixture
def invented(tmp_path, monkeypatch):
    """A package whose metadata has two names and sentences"""
    (tmp_path / "zero_shot_metadata.py").write_text(METADATA)
    monkeypatch.setattr(prompts, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    prompts.clip_list.cache_clear()
    yield tmp_path
    prompts.clip_list.cache_clear()


def test_clips_lists_are_read_off_the_file(invented):
    assert sentences("imagenet") == ["a bad photo of a {}.", "the {} of {}."]
    assert prompts.clip_list("IMAGENET_CLASSNAMES") == ("tench", "kite (bird of prey)")
    with pytest.raises(ValueError, match="has no NAMES; install open_clip_torch 3.3"):
        prompts.clip_list("NAMES")


@pytest.mark.skipif(not find_spec("open_clip"), reason="open_clip_torch, which has the lists, is not installed")
def test_clips_own_lists():
    assert len(sentences("imagenet")) == 80 and sentences("imagenet")[0] == "a bad photo of a {}."
    names = names_of([f"n{k:08}" for k in range(1000)])
    assert len(names) == 1000 and names[0] == ["tench"] and "open_clip" not in sys.modules


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(prompts, "find_spec", lambda name: None)
    prompts.clip_list.cache_clear()
    with pytest.raises(ValueError, match=r"pip install -e \"\.\[text\]\", which brings open_clip_torch; or write"):
        sentences("imagenet")


def test_names_of_folders(tmp_path):
    assert names_of(["african_grey", "cat"]) == [["african grey"], ["cat"]]
    (tmp_path / "a.txt").write_text("tench; fish\n\ndog\n")
    assert names_of(["n1", "n2"], tmp_path / "a.txt") == [["tench", "fish"], ["dog"]]
    (tmp_path / "a.json").write_text('{"n2": "dog", "n1": "tench", "n3": "more"}')
    assert names_of(["n1", "n2"], str(tmp_path / "a.json")) == [["tench"], ["dog"]]


def test_ade20k_names_the_first_of_its_synonyms(tmp_path):
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.1\twall\n2\t0.1\tbuilding, edifice\n")
    assert label_names("ade20k", tmp_path) == [["wall"], ["building"]]
    assert label_names("ade20k", tmp_path / "images") == [["wall"], ["building"]]
    assert [len(LABELS[name]) for name in ("cityscapes", "voc", "camvid", "context", "stuff")] == [19, 21, 11, 59, 171]
    assert label_names("voc", tmp_path)[0][:2] == ["background", "sky"]


def test_shapes_are_asked_for_as_their_captions_say_it():
    """a red and white dotted star on paved ground before a cloudy wall: of each part every word, none else"""
    assert STRUCTURED[0] == "dotted star" and len(STRUCTURED) == len(shapes.CLASSES)
    form = re.compile(r"an? (\w+) and (\w+) {} on (\w+) ground before a (\w+) wall")
    words = [form.fullmatch(sentence).groups() for sentence in SCENES]
    for k, known in enumerate((shapes.PALETTE, shapes.PALETTE, shapes.TEXTURES, shapes.TEXTURES)):
        assert {each[k] for each in words} == set(known)
    assert len(words) == 33 and SCENES[3].startswith("an orange and ")
    scene = shapes.scene(4)
    assert STRUCTURED[scene.label] in scene.caption and sentences("shapes") == SCENES and sentences("plain")[-1] == "{}"


@pytest.mark.parametrize("folders, file, text, says", [
    (["n01440764", "n02102040"], "", "", "folders are called n01440764, and are 2 of ImageNet's 1,000; write --names"),
    (["a", "b"], "x.txt", "cat\n", "has names for 1 classes; wanted 2, a line each"),
    (["a", "b"], "x.json", '{"a": "cat"}', "has no name for b, and 1 of 2 folders"),
    (["a", "b"], "x.json", "[1]", "cannot be read .*; wanted JSON"),
    (["a", "b"], "y.json", None, "y.json cannot be read")])
def test_mistakes(folders, file, text, says, tmp_path):
    if text is not None and file:
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=says):
        names_of(folders, str(tmp_path / file) if file else "")


def test_sentences_of_a_file(tmp_path):
    (tmp_path / "s.txt").write_text("a {} at night\n")
    assert sentences(str(tmp_path / "s.txt")) == ["a {} at night"]
    (tmp_path / "s.txt").write_text("a {} at night\nno name\n")
    with pytest.raises(ValueError, match="'no name' has no {}; that is where the name of the class goes"):
        sentences(str(tmp_path / "s.txt"))
