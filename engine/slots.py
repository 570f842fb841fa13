"""
What a worker process makes is handed over without new memory: both processes keep a few slots of shared memory, and the
tensors of an item lie in one of them for as long as anyone has one. New shared memory costs more than the copy into it:
the system clears it page by page, for both.

    lent      around the dataset of a DataLoader, while it runs; it knows nothing of it: what arrives is the item
"""

import io
import os
import pickle
import weakref
from contextlib import contextmanager
from itertools import count

import torch
from torch.utils.data import Dataset

SLOTS = 6         # of a worker: two that are asked for ahead, and those in use; if all are, new memory it is
ALIGN = 64        # bytes; the first one of a slot says whether it is in use
KNOWN = {}        # what the loaders of this process have received: {number: {(worker, slot): its bytes, an array}}
NUMBERS = count()


@contextmanager
def lent(dataset):
    """A dataset of the same items, whose tensors come in slots."""
    number = next(NUMBERS)
    KNOWN[number] = {}
    try:
        yield Lending(dataset, number)
    finally:
        del KNOWN[number]  # a slot that someone has a tensor of stays until then


class Lending(Dataset):
    """In a worker"""

    def __init__(self, dataset, number):
        self.dataset, self.number, self.slots = dataset, number, []

    def __getitem__(self, place):
        item, notes = self.dataset[place], io.BytesIO()
        pickler = Pickler(notes)
        pickler.dump(item)
        slot, new = self.free(pickler.end) if pickler.tensors else (None, None)
        if slot is None:
            return item
        memory = self.slots[slot]
        for (start, dtype, shape), x in pickler.tensors:
            at(memory, start, dtype, shape).copy_(x)
        memory[0] = 1
        return Lent(self.number, os.getpid(), slot, new, notes.getvalue())

    def free(self, size):
        """(number of a slot that nobody uses, itself if the other side does not have it yet), or None twice"""
        free = [k for k, memory in enumerate(self.slots) if not memory[0]]
        for k in free:
            if len(self.slots[k]) >= size:
                return k, None
        if not free and len(self.slots) == SLOTS:
            return None, None
        k = free[0] if free else len(self.slots)
        self.slots[k : k + 1] = [torch.empty(size + size // 8, dtype=torch.uint8).share_memory_()]
        return k, self.slots[k]


class Pickler(pickle.Pickler):
    """Of an item without its tensors, which it only notes: where in a slot each is to lie"""

    def __init__(self, file):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors, self.end = [], ALIGN

    def persistent_id(self, x):
        if type(x) is not torch.Tensor:
            return None
        place = self.end, x.dtype, tuple(x.shape)
        self.tensors.append((place, x))
        self.end += -(-x.nbytes // ALIGN) * ALIGN
        return place


class Lent:
    """On its way: it arrives as the item"""

    def __init__(self, *where):
        self.where = where

    def __reduce__(self):
        return receive, self.where


def receive(number, worker, slot, new, notes):
    """The item, in the process of the loader; its tensors lie in the slot, which is free when the last is gone."""
    known = KNOWN.get(number)
    if known is None:  # nobody waits for it
        return None
    if new is not None:
        known[worker, slot] = new.numpy()
    memory = known[worker, slot]
    mine = memory[:]   # lives as long as any tensor of it
    weakref.finalize(mine, memory.__setitem__, 0, 0).atexit = False
    unpickler = pickle.Unpickler(io.BytesIO(notes))
    unpickler.persistent_load = lambda place: at(torch.from_numpy(mine), *place)
    return unpickler.load()


def at(memory, start, dtype, shape):
    size = dtype.itemsize * torch.Size(shape).numel()
    return memory[start : start + size].view(dtype).view(shape)
