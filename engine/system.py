"""
What systems do differently, for the files that need it: elsewhere nothing is imported that one of them lacks.

    locked            an open file that one process has at a time
    read_at           bytes of a file, from a place in it
    user              what own folders are named after
    physical, peak    bytes of memory: of the machine; the most that this process has had

Linux is where the tests run. macOS has all but /proc; the ways of Windows are called by a test that stands in for it,
and have not run there.
"""

import getpass
import os
import sys
import threading

try:
    import fcntl
except ImportError:
    fcntl = None     # Windows
try:
    import resource
except ImportError:
    resource = None  # Windows

TURN = threading.Lock()


def locked(file, wait=True, records=False):
    """
    Gives an open file to this process alone, until it is closed.

    records  by the lock that network disks know, too    raises  BlockingIOError: another has it, without waiting
    """
    if fcntl is None:
        return locked_by_windows(file, wait)
    (fcntl.lockf if records else fcntl.flock)(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def locked_by_windows(file, wait):
    import msvcrt
    while True:
        try:
            file.seek(0)
            return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError as error:  # LK_LOCK itself gives up after ten seconds
            if not wait:
                raise BlockingIOError(*error.args) from error


def read_at(fd, n, at):
    """Up to n bytes; where the file stands does not matter, nor does it to others"""
    if hasattr(os, "pread"):
        return os.pread(fd, n, at)
    with TURN:
        os.lseek(fd, at, os.SEEK_SET)
        return os.read(fd, n)


def user():
    return str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()


def physical():
    """Bytes of the machine's memory"""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import ctypes
    words = (ctypes.c_ulonglong * 8)()  # MEMORYSTATUSEX: its size and the load, 4 bytes each, then the total
    words[0] = ctypes.sizeof(words)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(words))
    return words[1]


def peak():
    """The most bytes that this process has had in memory; 0 where the system does not say"""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
