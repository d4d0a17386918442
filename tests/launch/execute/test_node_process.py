"""Decisions of a node process that do not need a cluster."""

from __future__ import annotations

import errno
import math
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.cluster import slurm
from launch.execute import node_process
from launch.execute.node import ranks
from launch.execute.node.patience import Patience
from launch.execute.node.place import Place
from launch.execute.node.progress import SHORT_ATTEMPTS
from launch.records.requeue import REQUEUE
from launch.supervise.rendezvous import NotConnected
from launch.supervise.signals import StopSignals
from trainers.contract import exit_codes
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, replace_json
from trainers.contract.paths import RunPaths


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run-1")
    paths.root.mkdir()
    replace_json(paths.record, {"state": "submitted"})
    paths.spec.write_text("name: x\nscript: /x.py\nrun: {grace_s: 60}\n")
    return paths


@pytest.mark.parametrize("received, requeues, outcome, state", [
    ([signal.SIGUSR2], True, "preempted", "preempted"),  # the time limit: counts as an attempt without progress
    ([signal.SIGTERM], False, None, "submitted"),        # cancelled or preempted: SLURM decides
    ([], True, "failed", "preempted"),                   # a node did not come
])
def test_what_follows_if_the_node_processes_have_not_connected(paths, monkeypatch, received, requeues, outcome, state):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    flag = paths.root / "requeue-9-0"
    flag.touch()
    submission = SimpleNamespace(number=1, max_restarts=3, cluster=SimpleNamespace(requeue=True), here=False)
    with socket.socket() as wakeup:
        stop = StopSignals(received, wakeup)
        code = node_process._not_connected(submission, Place("9", 0, 0, 2, None), paths, flag, stop,
                                           Patience(stop, lambda text: None), "node 1 did not come")
    assert code == (REQUEUE if requeues else exit_codes.FAILED) and flag.exists() == requeues
    assert read_json(paths.record)["state"] == state
    assert paths.attempt_numbers() == ([1] if outcome else [])
    if outcome:
        attempt = read_json(paths.attempt_record(1))
        assert attempt["outcome"] == outcome and attempt["kept"] == attempt["kept_before"]


def test_a_job_too_short_for_its_node_processes_to_connect_is_not_requeued_for_ever(paths, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    submission = SimpleNamespace(number=1, max_restarts=3, cluster=SimpleNamespace(requeue=True), here=False)
    codes = []
    with socket.socket() as wakeup:
        stop = StopSignals([signal.SIGUSR2], wakeup)
        for restart in range(SHORT_ATTEMPTS):
            flag = paths.root / f"requeue-9-{restart}"
            codes.append(node_process._not_connected(submission, Place("9", restart, 0, 2, None), paths, flag, stop,
                                                     Patience(stop, lambda text: None), "node 1 did not come"))
    assert codes == [REQUEUE] * (SHORT_ATTEMPTS - 1) + [exit_codes.FAILED] and not flag.exists()
    assert read_json(paths.record)["state"] == "failed"
    failure = read_json(paths.attempt_record(SHORT_ATTEMPTS))["failure"]
    assert failure["message"].startswith("10 attempts in a row ended at the time limit after less than 5 minutes each")


@pytest.mark.parametrize("received", [[], [signal.SIGUSR2]])
def test_records_of_a_job_that_may_run_on_are_written_with_patience(paths, monkeypatch, received):
    """Only a job that was asked to end has little time."""
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    submission = SimpleNamespace(number=1, max_restarts=3, cluster=SimpleNamespace(requeue=True), here=False)
    with socket.socket() as wakeup:
        stop = StopSignals(received, wakeup)
        patience = Patience(stop, lambda text: None)
        node_process._not_connected(submission, Place("9", 0, 0, 2, None), paths, paths.root / "requeue-9-0", stop, patience, "x")
    assert (patience.deadline == math.inf) == (not received)


def test_slurm_is_asked_before_the_node_processes_connect(paths, monkeypatch):
    """Until all have connected, nobody misses signs of life; and a warning that is overdue ends the waiting."""
    asked = []

    def meet(folder, name, node, nodes, interface, stopped, write):
        assert asked == ["KillWait"] and stopped()
        raise NotConnected("it was stopped")

    submission = SimpleNamespace(number=1, max_restarts=3, here=False, runs=[str(paths.root)],
                                 cluster=SimpleNamespace(requeue=True, interface=None))
    for name, value in {"SLURM_JOB_ID": "9", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(node_process, "read_submission", lambda folder: submission)
    monkeypatch.setattr(node_process, "kill_wait_s", lambda: asked.append("KillWait"))
    monkeypatch.setattr(node_process, "meet", meet)
    monkeypatch.setattr(slurm, "time_left_s", lambda job: 0)
    with socket.socket() as wakeup:
        assert node_process.run_node(paths.root, StopSignals([], wakeup)) == REQUEUE


def test_ranks_that_cannot_be_started_fail_like_others_on_every_node(monkeypatch, tmp_path):
    def supervise(*args, **more):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    sent = []
    monkeypatch.setattr(ranks, "supervise", supervise)
    monkeypatch.setattr(ranks, "kill_wait_s", lambda: None)
    group = SimpleNamespace(address="127.0.0.1", interface=None, send=sent.append)
    outcome = ranks.run_ranks(None, Place("9", 0, 0, 2, None), RunPaths(tmp_path), group, 1, None, None)
    assert outcome.kind == "failed" and outcome.failure.retry and "temporarily unavailable" in outcome.failure.message
    assert sent == [{"failure": outcome.failure.as_dict()}]


@pytest.mark.parametrize("left_s, due_s", [(136, None), (135, 30), (106, 1), (105, 0), (0, 0), (None, None),
                                           (UserError("away"), None)])
def test_the_warning_before_the_time_limit_may_have_come_during_setup(paths, monkeypatch, left_s, due_s):
    """SLURM warns once: run.grace_s + 45 s before the limit, or up to 30 s earlier."""
    def time_left_s(job: str) -> int | None:
        if isinstance(left_s, UserError):
            raise left_s
        return left_s

    monkeypatch.setattr(slurm, "time_left_s", time_left_s)
    armed, handlers = [], []
    monkeypatch.setattr(signal, "setitimer", lambda which, seconds: armed.append(seconds))
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.append(handler))
    with socket.socket() as wakeup:
        stop = StopSignals([], wakeup)
        node_process._make_up_for_warning(Place("9", 0, 0, 1, None), paths, stop)
    assert armed == ([due_s] if due_s else []) and stop.received == [signal.SIGUSR2] * (due_s == 0)
    if due_s:
        handlers[0](signal.SIGALRM, None)
        assert stop.received == [signal.SIGUSR2]
