"""
Runs of train.py in processes that are forked, not started: a second less for each, of which the tests below need many.

    start    one process, or ranks that find each other as under torchrun, in a process group of their own
    Group    what became of them
"""

import faulthandler
import os
import signal
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from test_train import MICRO

import train
from engine import checkpoint, progress
from engine import config as command_line


class Group:
    def __init__(self, pids, log, store):
        self.pids, self.log, self.store, self.codes, self.started = pids, log, store, {}, time.monotonic()

    def wait(self, seconds=60):
        """Exit codes by rank, and the seconds that it took; kills what is still there."""
        start = time.monotonic()
        while len(self.codes) < len(self.pids) and time.monotonic() - start < seconds:
            self.look()
            time.sleep(0.02)
        took = time.monotonic() - start
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self.codes[rank] = "hung"
        return [self.codes[rank] for rank in range(len(self.pids))], took

    def look(self):
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)

    def signal(self, number):
        os.killpg(self.pids[0], number)

    def text(self):
        return self.log.read_text()


def start(out, *words, ranks=1, prepare=lambda rank: None, base=MICRO, main=train.main):
    """prepare(rank) runs in each before main([*base, --out OUT, *words])."""
    log, store = out.with_name(out.name + ".log"), None
    out.parent.mkdir(parents=True, exist_ok=True)
    env = dict(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="localhost", TORCHELASTIC_USE_AGENT_STORE=True)
    if ranks > 1:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        env["MASTER_PORT"] = store.port
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                with open(log, "a") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
                sys.argv = ["train.py", *base, "--out", str(out), *words]
                checkpoint.commit = progress.commit = lambda: "one"  # of all runs, whoever edits a file meanwhile
                faulthandler.dump_traceback_later(100)  # into the log: where it stands, if it hangs
                torch.set_num_threads(1)  # the pool of threads did not survive the fork
                if ranks > 1:
                    here = env | dict(RANK=rank, LOCAL_RANK=rank)
                    os.environ.update({name: str(value) for name, value in here.items()})
                prepare(rank)
                command_line.run(main)
                code = 0
            except SystemExit as error:
                code = error.code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return Group(pids, log, store)
