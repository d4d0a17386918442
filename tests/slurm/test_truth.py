"""What readers say about runs that somebody suspends, stops, requeues or cancels by hand."""

from __future__ import annotations

import pytest
from conftest import BLOBS, attempt, record, wait_until
from slurm.conftest import explanation_of
from slurm.scripts import submit

from launch.records.run import read_run
from launch.records.state import state_of

pytestmark = pytest.mark.slow

SLOWLY = (BLOBS, "--gpus", 2, "--nodes", 2, "train.steps=2000", "eval.every=never", "checkpoint.every=10", "run.grace_s=10",
          "model.pause_s=0.05")


def sentence(run) -> str:
    return explanation_of(run)["sentence"]


def steps(run) -> int:
    return (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0


def begin(slurm, launch, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    run, (job,) = submit(launch, *SLOWLY)
    wait_until(lambda: steps(run) > 12)
    return run, job


def test_a_run_that_is_suspended_continued_and_interrupted(slurm, slurm_launch, monkeypatch):
    """SIGINT reaches every node process. That is no second Ctrl-C, which would end the run without a checkpoint."""
    run, job = begin(slurm, slurm_launch, monkeypatch)
    slurm.run("scontrol", "suspend", job)
    wait_until(lambda: "; SLURM has suspended job" in sentence(run), timeout_s=20)
    slurm.run("scontrol", "resume", job)
    wait_until(lambda: sentence(run).endswith("nothing is wrong"), timeout_s=20)
    before = steps(run)
    wait_until(lambda: steps(run) > before + 40)  # SLURM drops a signal for a job that it has just continued
    slurm.run("scancel", "--signal=INT", job)
    slurm.wait(job)
    found = explanation_of(run)
    step = record(run)["step"]
    assert found["sentence"] == f"stopped at step {step} in attempt 1 (SIGINT); it does not continue by itself"
    assert record(run)["checkpoint"] == step and attempt(run, 1)["exit_code"] == 75


def test_a_run_that_is_requeued_on_hold_and_then_cancelled(slurm, slurm_launch, monkeypatch):
    run, job = begin(slurm, slurm_launch, monkeypatch)
    slurm.run("scontrol", "requeuehold", job)
    wait_until(lambda: "it was requeued and put on hold" in sentence(run), timeout_s=30)
    step = record(run)["step"]
    assert sentence(run).endswith(f"; it stopped with a checkpoint at step {step} in attempt 1: requeued with scontrol")
    slurm.run("scancel", job)
    wait_until(lambda: state_of(read_run(run)) == "cancelled", timeout_s=30)
    monkeypatch.setattr("launch.cluster.slurm.history", lambda ids: {})  # SLURM has forgotten the job
    assert sentence(run) == f"cancelled at step {step} in attempt 1, with a checkpoint of step {step}"
