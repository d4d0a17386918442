"""Run folders that are copied, renamed or deleted."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from pathlib import Path

import pytest

from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Wanted
from launch.execute.copies import adopt
from launch.execute.local import resume
from launch.plan.spec import script_spec, spec_of
from launch.records.process import identity
from launch.records.read import list_runs
from launch.records.run import read_run
from launch.records.state import state_of
from launch.report.explain import explain
from launch.supervise import supervisor
from trainers.contract.files import read_json, replace_json, replace_text

RECORD = {"id": "a", "task": "t", "state": "running", "step": 5, "total": None, "attempt": 1, "sweep": None, "metrics": {},
          "checkpoint": None, "created": "2026-01-01T00:00:00+00:00", "updated": "2026-01-01T00:00:00+00:00",
          "job": {"kind": "slurm", "cluster": "c", "ids": ["7"], "submission": 1}}


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """The folder of a run that is running: this process runs its attempt."""
    folder = tmp_path / "runs/a"
    (folder / "attempts/1").mkdir(parents=True)
    (folder / "code/proj").mkdir(parents=True)
    (folder / "code/proj/train.py").write_text("print('done')\n")
    spec = script_spec(str(folder / "code/proj/train.py"), [], [], cluster=ClusterConfig(name="c"))
    replace_text(folder / "run.yaml", spec.text)
    replace_json(folder / "run.json", RECORD)
    replace_json(folder / "attempts/1/attempt.json", {
        "attempt": 1, "outcome": "running", "host": socket.gethostname(), "pid": os.getpid(), "cwd": str(tmp_path),
        "device": "cpu", "ranks": 1, "process_started": identity(os.getpid())})
    return folder


def test_jobs_and_processes_of_the_original_do_not_belong_to_a_copy(original: Path) -> None:
    copy = Path(shutil.copytree(original, original.with_name("b")))
    run = read_run(copy)
    assert (run.record["id"], run.record["copy_of"], run.record["job"], state_of(run)) == ("b", "a", None, "preempted")
    assert explain(run)["sentence"].endswith("in attempt 1: the folder was copied from run a while this attempt ran there")
    assert {row["id"] for row in list_runs(copy.parent)} == {"a", "b"}
    assert read_json(copy / "run.json")["id"] == "a"  # only `launch resume` writes


def test_a_copy_that_is_resumed_is_a_run_of_its_own(original: Path, capfd: pytest.CaptureFixture) -> None:
    copy = Path(shutil.copytree(original, original.with_name("b")))
    assert resume(read_run(copy), wanted=Wanted(), json=False) == 0
    assert "run b is a copy of run a" in capfd.readouterr().err
    assert (read_json(copy / "run.json")["id"], read_json(copy / "run.json")["state"]) == ("b", "finished")
    assert spec_of(read_run(copy).paths).config.script == str(copy / "code/proj/train.py")
    assert read_json(copy / "attempts/1/attempt.json")["outcome"] == "lost"
    assert read_json(original / "run.json") == RECORD


def test_a_renamed_run_keeps_its_id(original: Path, capsys: pytest.CaptureFixture) -> None:
    """W&B knows the run by this id."""
    renamed = original.rename(original.with_name("b"))
    adopt(read_run(renamed))
    assert read_run(renamed).record == RECORD == read_json(renamed / "run.json") and capsys.readouterr().err == ""
    assert spec_of(read_run(renamed).paths).config.script == str(renamed / "code/proj/train.py")


def test_a_copy_that_has_become_a_run_of_its_own_may_be_renamed(
    original: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = Path(shutil.copytree(original, original.with_name("b")))
    adopt(read_run(copy))
    running = {**read_json(original / "attempts/1/attempt.json"), "attempt": 2}
    (copy / "attempts/2").mkdir()
    replace_json(copy / "attempts/2/attempt.json", running)
    record = read_json(copy / "run.json")
    renamed = copy.rename(copy.with_name("c"))
    capsys.readouterr()
    adopt(read_run(renamed))
    assert read_json(renamed / "run.json") == record and record["id"] == "b" and capsys.readouterr().err == ""
    assert read_json(renamed / "attempts/2/attempt.json") == running, "the attempt goes on"


@pytest.mark.parametrize("end", ["time.sleep(60)", "sys.exit(3)"], ids=["works on", "fails"])
def test_a_run_whose_folder_is_deleted_stops_and_says_so(
    end: str, original: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "GONE_S", 0.3)
    copy = Path(shutil.copytree(original, original.with_name("b")))
    (copy / "code/proj/train.py").write_text(
        f"import os, shutil, sys, time\nshutil.rmtree(os.environ['LAUNCH_RUN_DIR'])\n{end}\n")
    assert resume(read_run(copy), wanted=Wanted(), json=False) == 1
    said = capfd.readouterr().err
    assert f"the run's folder {copy} was deleted or moved while the run used it" in said and "Traceback" not in said
    assert not copy.exists()


def test_a_storage_error_does_not_mean_that_the_folder_is_gone(
    original: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "LOOK_S", 0.05)
    monkeypatch.setattr(supervisor, "GONE_S", 0.1)
    copy = Path(shutil.copytree(original, original.with_name("b")))
    (copy / "code/proj/train.py").write_text("import time\ntime.sleep(0.5)\n")
    stat, failed = os.stat, []

    def fail(path, *args, **more):
        if str(path) == str(copy / "attempts/2") and os.access(copy / "attempts/2/attempt.json", os.F_OK):
            failed.append(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return stat(path, *args, **more)

    monkeypatch.setattr(os, "stat", fail)
    assert resume(read_run(copy), wanted=Wanted(), json=False) == 0 and failed


def test_only_a_missing_folder_is_gone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert supervisor.is_there(tmp_path)
    assert not supervisor.is_there(tmp_path / "nothing") and not supervisor.is_there(tmp_path / "file/below")
