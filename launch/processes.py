"""Whether a process is still the one that was meant: a pid alone may have been given to another."""

from __future__ import annotations

import os
from functools import cache

CLOCK_ERROR_S = 2.0  # /proc counts from boot, whose time of day moves a little with the clock's corrections


def identity(pid: int) -> float | None:
    """When the process was created, in seconds since 1970; None if there is none, or only its zombie."""
    try:
        # The name in parentheses may hold spaces and parentheses itself: read after the last one.
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None if os.path.exists("/proc/self/stat") else _identity_elsewhere(pid)
    state, started_ticks = fields[0], int(fields[19])  # fields 3 and 22 of proc(5)
    return None if state in (b"Z", b"X") else _boot_time() + started_ticks / os.sysconf("SC_CLK_TCK")


def alive(pid: int, started: float) -> bool:
    """Whether the process `pid` that was created at `started` still runs."""
    created = identity(pid)
    return created is not None and abs(created - started) < CLOCK_ERROR_S


@cache
def _boot_time() -> float:
    with open("/proc/stat", "rb") as file:
        return float(next(line for line in file if line.startswith(b"btime")).split()[1])


def _identity_elsewhere(pid: int) -> float | None:
    """The same where there is no /proc."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
