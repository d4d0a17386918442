"""Whether a process is still the one that was meant: a pid alone may have been given to another."""

from __future__ import annotations

import os
from functools import cache


def identity(pid: int) -> str | None:
    """What tells this process from any other that has had or will have its pid; None if there is none, or
    only its zombie. On Linux the boot and the clock ticks from there to its start: no time of day, which moves."""
    try:
        # The name in parentheses may hold spaces and parentheses itself: read after the last one.
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None if os.path.exists("/proc/self/stat") else _identity_elsewhere(pid)
    state, started_ticks = fields[0], int(fields[19])  # fields 3 and 22 of proc(5)
    return None if state in (b"Z", b"X") else f"{_boot()}:{started_ticks}"


def alive(pid: int, started: str) -> bool:
    """Whether the process `pid` whose identity was `started` still runs."""
    return identity(pid) == started


@cache
def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _identity_elsewhere(pid: int) -> str | None:
    """The same where there is no /proc."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.NoSuchProcess:
        return None
