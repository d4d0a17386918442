"""Signals that ask a rank to stop. Imports no torch: a rank listens before its imports, which take seconds."""

from __future__ import annotations

import signal

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)

_received: list[int] = []
_holding = False


class Stopped(BaseException):
    """A stop was requested before the loop started. The attempt has nothing to save."""


def listen() -> None:
    """Handle stop signals from now on: the first one raises Stopped. After `hold`, signals are only recorded."""
    for number in STOP:
        signal.signal(number, _on_signal)


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


def _on_signal(number: int, frame: object) -> None:
    _received.append(number)
    if not _holding and len(_received) == 1:
        raise Stopped
