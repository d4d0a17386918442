"""Stop signals: recorded by handlers, heeded by the loop."""

from __future__ import annotations

import signal
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


@dataclass(frozen=True)
class StopSignals:
    received: list[int]     # in order, not yet heeded
    wakeup: socket.socket   # readable when one has come, or a child has ended


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Stop signals are recorded and wake the loop, as does a child's end; handlers do nothing else. One
    that this process was started to ignore (nohup) stays ignored."""
    received: list[int] = []
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    before = {n: signal.getsignal(n) for n in (*STOP_SIGNALS, signal.SIGCHLD)}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        for number in STOP_SIGNALS:
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
