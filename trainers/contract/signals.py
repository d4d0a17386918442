"""Signals that ask a rank to stop. Imports no torch: a rank listens before the seconds that its imports take."""

from __future__ import annotations

import signal

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)

_received: list[int] = []
_holding = False


class Stopped(BaseException):
    """A stop was asked for before the loop began: this attempt has nothing to save."""


def listen() -> None:
    """From now on these signals raise Stopped, and once `hold` was called are only noted."""
    for number in STOP:
        signal.signal(number, _on_signal)


def hold() -> None:
    """From now on a stop waits for the next boundary, where the ranks agree on it and save."""
    global _holding
    _holding = True


def request_stop() -> None:
    """As a signal does once `hold` was called."""
    _received.append(signal.SIGTERM)


def stop_requested() -> bool:
    return bool(_received)


def _on_signal(number: int, frame: object) -> None:
    _received.append(number)
    if not _holding and len(_received) == 1:
        raise Stopped
