"""
Checkpoints that are written while the next steps run: the loop stands still for a copy of this rank's rows.

    Saver    saver(step, wait): one at a time, of one run
    free     bytes that this host has left when a step takes the most
"""

import math
import os
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.distributed as dist

from engine.checkpoint import bytes_of, own_rows, save_checkpoint, training_state
from engine.interrupt import Behind
from engine.plan import copied, device_memory
from engine.ranks import PATIENCE, free_memory
from engine.system import peak


class Saver:
    """
    The state as it stands when saver(step) is called becomes OUT/checkpoints/STEP, byte for byte as if the loop waited.
    A thread writes a copy of it; the threads of all ranks talk in a group of their own, as the loop talks meanwhile.

    The next save first waits for the one before, and raises what it failed with, on all ranks. A save that fails also
    calls `failed`, by which the loop can ask for the next one soon. Where the host has no memory for the copy, made
    at the first save and kept, or where the loop has nothing else to do, it waits.
    """
    def __init__(self, c, ranks, student, teacher, optimizer, gram=None, failed=lambda: None):
        self.c, self.failed, self.state = c, failed, (student, teacher, optimizer, gram)
        self.copies, self.waits, self.behind, self.ranks = None, False, None, ranks

    @cached_property
    def apart(self):
        """The ranks, with a group of their own for the threads."""
        if self.ranks.group is None:
            return self.ranks
        members = dist.get_process_group_ranks(self.ranks.files)
        return replace(self.ranks, files=dist.new_group(members, backend="gloo", timeout=PATIENCE,
                                                        use_local_synchronization=True))

    def __call__(self, step, wait=True):
        """wait: until it is whole"""
        self.settle()
        state = training_state(*self.state)
        rows, ready = own_rows(self.ranks, state), None
        if not wait and not self.waits and self.copies is None:
            self.make_room(step, rows)
        wait = wait or self.waits
        if not wait:
            rows, ready = self.copy(rows)
        config = self.state[1]["backbone"].config
        work = partial(self.write, ready, self.c, self.apart, step, rows, bytes_of(state), config)
        self.behind = Behind(work, self.failed)
        if wait:
            self.settle()

    def settle(self):
        """Until what was begun is whole. Raises what it failed with."""
        behind, self.behind = self.behind, None
        if behind is not None:
            behind.join()
            if behind.error is not None:
                raise behind.error

    def make_room(self, step, rows):
        """For copies of the rows, unless they take more memory than there is to spare."""
        size, left, pin = sum(x.nbytes for x, _, _ in rows.values()), free(), self.ranks.device.type == "cuda"
        self.waits = not copied(size, left)
        if self.waits:
            print(f"step {step}, rank {self.ranks.rank}: steps wait for checkpoints to be written: a copy of {size:,} "
                  f"bytes leaves too little of the {left:,} that are free", flush=True)
            return
        self.copies = {name: torch.empty(x.shape, dtype=x.dtype, pin_memory=pin) for name, (x, _, _) in rows.items()}

    @torch.no_grad()
    def copy(self, rows):
        """Copies of the rows, and the event after which they are there, None = now: the host does not wait for it."""
        cuda = self.ranks.device.type == "cuda"
        for name, (x, _, _) in rows.items():
            self.copies[name].copy_(x, non_blocking=cuda)
        ready = torch.cuda.Event() if cuda else None
        if ready:
            ready.record()
        return {name: (self.copies[name], *place) for name, (_, *place) in rows.items()}, ready

    def write(self, ready, *what):
        if ready:
            ready.synchronize()
        save_checkpoint(*what)


def free():
    """Bytes of this host's memory that a rank has left when a step takes the most."""
    most = peak()
    left = device_memory("cpu") - most
    if (there := free_memory()) < math.inf:
        mine = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        left = min(left, there / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - (most - mine))
    return round(left)
