"""Submissions that died half way, on a real cluster: none is lost, none is made twice."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from conftest import attempt, environment, record, wait_until
from slurm.conftest import write_cluster
from slurm.scripts import LATER, SHOW, WHERE, before_dashes, finish, nothing_was_done, seen, submit, write

pytestmark = pytest.mark.slow  # not each, but together


@pytest.fixture
def dying(slurm_launch):
    """`launch` that is killed before or after the first call of one of SLURM's commands that changes something."""

    def submit(when: str, command: str, *args: object) -> Path:
        kill = "kill -9 $PPID\n"
        text = f"{kill}" if when == "before" else f'{found(command)} "$@" > /dev/null\n{kill}'
        done = slurm_launch(*before_dashes(args, *WHERE), PATH=wrapped(slurm_launch.folder, command, text))
        assert done.returncode == -signal.SIGKILL, done.stderr
        (run,) = slurm_launch.runs()
        return run

    return submit


def found(command: str) -> str:
    return shutil.which(command, path=environment()["PATH"])


def wrapped(folder: Path, command: str, text: str) -> str:
    """A PATH on which a script takes the place of a command, but where that changes nothing."""
    (folder / "bin").mkdir(exist_ok=True)
    write(folder / "bin", f'#!/bin/sh\ncase "$*" in *--test-only*|show*) exec {found(command)} "$@";; esac\n{text}',
          command).chmod(0o755)
    return f"{folder}/bin:{environment()['PATH']}"


def test_a_submission_that_died_before_sbatch_is_submitted_anew(slurm, slurm_launch, dying):
    write(slurm_launch.folder, SHOW)
    run = dying("before", "sbatch", "work.py", "--procs", 1, "--", "a word")
    assert slurm.run("squeue", "-h") == "" and record(run)["job"]["ids"] == []
    assert "did not finish" in slurm_launch("status", run.name).stdout
    resumed = slurm_launch("resume", run.name, "--json")
    assert resumed.returncode == 0, resumed.stderr
    finish(run)
    assert json.loads(resumed.stdout)["jobs"] == record(run)["job"]["ids"] and seen(run)["argv"] == ["a word"]
    assert record(run)["job"]["submission"] == 2


@pytest.mark.parametrize("links", [1, 3])
def test_a_submission_that_died_after_sbatch_is_found(slurm, slurm_launch, dying, links):
    """While it waits and while it runs; a chain is as long as it had become."""
    write(slurm_launch.folder, "import os, time\nwhile not os.path.exists('go'): time.sleep(0.05)\n" + SHOW)
    write_cluster(slurm_launch.folder, requeue=links == 1, chain=links)
    run = dying("after", "sbatch", "work.py", "--procs", 1, LATER)
    (job,) = slurm.run("squeue", "-h", "-o", "%A").split()
    assert record(run)["job"]["ids"] == []
    resumed = slurm_launch("resume", run.name)
    assert resumed.returncode == 0 and f"job {job} is in the queue" in resumed.stdout
    assert slurm.run("squeue", "-h", "-o", "%A").split() == [job] == record(run)["job"]["ids"]
    again = slurm_launch("resume", run.name)
    assert again.returncode == 2 and f"job {job} is in SLURM's queue" in again.stderr
    slurm.start_now(job)
    wait_until(lambda: record(run)["state"] == "running")
    again = slurm_launch("resume", run.name)
    assert again.returncode == 2 and f"run {run.name} is running: job {job} is in SLURM's queue" in again.stderr
    (slurm_launch.folder / "go").touch()
    finish(run)
    assert record(run)["attempt"] == 1


@pytest.mark.parametrize("links", [1, 2])
def test_a_submission_that_died_before_it_let_its_job_go(slurm, slurm_launch, dying, links):
    write(slurm_launch.folder, SHOW)
    write_cluster(slurm_launch.folder, requeue=links == 1, chain=links)
    run = dying("before", "scontrol", "work.py", "--procs", 1)
    jobs = sorted(slurm.run("squeue", "-h", "-o", "%A").split(), key=int)
    assert record(run)["job"]["ids"] == jobs and len(jobs) == links
    assert {slurm.job(job)["Reason"] for job in jobs} == {"JobHeldUser"}
    resumed = slurm_launch("resume", run.name)
    assert resumed.returncode == 0 and f"job {', '.join(jobs)}" in resumed.stdout, resumed.stderr
    finish(run)
    assert attempt(run, 1)["job"] == jobs[0] and record(run)["job"]["ids"] == jobs
    assert slurm_launch("resume", run.name).stdout == f"run {run.name} is finished: nothing to resume\n"


def test_a_submission_that_is_under_way_is_left_alone(slurm_launch):
    write(slurm_launch.folder, SHOW)
    path = wrapped(slurm_launch.folder, "sbatch", f'while [ ! -e go ]; do sleep 0.05; done\nexec {found("sbatch")} "$@"\n')
    submitting = slurm_launch.start("work.py", "--procs", 1, *WHERE, PATH=path)
    run = wait_until(lambda: [run for run in slurm_launch.runs() if (run / "run.json").exists()], process=submitting)[0]
    done = slurm_launch("resume", run.name)
    assert done.returncode == 2 and f"is being submitted by process {submitting.pid}" in done.stderr
    (slurm_launch.folder / "go").touch()
    submitting.communicate(timeout=120)
    finish(run)
    assert record(run)["job"]["submission"] == 1 and record(run)["attempt"] == 1


def test_a_chain_whose_later_link_is_refused_leaves_nothing(slurm_launch):
    write(slurm_launch.folder, SHOW)
    write_cluster(slurm_launch.folder, requeue=False, chain=3)
    text = f'case "$*" in *afternotok:*:*) echo "sbatch: error: no more" >&2; exit 1;; esac\nexec {found("sbatch")} "$@"\n'
    path = wrapped(slurm_launch.folder, "sbatch", text)
    done = slurm_launch("work.py", "--procs", 1, LATER, *WHERE, PATH=path)
    assert done.returncode == 2 and "no more" in done.stderr
    nothing_was_done(slurm_launch)


def test_an_sbatch_that_greets(slurm_launch):
    write(slurm_launch.folder, SHOW)
    path = wrapped(slurm_launch.folder, "sbatch", f'echo "Welcome, user 7"\necho\nexec {found("sbatch")} "$@"\n')
    run, (job,) = submit(slurm_launch, "work.py", "--procs", 1, PATH=path)
    finish(run)
    assert job.isdigit() and attempt(run, 1)["job"] == job
    path = wrapped(slurm_launch.folder, "sbatch", 'echo "Closed for the day"\n')
    done = slurm_launch("work.py", "--procs", 1, *WHERE, PATH=path)
    assert done.returncode == 2 and "sbatch gave no job id; it said: Closed for the day" in done.stderr
    assert slurm_launch.runs() == [run]


def test_a_submission_that_is_interrupted_leaves_nothing(slurm_launch):
    """Ctrl-C while sbatch is at work, which has submitted already."""
    write(slurm_launch.folder, SHOW)
    path = wrapped(slurm_launch.folder, "sbatch", f'{found("sbatch")} "$@"\nkill -INT $PPID\nsleep 2\n')
    done = slurm_launch("work.py", "--procs", 1, *WHERE, PATH=path)
    assert done.returncode == 130
    nothing_was_done(slurm_launch)
