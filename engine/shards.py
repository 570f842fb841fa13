"""
Tensors in files that are written one after the other and read by rows: one piece at a time is in memory.

    write_tensors   {name: Entry} -> a .safetensors file, header first; its size and checksum
    read_pieces     the file that a rank wrote -> {name: the rows that lie there}
    Piece.read      rows of one of them
    fill            the rows that this rank holds of a tensor, from such pieces
    checksum        of a file

A rank's file holds its own rows; its metadata says under "rows" which ones, of how many. The header is JSON and the
rest plain numbers: nothing in such a file can be executed.
"""

import json
import math
import os
import zlib
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from model import shard

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 24                # bytes that a checksum reads at once
LONGEST = 1 << 27              # bytes of a header that is believed; 7B's have 1 MB


class Entry(NamedTuple):
    """A tensor that is yet to be written."""
    shape: tuple
    dtype: torch.dtype
    parts: Callable            # () -> an iterator over tensors: its rows, in order


class Piece(NamedTuple):
    """Rows of a tensor, in a file."""
    first: int                 # number of its first row in the tensor
    total: int                 # rows of the tensor; 1 for a tensor without dimensions
    shape: tuple
    dtype: torch.dtype
    path: Path
    offset: int                # in bytes

    @property
    def rows(self):
        return self.shape[0] if self.shape else 1

    def read(self, start=0, stop=None):
        """Rows start to stop, counted from the piece's first one."""
        stop = self.rows if stop is None else stop
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = bytearray((stop - start) * width)
        with open(self.path, "rb") as file:
            file.seek(self.offset + start * width)
            if file.readinto(data) != len(data):
                raise ValueError(f"{self.path} is cut short")
        shape = self.shape and (stop - start, *self.shape[1:])
        return torch.frombuffer(data, dtype=self.dtype).view(shape) if data else torch.empty(shape, dtype=self.dtype)


def write_tensors(path, entries, metadata):
    """
    The file, on the disk when this returns; its bytes are a function of the arguments.

    returns  its size in bytes, its crc32;  raises OSError that names it
    """
    header, at = {"__metadata__": metadata}, 0
    for name, entry in entries.items():
        end = at + math.prod(entry.shape) * entry.dtype.itemsize
        header[name] = dict(dtype=NAMES[entry.dtype], shape=list(entry.shape), data_offsets=[at, end])
        at = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # what follows is aligned
    data = (x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for entry in entries.values() for x in entry.parts())
    size, crc = 0, 0
    try:
        with open(path, "wb") as file:
            for block in chain([len(head).to_bytes(8, "little"), head], data):
                file.write(block)
                size, crc = size + len(block), zlib.crc32(block, crc)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    assert size == 8 + len(head) + at, "an entry has other rows than its shape says"
    return size, crc


def read_pieces(path):
    """{name: Piece} of a file that write_tensors wrote. Raises ValueError for one that is none."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LONGEST:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        size, rows, found = path.stat().st_size, json.loads(header.pop("__metadata__").get("rows", "{}")), {}
        for name, said in header.items():
            shape, dtype, (at, end) = tuple(said["shape"]), DTYPES[said["dtype"]], said["data_offsets"]
            if not 0 <= at <= end <= size - 8 - length or end - at != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} does not lie in it")
            first, total = rows.get(name, (0, shape[0] if shape else 1))
            found[name] = Piece(first, total, shape, dtype, path, 8 + length + at)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error!r})") from error


@torch.no_grad()
def fill(x, pieces):
    """The rows that this rank holds of x, in place.    pieces  of the whole tensor, in order"""
    local, first = shard(x)
    if not local.ndim:
        local.copy_(pieces[0].read())
        return
    for piece in pieces:
        start, stop = max(first, piece.first), min(first + len(local), piece.first + piece.rows)
        if start < stop:
            local[start - first : stop - first].copy_(piece.read(start - piece.first, stop - piece.first))


def checksum(path):
    """crc32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            crc = zlib.crc32(block, crc)
    return crc
