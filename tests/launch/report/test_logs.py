from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import replace

import pytest

from launch.cluster import slurm
from launch.records.process import identity
from launch.records.run import read_run
from launch.report import logs
from trainers.contract.errors import UserError
from trainers.contract.files import replace_json, update_json
from trainers.contract.paths import RunPaths


@pytest.fixture
def run(tmp_path):
    """A run whose process is this test's own process."""
    paths = RunPaths(tmp_path / "r-1")
    paths.root.mkdir()
    job = {"kind": "local", "host": socket.gethostname(), "pid": os.getpid(), "started": identity(os.getpid())}
    replace_json(paths.record, {"id": "r-1", "task": "r", "state": "running", "step": 0, "attempt": 1, "job": job,
                                "created": "2026-01-01T00:00:00+00:00"})
    return read_run(paths.root)


def append(run, attempt, rank, text):
    """Append to the log of a rank."""
    file = run.paths.log(attempt, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab") as opened:
        opened.write(text.encode())


def printed(run, **choice):
    """What `logs.follow` writes."""
    output = []
    logs.follow(run, write=output.append, **choice)
    return "".join(output)


def test_all_attempts_in_order_or_only_one(run):
    for number in (10, 9):
        append(run, number, 0, f"of {number}\nmore\n")
        append(run, number, 1, f"rank 1 of {number}")
    assert printed(run) == "of 9\nmore\n--- attempt 10 ---\nof 10\nmore\n"
    assert printed(run, attempt=9) == "of 9\nmore\n"
    assert printed(run, rank=1, attempt=10) == "rank 1 of 10\n"
    assert list(logs.lines(run, rank=1, attempt=9)) == [{"attempt": 9, "rank": 1, "line": "rank 1 of 9"}]


def test_a_missing_rank_or_attempt_is_an_error(run):
    with pytest.raises(UserError, match="no log of rank 0") as caught:
        printed(run)
    assert caught.value.hint == "it has no rank yet"
    for rank in range(3):
        append(run, 1, rank, "x\n")
    with pytest.raises(UserError, match="no log of rank 7") as caught:
        printed(run, rank=7)
    assert caught.value.hint == "it has ranks 0 to 2"
    with pytest.raises(UserError, match="no attempt 3") as caught:
        printed(run, attempt=3)
    assert caught.value.hint == "it has attempt 1"


def test_follow_continues_with_new_attempts_until_the_end(run, monkeypatch):
    monkeypatch.setattr(logs, "POLL_S", 0.01)
    output, failed = [], []

    def wait_for(text):
        deadline = time.monotonic() + 20
        while text not in "".join(output):
            assert time.monotonic() < deadline, (text, output)
            time.sleep(0.005)

    def node():
        try:
            chinese = "中文\n".encode()
            append(run, 1, 0, "one\nhal")
            wait_for("one\n")
            assert "hal" not in "".join(output), "half a line is held back"
            append(run, 1, 0, "f\n")
            wait_for("half\n")
            with open(run.paths.log(1, 0), "ab", buffering=0) as opened:
                opened.write(chinese[:2])
                time.sleep(0.05)
                opened.write(chinese[2:])
            wait_for("中文\n")
            append(run, 2, 0, "two\n")
            wait_for("two\n")
            append(run, 2, 0, "last words")
        except AssertionError as error:
            failed.append(error)
        update_json(run.paths.record, state="finished")

    thread = threading.Thread(target=node)
    thread.start()
    logs.follow(run, follow=True, write=output.append)
    thread.join()
    assert not failed
    assert "".join(output) == "one\nhalf\n中文\n--- attempt 2 ---\ntwo\nlast words\n"


def test_follow_continues_when_another_attempt_comes_after_a_failed_one(run, monkeypatch):
    monkeypatch.setattr(logs, "POLL_S", 0.01)
    output, looks = [], []
    going = logs.Watch.going

    def look(watch):
        looks.append(going(watch))
        if looks[-1] is False and len(output) == 1:  # between the two attempts
            update_json(run.paths.record, state="running", attempt=2)
            append(run, 2, 0, "two\n")
        return looks[-1]

    def write(text):
        output.append(text)
        update_json(run.paths.record, state="failed" if text == "one\n" else "finished")

    monkeypatch.setattr(logs.Watch, "going", look)
    append(run, 1, 0, "one\n")
    logs.follow(run, follow=True, write=write)
    assert "".join(output) == "one\n--- attempt 2 ---\ntwo\n" and False in looks[:2]


def test_follow_shows_an_attempt_that_begins_while_slurms_last_answer_says_that_the_job_waits(run, monkeypatch):
    """An attempt begins with its folder. Its record comes later, and the run's record after that."""
    monkeypatch.setattr(logs, "POLL_S", 0.01)
    monkeypatch.setattr(logs, "QUIET_S", 0.0)
    waiting = slurm.Queued("7", "PENDING", "Priority", None, 1, 1, "", "main", None, None)
    monkeypatch.setattr(slurm, "look", lambda ids, ended=True: ({"7": waiting}, {}))
    job = {"kind": "slurm", "cluster": "c", "ids": ["7"], "submission": 1}
    update_json(run.paths.record, state="preempted", attempt=1, job=job)
    append(run, 1, 0, "one\n")
    replace_json(run.paths.attempt_record(1), {"attempt": 1, "outcome": "preempted", "job": "7"})
    output = []

    def node():
        while "waiting in the queue" not in "".join(output):
            time.sleep(0.005)
        run.paths.attempt(2).mkdir()
        time.sleep(0.1)
        replace_json(run.paths.attempt_record(2), {"attempt": 2, "outcome": "running", "job": "7"})
        time.sleep(0.1)
        update_json(run.paths.record, state="running", attempt=2)
        append(run, 2, 0, "two\n")
        time.sleep(0.1)
        append(run, 2, 0, "finished\n")
        replace_json(run.paths.attempt_record(2), {"attempt": 2, "outcome": "finished", "job": "7"})
        update_json(run.paths.record, state="finished")

    thread = threading.Thread(target=node)
    thread.start()
    logs.follow(run, follow=True, write=output.append)
    thread.join()
    assert "".join(output).splitlines() == [
        "one", "--- attempt 1 has ended; waiting in the queue: jobs of higher priority come first (Priority) ---",
        "--- attempt 2 has begun; rank 0 has not printed anything yet ---", "--- attempt 2 ---", "two", "finished"]


def test_follow_says_each_thing_that_it_waits_for(run, monkeypatch):
    monkeypatch.setattr(logs, "POLL_S", 0.01)
    monkeypatch.setattr(logs, "ASK_OFTEN_S", 0.0)
    monkeypatch.setattr(logs, "QUIET_S", 0.0)
    job = slurm.Queued("7", "PENDING", "Resources", None, 1, 1, "", "main", None, None)
    answers = [job, replace(job, state="RUNNING", node_list="n1"), None]
    monkeypatch.setattr(slurm, "look", lambda ids, ended=True: ({"7": answers[0]} if answers[0] else {}, {}))
    monkeypatch.setattr(slurm, "accounted", lambda ids: {})
    update_json(run.paths.record, state="submitted", attempt=0,
                job={"kind": "slurm", "cluster": "c", "ids": ["7"], "submission": 1})
    output = []

    def write(text):
        output.append(text)
        del answers[0]

    logs.follow(run, follow=True, write=write)
    assert output == ["--- waiting in the queue: it waits for nodes, cores or GPUs to become free (Resources) ---\n",
                      "--- job 7 runs on n1; attempt 1 is being started ---\n"]


def test_follow_of_an_ended_run_prints_the_log_and_ends(run):
    append(run, 1, 0, "x\n")
    update_json(run.paths.record, state="failed")
    assert printed(read_run(run.paths.root), follow=True) == "x\n"


def test_control_c_ends_quietly(run):
    append(run, 1, 0, "x\ny\n")
    output = []

    def write(text):
        output.append(text)
        raise KeyboardInterrupt

    logs.follow(run, follow=True, write=write)
    assert output == ["x\n"]
