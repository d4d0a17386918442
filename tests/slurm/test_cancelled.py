"""Cancelling that does not work, and jobs that find their run cancelled."""

from __future__ import annotations

import json

import pytest
from conftest import BLOBS, attempt, environment, record, rows, set_pause, wait_until
from slurm.scripts import PRINT_CONTEXT, START_LATER, submit, wait_for_end, write

from trainers.contract.files import update_json

pytestmark = pytest.mark.slow


def test_a_cancel_that_fails_changes_nothing_and_the_run_continues_after_its_time_limit(slurm, slurm_launch):
    run, (job,) = submit(slurm_launch, BLOBS, "--procs", 1, "model.pause_s=0.5", "checkpoint.every=5", "run.grace_s=10")
    wait_until(lambda: record(run)["state"] == "running" and record(run)["checkpoint"])
    folder = slurm_launch.folder / "bin"
    folder.mkdir()
    write(folder, "#!/bin/sh\necho 'scancel: error: nobody answers' >&2\nexit 1\n", "scancel").chmod(0o755)
    done = slurm_launch("cancel", run.name, PATH=f"{folder}:{environment()['PATH']}")
    assert done.returncode == 2 and "nobody answers" in done.stderr
    assert not (run / "attempts/1/cancelled").exists() and record(run)["state"] == "running"
    slurm.shorten_time_limit(job)
    slurm.wait_until_requeued(job)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    set_pause(run, 0.0)
    slurm.start_now(job)
    wait_for_end(run)
    assert attempt(run, 1)["outcome"] == "preempted" and attempt(run, 1)["reason"] == "time limit"
    assert [row["step"] for row in rows(run)] == sorted({row["step"] for row in rows(run)})


def test_a_job_that_finds_its_run_cancelled_fails_so_that_no_run_starts_after_it(slurm, slurm_launch):
    write(slurm_launch.folder, PRINT_CONTEXT)
    run, (job,) = submit(slurm_launch, "work.py", "--procs", 1, START_LATER)
    after, (later,) = submit(slurm_launch, "work.py", "--procs", 1, "--after", run.name)
    update_json(run / "run.json", state="cancelled")  # as a `launch cancel` whose scancel was lost
    slurm.start_now(job)
    assert slurm.wait(job)["JobState"] == "FAILED"
    wait_until(lambda: slurm.job(later)["Reason"] == "DependencyNeverSatisfied")
    assert json.loads((after / "run.json").read_text())["attempt"] == 0
