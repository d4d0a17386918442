"""Files that cannot be written are written later."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from launch.execute.node import patience as module
from launch.execute.node.patience import OutOfPatience, Patience
from launch.supervise.signals import stop_signals
from trainers.contract.errors import UserError


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def patience(monkeypatch, said):
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.02)
    with stop_signals() as stop:
        yield Patience(stop, said.append)


def failing(times: int, error: Exception):
    """A function that raises `error` so many times, and then returns the number of its calls."""
    calls = []

    def write() -> int:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return write


FULL = OSError(errno.ENOSPC, "No space left on device", "/runs/r/run.json")


def chained() -> UserError:
    error = UserError("the attempt cannot be made")
    error.__cause__ = FULL
    return error


@pytest.mark.parametrize("error", [FULL, PermissionError(errno.EACCES, "Permission denied"), chained()])
def test_a_write_is_tried_until_it_succeeds_and_the_wait_is_told(patience, said, error):
    beats = []
    patience.beat = lambda: beats.append(1)
    assert patience(failing(3, error)) == 4 and beats
    assert len(said) == 2 and "trying again for as long as the job may run" in said[0]
    assert said[1] == patience.story and "until the run directory could be written" in said[1]


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file"), UserError("taken"), ValueError()])
def test_an_error_that_waiting_does_not_cure_is_raised_at_once(patience, said, error):
    with pytest.raises(type(error)):
        patience(failing(1, error))
    assert said == []


def test_a_stop_signal_ends_the_wait(patience, monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 60.0)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR2)).start()
    began = time.monotonic()
    with pytest.raises(OutOfPatience, match="No space left on device"):
        patience(failing(9, FULL))
    assert time.monotonic() - began < 10


def test_a_deadline_ends_the_wait(patience):
    patience.hurry(0.3)
    with pytest.raises(OutOfPatience):
        patience(failing(1000, FULL))


def test_each_attempt_tells_of_its_own_waits_only(patience):
    patience(failing(3, FULL))
    assert "until the run directory could be written" in patience.take_story()
    patience(failing(0, FULL))
    assert patience.take_story() is None
    patience(failing(1, FULL))  # a shorter wait than the first
    assert "until the run directory could be written" in patience.take_story()


def test_a_process_that_waits_for_a_disk_gives_signs_of_life_that_say_so(patience):
    signs = []
    patience.sign = SimpleNamespace(turn=signs.append)
    patience(failing(1, FULL))
    assert set(signs[:-1]) == {"the run directory cannot be written: No space left on device"} and signs[-1] is None
