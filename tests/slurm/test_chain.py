"""Where a site forbids requeueing: a chain of jobs, of which each link goes on where the one before it ended."""

from __future__ import annotations

import pytest
from conftest import attempt, record, wait_until
from slurm.conftest import write_cluster
from slurm.scripts import SHOW, finish, submit, write

pytestmark = pytest.mark.slow  # not each, but together


@pytest.fixture
def chained(slurm_launch):
    write_cluster(slurm_launch.folder, requeue=False, chain=4)
    return slurm_launch


def never_ran(slurm, jobs: list[str]) -> None:
    """They are over, without having had a node."""
    for job in jobs:
        found = slurm.wait(job)
        assert (found["JobState"], found["NodeList"]) == ("CANCELLED", ""), found


@pytest.mark.slow
def test_a_finished_link_ends_the_chain(slurm, chained):
    """And lets those begin that wait for it."""
    write(chained.folder, "import time\ntime.sleep(1)\n" + SHOW)
    run, jobs = submit(chained, "work.py", "--procs", 1)
    after, _ = submit(chained, "work.py", "--procs", 1, "--after", run.name)
    assert len(jobs) == 4
    assert slurm.job(jobs[3])["Dependency"] != "(null)" and slurm.job(jobs[0])["Requeue"] == "0"
    finish(run)
    never_ran(slurm, jobs[1:])
    assert record(run)["attempt"] == 1 and slurm.wait(jobs[0])["JobState"] == "COMPLETED"
    assert record(run)["job"]["ids"] == jobs
    finish(after)


def test_a_failed_rank_is_tried_again_and_a_killed_node_process_by_the_next_link(slurm, chained):
    write(chained.folder, "import os\nnumber = int(os.environ['LAUNCH_ATTEMPT'])\n"
                          "if number == 1: raise ValueError('a first failure')\n"
                          "if number == 2: os.kill(os.getppid(), 9)\n" + SHOW)
    run, jobs = submit(chained, "work.py", "--procs", 1)
    finish(run)
    assert [attempt(run, number)["job"] for number in (1, 2, 3)] == [jobs[0], jobs[0], jobs[1]]
    assert [attempt(run, number)["outcome"] for number in (1, 2, 3)] == ["failed", "lost", "finished"]
    never_ran(slurm, jobs[2:])


@pytest.mark.slow
def test_the_next_link_goes_on_after_a_time_limit(slurm, chained):
    write(chained.folder, "import os, time\nif os.environ['LAUNCH_ATTEMPT'] == '1': time.sleep(600)\n" + SHOW)
    run, jobs = submit(chained, "work.py", "--procs", 1, "run.grace_s=5")
    wait_until(lambda: record(run)["state"] == "running")
    slurm.end_soon(jobs[0])
    finish(run)
    first, second = attempt(run, 1), attempt(run, 2)
    assert (first["outcome"], first["reason"], first["job"]) == ("preempted", "time limit", jobs[0])
    assert (second["outcome"], second["job"], second["restart"]) == ("finished", jobs[1], 0)
    never_ran(slurm, jobs[2:])


def test_a_run_that_fails_for_good_ends_the_chain_and_starts_nothing_after_it(slurm, chained):
    write(chained.folder, "import time\ntime.sleep(1)\nraise ValueError('for good')\n")
    run, jobs = submit(chained, "work.py", "--procs", 1, "run.max_restarts=0")
    after, (later, *_) = submit(chained, "work.py", "--procs", 1, "--after", run.name)
    finish(run, "failed")
    never_ran(slurm, jobs[1:])
    wait_until(lambda: slurm.job(later)["Reason"] == "DependencyNeverSatisfied")
    assert record(after)["attempt"] == 0


def test_cancel_ends_the_whole_chain(slurm, chained):
    write(chained.folder, "import time\ntime.sleep(600)\n")
    run, jobs = submit(chained, "work.py", "--procs", 1)
    wait_until(lambda: record(run)["state"] == "running")
    done = chained("cancel", run.name)
    assert done.returncode == 0 and done.stdout == f"{run.name}: cancelled\n", done.stderr
    never_ran(slurm, jobs[1:])
    assert slurm.wait(jobs[0]) and record(run)["attempt"] == 1
