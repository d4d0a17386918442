"""Processes that a rank forks: they obey signals, and do not outlive the rank. No rank is started: this file is the program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import get_context

import pytest
from conftest import alive, wait_until

from trainers.contract.signals import hold, listen, stop_requested

FORK = get_context("fork")


@pytest.fixture
def rank():
    """A function that starts this file as a rank that runs one of the functions below, and returns the process."""
    started = []

    def start(name: str) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, __file__, name], stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_children_obey_terminate_at_once(rank):
    process = rank("terminate")
    assert process.communicate(timeout=60)[0] == "[0, 1, 4, 9]\n" + "-15\n" * 20 and process.returncode == 0


def test_a_rank_with_children_still_notes_a_signal_itself(rank):
    process = rank("note")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "stop requested\n" and process.returncode == 0


def test_children_of_the_main_thread_die_with_a_rank_that_is_killed(rank):
    process = rank("leave")
    pids = json.loads(process.stdout.readline())
    assert all(alive(pid) for pid in pids.values())
    process.kill()
    process.wait()
    try:
        wait_until(lambda: not alive(pids["forked"]), 20)
        time.sleep(0.1)
        assert [name for name, pid in pids.items() if alive(pid)] == ["by a thread", "program", "program with preexec_fn"]
    finally:
        for pid in pids.values():
            if alive(pid):
                os.kill(pid, signal.SIGTERM)  # each child obeys
    wait_until(lambda: not any(alive(pid) for pid in pids.values()), 20)


# ---- what the rank runs


def square(number: int) -> int:
    return number * number


def terminate() -> None:
    with FORK.Pool(2) as pool:  # leaving the context terminates the workers
        print(pool.map(square, range(4)))
    for _ in range(20):
        child = FORK.Process(target=time.sleep, args=(600,))
        child.start()
        child.terminate()  # perhaps before the child has its handlers
        child.join()
        print(child.exitcode)


def note() -> None:
    child = FORK.Process(target=time.sleep, args=(600,))
    child.start()
    print("ready", flush=True)
    while not stop_requested():
        time.sleep(0.01)
    child.terminate()
    child.join()
    print("stop requested")


def leave() -> None:
    forked = FORK.Process(target=time.sleep, args=(600,))
    forked.start()
    by_thread = FORK.Process(target=time.sleep, args=(600,))
    thread = threading.Thread(target=by_thread.start)
    thread.start()
    thread.join()  # the end of the thread must not end the child
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    programs = [subprocess.Popen(sleep), subprocess.Popen(sleep, preexec_fn=lambda: None)]
    print(json.dumps({"forked": forked.pid, "by a thread": by_thread.pid, "program": programs[0].pid,
                      "program with preexec_fn": programs[1].pid}), flush=True)
    time.sleep(600)


if __name__ == "__main__":
    listen()
    hold()
    globals()[sys.argv[1]]()
