"""Identify processes. A pid alone is not enough, because the system reuses pids."""

from __future__ import annotations

import os
from functools import cache

STOPPED = ("T", "t")  # states of a process that stands still, as proc(5) names them


def identity(pid: int) -> str | None:
    """Return a text that no other process with the same pid has; None if the process does not exist or is a zombie.

    On Linux it consists of the boot's id and the process's start in clock ticks since the boot. It does not use the time
    of day, because that can be changed.
    """
    try:
        fields = stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None if os.path.exists("/proc/self/stat") else _identity_elsewhere(pid)
    state, started_ticks = fields[0], int(fields[19])  # fields 3 and 22 of proc(5)
    return None if state in ("Z", "X") else f"{_boot()}:{started_ticks}"


def alive(pid: int, started: str) -> bool:
    """Return whether the process `pid` still runs. `started` is what `identity` returned for it earlier."""
    return identity(pid) == started


def stopped(pid: int) -> bool:
    """Return whether the process stands still, because of SIGSTOP, Ctrl-Z or a debugger. Only Linux tells."""
    return process_state(pid) in STOPPED


def process_state(pid: int) -> str:
    """Return the state of a process, one letter of proc(5); "" if it cannot be read."""
    try:
        return stat(pid)[0]
    except (OSError, IndexError):
        return ""


def stat(pid: int) -> list[str]:
    """Return what /proc says of a process, from field 3 of proc(5) on: its state, its parent, its group and so on.

    Raises:
        OSError: there is no such process, or no /proc.
    """
    # The process's name stands in parentheses and may itself contain spaces and parentheses: read after the last one.
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].decode().split()


@cache
def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _identity_elsewhere(pid: int) -> str | None:
    """Return the same on systems without /proc."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.NoSuchProcess:
        return None
