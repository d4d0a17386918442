"""Chains of jobs, for sites that forbid requeueing: each job of a chain continues the run where the job before it ended."""

from __future__ import annotations

import pytest
from conftest import attempt, record, wait_until
from slurm.conftest import write_cluster
from slurm.scripts import PRINT_CONTEXT, submit, wait_for_end, write

pytestmark = pytest.mark.slow  # each test is fast, the file is slow


@pytest.fixture
def chain_launch(slurm_launch):
    """`launch` with a cluster file that asks for chains of four jobs."""
    write_cluster(slurm_launch.folder, requeue=False, chain=4)
    return slurm_launch


def assert_never_ran(slurm, jobs: list[str]) -> None:
    """Assert that the jobs were cancelled before they got a node."""
    for job in jobs:
        fields = slurm.wait(job)
        assert (fields["JobState"], fields["NodeList"]) == ("CANCELLED", ""), fields


@pytest.mark.slow
def test_a_finished_run_ends_its_chain(slurm, chain_launch):
    """Runs that wait for the finished run then start."""
    write(chain_launch.folder, "import time\ntime.sleep(1)\n" + PRINT_CONTEXT)
    run, jobs = submit(chain_launch, "work.py", "--procs", 1)
    after, _ = submit(chain_launch, "work.py", "--procs", 1, "--after", run.name)
    assert len(jobs) == 4
    assert slurm.job(jobs[3])["Dependency"] != "(null)" and slurm.job(jobs[0])["Requeue"] == "0"
    wait_for_end(run)
    assert_never_ran(slurm, jobs[1:])
    assert record(run)["attempt"] == 1 and slurm.wait(jobs[0])["JobState"] == "COMPLETED"
    assert record(run)["job"]["ids"] == jobs
    wait_for_end(after)


def test_a_failed_rank_is_retried_in_the_same_job_and_a_killed_node_process_in_the_next_job(slurm, chain_launch):
    write(chain_launch.folder, "import os\nnumber = int(os.environ['LAUNCH_ATTEMPT'])\n"
                          "if number == 1: raise ValueError('a first failure')\n"
                          "if number == 2: os.kill(os.getppid(), 9)\n" + PRINT_CONTEXT)
    run, jobs = submit(chain_launch, "work.py", "--procs", 1)
    wait_for_end(run)
    assert [attempt(run, number)["job"] for number in (1, 2, 3)] == [jobs[0], jobs[0], jobs[1]]
    assert [attempt(run, number)["outcome"] for number in (1, 2, 3)] == ["failed", "lost", "finished"]
    assert_never_ran(slurm, jobs[2:])


@pytest.mark.slow
def test_the_next_job_continues_after_a_time_limit(slurm, chain_launch):
    write(chain_launch.folder, "import os, time\nif os.environ['LAUNCH_ATTEMPT'] == '1': time.sleep(600)\n" + PRINT_CONTEXT)
    run, jobs = submit(chain_launch, "work.py", "--procs", 1, "run.grace_s=5")
    wait_until(lambda: record(run)["state"] == "running")
    slurm.shorten_time_limit(jobs[0])
    wait_for_end(run)
    first, second = attempt(run, 1), attempt(run, 2)
    assert (first["outcome"], first["reason"], first["job"]) == ("preempted", "time limit", jobs[0])
    assert (second["outcome"], second["job"], second["restart"]) == ("finished", jobs[1], 0)
    assert_never_ran(slurm, jobs[2:])


def test_a_failed_run_ends_its_chain_and_a_run_that_waits_for_it_starts_once_it_has_been_resumed_and_has_finished(
        slurm, chain_launch):
    write(chain_launch.folder, "import os, time\ntime.sleep(1)\nif not os.path.exists('fixed'): raise ValueError('for good')\n")
    run, jobs = submit(chain_launch, "work.py", "--procs", 1, "run.max_restarts=0")
    after, (later, *_) = submit(chain_launch, "work.py", "--procs", 1, "--after", run.name)
    wait_for_end(run, "failed")
    assert_never_ran(slurm, jobs[1:])
    wait_until(lambda: slurm.job(later)["Reason"] == "DependencyNeverSatisfied")
    assert record(after)["attempt"] == 0
    assert f"it waits for run {run.name}, which is failed" in chain_launch("runs").stdout
    (chain_launch.folder / "fixed").touch()
    resumed = chain_launch("resume", run.name)
    assert resumed.returncode == 0 and f"job {later} of {after.name} waits for job " in resumed.stderr
    wait_for_end(after)
    assert attempt(run, 2)["outcome"] == "finished" and attempt(after, 1)["job"] == later
    assert attempt(after, 1)["began"] >= attempt(run, 2)["ended"]


def test_cancel_ends_the_whole_chain(slurm, chain_launch):
    write(chain_launch.folder, "import time\ntime.sleep(600)\n")
    run, jobs = submit(chain_launch, "work.py", "--procs", 1)
    wait_until(lambda: record(run)["state"] == "running")
    done = chain_launch("cancel", run.name)
    assert done.returncode == 0 and done.stdout == f"{run.name}: cancelled\n", done.stderr
    assert_never_ran(slurm, jobs[1:])
    assert slurm.wait(jobs[0]) and record(run)["attempt"] == 1
