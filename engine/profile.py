"""
--profile 20,30: where the time of steps 20 to 29 goes, and on a GPU what filled it if memory runs out.

    tracer        for the top of each step: OUT/profile.json for chrome://tracing or ui.perfetto.dev, and a table
    table         the operations that took longest
    watch_memory  OUT/memory.RANK.pickle at the moment of an out-of-memory, for pytorch.org/memory_viz
"""

import atexit
from pathlib import Path

import torch
from torch.profiler import profile
from torch.profiler import schedule as windows

ROWS, ENTRIES = 12, 100_000  # of the table; allocations that a snapshot goes back


def tracer(c, ranks, left):
    """
    trace(leave), called before each step and once after the last. Rank 0 traces, every rank watches its GPU's memory.

    left    steps to be done in this run
    raises  ValueError if the run ends before the last step that --profile names
    """
    first, end = map(int, c.profile)
    left = min(left, c.stop_after or left)
    if end > left:
        raise ValueError(f"--profile {first},{end}: this run does {left:,} steps; name two numbers up to that")
    if first == end:
        return lambda leave: None
    if ranks.device.type == "cuda":
        watch_memory(Path(c.out, f"memory.{ranks.rank}.pickle"))
    if not ranks.main:
        return lambda leave: None

    def write(done):
        done.export_chrome_trace(str(Path(c.out, "profile.json")))
        print(table(done.key_averages(), min(steps, end) - first, ranks.device.type), f"trace: {c.out}/profile.json",
              sep="\n", flush=True)
    warm = min(first, 1)  # a step traced and thrown away, as the first start of a trace takes long
    window = windows(wait=first - warm, warmup=warm, active=end - first, repeat=1)
    profiler, steps = profile(schedule=window, on_trace_ready=write), -1

    def trace(leave):
        nonlocal steps
        steps += 1
        profiler.step() if steps else profiler.start()
        if leave:
            atexit.unregister(profiler.stop)
            profiler.stop()  # writes what there is, if it is in the midst of it
    atexit.register(profiler.stop)  # Python would crash if an error ended it within a trace
    return trace


def table(events, steps, kind):
    """The ROWS longest operations by the time that is their own: share of all, ms and calls of a step."""
    where = "cpu" if kind == "cpu" else "device"
    spent = {event.key: (getattr(event, f"self_{where}_time_total"), event.count) for event in events
             if not event.key.startswith("ProfilerStep")}
    total = sum(time for time, _ in spent.values()) or 1
    longest = sorted(spent.items(), key=lambda item: -item[1][0])[:ROWS]
    lines = [f"{100 * time / total:5.1f} %  {time / steps / 1000:9.3f} ms  {count / steps:7.4g} x  {key[:60]}"
             for key, (time, count) in longest]
    return "\n".join([f"of a step, over {steps}, {total / steps / 1000:.1f} ms of {where}:", *lines])


def watch_memory(path):
    """Allocations are recorded until the run ends; what that costs is not measured: not run on a GPU."""
    def snapshot(device, wanted, allocated, free):
        torch.cuda.memory._dump_snapshot(str(path))
        print(f"out of memory: {wanted / 2**20:,.0f} MiB more were wanted; what fills it is in {path}", flush=True)
    torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
    torch._C._cuda_attach_out_of_memory_observer(snapshot)
