"""Signals that ask a rank to stop. Imports no torch: a rank listens before its imports, which take seconds."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
SET_DEATH_SIGNAL = 1  # of prctl

_received: list[int] = []
_holding = False


class Stopped(BaseException):
    """A stop was requested before the loop started. The attempt has nothing to save."""


def listen() -> None:
    """Handle stop signals from now on: the first one raises Stopped. After `hold`, signals are only recorded."""
    before = {number: signal.getsignal(number) for number in STOP}
    for number in STOP:
        signal.signal(number, _on_signal)
    _free_children(before)


def hold() -> None:
    """Let a stop wait, from now on, for the next step boundary, where the ranks agree to stop and save."""
    global _holding
    _holding = True


def request_stop() -> None:
    """Request a stop without a signal, with the effect that a signal has after `hold`."""
    _received.append(signal.SIGTERM)


def stop_requested() -> bool:
    """Return whether a stop was requested."""
    return bool(_received)


@contextmanager
def blocked() -> Iterator[None]:
    """Let stop signals wait until the end of a block. Processes that start in it are born with the signals blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_stops_to_rank(worker: int = 0) -> None:
    """In a process that works for a rank: ignore stop signals, and die when the parent dies. Start it while they are `blocked`.

    SLURM sends its signals to all processes of a job. The rank needs its workers until it has stopped at a boundary. Programs
    that the worker starts do not ignore the signals.

    Args:
        worker: its number; torch passes this.
    """
    for number in STOP:
        signal.signal(number, _ignore)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)


def _ignore(number: int, frame: object) -> None: ...  # SIG_IGN would be inherited by programs that the process starts


def _on_signal(number: int, frame: object) -> None:
    _received.append(number)
    if not _holding and len(_received) == 1:
        raise Stopped


def _free_children(handlers: dict[signal.Signals, Any]) -> None:
    """Give `handlers` to children that this process makes by fork, and let them die with this process.

    A child that inherited the rank's handlers would ignore `terminate`, and its parent would wait for the child for ever. Signals
    are blocked during the fork, so that a signal cannot reach the child before the child has its handlers.

    The kernel kills a child when the thread that forked it ends. So only children of the main thread die with the rank. The
    supervisor kills the others. A child that will execute another program (W&B's writer) keeps the time that the supervisor
    gives it. Children of children, such as a daemon that a child starts, are left to the supervisor, too.
    """
    rank, main = os.getpid(), threading.get_ident()
    prctl = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None
    forking = threading.local()
    is_rank = True

    def block() -> None:
        forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, forking.mask)

    def in_child() -> None:
        nonlocal is_rank
        made_by_rank, is_rank = is_rank, False
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        executes = sys._getframe(1).f_globals.get("__name__") in ("subprocess", "os")  # with preexec_fn, or by os.spawn
        if prctl is not None and made_by_rank and threading.get_ident() == main and not executes:
            prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != rank:  # the rank has ended before prctl
                os._exit(1)
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=in_child)
