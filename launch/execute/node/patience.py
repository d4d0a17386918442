"""Write files again and again while a disk is full or a folder cannot be written."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TypeVar

from launch.records.life_sign import LifeSign
from launch.supervise.signals import StopSignals
from trainers.contract.errors import UserError
from trainers.contract.text import duration

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0

T = TypeVar("T")


class OutOfPatience(OSError):
    """A file could not be written in the time that was left."""


@dataclass
class Patience:
    """Calls a function that writes files, again and again until it succeeds, or until this process is asked to stop.

    A job that ends because of a full disk loses its place in the queue: to wait for room is better.
    """

    stop: StopSignals
    notice: Callable[[str], None]
    beat: Callable[[], None] = lambda: None  # called about once a second during a pause
    deadline: float = inf                    # time.monotonic() after which no pause begins
    sign: LifeSign | None = None             # of the running attempt: tells during a pause what this process waits for
    story: str | None = None                 # the longest wait that succeeded since the last `take_story`, in words
    _longest_s: float = 0.0

    def __call__(self, write: Callable[[], T]) -> T:
        """Return what `write` returns.

        Raises:
            OutOfPatience: a stop signal arrived, or the deadline passed.
            FileNotFoundError: a folder does not exist (any more): to wait would not help.
        """
        pause_s, began, why = FIRST_PAUSE_S, time.monotonic(), None
        while True:
            try:
                result = write()
            except (OSError, UserError) as raised:
                error = raised if isinstance(raised, OSError) else raised.__cause__
                if not isinstance(error, OSError) or isinstance(error, (FileNotFoundError, NotADirectoryError)):
                    raise
                if pause_s == FIRST_PAUSE_S:
                    self.notice(f"warning: {error.filename or 'the run directory'} cannot be written: {error.strerror}; trying "
                                "again for as long as the job may run")
                if not self._wait(pause_s, f"the run directory cannot be written: {error.strerror}"):
                    raise OutOfPatience(error.errno, error.strerror, error.filename) from error
                pause_s, why = min(2 * pause_s, LONGEST_PAUSE_S), error.strerror
            else:
                if why and self.sign:
                    self.sign.turn(None)
                if why and (waited_s := time.monotonic() - began) > self._longest_s:
                    self._longest_s = waited_s
                    self.story = f"waited {duration(waited_s)} until the run directory could be written ({why})"
                    self.notice(self.story)
                return result

    def hurry(self, seconds: float) -> None:
        """From now on, wait only for so many seconds."""
        self.deadline = time.monotonic() + seconds

    def take_story(self) -> str | None:
        """Return the longest wait since the last call, in words. Each attempt tells of its own waits only."""
        story, self.story, self._longest_s = self.story, None, 0.0
        return story

    def _wait(self, pause_s: float, problem: str) -> bool:
        """Wait. Return whether to try again."""
        end = time.monotonic() + pause_s
        while (now := time.monotonic()) < end:
            if self.stop.received or now > self.deadline:
                return False
            self.beat()
            if self.sign:
                self.sign.turn(problem)
            if select.select([self.stop.wakeup], [], [], min(1.0, end - now))[0]:
                self.stop.wakeup.recv(4096)
        return True
