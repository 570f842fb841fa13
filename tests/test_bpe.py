"""engine/bpe.py: CLIP's ids as they are known, merges by hand and by the plain loop, pieces, what is missing."""

import gzip
import sys
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise

import pytest

from engine import bpe
from engine.bpe import LAST, Tokenizer, byte_characters, cleaned, learn_merges, words_of

KNOWN = {"a photo of a cat": [320, 1125, 539, 320, 2368], "Hello  world!": [3306, 1002, 256],
         "a red and white dotted star on paved ground before a cloudy wall":
         [320, 736, 537, 1579, 47950, 1565, 525, 27898, 2461, 1348, 320, 13106, 2569]}


@pytest.mark.skipif(not find_spec("open_clip"), reason="open_clip_torch, which has CLIP's vocabulary, is not installed")
def test_clips_ids():
    tokenizer = Tokenizer()
    assert "open_clip" not in sys.modules
    assert (tokenizer.size, tokenizer.start, tokenizer.end) == (49408, 49406, 49407)
    for text, ids in KNOWN.items():
        assert tokenizer.encode(text) == ids


def test_ids_by_hand():
    """256 bytes, the same at a word's end, the merges, start, end; the earliest merge comes first"""
    tokenizer = Tokenizer([("a", "t" + LAST), ("c", "at" + LAST), ("b", "a")])
    a, b, x = (list(byte_characters().values()).index(letter) for letter in "abx")
    assert (a, tokenizer.size, tokenizer.start, tokenizer.end) == (ord("a") - ord("!"), 517, 515, 516)
    assert tokenizer.encode("cat") == [513] and tokenizer.encode("at") == [512]
    assert tokenizer.encode("bat") == [b, 512]                       # a t</w> stands before b a in the list
    assert tokenizer.encode("bax") == [514, x + 256] and tokenizer.encode("x") == [x + 256]
    assert tokenizer.encode("<|startoftext|>cat<|endoftext|>") == [515, 513, 516]


def test_bytes():
    """Printable ones first, as they are; then 68 others from U+0100 on: é is two bytes"""
    letters = byte_characters()
    assert len(set(letters.values())) == 256 and letters[ord("~")] == "~" and list(letters)[188] == 0
    assert letters[0] == chr(256) and letters[0x20] == chr(256 + 32) and letters[0xAD] == chr(256 + 67)
    first, second = "é".encode()
    place = {byte: k for k, byte in enumerate(letters)}
    assert Tokenizer([]).encode("é") == [place[first], place[second] + 256]


@pytest.mark.parametrize("text, pieces", [
    ("it's 12 o'clock!?", ["it", "'s", "1", "2", "o", "'", "clock", "!?"]),
    ("you'll they've i'd don't", ["you", "'ll", "they", "'ve", "i", "'d", "don", "'t"]),
    ("x² ⅷb_c—é", ["x", "²", "ⅷ", "b", "_", "c", "—", "é"]),
    ("<|endoftext|>a", ["<|endoftext|>", "a"])])
def test_pieces(text, pieces):
    assert words_of().findall(text) == pieces


def test_cleaning():
    assert cleaned("  A\t&amp;lt; B\n C ") == "a < b c"


def test_too_long_is_cut_and_counted():
    tokenizer = Tokenizer([])
    ids, cut = tokenizer(["abc", "abcd", "a", ""], context=5)
    start, end, (a, b, c) = tokenizer.start, tokenizer.end, (tokenizer.ids[letter] for letter in "abc")
    assert ids.tolist() == [[start, a, b, c + 256, end], [start, a, b, c, end], [start, a + 256, end, 0, 0],
                            [start, end, 0, 0, 0]] and cut == 1
    assert tokenizer(["a"], context=5)[0].shape == (1, 3)            # as long as the longest wants


def plainly_learned(captions, n):
    """Counts all pairs anew for each merge."""
    counts = Counter(word for text in captions for word in words_of().findall(cleaned(text)))
    words, merges = {word: bpe.symbols(word) for word in counts}, []
    while len(merges) < n:
        pairs = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        words = {word: bpe.merged(parts, best) for word, parts in words.items()}
    return merges


def test_learning_is_the_plain_loop():
    captions = ["a banana and a bandana on sand", "bananas band", "the theme of the thesis", "aaaa aaab ananan"]
    found = learn_merges(captions, 1000)
    assert found == plainly_learned(captions, 1000) and len(found) == 10
    assert learn_merges(captions, 3) == found[:3]
    assert learn_merges(["xyz"], 9) == []                            # what is there once is no habit


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"CLIP's vocabulary is not here; pip install -e \"\.\[text\]\""):
        Tokenizer()
    path = tmp_path / bpe.CLIP
    path.write_bytes(gzip.compress(b"#version\na b\n"))
    with pytest.raises(ValueError, match="has sha256 .*, CLIP's vocabulary 924691ac288e"):
        bpe.read_merges(path)


def test_ftfy_is_asked_for_where_ids_depend_on_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert cleaned("plain", mend=True) == "plain" and cleaned("“é”") == "“é”"
    with pytest.raises(ValueError, match="ftfy is not installed, which ids of '“é”' depend on; pip"):
        cleaned("“é”", mend=True)
