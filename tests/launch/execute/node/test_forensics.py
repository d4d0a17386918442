"""How an attempt ended, as the head judges it, and what the head of the next job finds."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.execute.node import forensics
from launch.execute.node.forensics import count_failures, joint_outcome, record_lost_attempts, record_silent_head
from launch.execute.node.place import Place
from launch.supervise import group as group_module
from launch.supervise.group import Link, NodeGroup
from launch.supervise.rank import Outcome
from trainers.contract.files import read_json, replace_json
from trainers.contract.paths import RunPaths

HOSTS = ["n1", "n2"]


@pytest.fixture
def two(monkeypatch) -> tuple[NodeGroup, NodeGroup]:
    """The head and the other node's process."""
    monkeypatch.setattr(forensics, "COLLECT_S", 0.2)
    monkeypatch.setattr(group_module, "BEAT_S", 0.1)
    ends = socket.socketpair()
    head, other = (NodeGroup(node, "127.0.0.1", None, {1 - node: Link(end)}) for node, end in enumerate(ends))
    yield head, other
    head.close(), other.close()


def judged(head: NodeGroup, batch: str | None, mine: Outcome = Outcome("finished")) -> tuple[Outcome, float]:
    """The head's judgment and how long it took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        RunPaths(Path(folder)).attempt(1).mkdir(parents=True)
        plan = SimpleNamespace(batch=batch, grace_s=0.2, folder=folder, attempt=1)
        outcome = joint_outcome(mine, head, plan, HOSTS)
        assert RunPaths(Path(folder)).life_sign(1, 0).exists()
    return outcome, time.monotonic() - began


def work(other: NodeGroup, seconds: float, outcome: Outcome) -> None:
    """Let the other process give signs of life for some time, and then report how its ranks ended."""
    def run() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            other.receive()
            time.sleep(0.05)
        other.send({"ended": asdict(outcome)})

    threading.Thread(target=run).start()


def test_the_head_waits_for_a_script_that_works_longer_on_another_node(two):
    head, other = two
    head.silence_s = 0.8
    work(other, 2.0, Outcome("finished"))
    outcome, seconds = judged(head, batch=None)
    assert outcome.kind == "finished" and seconds > 1.5


def test_the_head_does_not_wait_for_a_process_that_gives_no_sign_of_life(two):
    head, _ = two
    head.silence_s = 0.5
    outcome, seconds = judged(head, batch=None)
    assert outcome.kind == "failed" and outcome.failure.message == "the node process on n2 gave no sign of life"
    assert outcome.failure.node == "n2" and outcome.failure.retry and seconds < 20


@pytest.mark.parametrize("batch, mine", [("32", Outcome("finished")), (None, Outcome("preempted", signal="SIGUSR2"))])
def test_the_head_waits_only_shortly_for_a_task_and_after_a_stop(two, batch, mine):
    head, other = two
    work(other, 2.0, mine)
    outcome, seconds = judged(head, batch, mine)
    assert outcome.kind == "failed" and outcome.failure.message == "the node process on n2 is gone" and seconds < 1.8


def test_what_stopping_cost_on_another_node_is_told(two):
    head, other = two
    other.send({"ended": asdict(Outcome("preempted", signal="SIGUSR2", note="rank 3 was killed"))})
    outcome, _ = judged(head, "32", Outcome("preempted", signal="SIGUSR2"))
    assert (outcome.kind, outcome.note) == ("preempted", "rank 3 was killed")


@pytest.fixture
def paths(tmp_path: Path, monkeypatch) -> RunPaths:
    """A run whose attempt 1 runs by its record."""
    monkeypatch.setattr(forensics, "down_nodes", lambda nodes: {})
    paths = RunPaths(tmp_path / "run-1")
    paths.attempt(1).mkdir(parents=True)
    paths.submission(1).mkdir(parents=True)
    replace_json(paths.attempt_record(1), {"attempt": 1, "outcome": "running", "nodes": HOSTS, "host": "n1", "failure": None})
    replace_json(paths.record, {"state": "running"})
    return paths


@pytest.mark.parametrize("left, message, counts", [
    ("again-9_3-1-137", "the node process on n1 was killed", True),
    ("again-9_3-1-76", "it stopped at the time limit, but its record could not be written", False),
    ("again-9_3-0-137", "how it ended could not be recorded: SLURM ended the job first (a node failed, or the grace was too "
                        "short), or the run's folder could not be written", False),
])
def test_an_attempt_without_an_end_is_explained_by_what_the_batch_shell_left(paths, left, message, counts):
    (paths.submission(1) / left).touch()
    record_lost_attempts(paths, Place("9_3", 2, 0, 2, 3), paths.submission(1))
    attempt = read_json(paths.attempt_record(1))
    assert (attempt["outcome"], attempt["failure"]["message"], attempt["failure"]["retry"]) == ("lost", message, counts)


@pytest.mark.parametrize("requeued, state", [(True, "preempted"), (False, "failed")])
def test_another_node_writes_the_record_of_a_head_that_is_silent(paths, requeued, state):
    record_silent_head(paths, "n1", requeued)
    attempt = read_json(paths.attempt_record(1))
    assert (attempt["outcome"], attempt["failure"]["node"]) == ("lost", "n1") and attempt["ended"]
    assert attempt["failure"]["message"] == "the node process on n1 gave no sign of life"
    assert read_json(paths.record)["state"] == state
    before = json.dumps(attempt)
    record_silent_head(paths, "n9", requeued)  # the attempt has ended already
    assert json.dumps(read_json(paths.attempt_record(1))) == before


@pytest.mark.parametrize("failure, failures", [(None, 0), ({"retry": False}, 0), ({"retry": True}, 1)])
def test_the_lost_attempt_of_a_copied_run_has_no_failure_and_does_not_count(paths, failure, failures):
    replace_json(paths.attempt_record(1), {"attempt": 1, "outcome": "lost", "failure": failure, "submission": 1})
    assert count_failures(paths, SimpleNamespace(number=1)) == failures
