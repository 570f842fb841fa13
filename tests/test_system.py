"""engine/system.py, here and as where a system lacks what Linux has: imports, readers that are not forked."""

import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from engine import system

ROOT = Path(__file__).parents[1]
WITHOUT = f"""
import asyncio, sys  # the library's own, which is another one on each system
sys.path.insert(0, {str(ROOT)!r})
for name in "fcntl", "resource", "pwd", "grp", "termios":
    sys.modules[name] = None
import os, select, signal, multiprocessing
os.environ["USERNAME"] = "someone"  # as Windows sets it
for module, names in (os, "fork forkpty getuid pread sched_getaffinity sysconf posix_fadvise killpg O_CLOEXEC"), (
        select, "poll"), (signal, "SIGUSR1 pthread_sigmask sigwaitinfo SIGHUP"):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
"""


def test_a_lock_is_one_process_s(tmp_path):
    with open(tmp_path / "lock", "w") as one, open(tmp_path / "lock", "w") as two:
        system.locked(one)
        with pytest.raises(BlockingIOError):
            system.locked(two, wait=False)
    with open(tmp_path / "lock", "w") as three:
        system.locked(three, wait=False)
    with open(tmp_path / "lock", "a+b") as four:
        system.locked(four, records=True)


def test_a_lock_as_windows_has_it(tmp_path, monkeypatch):
    asked, busy = [], [OSError(36, "deadlock"), None, OSError(13, "busy")]

    def locking(number, how, n):
        asked.append((how, n))
        if error := busy.pop(0):
            raise error
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_LOCK=1, LK_NBLCK=2))
    monkeypatch.setattr(system, "fcntl", None)
    with open(tmp_path / "lock", "w") as file:
        system.locked(file)                                             # ten seconds are over once: it asks again
        with pytest.raises(BlockingIOError):
            system.locked(file, wait=False)
    assert asked == [(1, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize("lacking", [False, True])
def test_bytes_from_a_place_by_many_threads(tmp_path, monkeypatch, lacking):
    if lacking:
        monkeypatch.delattr(os, "pread")
    (tmp_path / "x").write_bytes(bytes(range(256)) * 40)
    wrong = []
    with open(tmp_path / "x", "rb") as file:
        def read(first):
            for at in range(first, 10_000, 7):
                if system.read_at(file.fileno(), 5, at) != bytes((at + k) % 256 for k in range(5)):
                    wrong.append(at)
        threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert system.read_at(file.fileno(), 99, 10_239) == b"\xff"
    assert not wrong


def test_a_user_and_memory(monkeypatch):
    assert system.user() == str(os.getuid()) and 1e7 < system.peak() < system.physical()
    monkeypatch.delattr(os, "getuid")
    monkeypatch.setattr(system, "resource", None)
    monkeypatch.setenv("LOGNAME", "someone")
    assert system.user() == "someone" and system.peak() == 0


def run(code, *words):
    return subprocess.run([sys.executable, "-c", WITHOUT + code, *words], capture_output=True, text=True, cwd=ROOT)


def test_every_module_is_imported_where_all_that_is_missing():
    files = [*ROOT.glob("*.py"), *(path for wing in ("engine", "sets", "tasks", "decoders")
                                   for path in ROOT.glob(f"{wing}/*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    done = run("import importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\nprint(len(sys.argv))",
               *sorted(set(names) - {"setup"}))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.long
@pytest.mark.parametrize("workers", ["0", "1"])
def test_vectors_are_the_same_where_nothing_can_fork(tmp_path, workers):
    """readers that are started, as on macOS and Windows; a folder with a space, and one that is no ASCII"""
    import numpy as np
    from PIL import Image

    import shapes
    folder = tmp_path / "my photos é"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(shapes.scene(i, 32, 0).image).save(folder / f"{i}.png")
    words = [str(folder), "--weights", "pixels", "--device", "cpu", "--workers", workers, "--out"]
    code = "if __name__ == '__main__':\n    import multiprocessing\n    multiprocessing.set_start_method('spawn')\n" \
           "    import embed\n    embed.main(sys.argv[1:])\n"
    lock = "sys.modules['msvcrt'] = type('msvcrt', (), dict(locking=lambda *words: None, LK_LOCK=1, LK_NBLCK=2))\n"
    (tmp_path / "go.py").write_text(WITHOUT + lock + code)
    done = subprocess.run([sys.executable, str(tmp_path / "go.py"), *words, str(tmp_path / "a.npz")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    subprocess.run([sys.executable, "embed.py", *words, str(tmp_path / "b.npz")], cwd=ROOT, check=True,
                   capture_output=True)
    a, b = (np.load(tmp_path / f"{name}.npz") for name in "ab")
    assert (a["cls"] == b["cls"]).all() and (a["paths"] == b["paths"]).all() and len(a["cls"]) == 5
