"""
Where a process stands among the others that torchrun or srun started, its device, and what this machine has.

    start_ranks        --device -> Ranks, with a process group if there are several
    read_slurm         what srun says, in torchrun's words
    Ranks.mean         of a tensor;  Ranks.together  what all do, or fail at, with files
    exchange, leading  what ranks tell each other; rank 0's part, after which, well or not, the others may leave
    add_up, linked     tensors, over the ranks; the ranks with the fastest way for them
    choose_precision   auto -> bf16 or fp32
    count_workers      -1 -> processes that read images, for each rank
    free_memory        bytes of the host's memory that nobody uses
"""

import math
import os
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engine import config as command_line

PATIENCE = timedelta(hours=2)  # of those who wait while one rank writes or reads files; NCCL's own is 10 minutes


@dataclass
class Ranks:
    """Where this process stands; without torchrun or srun there is one, and no process group."""
    rank: int = 0
    count: int = 1             # S
    device: torch.device = torch.device("cpu")
    group: object = None       # torch.distributed process group of all ranks, or None
    files: object = None       # the same ranks through gloo, for what waits for disks

    @property
    def main(self):
        return self.rank == 0

    def __str__(self):
        nodes = os.environ.get("GROUP_WORLD_SIZE", 1)  # torchrun has one group, its agent's, on each node
        return self.device.type + (f", {self.count} ranks on {nodes} node{'s' * (str(nodes) != '1')}"
                                   if self.count > 1 else "")

    def mean(self, x):
        """Of all ranks' x; the same on each."""
        if self.group is not None:
            x = x.clone()
            dist.all_reduce(x, group=self.group)
        return x / self.count

    def together(self, work):
        """
        [what work() returns] of each rank, in order.

        raises  ValueError on all ranks, with the first one's sentence, if it raises ValueError or OSError on any
        """
        try:
            mine = work(), None
        except (ValueError, OSError) as error:
            mine = None, str(error)
        each = [mine]
        if self.group is not None:
            each = [None] * self.count
            dist.all_gather_object(each, mine, self.files)
        for rank, (_, error) in enumerate(each):
            if error:
                raise ValueError(f"rank {rank}: {error}" if self.group is not None else error)
        return [value for value, _ in each]


def start_ranks(device, talk=False):
    """
    --device -> Ranks

    talk  the ranks exchange Python objects alone: gloo does for any device, several ranks may share a GPU, and one may
          wait for another for days
    """
    kind = command_line.choose_device(device).type
    os.environ.update(read_slurm(os.environ))
    if "RANK" not in os.environ:
        return Ranks(device=torch.device(kind))
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # nothing edits them
    local, place, nccl = int(os.environ["LOCAL_RANK"]), torch.device(kind), kind == "cuda" and not talk
    if kind == "cuda":  # a task of SLURM may see its own GPU alone
        share = talk or "SLURM_STEP_ID" in os.environ
        place = torch.device(kind, local % torch.cuda.device_count() if share else local)
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if nccl else "gloo", device_id=place if nccl else None)
    talking = dist.new_group(backend="gloo", timeout=timedelta(days=30) if talk else PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size(), place, talking if talk else dist.group.WORLD, talking)


def read_slurm(env):
    """
    torchrun's variables, of one of several tasks that srun started; none otherwise, or if torchrun has set its own.

    env      os.environ. SLURM_NTASKS alone does not tell: a batch script has it too, and is one process
    raises   ValueError if the ranks of a node are not consecutive
    """
    count = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if "RANK" in env or count == 1:
        return {}
    here = [int(task) for task in env["SLURM_GTIDS"].split(",")]  # of this node
    if here != list(range(here[0], here[0] + len(here))):
        raise ValueError(f"srun: tasks {env['SLURM_GTIDS']} share a node; give it --distribution=block, so that "
                         "neighbours do")
    job, step = int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"])
    return dict(
        RANK=env["SLURM_PROCID"], WORLD_SIZE=str(count), GROUP_WORLD_SIZE=env["SLURM_STEP_NUM_NODES"],
        LOCAL_RANK=env["SLURM_LOCALID"], LOCAL_WORLD_SIZE=str(len(here)),
        MASTER_ADDR=env.get("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"])),
        MASTER_PORT=env.get("MASTER_PORT", str(20_000 + (job + step) % 10_000)),  # below the ports that a system gives
    )


def first_host(names):
    """n[003-006,9],m1 -> n003"""
    first = re.match(r"(\[[^]]*\]|[^,[])*", names)[0]
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first)


def exchange(ranks, collective, *args):
    """A collective. Raises ValueError if a rank is gone."""
    try:
        collective(*args, group=ranks.group)
    except RuntimeError as error:
        raise ValueError("another rank has ended; it or torchrun says why") from error


def linked(ranks):
    """The same ranks, their tensors through NCCL where each has a GPU to itself; all of them ask. Not run on a GPU"""
    alone = ranks.device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= torch.cuda.device_count()
    return replace(ranks, group=dist.new_group(backend="nccl")) if ranks.count > 1 and alone else ranks


def add_up(tensors, ranks):
    """Each becomes, in place and on every rank, the sum of all ranks'."""
    for x in tensors if ranks.count > 1 else ():
        exchange(ranks, dist.all_reduce, x)


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


def choose_precision(precision, device):
    """bf16 where the hardware multiplies it; never fp16, whose range the losses leave."""
    if precision != "auto":
        return precision
    fast = {"cuda": torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8,
            "cpu": torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()}
    return "bf16" if fast.get(device.type) else "fp32"


def count_workers(workers):
    """Processes that read images for this rank; -1: the machine's share of it but one core, 1 to 12."""
    if workers >= 0:
        return workers
    return max(1, min(12, int(cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def cores(control=Path("/sys/fs/cgroup")):
    """Cores that this process may use: by its affinity, and by the quota of its container (cgroups 2 or 1)."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for words in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((control / word).read_text() for word in words).split()
        except (OSError, ValueError):
            continue  # another kind of machine, or of cgroups
        if quota not in ("max", "-1"):
            found = min(found, int(quota) / int(period))
    return found


def free_memory(file=Path("/proc/meminfo")):
    """Bytes of this host's memory that nobody uses, or could be had back; inf where it does not say"""
    found = re.search(r"MemAvailable:\s+(\d+)", file.read_text()) if file.exists() else None
    return 1024 * int(found[1]) if found else math.inf
