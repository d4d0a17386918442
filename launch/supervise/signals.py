"""Stop signals: handlers record them, and the supervisor's loop acts on them."""

from __future__ import annotations

import signal
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


@dataclass(frozen=True)
class StopSignals:
    """The stop signals that this process has received."""

    received: list[int]     # in order of arrival; the loop removes each signal that it handles
    wakeup: socket.socket   # readable after a stop signal, or after a child has ended


@contextmanager
def stop_signals(pausing: bool = False) -> Iterator[StopSignals]:
    """Record stop signals until the block ends.

    A handler only records its signal. A stop signal and the end of a child both wake the loop. A signal that this process
    was started to ignore (nohup) stays ignored.

    Args:
        pausing: also record SIGTSTP (Ctrl-Z). The loop then stops this process itself, after its ranks.
    """
    signals = (*STOP_SIGNALS, *((signal.SIGTSTP,) if pausing else ()))
    received: list[int] = []
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    before = {number: signal.getsignal(number) for number in (*signals, signal.SIGCHLD)}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        for number in signals:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, lambda n, frame: received.append(n))
        signal.signal(signal.SIGCHLD, lambda n, frame: None)
        yield StopSignals(received, ours)
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        ours.close()
        theirs.close()
