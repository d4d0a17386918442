from __future__ import annotations

import os
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from launch.cluster.config import ClusterConfig, load_cluster
from launch.report.doctor import checks as module
from launch.report.doctor.check import Check, line
from launch.report.doctor.checks import doctor, file_system, fits, grace, requirements, slowest_checkpoint
from launch.report.doctor.trial_job import FIXES
from trainers.contract.files import replace_json
from trainers.contract.paths import RunPaths
from trainers.trial import PROBES


def examine(cluster=None, runs=Path("runs"), **options) -> dict[str, list[Check]]:
    """The results of `launch doctor`, by the names of the checks."""
    checks: dict[str, list[Check]] = {}
    for check in doctor(cluster or load_cluster("local"), runs.absolute(), **options):
        checks.setdefault(check.name, []).append(check)
    return checks


# --- software


@pytest.mark.parametrize("version, versions, fitting", [
    ("2.11.0", ">=2.11", True), ("2.11.0+cu128", ">=2.11", True), ("2.11.0a0+gitdeadbee", ">=2.11", True),
    ("2.9.1", ">=2.11", False), ("1.5.4", ">=1.5,<2", True), ("2.0", ">=1.5,<2", False), ("10", ">=8", True),
    ("3.11.7", ">=3.11", True), ("1.2", "", True), ("1.2", "!=1.2", False), ("1.2.0", "==1.2", True),
    ("our-own-build", ">=2", True),
])
def test_whether_a_version_meets_a_requirement(version, versions, fitting):
    assert fits(version, Requirement(f"torch{versions}")) is fitting


def test_the_requirements_are_those_of_the_project(tmp_path):
    python, needs = requirements()
    names = {canonicalize_name(need.name) for need in needs}
    assert "3.11" in python and "3.10" not in python
    assert {"torch", "accelerate", "submitit", "wandb"} <= names and "pytest" not in names
    installed = requirements(tmp_path / "pyproject.toml")  # no such file: from what pip has recorded
    assert installed[0] == python and {canonicalize_name(need.name) for need in installed[1]} == names


def test_a_missing_or_old_package_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "requirements", lambda: (
        SpecifierSet(">=3.11"), [Requirement("click>=99,<100"), Requirement("no-such-package>=1"), Requirement("rich")]))
    old, missing = examine(runs=tmp_path)["packages"]
    assert old.ok == missing.ok == "error"
    assert old.what.startswith("click 8") and old.what.endswith("; <100,>=99 is needed")
    assert missing.what == "no-such-package is not installed; >=1 is needed" and "'no-such-package>=1'" in missing.fix


# --- the folder of runs


MOUNTS = """\
22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:26 / /mnt rw - xfs /dev/vdb rw
31 30 0:27 / /mnt/with\\040space rw - nfs4 server:/export rw,vers=4.2
32 31 0:28 / /mnt/with\\040space/fast rw shared:9 master:2 - lustre 10.0.0.1@o2ib:/fast rw
33 22 0:29 / /mnt-else rw - beegfs beegfs_nodev rw
"""


@pytest.mark.parametrize("path, kind", [
    ("/home/me", "ext4"), ("/mnt/runs", "xfs"), ("/mnt/with space/runs", "nfs4"), ("/mnt/with space/fast", "lustre"),
    ("/mnt-else/runs", "beegfs"), ("/mnt-elsewhere", "ext4"),
])
def test_the_file_system_of_a_path(tmp_path, path, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert file_system(Path(path), mounts)[0] == kind
    assert file_system(Path(path), tmp_path / "none") == ("?", "?")


def test_the_file_system_of_this_test(tmp_path):
    assert file_system(tmp_path)[0] == file_system(Path(os.path.realpath(tmp_path)))[0] != "?"


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    (check,) = examine(runs=tmp_path / "file" / "runs")["runs"]
    assert check.ok == "error" and f"cannot write to {tmp_path / 'file'}" in check.what


def test_no_file_is_left_in_the_folder_of_runs(tmp_path):
    (check,) = examine(runs=tmp_path / "not yet" / "runs")["runs"]
    assert check.ok == "ok" and not list(tmp_path.iterdir())


def test_little_free_space_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOM_BYTES", 2**60)
    (check,) = examine(runs=tmp_path)["runs"]
    assert check.ok == "warning" and check.fix.startswith("free some space")


# --- a cluster


def test_without_slurm_the_other_checks_still_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(module, "LOCAL", {file_system(tmp_path)[0]})
    checks = examine(ClusterConfig(name="here", kind="slurm"), tmp_path, job=True)
    assert checks["slurm"][0].ok == "error" and "there is no SLURM here" in checks["slurm"][0].what
    assert [check.ok for check in checks["shared"]] == ["warning"] * len(checks["shared"]) and "job" not in checks
    assert checks["packages"][0].ok == "ok" and "W&B" in checks


def test_the_python_of_a_container_is_not_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(module, "LOCAL", {file_system(tmp_path)[0]})
    cluster = ClusterConfig(name="here", kind="slurm", prefix=["apptainer", "exec", "x.sif"])
    assert [check.what.partition(",")[0] for check in examine(cluster, tmp_path)["shared"]] == ["the folder of runs"]


@pytest.mark.parametrize("slowest, ok, fix", [
    (None, "ok", None), (12.0, "ok", None), (25.0, "warning", "lower checkpoint.every"), (70.0, "warning", "grace_s: 210"),
])
def test_the_grace_is_compared_with_the_slowest_checkpoint(slowest, ok, fix):
    check = grace(60.0, 20.0, slowest and (slowest, "bert-1"))
    assert check.ok == ok and (fix is None or fix in check.fix)
    assert "run.grace_s is 60 s; a preempted job is killed after 20 s" in check.what


def test_the_slowest_checkpoint_is_taken_from_recent_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECENT_RUNS", 2)
    for age, (name, times) in enumerate({"new": [1.0, None], "broken": [], "old": [9.0]}.items()):
        paths = RunPaths(tmp_path / name)
        paths.attempts.mkdir(parents=True)
        paths.record.touch()
        os.utime(paths.record, (1000 - age, 1000 - age))
        for number, took in enumerate(times, 1):
            paths.attempt(number).mkdir()
            replace_json(paths.attempt_record(number), {"checkpoint_s": took})
    (RunPaths(tmp_path / "broken").attempt(1)).mkdir()
    assert slowest_checkpoint(tmp_path) == (1.0, "new")
    assert slowest_checkpoint(tmp_path / "none") is None


# --- the trial


def test_each_probe_has_a_fix():
    assert list(PROBES) == list(FIXES)


@pytest.mark.slow
def test_the_trial_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    messages: list[str] = []
    (check,) = examine(runs=tmp_path / "runs", job=True, say=messages.append)["job"]
    assert check.ok == "ok" and check.what.startswith("2 rank(s) on ") and "all-reduce: over gloo, 2 rank(s)" in check.what
    assert messages == ["trying 2 rank(s) on cpu of this machine"] and not list((tmp_path / "runs").iterdir())


@pytest.mark.slow
def test_the_trial_names_the_probe_that_failed(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('not for this CPU')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check, summary = examine(runs=tmp_path / "runs", job=True)["job"]
    assert check.ok == "error" and ": torch: rank 0: ImportError: not for this CPU" in check.what
    (run,) = (tmp_path / "runs").iterdir()
    assert summary.fix == f"`launch explain {run}` shows more"


def test_a_check_as_text():
    assert line(Check("slurm", "ok", "all is well", "nothing")) == "ok       slurm       all is well"
    assert line(Check("slurm", "error", "it is down", "wait")) == "error    slurm       it is down\n" + " " * 21 + "wait"
