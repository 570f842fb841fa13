"""
What ends a run before its last step, or keeps a step from the weights.

    Interrupt    Ctrl-C, SIGTERM, SIGUSR1: save and leave
    Verdicts     what all ranks agree on in every step, while the host goes on: to leave; that a number is not finite
    Behind       a thread that has its work done before the run ends, well or not
    Peers        a rank that fails, or is gone, ends the others

    with Interrupt() as interrupt, Peers(start_ranks(device)) as ranks: train(c, ranks, interrupt)
"""

import gc
import math
import os
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data import STOPS
from engine import config as command_line

# --------------------------------------------------------------------------------
# Signals


class Interrupt:
    """
    A signal once: save and leave after this step. Twice, AGAIN seconds apart or more: leave at once. Schedulers and
    torchrun both send theirs to each process, moments apart: that is one request.

    Within it Python's collector rests; `collect` is for one moment of all ranks, or each would wait for each in turn.
    """
    AGAIN = 5  # seconds
    asked = 0.0  # when, by time.monotonic(); 0 = not yet

    def __enter__(self):
        self.old = {number: signal.signal(number, self.ask) for number in STOPS}
        gc.disable()
        return self

    def __exit__(self, *error):
        gc.enable()
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        if not self.asked:
            self.leave()
        elif time.monotonic() - self.asked >= self.AGAIN and number != getattr(signal, "SIGUSR1", None):
            raise KeyboardInterrupt

    def leave(self):
        """Asks for the same as a signal; from any thread, and however often."""
        self.asked = self.asked or time.monotonic()

    def collect(self, step, every=500):
        if step % every == 0:
            gc.collect()

# --------------------------------------------------------------------------------
# Numbers


class Verdicts:
    """
    verdicts.judge(...) in each step, before the optimizer's: one all-reduce of a few numbers. What it says is read in
    the next step, when the device is done with it. `skip`, on the device, keeps the optimizer from a step that is not
    finite on any rank: fused AdamW reads it as found_inf, as with a GradScaler.

    A gradient that is not finite costs its step, and is told with its images; PATIENCE of them in a row end the run,
    and so does a loss that is not finite, by a ValueError on all ranks. The weights stand as they were before.
    """
    PATIENCE = 3  # steps in a row

    def __init__(self, ranks, interrupt, name_of):
        """name_of: index in the source -> name of the image"""
        self.ranks, self.interrupt, self.name_of = ranks, interrupt, name_of
        self.agreed, self.skipped, self.in_a_row, self.open = False, 0, 0, None

    @property
    def leave(self):
        return self.agreed or self.ranks.group is None and bool(self.interrupt.asked)

    def judge(self, step, terms, norms, indices):
        """
        terms    of the loss, 0-dim, this rank's    norms  of the gradients, the same on all ranks
        returns  the terms' means over all ranks and the norms, 0-dim, on the device
        """
        self.settle()
        own = torch.stack([x.detach().float() for x in terms.values()])
        asked = torch.full((1,), float(bool(self.interrupt.asked)), device=own.device)
        means = self.ranks.mean(torch.cat([asked, own]))
        said = torch.cat([means, torch.stack([x.float() for x in norms.values()]), own])
        self.skip = (~said.isfinite().all()).float()
        self.open = step, list(terms), list(norms), Later(said), indices
        return dict(zip((*terms, *norms), said[1 : 1 + len(terms) + len(norms)].unbind(), strict=True))

    def settle(self):
        """Reads what the last judge() said: it waits for that step, unless the device has gone on since."""
        if self.open is None:
            return
        (step, terms, norms, later, indices), self.open = self.open, None
        values = later.read()
        self.agreed = values[0] > 0
        means, own = values[1 : 1 + len(terms)], values[1 + len(terms) + len(norms) :]
        wrong = describe(terms, own if any(not math.isfinite(v) for v in own) else means)
        if wrong:
            self.stop(f"step {step}, rank {self.ranks.rank}: {wrong}; stopped before the optimizer step, the last "
                      f"checkpoint stands. Images: {self.names(indices)}", describe(terms, own))
        wrong = describe(norms, values[1 + len(terms) : 1 + len(terms) + len(norms)])
        self.in_a_row = self.in_a_row + 1 if wrong else 0
        if wrong:
            self.skipped += 1
            print(f"step {step}, rank {self.ranks.rank}: {wrong}; the step is skipped. Images: {self.names(indices)}",
                  flush=True)
        if self.in_a_row == self.PATIENCE:
            self.stop(f"step {step}: {wrong}; {self.in_a_row} steps in a row had to be skipped; the last checkpoint "
                      "stands", self.ranks.main)

    def stop(self, sentence, mine):
        raise (ValueError if mine else Elsewhere)(sentence)

    def names(self, indices):
        return ", ".join(self.name_of(i) for i in indices.tolist())


def describe(names, values):
    return ", ".join(f"{name} is {v}" for name, v in zip(names, values, strict=True) if not math.isfinite(v))


class Later:
    """A tensor's numbers for the host, on their way without it."""
    def __init__(self, x):
        self.x, self.event = x, None
        if x.is_cuda:
            self.x = torch.empty(x.shape, pin_memory=True).copy_(x, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self):
        if self.event:
            self.event.synchronize()
        return self.x.tolist()

# --------------------------------------------------------------------------------
# Ranks that fail


class Elsewhere(ValueError):
    """An error that another rank will tell."""


class Behind(threading.Thread):
    """Work beside the loop. Peers waits for it, also after an error; but not where a second Ctrl-C leaves at once."""

    def __init__(self, work, failed):
        """failed()  is called, in the thread, if work() raises; `error` holds what"""
        super().__init__(daemon=True)
        self.work, self.failed, self.error = work, failed, None
        self.start()

    def run(self):
        try:
            self.work()
        except BaseException as error:  # for the loop, which has to tell it
            self.error = error
            self.failed()


class Peers:
    """
    A rank that raises says why, once for all of them, and the others leave: they may be waiting for it in a collective
    that will never end. A thread on each asks the store of torchrun, and looks whether its neighbour still lives.
    """
    EVERY, GRACE = 0.5, 5  # seconds between looks; for another rank to say what this one suffers from

    def __init__(self, ranks):
        self.ranks, self.over = ranks, threading.Event()

    def __enter__(self):
        if self.ranks.group is not None:
            env = os.environ
            self.store = dist.PrefixStore(
                f"peers {env.get('TORCHELASTIC_RESTART_COUNT', 0)}",
                dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), wait_for_workers=False,
                              timeout=timedelta(seconds=10)))
            self.store.set(f"pid {self.ranks.rank}", str(os.getpid()))
            local, size = int(env["LOCAL_RANK"]), int(env["LOCAL_WORLD_SIZE"])
            self.neighbour = self.ranks.rank - local + (local + 1) % size
            self.thread = threading.Thread(target=self.look, daemon=True)
            self.thread.start()
        return self.ranks

    def __exit__(self, kind, error, trace):
        for thread in threading.enumerate() if kind is not KeyboardInterrupt else ():
            if isinstance(thread, Behind):
                thread.join()
        if self.ranks.group is None:
            return
        if error is None:
            others = [f"done {rank}" for rank in range(1, self.ranks.count)]
            while self.ranks.main and not self.store.check(others):  # where srun starts the ranks, 0 has the store
                time.sleep(self.EVERY / 5)
            self.over.set()
            self.thread.join()  # Python may not end while it asks the store
            self.store.set(f"done {self.ranks.rank}", "")
            dist.destroy_process_group()
            return
        # others' troubles come here as a collective that breaks; the thread still looks who is in trouble
        if isinstance(error, (RuntimeError, Elsewhere)) and not isinstance(error, torch.OutOfMemoryError):
            self.await_reason()
        if not isinstance(error, KeyboardInterrupt) and not command_line.on_purpose(error):
            traceback.print_exception(error)
        self.fail(f"rank {self.ranks.rank}: {str(error).partition(chr(10))[0] or kind.__name__}")

    def look(self):
        """Runs in a thread, as long as the run."""
        pid = None
        while not self.over.wait(self.EVERY):
            try:
                if self.store.check(["reason"]):
                    self.leave()
                if pid is None and self.store.check([f"pid {self.neighbour}"]):
                    pid = int(self.store.get(f"pid {self.neighbour}"))
                if pid is not None and not lives(pid) and not self.store.check([f"done {self.neighbour}"]):
                    self.fail(f"rank {self.neighbour} is gone: it was killed, perhaps for want of memory")
            except RuntimeError:  # the store went, and with it torchrun and the ranks beside it
                self.leave()

    def await_reason(self):
        end = time.monotonic() + self.GRACE
        while time.monotonic() < end:
            try:
                if self.store.check(["reason"]):
                    self.leave()
            except RuntimeError:  # the rank that had the store has said why, and is gone
                self.leave()
            time.sleep(self.EVERY / 5)

    def fail(self, reason):
        """Ends this process, and by it all; the first to come tells the reason."""
        try:
            first = self.store.add("failures", 1) == 1
        except RuntimeError:
            first = True
        if first:
            print(f"{os.path.basename(sys.argv[0])}: {reason}", file=sys.stderr, flush=True)
            self.store.set("reason", reason)
        self.leave()

    def leave(self):
        """At once: the main thread may wait in a collective, and so would what Python does at its end."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


def lives(pid):
    """Whether a process of this machine is there, and not only for its parent to be told that it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        if Path("/proc/self").exists():
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
