"""Ctrl-Z stops a run's processes together with the supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from conftest import wait_until

from launch.records.process import stopped

# A supervisor that waits for a process which an ended rank has left behind.
WAITING = """
import subprocess
from types import SimpleNamespace
from launch.supervise import supervisor
from launch.supervise.rank import Alone, Rank
from launch.supervise.signals import stop_signals

class Ended(Rank):
    def __init__(self):
        self.process = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL)
        self.rank, self.code = 0, 0
    def read_all(self): ...
    def send_group(self, number, **how):
        print(number.name, flush=True)
        super().send_group(number, **how)

with stop_signals(pausing=True) as stop:
    rank = Ended()
    print(rank.process.pid, flush=True)
    supervisor._wait_for_leftovers([rank], 600, stop, SimpleNamespace(notice=print), Alone(),
                                   SimpleNamespace(turn=lambda problem: None))
print("no process is left", flush=True)
"""


@pytest.fixture
def waiting():
    """A function that starts such a supervisor: (the supervisor, the pid of the process that was left behind)."""
    started = []

    def start(**how) -> tuple[subprocess.Popen, int]:
        process = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True, **how)
        started.append((process, int(process.stdout.readline())))
        return started[-1]

    yield start
    for process, left in started:
        for pid in (process.pid, left):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.communicate()


def test_a_process_that_a_rank_has_left_behind_pauses_and_continues(waiting):
    process, left = waiting(process_group=0)  # a job of its own, as a shell starts it
    process.send_signal(signal.SIGTSTP)
    wait_until(lambda: stopped(process.pid) and stopped(left), 20, process)
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: not stopped(process.pid) and not stopped(left), 20, process)
    os.kill(left, signal.SIGKILL)
    assert process.communicate(timeout=20)[0].endswith("no process is left\n") and process.returncode == 0


def test_ctrl_z_stops_nothing_where_no_shell_could_continue_it(waiting):
    """As with `ssh -t HOST launch ...`: the process group is orphaned."""
    process, left = waiting(start_new_session=True)
    process.send_signal(signal.SIGTSTP)
    assert process.stdout.readline() == "SIGSTOP\n"
    os.kill(left, signal.SIGKILL)
    assert process.communicate(timeout=10)[0].endswith("no process is left\n")
