"""
How time, memory and launches are measured: the same lines on a CPU and on a GPU.

    Cpu, Cuda    a machine as a stopwatch sees it
    Rehearsal    a CPU that stands in for a GPU: every line of a measurement runs, no number means anything
    medians      several ways to compute one thing, interleaved, over arguments that rotate

On a GPU a way is captured in a graph and replayed between two events, so that neither the host nor the gaps between
launches count; arguments rotate until they are twice the L2 cache, so that none is still in it.
"""

import math
import platform
import re
import shutil
import statistics
import subprocess
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

BACKENDS = dict(cudnn=SDPBackend.CUDNN_ATTENTION, flash=SDPBackend.FLASH_ATTENTION,
                efficient=SDPBackend.EFFICIENT_ATTENTION)


@dataclass(frozen=True)
class Time:
    """Of one call."""
    seconds: float             # median over the rounds
    spread: float              # distance of the quartiles over the median
    how: str                   # graph: replayed; events: launched by the host each time; clock: the host's


class Cpu:
    kind, device = "cpu", torch.device("cpu")
    shapes = "cpu"             # which of a benchmark's shapes are for it: cpu, cuda, or dry
    backends = ()              # of scaled_dot_product_attention, that one may choose
    rotate = 0                 # bytes that rotating arguments must have in all; 0 = one set will do
    least = 0.0                # seconds that one round of a way lasts at least
    most = 1000                # rounds

    def describe(self):
        capability = torch.backends.cpu.get_cpu_capability()
        return dict(device=f"{processor()}, {capability}, {torch.get_num_threads()} threads", torch=torch.__version__)

    def prepare(self, function, sets, graph=True):
        """(what runs `function` on each set of arguments, how it is timed), warm."""
        def run():
            for arguments in sets:
                function(*arguments)
        run()
        run()
        return run, "clock"

    def clock(self, run, times):
        """Seconds of so many runs."""
        start = time.perf_counter()
        for _ in range(times):
            run()
        return time.perf_counter() - start

    def compile(self, function):
        torch.compiler.reset()  # its caches hold few shapes
        return torch.compile(function)

    def compile_module(self, module):
        module.compile()

    def sdpa(self, backend):
        """Within, scaled_dot_product_attention takes this backend of the GPU's; a CPU has its own."""
        return nullcontext()

    def sync_is_error(self, on):
        """Whether a host that waits for the device raises."""

    def synchronize(self):
        """Waits for the device."""

    def release(self):
        """Gives memory that nothing uses back."""

    def held(self):
        """Bytes of tensors on the device; of a CPU not asked."""
        return 0

    def peak(self, function):
        """Bytes that a call adds to what is held before it; of Linux, from what the kernel counts."""
        status = Path("/proc/self/status")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            before = int(re.search(r"VmRSS:\s*(\d+)", status.read_text())[1])
            function()
            return (int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) - before) * 1024
        except OSError:
            return math.nan

    def launches(self, function):
        """What one call starts on the device: {name: (times, microseconds)}; for a CPU the operators of PyTorch."""
        return profiled(function, ProfilerActivity.CPU, DeviceType.CPU)


def processor():
    """The CPU's name, where the system says it."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)", path.read_text(), re.M) if path.exists() else []
    return names[0] if names else platform.processor() or "CPU"


class Rehearsal(Cpu):
    shapes, backends, rotate, most = "dry", tuple(BACKENDS), 1 << 12, 2

    def describe(self):
        return super().describe() | dict(device="rehearsal on a CPU: its numbers mean nothing")

    def compile(self, function):
        torch.compiler.reset()
        return torch.compile(function, backend="aot_eager")  # all of it but the code generator

    def compile_module(self, module):
        module.compile(backend="eager")  # what traces Python, which is what a network can fail at


class Cuda(Cpu):
    kind, device = "cuda", torch.device("cuda")
    shapes, backends = "cuda", tuple(BACKENDS)
    least = 3e-3

    def __init__(self):
        self.properties = torch.cuda.get_device_properties(0)
        self.rotate = 2 * self.properties.L2_cache_size

    def describe(self):
        p, ask = self.properties, ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(ask, capture_output=True, text=True).stdout.strip() if shutil.which(ask[0]) else ""
        return dict(device=p.name, driver=driver or "unknown", cuda=torch.version.cuda, torch=torch.__version__,
                    multiprocessors=p.multi_processor_count, l2_bytes=p.L2_cache_size, memory_bytes=p.total_memory)

    def prepare(self, function, sets, graph=True):
        def run():
            for arguments in sets:
                function(*arguments)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as capture does, so that the allocator and the libraries are ready for it
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.synchronize()
        if not graph:
            return run, "events"
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:  # something in it asks the device: then with the gaps between launches
            self.synchronize()
            return run, "events"
        graph.replay()
        return graph.replay, "graph"

    def clock(self, run, times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def sdpa(self, backend):
        return sdpa_kernel(BACKENDS[backend])

    def sync_is_error(self, on):
        torch.cuda.set_sync_debug_mode("error" if on else "default")

    def synchronize(self):
        torch.cuda.synchronize()

    def release(self):
        torch.cuda.empty_cache()

    def held(self):
        return torch.cuda.memory_allocated()

    def peak(self, function):
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, function):
        def whole():
            function()
            self.synchronize()
        return profiled(whole, ProfilerActivity.CUDA, DeviceType.CUDA)


def machine():
    """What is here."""
    return Cuda() if torch.cuda.is_available() else Cpu()


def profiled(function, activity, kind):
    """{name: (times, microseconds)} of what ran on this kind of device, the longest first."""
    with profile(activities=[activity]) as found:
        function()
    sums = {}
    for event in found.events():
        if event.device_type == kind and not event.is_user_annotation:  # a range that someone named, not work
            times, microseconds = sums.get(event.name, (0, 0.0))
            sums[event.name] = times + 1, microseconds + event.time_range.elapsed_us()
    return dict(sorted(sums.items(), key=lambda pair: -pair[1][1]))


def rotating(machine, make):
    """Sets of arguments, as many as fill twice the L2 cache.    make() -> tuple, of tensors and others"""
    sets = [make()]
    size = sum(x.numel() * x.element_size() for x in sets[0] if isinstance(x, torch.Tensor))
    return sets + [make() for _ in range(min(machine.rotate // max(size, 1), 63))]


def medians(machine, ways, sets=((),), rounds=15, failed=None, graph=True):
    """
    Time of each way on each set, median over rounds in which each way runs in turn, so that noise meets all alike.

    ways     {name: function of a set's elements}
    graph    False: as the host launches it, gaps and all
    failed   a dict that takes the errors of ways that cannot run here; None = they are raised
    returns  {name: Time}
    """
    runs, values = {}, {}
    for name, function in ways.items():
        try:
            runs[name] = machine.prepare(function, sets, graph)
        except (RuntimeError, ValueError) as error:
            if failed is None:
                raise
            failed[name] = str(error).strip().partition("\n")[0][:200]
    often = {name: max(1, math.ceil(machine.least / machine.clock(run, 1))) if machine.least else 1
             for name, (run, _) in runs.items()}
    for _ in range(min(rounds, machine.most)):
        for name, (run, _) in runs.items():
            values.setdefault(name, []).append(machine.clock(run, often[name]) / often[name] / len(sets))
    found = {}
    for name, (_, how) in runs.items():
        low, middle, high = statistics.quantiles(values[name], n=4)
        found[name] = Time(middle, (high - low) / middle, how)
    return found
