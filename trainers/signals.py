"""Signals that ask a rank to stop. Imports no torch: a rank listens before the seconds that its imports take."""

from __future__ import annotations

import signal

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)

_received: list[int] = []


def listen() -> None:
    """From now on these signals ask for a stop at the next boundary and end nothing by themselves."""
    for number in STOP:
        signal.signal(number, lambda received, frame: _received.append(received))


def stop_requested() -> bool:
    return bool(_received)
