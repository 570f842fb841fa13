"""
Where a process stands among the others that torchrun started, its device, and what that device multiplies fast.

    start_ranks        --device -> Ranks, with a process group if there are several
    exchange, leading  Python objects between ranks; rank 0's part, after which, well or not, the others may leave
    choose_precision   auto -> bf16 or fp32          readers    -1 -> processes that read images
"""

import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from engine import config as command_line


@dataclass
class Ranks:
    """Where this process stands; without torchrun there is one, and no process group."""
    rank: int = 0
    count: int = 1             # S
    device: torch.device = torch.device("cpu")
    group: object = None       # torch.distributed process group of all ranks, or None

    @property
    def main(self):
        return self.rank == 0

    def mean(self, x):
        """Of all ranks' x; the same on each."""
        if self.group is not None:
            x = x.clone()
            dist.all_reduce(x, group=self.group)
        return x / self.count


def start_ranks(device, talk=False):
    """
    --device -> Ranks

    talk  the ranks exchange Python objects alone: gloo does for any device, several ranks may share a GPU, and one may
          wait for another for days
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves by itself
    kind = command_line.choose_device(device).type
    if "RANK" not in os.environ:
        return Ranks(device=torch.device(kind))
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # nothing edits them
    local, place, nccl = int(os.environ["LOCAL_RANK"]), torch.device(kind), kind == "cuda" and not talk
    if kind == "cuda":
        place = torch.device(kind, local % torch.cuda.device_count() if talk else local)
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if nccl else "gloo", device_id=place if nccl else None)
    group = dist.new_group(timeout=timedelta(days=30)) if talk else dist.group.WORLD
    return Ranks(dist.get_rank(), dist.get_world_size(), place, group)


def exchange(ranks, collective, *args):
    """A collective of Python objects. Raises ValueError if a rank is gone."""
    try:
        collective(*args, group=ranks.group)
    except RuntimeError as error:
        raise ValueError("another rank has ended; it or torchrun says why") from error


@contextmanager
def leading(ranks):
    """Rank 0's part: in the end, and after an error of one line, the others may leave; after a bug they notice."""
    failure = None
    try:
        yield
    except ValueError as error:
        failure = error
    try:
        if ranks.count > 1:
            exchange(ranks, dist.broadcast_object_list, [None])
    except ValueError as error:
        failure = failure or error
    if failure:
        raise failure


def readers(workers):
    """--workers, or the cores that this process may use, shared out among the ranks of this machine, less one"""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return workers if workers >= 0 else max(1, min(12, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def choose_precision(precision, device):
    """bf16 where the hardware multiplies it; never fp16, whose range the losses leave."""
    if precision != "auto":
        return precision
    fast = {"cuda": torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8,
            "cpu": torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()}
    return "bf16" if fast.get(device.type) else "fp32"
