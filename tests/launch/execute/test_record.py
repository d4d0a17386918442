"""Which process has an attempt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.execute.record import next_attempt, recorded, runs_here, take_attempt
from launch.supervise.rank import Outcome
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, replace_json
from trainers.contract.paths import RunPaths


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    (tmp_path / "run-1").mkdir()
    return RunPaths(tmp_path / "run-1")


def test_an_attempt_is_known_to_be_taken_before_its_record_exists(paths):
    """Its owner may need seconds to make the plan: a `launch resume` meanwhile must not start another attempt."""
    take_attempt(paths, 1)
    assert os.listdir(paths.attempts) == ["1"] and next_attempt(paths) == 2
    assert runs_here(paths, 1) and not paths.attempt_record(1).exists()
    with pytest.raises(UserError, match="has just been started by another process"):
        take_attempt(paths, 1)
    assert os.listdir(paths.attempts) == ["1"], "nothing is left of the second try"


def test_an_owner_that_has_ended_or_is_on_another_host_does_not_run_here(paths):
    code = ("import sys\nfrom pathlib import Path\nfrom launch.execute.record import take_attempt\n"
            "from trainers.contract.paths import RunPaths\ntake_attempt(RunPaths(Path(sys.argv[1])), 1)")
    subprocess.run([sys.executable, "-P", "-c", code, str(paths.root)], check=True)
    assert not runs_here(paths, 1)
    take_attempt(paths, 2)
    owner = json.loads(paths.attempt_owner(2).read_text())
    replace_json(paths.attempt_owner(2), {**owner, "host": "another"})
    assert not runs_here(paths, 2)
    replace_json(paths.attempt_owner(2), {**owner, "started": "another"})
    assert not runs_here(paths, 2), "a process that has the same pid"


def test_an_attempt_of_an_earlier_version_has_a_record_only(paths):
    take_attempt(paths, 1)
    owner = json.loads(paths.attempt_owner(1).read_text())
    paths.attempt_owner(1).unlink()
    assert not runs_here(paths, 1)
    record = {"host": owner["host"], "pid": owner["pid"], "process_started": owner["started"], "outcome": "running"}
    replace_json(paths.attempt_record(1), record)
    assert runs_here(paths, 1)
    replace_json(paths.attempt_record(1), {**record, "outcome": "failed"})
    assert not runs_here(paths, 1)


def test_of_many_processes_that_take_an_attempt_one_succeeds(paths):
    code = ("import sys\nfrom pathlib import Path\nfrom launch.execute.record import take_attempt\n"
            "from trainers.contract.paths import RunPaths\nsys.stdin.readline()\ntake_attempt(RunPaths(Path(sys.argv[1])), 1)")
    processes = [subprocess.Popen([sys.executable, "-P", "-c", code, str(paths.root)], stdin=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True) for _ in range(6)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert sorted(bool(error) for error in errors) == [False] + [True] * 5
    assert all("has just been started" in error for error in errors if error)
    assert os.listdir(paths.attempts) == ["1"]


def test_the_folder_of_a_deleted_run_is_not_made_again(paths):
    paths.root.rmdir()
    with pytest.raises(UserError, match="cannot be made: No such file"):
        take_attempt(paths, 2)
    assert not paths.root.exists()


def test_an_attempt_tells_what_delayed_it_before_it_began_and_as_it_began(paths):
    paths.attempt(1).mkdir(parents=True)
    replace_json(paths.record, {"state": "submitted"})
    plan = SimpleNamespace(folder=str(paths.root), attempt=1, cwd="/", files={}, batch=None,
                           resources=SimpleNamespace(device="cpu", ranks=1, threads=1))
    delays = ["waited 1:00", "waited 0:10"]
    with recorded(plan, paths, SimpleNamespace(), delay=lambda: delays.pop(0)) as ended:
        assert read_json(paths.attempt_record(1))["reason"] == "waited 1:00"
        ended(Outcome("preempted", signal="SIGUSR2", note="a note"), "time limit")
    assert read_json(paths.attempt_record(1))["reason"] == "time limit; a note; waited 1:00; waited 0:10"
