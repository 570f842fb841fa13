"""
Checkpoints in OUT/checkpoint, as torch.distributed.checkpoint wrote them: still read, no longer written.

    read_pieces    such a folder -> {name: its pieces}, with the same read() as those of shards.py

Their .metadata is a pickle. Nothing in it is believed: each class that it may name becomes a Record, a bag of
attributes, and any other name ends the reading. The tensors themselves are read by torch.load(weights_only=True).
"""

import io
import pickle
from pathlib import Path
from typing import NamedTuple

import torch

RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "torch": {"float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
}


class Record:
    """What stands in for every class of the pickle."""
    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        if isinstance(state, dict):  # else what nobody here asks for: a dtype's properties
            self.__dict__.update(state)


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) == ("torch", "Size"):
            return tuple
        if name in RECORDS.get(module, ()):
            return Record
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there")


class OldPiece(NamedTuple):
    """Rows of a tensor, somewhere in a .distcp file; see shards.Piece."""
    first: int
    total: int
    shape: tuple
    path: Path
    offset: int
    length: int

    @property
    def rows(self):
        return self.shape[0] if self.shape else 1

    def read(self, start=0, stop=None):
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            x = torch.load(io.BytesIO(file.read(self.length)), map_location="cpu", weights_only=True)
        if tuple(x.shape) != self.shape:
            raise ValueError(f"{self.path} holds other tensors than its .metadata says")
        return x[start:stop] if self.shape else x


def read_pieces(folder):
    """{name: [OldPiece], in order}. Raises ValueError if .metadata is not what torch would have written."""
    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            metadata = Unpickler(file).load()
        found = {}
        for index, where in metadata.storage_data.items():
            tensor = metadata.state_dict_metadata[index.fqn]
            if hasattr(tensor, "chunks"):  # the others are plain values: the schedules set them anew
                offset = index.offset or (0,) * len(tensor.size)
                shape = next(tuple(chunk.sizes) for chunk in tensor.chunks if tuple(chunk.offsets) == tuple(offset))
                if any(offset[1:]) or Path(where.relative_path).name != where.relative_path:
                    raise ValueError(f"{index.fqn} lies elsewhere")
                first, total = (offset[0], tensor.size[0]) if shape else (0, 1)
                file = folder / where.relative_path
                found.setdefault(index.fqn, []).append(
                    OldPiece(first, total, shape, file, where.offset, where.length))
        return {name: sorted(pieces) for name, pieces in found.items()}
    except Exception as error:  # whatever a pickle of foreign bytes ends in
        raise ValueError(f"{path} cannot be read ({error}); nothing of it was executed") from error
