"""timing.py: medians of what a clock says, arguments that rotate, and what CUDA is asked, by a stand-in for it."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from engine import timing
from engine.timing import Cpu, Cuda, Rehearsal, medians, rotating


class Scripted(Cpu):
    """Its clock reads seconds off a list of each way."""
    def __init__(self, **seconds):
        self.seconds, self.asked = {name: iter(values) for name, values in seconds.items()}, []

    def prepare(self, function, sets, graph=True):
        return function, "clock"

    def clock(self, run, times):
        self.asked.append(run)
        return next(self.seconds[run])


def test_medians_take_turns():
    here = Scripted(a=[3, 1, 2, 9, 4], b=[5, 5, 5, 5, 5])
    found = medians(here, dict(first="a", second="b"), sets=[(), ()], rounds=5)
    assert here.asked == ["a", "b"] * 5
    assert found["first"].seconds == 1.5 and found["second"].seconds == 2.5         # of one set of two
    assert found["first"].spread == pytest.approx((6.5 - 1.5) / 3) and found["second"].spread == 0


def test_short_rounds_are_repeated():
    here = Scripted(a=[1e-3, 5e-3, 5e-3, 5e-3])
    here.least = 4.5e-3
    assert medians(here, dict(way="a"), rounds=3)["way"].seconds == pytest.approx(1e-3)  # five runs a round


def test_a_way_that_cannot_run_is_named_or_raised():
    def broken():
        raise RuntimeError("no kernel for this\nmore")
    failed = {}
    found = medians(Cpu(), dict(broken=broken, fine=lambda: None), rounds=2, failed=failed)
    assert list(found) == ["fine"] and failed == dict(broken="no kernel for this")
    with pytest.raises(RuntimeError, match="no kernel"):
        medians(Cpu(), dict(broken=broken), rounds=2)


def test_arguments_fill_what_must_be_filled():
    here = Rehearsal()                                                              # 4096 bytes
    assert len(rotating(here, lambda: (torch.zeros(256), 3))) == 5                  # of 1024 bytes each: more than it
    assert len(rotating(here, lambda: (torch.zeros(10_000),))) == 1
    assert len(rotating(here, lambda: (torch.zeros(0),))) == 64
    assert len(rotating(Cpu(), lambda: (torch.zeros(256),))) == 1


def test_memory_and_operators_of_a_cpu():
    here = Cpu()
    assert 500e6 < here.peak(lambda: torch.ones(128 << 20)) < 800e6       # more than what lies free from other tests
    found = here.launches(lambda: torch.ones(4, 4) @ torch.ones(4, 4))
    assert found["aten::mm"][0] == 1 and found["aten::ones"][0] == 2


class Events:
    """What torch.cuda is asked, in order; a graph's capture fails if `breaks`."""
    def __init__(self, breaks=False):
        self.said, self.breaks = [], breaks

    def __getattr__(self, name):
        return lambda *_, **__: self.said.append(name)

    @contextmanager
    def stream(self, _):
        self.said.append("side")
        yield
        self.said.append("back")

    @contextmanager
    def graph(self, _):
        self.said.append("capture")
        yield
        if self.breaks:
            raise RuntimeError("operation not permitted when stream is capturing")

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.said.append("replay"))

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda _: None)

    def current_stream(self):
        return self.Stream()

    def Event(self, enable_timing):
        return SimpleNamespace(record=lambda: self.said.append("event"), synchronize=lambda: self.said.append("wait"),
                               elapsed_time=lambda _: 8.0)

    def get_device_properties(self, _):
        return SimpleNamespace(name="a card", L2_cache_size=100, multi_processor_count=2, total_memory=9)

    def memory_allocated(self):
        return 30

    def max_memory_allocated(self):
        return 70

    def is_available(self):
        return True


@pytest.fixture
def cuda(monkeypatch):
    events = Events()
    monkeypatch.setattr(timing.torch, "cuda", events)
    return events


def test_cuda_replays_a_graph_between_two_events(cuda):
    here = timing.machine()
    assert isinstance(here, Cuda) and here.rotate == 200 and here.describe()["device"] == "a card"
    run, how = here.prepare(lambda x: cuda.said.append(x), [("one",), ("two",)])
    both = ["one", "two"]
    assert how == "graph" and cuda.said == ["side", *both * 3, "back", "synchronize", "capture", *both, "replay"]
    cuda.said.clear()
    assert here.clock(run, 2) == 8e-3 and cuda.said == ["event", "replay", "replay", "event", "wait"]


def test_cuda_launches_what_cannot_be_captured(cuda):
    cuda.breaks = True
    run, how = Cuda().prepare(lambda: cuda.said.append("x"), [()])
    cuda.said.clear()
    run()
    assert how == "events" and cuda.said == ["x"]
    cuda.said.clear()
    assert Cuda().prepare(lambda: None, [()], graph=False)[1] == "events" and "capture" not in cuda.said


def test_what_else_cuda_is_asked(cuda):
    here = Cuda()
    assert here.peak(lambda: cuda.said.append("x")) == 40 and here.held() == 30
    assert cuda.said == ["synchronize", "reset_peak_memory_stats", "x", "synchronize"]
    cuda.said.clear()
    here.sync_is_error(True)
    here.sync_is_error(False)
    here.release()
    assert cuda.said == ["set_sync_debug_mode"] * 2 + ["empty_cache"]
    with here.sdpa("flash"):
        assert torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.math_sdp_enabled()
