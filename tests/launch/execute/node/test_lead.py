"""What the head writes and decides at the end of an attempt. No ranks are started."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.execute import node_process, record
from launch.execute.node import lead as lead_module
from launch.execute.node import patience as patience_module
from launch.execute.node import ranks as ranks_module
from launch.execute.node.forensics import record_silent_head
from launch.execute.node.lead import lead
from launch.execute.node.patience import Patience
from launch.execute.node.place import Place
from launch.supervise.group import NodeGroup
from launch.supervise.rank import Outcome
from launch.supervise.signals import StopSignals
from trainers.contract import exit_codes
from trainers.contract.files import read_json, replace_json
from trainers.contract.paths import RunPaths

PLACE = Place("9", 0, 0, 1, None)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run-1")
    paths.submission(1).mkdir(parents=True)
    replace_json(paths.record, {"state": "submitted", "job": {"ids": ["9"]}})
    return paths


@pytest.fixture
def flag(paths: RunPaths) -> Path:
    flag = paths.submission(1) / "requeue-9-0"
    flag.touch()
    return flag


@pytest.fixture
def leads(paths, flag, monkeypatch):
    """A function that lets the head lead one attempt, whose ranks are a function. Returns the exit code and what was said."""
    def leads(ranks) -> tuple[int, list[str]]:
        said: list[str] = []
        view = SimpleNamespace(notice=said.append, event=lambda event: None)
        resources = SimpleNamespace(device="cpu", ranks=1, threads=1)
        monkeypatch.setattr(lead_module, "plan_of", lambda submission, paths, number: SimpleNamespace(
            attempt=number, cwd="/here", resources=resources, files={}, batch="1", grace_s=1.0, folder=str(paths.root)))
        monkeypatch.setattr(lead_module, "silence_s", lambda plan: 10.0)
        monkeypatch.setattr(ranks_module, "kill_wait_s", lambda: None)
        monkeypatch.setattr(lead_module, "hosts_of", lambda place: ["n1"])
        monkeypatch.setattr(lead_module, "reserved_port", lambda: nullcontext(1))
        monkeypatch.setattr(ranks_module, "supervise", lambda *_, **__: ranks())
        monkeypatch.setattr(patience_module, "FIRST_PAUSE_S", 0.01)
        submission = SimpleNamespace(number=1, max_restarts=3, here=False, cluster=SimpleNamespace(requeue=True))
        with socket.socket() as wakeup:
            stop = StopSignals([], wakeup)
            monkeypatch.setattr(patience_module.select, "select", lambda *_: ([], [], []))
            code = lead(submission, PLACE, paths, NodeGroup(0, "127.0.0.1", None), flag, stop, Patience(stop, said.append), view)
        return code, said

    return leads


@pytest.mark.parametrize("name", ["kept", "next_attempt"])
def test_a_storage_error_at_an_attempts_end_is_waited_out(paths, leads, monkeypatch, name):
    read, failures = getattr(record, name), []

    def ranks() -> Outcome:
        failures.extend([errno.ESTALE, errno.EIO])
        return Outcome("finished")

    def fails(paths):
        if failures:
            number = failures.pop()
            raise OSError(number, os.strerror(number))
        return read(paths)

    monkeypatch.setattr(record, name, fails)
    code, said = leads(ranks)
    assert (code, read_json(paths.record)["state"], failures) == (exit_codes.FINISHED, "finished", [])
    assert any("trying again" in line for line in said)


def test_ranks_that_cannot_be_started_are_started_again(paths, leads):
    errors = [OSError(errno.EAGAIN, "Resource temporarily unavailable")]

    def ranks() -> Outcome:
        if errors:
            raise errors.pop()
        return Outcome("finished")

    code, said = leads(ranks)
    assert (code, read_json(paths.record)["state"], paths.attempt_numbers()) == (exit_codes.FINISHED, "finished", [1, 2])
    attempt = read_json(paths.attempt_record(1))
    assert attempt["outcome"] == "failed" and "Resource temporarily unavailable" in attempt["failure"]["message"]


def test_an_attempt_that_has_begun_keeps_its_record(paths, leads, monkeypatch):
    def judge(*_) -> Outcome:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(lead_module, "joint_outcome", judge)
    assert leads(lambda: Outcome("finished"))[0] == exit_codes.FAILED
    attempt = read_json(paths.attempt_record(1))
    assert (attempt["cwd"], attempt["outcome"], read_json(paths.record)["state"]) == ("/here", "failed", "failed")
    assert "Cannot allocate memory" in attempt["failure"]["message"]


def test_a_head_that_wakes_up_leaves_the_record_of_another_node_alone(paths, flag, leads, monkeypatch):
    def ranks() -> Outcome:
        record_silent_head(paths, "n1", requeued=True)  # the head was stopped meanwhile
        return Outcome("finished")

    code, said = leads(ranks)
    assert code == exit_codes.FAILED and flag.exists() and any("gave no sign of life" in line for line in said)
    assert read_json(paths.attempt_record(1))["outcome"] == "lost" and read_json(paths.record)["state"] == "preempted"
    excluded: list[str] = []
    monkeypatch.setattr(node_process, "hosts_of", lambda place: ["n1", "n2"])
    monkeypatch.setattr(node_process, "exclude", lambda folder, place, nodes: excluded.extend(nodes))
    left = SimpleNamespace(open=False, silent=False)
    node_process._report_lost(flag.parent, PLACE, paths, SimpleNamespace(links={1: left}))
    assert excluded == []
