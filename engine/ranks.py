"""
Where a process stands among the others that torchrun started, its device, and what that device multiplies fast.

    start_ranks        --device -> Ranks, with a process group if there are several
    choose_precision   auto -> bf16 or fp32
"""

import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from engine import config as command_line


@dataclass
class Ranks:
    """Where this process stands; without torchrun there is one, and no process group."""
    rank: int
    count: int
    device: torch.device
    group: object  # torch.distributed process group, or None

    @property
    def main(self):
        return self.rank == 0

    def mean(self, x):
        """Of all ranks' x; the same on each."""
        if self.group is not None:
            x = x.clone()
            dist.all_reduce(x, group=self.group)
        return x / self.count


def start_ranks(device):
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves by itself
    kind = command_line.choose_device(device).type
    if "RANK" not in os.environ:
        return Ranks(0, 1, torch.device(kind), None)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # nothing edits them
    local = int(os.environ["LOCAL_RANK"])
    place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=place if kind == "cuda" else None)
    return Ranks(dist.get_rank(), dist.get_world_size(), place, dist.group.WORLD)


def choose_precision(precision, device):
    """bf16 where the hardware multiplies it; never fp16, whose range the losses leave."""
    if precision != "auto":
        return precision
    fast = {"cuda": torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8,
            "cpu": torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()}
    return "bf16" if fast.get(device.type) else "fp32"
