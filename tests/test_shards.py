"""engine/shards.py: files that safetensors reads, bytes that do not vary, rows by any number of ranks, damage."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from engine import shards
from engine.shards import Entry, checksum, fill, read_pieces, write_tensors


def entries(state):
    return {name: Entry(tuple(x.shape), x.dtype, lambda x=x: iter([x])) for name, x in state.items()}


@pytest.fixture
def state():
    torch.manual_seed(0)
    return dict(a=torch.randn(7, 3), b=torch.tensor(3.5), c=torch.randn(2, 2, 5).bfloat16(), d=torch.arange(4),
                e=torch.tensor([True, False]), f=torch.randn(4, 6).t())


def test_safetensors_reads_it(state, tmp_path):
    size, crc = write_tensors(tmp_path / "x", entries(state), dict(step="3"))
    found = load_file(tmp_path / "x")
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    with safe_open(tmp_path / "x", "pt") as opened:
        assert opened.metadata() == dict(step="3")
    assert size == (tmp_path / "x").stat().st_size and crc == checksum(tmp_path / "x")


def test_equal_tensors_are_equal_bytes_of_the_usual_mode(state, tmp_path):
    old = os.umask(0o022)
    for name in "xy":
        write_tensors(tmp_path / name, entries(state), dict(rows="{}", b="2", a="1"))
    os.umask(old)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_parts_are_written_one_after_the_other(tmp_path):
    """and asked for only then"""
    x, asked = torch.randn(6, 4), []

    def parts():
        for i in range(3):
            asked.append((tmp_path / "x").stat().st_size)
            yield x[2 * i : 2 * i + 2]
    write_tensors(tmp_path / "x", dict(x=Entry((6, 4), x.dtype, parts)), {})
    assert torch.equal(load_file(tmp_path / "x")["x"], x) and len(asked) == 3


@pytest.mark.parametrize("n, cuts", [(7, [(0, 7)]), (7, [(0, 3), (3, 6), (6, 7)]), (2, [(0, 1), (1, 2)])])
def test_rows_find_their_place(tmp_path, monkeypatch, n, cuts):
    x, pieces = torch.randn(n, 3), []
    for i, (start, stop) in enumerate(cuts):
        write_tensors(tmp_path / f"{i}", entries(dict(x=x[start:stop])), dict(rows=json.dumps(dict(x=(start, n)))))
        pieces.append(read_pieces(tmp_path / f"{i}")["x"])
    assert torch.equal(torch.cat([piece.read() for piece in pieces]), x)
    for first in range(n):
        for stop in range(first + 1, n + 1):
            local = torch.full((stop - first, 3), torch.nan)
            monkeypatch.setattr(shards, "shard", lambda x, local=local, first=first: (local, first))
            fill(x, pieces)
            assert torch.equal(local, x[first:stop])


def test_a_file_on_a_full_disk_names_itself(state, tmp_path):
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_tensors("/dev/full", entries(state), {})


@pytest.mark.parametrize("data", [
    b"", b"\xff" * 8, (10).to_bytes(8, "little") + b"{}        ", (4).to_bytes(8, "little") + b"null",
    (2000).to_bytes(8, "little") + b"[" * 2000, (1 << 40).to_bytes(8, "little"),
    (74).to_bytes(8, "little") + json.dumps(dict(__metadata__={}, a=dict(dtype="F32", shape=[9], data_offsets=[0, 36])))
    .encode().ljust(74), b"not a header, but words"])
def test_damaged_headers_are_one_line(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match="x cannot be read") as error:
        read_pieces(tmp_path / "x")
    assert "\n" not in str(error.value)
