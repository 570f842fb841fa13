"""
Words to numbers, as CLIP has it: UTF-8 bytes, of which neighbours are merged in the order of a list.

    Tokenizer      texts -> ids, of such a list of merges
    clip_merges    CLIP's own 48,894, from the file that open_clip_torch brings along; nothing of it is imported
    learn_merges   the merges of any captions, where CLIP's are not wanted

Ids are those of dino.txt's text tower: 256 bytes, the same at a word's end, one for each merge, start, end.
"""

import gzip
import hashlib
import html
import re
import unicodedata
from collections import Counter, defaultdict
from functools import cache
from heapq import heapify, heappop, heappush
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

CLIP = "bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
CLIP_MERGES = 48894            # of the file's lines those that CLIP uses: 2 to 48895
START, END = "<|startoftext|>", "<|endoftext|>"
LAST = "</w>"                  # behind the last character of a word


@cache
def byte_characters():
    """A character for each of 256 bytes: itself if it can be printed, else one from U+0100 on"""
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + k) for k, byte in enumerate(others)}


@cache
def words_of():
    """What finds the pieces of a text: contractions, runs of letters, single digits, runs of anything else."""
    numerals = "".join(c for c in map(chr, range(0x110000)) if unicodedata.category(c) in ("Nl", "No"))
    letter = rf"(?![{numerals}])[^\W\d_]"  # what Python calls alphanumeric, without digits and without ², Ⅷ and ½
    return re.compile(rf"{re.escape(START)}|{re.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d|(?:{letter})+|[\d{numerals}]"
                      rf"|(?:(?!{letter})[^\s\d{numerals}])+")


def cleaned(text, mend=False):
    """HTML's names of characters, twice; blanks are one, capitals small.    mend  as CLIP did"""
    if mend and not text.isascii():
        text = mended(text)
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def mended(text):
    """What ftfy makes of a text, as CLIP was trained: straight quotes, no broken encodings. Raises ValueError."""
    try:
        from ftfy import fix_text  # here, as ASCII needs none
    except ImportError as error:
        raise ValueError(f'ftfy is not installed, which ids of {text[:30]!r} depend on; pip install -e ".[text]"'
                         ) from error
    return fix_text(text)


class Tokenizer:
    """
    tokenizer(texts, context) -> ids  n N int64: start, the text, end, zeros, N as the longest wants;  how many were cut
                                 so as to end within the context

    merges  [(left, right)] of characters of byte_characters, in order; None = CLIP's, and ftfy before them
    """
    def __init__(self, merges=None):
        letters, self.mend = list(byte_characters().values()), merges is None
        self.merges = clip_merges() if self.mend else merges
        self.rank = {pair: k for k, pair in enumerate(self.merges)}
        words = [*letters, *(letter + LAST for letter in letters), *map("".join, self.merges)]
        self.ids = {word: k for k, word in enumerate(words)}
        self.start, self.end, self.size = len(words), len(words) + 1, len(words) + 2
        self.known = {START: [self.start], END: [self.end]}

    def __call__(self, texts, context):
        found = [self.encode(text) for text in texts]
        rows = [torch.tensor([self.start, *ids[: context - 2], self.end]) for ids in found]
        return pad_sequence(rows, batch_first=True), sum(len(ids) > context - 2 for ids in found)

    def encode(self, text):
        """A text's ids, as many as it has"""
        return list(chain.from_iterable(map(self.piece, words_of().findall(cleaned(text, self.mend)))))

    def piece(self, word):
        """Of one word, remembered"""
        if word not in self.known:
            parts = symbols(word)
            while len(parts) > 1:
                best = min(pairwise(parts), key=lambda pair: self.rank.get(pair, len(self.rank)))
                if best not in self.rank:
                    break
                parts = merged(parts, best)
            self.known[word] = [self.ids[part] for part in parts]
        return self.known[word]


def symbols(word):
    letters = [byte_characters()[byte] for byte in word.encode()]
    return (*letters[:-1], letters[-1] + LAST)


def merged(parts, pair):
    """The parts of a word, wherever these two are neighbours as one"""
    out, k = [], 0
    while k < len(parts):
        both = parts[k : k + 2] == pair
        out.append("".join(pair) if both else parts[k])
        k += 1 + both
    return tuple(out)


def learn_merges(captions, n):
    """Up to n merges of captions, each of the pair that is most often there, twice at least; of equals the first."""
    counts = Counter(chain.from_iterable(words_of().findall(cleaned(text)) for text in captions))
    words = [[symbols(word), count] for word, count in sorted(counts.items())]
    pairs, where, merges = Counter(), defaultdict(set), []

    def count(k, sign):
        for pair in pairwise(words[k][0]):
            pairs[pair] += sign * words[k][1]
            where[pair].add(k)

    for k in range(len(words)):
        count(k, 1)
    heap = [(-n_pairs, pair) for pair, n_pairs in pairs.items()]
    heapify(heap)
    while len(merges) < n and heap:
        often, best = heappop(heap)
        if -often != pairs[best] or often > -2:  # it was counted again since, or is rare
            continue
        merges.append(best)
        for k in where.pop(best):
            before = {*pairwise(words[k][0])}
            count(k, -1)
            words[k][0] = merged(words[k][0], best)
            count(k, 1)
            for pair in before | {*pairwise(words[k][0])}:
                heappush(heap, (-pairs[pair], pair))
    return merges


def clip_merges():
    """CLIP's merges. Raises ValueError if its file is not there, or another."""
    package = find_spec("open_clip")
    path = Path(package.origin).with_name(CLIP) if package else None
    if not path or not path.is_file():
        raise ValueError('CLIP\'s vocabulary is not here; pip install -e ".[text]", which brings open_clip_torch')
    return read_merges(path)


def read_merges(path):
    """The merges of CLIP's file. Raises ValueError for another one: all ids would be."""
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise ValueError(f"{path} has sha256 {found[:12]}..., CLIP's vocabulary {SHA256[:12]}...; install "
                         "open_clip_torch 3.3 again")
    lines = gzip.decompress(data).decode().split("\n")
    return [tuple(line.split()) for line in lines[1 : 1 + CLIP_MERGES]]
