"""engine/ranks.py: one process stands alone; the precision is what the device multiplies fast; two ranks' mean."""

import torch
import torch.distributed as dist

from engine.ranks import Ranks, choose_precision, start_ranks

CPU = torch.device("cpu")


def test_one_process_stands_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ranks = start_ranks("cpu")
    assert ranks == Ranks(0, 1, CPU, None) and ranks.main
    assert ranks.mean(torch.tensor(3.0)) == 3


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
