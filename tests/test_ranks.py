"""engine/ranks.py: one process alone; precision; what ranks do together; who leads lets go; cores and workers."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from engine import ranks
from engine.ranks import Ranks, choose_precision, cores, count_workers, leading, start_ranks

CPU = torch.device("cpu")


def test_one_process_stands_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ranks = start_ranks("cpu")
    assert ranks == Ranks(0, 1, CPU, None) and ranks.main
    assert ranks.mean(torch.tensor(3.0)) == 3 and start_ranks("cpu", talk=True) == ranks == Ranks()


def test_precision_is_what_the_device_multiplies_fast(monkeypatch):
    assert choose_precision("fp32", CPU) == "fp32" and choose_precision("bf16", CPU) == "bf16"
    for capability, has_bf16, chosen in (("AVX512", True, "bf16"), ("AVX512", False, "fp32"), ("AVX2", True, "fp32")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_bf16=has_bf16: has_bf16)
        assert choose_precision("auto", CPU) == chosen
    assert choose_precision("auto", torch.device("mps")) == "fp32"


def test_mean_is_that_of_all_ranks(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: x.add_(5))   # the other rank has 5
    mine = torch.tensor(3.0)
    assert Ranks(1, 2, CPU, object()).mean(mine) == 4 and mine == 3


@pytest.mark.parametrize("others_there", [True, False])
def test_leading_lets_the_others_go_and_its_own_error_goes_first(others_there, monkeypatch):
    said = []

    def broadcast(words, group):
        said.append(words)
        if not others_there:
            raise RuntimeError("connection closed")

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    with pytest.raises(ValueError, match="my own"), leading(Ranks(0, 2)):
        raise ValueError("my own")
    assert said == [[None]]
    with nullcontext() if others_there else pytest.raises(ValueError, match="another rank has ended"):
        with leading(Ranks(0, 2)):
            pass
    with pytest.raises(KeyError), leading(Ranks(0, 2)):  # a bug: the others notice by themselves
        raise KeyError("bug")
    assert len(said) == 2
    with leading(Ranks()):
        pass
    assert len(said) == 2


def test_what_one_fails_at_all_hear(monkeypatch):
    def gather(each, mine, group):
        assert group == "files"
        each[:] = [(1, None), mine]
    monkeypatch.setattr(dist, "all_gather_object", gather)
    two = Ranks(1, 2, CPU, object(), "files")
    assert two.together(lambda: 2) == [1, 2] and Ranks(0, 1, CPU, None).together(lambda: 3) == [3]

    def fail():
        raise OSError(28, "No space left on device", "x")
    with pytest.raises(ValueError, match="^rank 1: .Errno 28. No space left on device: 'x'$"):
        two.together(fail)


@pytest.mark.parametrize("files, affinity, found", [
    ({}, 8, 8), ({"cpu.max": "max 100000"}, 8, 8), ({"cpu.max": "250000 100000"}, 8, 2.5),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8, 8),
    ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 8, 4), ({"cpu.max": "900000 100000"}, 8, 8),
])
def test_cores_know_quotas(tmp_path, monkeypatch, files, affinity, found):
    monkeypatch.setattr(ranks.os, "sched_getaffinity", lambda _: range(affinity))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cores(tmp_path) == found


@pytest.mark.parametrize("here, given, workers", [(8, 128, 12), (8, 64, 7), (2, 8, 3), (1, 2, 1), (8, 8, 1)])
def test_workers_share_the_cores_of_their_machine(monkeypatch, here, given, workers):
    """not of all machines: 32 nodes of 8 ranks have 256"""
    monkeypatch.setattr(ranks, "cores", lambda: given)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setenv("WORLD_SIZE", "256")
    assert count_workers(-1) == workers and count_workers(0) == 0 and count_workers(5) == 5


def test_memory_that_nobody_uses(tmp_path):
    assert 1e8 < ranks.free_memory()
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   6000000 kB\n")
    assert ranks.free_memory(tmp_path / "meminfo") == 6_144_000_000
    assert ranks.free_memory(tmp_path / "none") == float("inf")
