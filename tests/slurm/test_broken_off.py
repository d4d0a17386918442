"""Submissions that are interrupted half way, on a real cluster: no job is lost, no job is submitted twice."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from conftest import attempt, environment, record, wait_until
from slurm.conftest import write_cluster
from slurm.scripts import (
    ON_TEST_CLUSTER,
    PRINT_CONTEXT,
    START_LATER,
    assert_nothing_submitted,
    insert_before_dashes,
    printed,
    submit,
    wait_for_end,
    write,
)

pytestmark = pytest.mark.slow  # each test is fast, the file is slow


@pytest.fixture
def submit_and_kill(slurm_launch):
    """A function that submits a run and kills `launch` before or after its first call of a SLURM command.

    Calls that change nothing in SLURM are not counted.
    """

    def run_killed(when: str, command: str, *args: object) -> Path:
        kill = "kill -9 $PPID\n"
        text = kill if when == "before" else f'{path_of(command)} "$@" > /dev/null\n{kill}'
        path = path_with_wrapper(slurm_launch.folder, command, text)
        done = slurm_launch(*insert_before_dashes(args, *ON_TEST_CLUSTER), PATH=path)
        assert done.returncode == -signal.SIGKILL, done.stderr
        (run,) = slurm_launch.runs()
        return run

    return run_killed


def path_of(command: str) -> str:
    """Return the path of the real command."""
    return shutil.which(command, path=environment()["PATH"])


def path_with_wrapper(folder: Path, command: str, text: str) -> str:
    """Return a PATH on which a script replaces a command. Calls that change nothing in SLURM still reach the real command."""
    (folder / "bin").mkdir(exist_ok=True)
    write(folder / "bin", f'#!/bin/sh\ncase "$*" in *--test-only*|show*) exec {path_of(command)} "$@";; esac\n{text}',
          command).chmod(0o755)
    return f"{folder}/bin:{environment()['PATH']}"


def test_a_submission_killed_before_sbatch_is_submitted_again(slurm, slurm_launch, submit_and_kill):
    write(slurm_launch.folder, PRINT_CONTEXT)
    run = submit_and_kill("before", "sbatch", "work.py", "--procs", 1, "--", "a word")
    assert slurm.run("squeue", "-h") == "" and record(run)["job"]["ids"] == []
    assert "did not finish" in slurm_launch("status", run.name).stdout
    resumed = slurm_launch("resume", run.name, "--json")
    assert resumed.returncode == 0, resumed.stderr
    wait_for_end(run)
    assert json.loads(resumed.stdout)["jobs"] == record(run)["job"]["ids"] and printed(run)["argv"] == ["a word"]
    assert record(run)["job"]["submission"] == 2


@pytest.mark.parametrize("links", [1, 3])
def test_the_job_of_a_submission_killed_after_sbatch_is_found(slurm, slurm_launch, submit_and_kill, links):
    """`resume` finds the job while the job waits and while it runs, and submits nothing more. A chain keeps its one job."""
    write(slurm_launch.folder, "import os, time\nwhile not os.path.exists('go'): time.sleep(0.05)\n" + PRINT_CONTEXT)
    write_cluster(slurm_launch.folder, requeue=links == 1, chain=links)
    run = submit_and_kill("after", "sbatch", "work.py", "--procs", 1, START_LATER)
    (job,) = slurm.run("squeue", "-h", "-o", "%A").split()
    assert record(run)["job"]["ids"] == []
    resumed = slurm_launch("resume", run.name)
    assert resumed.returncode == 0 and f"job {job} is in the queue" in resumed.stdout
    assert slurm.run("squeue", "-h", "-o", "%A").split() == [job] == record(run)["job"]["ids"]
    refused = slurm_launch("resume", run.name)
    assert refused.returncode == 2 and f"job {job} is in SLURM's queue" in refused.stderr
    slurm.start_now(job)
    wait_until(lambda: record(run)["state"] == "running")
    refused = slurm_launch("resume", run.name)
    assert refused.returncode == 2 and f"run {run.name} is running: job {job} is in SLURM's queue" in refused.stderr
    (slurm_launch.folder / "go").touch()
    wait_for_end(run)
    assert record(run)["attempt"] == 1


@pytest.mark.parametrize("links", [1, 2])
def test_a_submission_killed_before_it_released_its_jobs_is_continued(slurm, slurm_launch, submit_and_kill, links):
    write(slurm_launch.folder, PRINT_CONTEXT)
    write_cluster(slurm_launch.folder, requeue=links == 1, chain=links)
    run = submit_and_kill("before", "scontrol", "work.py", "--procs", 1)
    jobs = sorted(slurm.run("squeue", "-h", "-o", "%A").split(), key=int)
    assert record(run)["job"]["ids"] == jobs and len(jobs) == links
    assert {slurm.job(job)["Reason"] for job in jobs} == {"JobHeldUser"}
    resumed = slurm_launch("resume", run.name)
    assert resumed.returncode == 0 and f"job {', '.join(jobs)}" in resumed.stdout, resumed.stderr
    wait_for_end(run)
    assert attempt(run, 1)["job"] == jobs[0] and record(run)["job"]["ids"] == jobs
    assert slurm_launch("resume", run.name).stdout == f"run {run.name} is finished: nothing to resume\n"


def test_resume_refuses_a_run_that_is_being_submitted(slurm_launch):
    write(slurm_launch.folder, PRINT_CONTEXT)
    text = f'while [ ! -e go ]; do sleep 0.05; done\nexec {path_of("sbatch")} "$@"\n'
    path = path_with_wrapper(slurm_launch.folder, "sbatch", text)
    submitting = slurm_launch.start("work.py", "--procs", 1, *ON_TEST_CLUSTER, PATH=path)
    run = wait_until(lambda: [run for run in slurm_launch.runs() if (run / "run.json").exists()], process=submitting)[0]
    done = slurm_launch("resume", run.name)
    assert done.returncode == 2 and f"is being submitted by process {submitting.pid}" in done.stderr
    (slurm_launch.folder / "go").touch()
    submitting.communicate(timeout=120)
    wait_for_end(run)
    assert record(run)["job"]["submission"] == 1 and record(run)["attempt"] == 1


def test_a_chain_whose_last_job_sbatch_refuses_leaves_nothing(slurm_launch):
    write(slurm_launch.folder, PRINT_CONTEXT)
    write_cluster(slurm_launch.folder, requeue=False, chain=3)
    text = f'case "$*" in *afternotok:*:*) echo "sbatch: error: no more" >&2; exit 1;; esac\nexec {path_of("sbatch")} "$@"\n'
    path = path_with_wrapper(slurm_launch.folder, "sbatch", text)
    done = slurm_launch("work.py", "--procs", 1, START_LATER, *ON_TEST_CLUSTER, PATH=path)
    assert done.returncode == 2 and "no more" in done.stderr
    assert_nothing_submitted(slurm_launch)


def test_the_job_id_is_found_after_other_output_of_sbatch(slurm_launch):
    write(slurm_launch.folder, PRINT_CONTEXT)
    path = path_with_wrapper(slurm_launch.folder, "sbatch", f'echo "Welcome, user 7"\necho\nexec {path_of("sbatch")} "$@"\n')
    run, (job,) = submit(slurm_launch, "work.py", "--procs", 1, PATH=path)
    wait_for_end(run)
    assert job.isdigit() and attempt(run, 1)["job"] == job
    path = path_with_wrapper(slurm_launch.folder, "sbatch", 'echo "Closed for the day"\n')
    done = slurm_launch("work.py", "--procs", 1, *ON_TEST_CLUSTER, PATH=path)
    assert done.returncode == 2 and "sbatch gave no job id; it said: Closed for the day" in done.stderr
    assert slurm_launch.runs() == [run]


def test_a_submission_stopped_by_ctrl_c_leaves_nothing(slurm_launch):
    """Ctrl-C comes while sbatch still runs, after sbatch has submitted the job."""
    write(slurm_launch.folder, PRINT_CONTEXT)
    path = path_with_wrapper(slurm_launch.folder, "sbatch", f'{path_of("sbatch")} "$@"\nkill -INT $PPID\nsleep 2\n')
    done = slurm_launch("work.py", "--procs", 1, *ON_TEST_CLUSTER, PATH=path)
    assert done.returncode == 130
    assert_nothing_submitted(slurm_launch)
