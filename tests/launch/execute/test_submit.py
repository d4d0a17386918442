"""Submitting a job exactly once, although sbatch fails now and then."""

from __future__ import annotations

import pytest

from launch.cluster import slurm
from launch.execute import submit
from launch.plan.job_script import Job
from trainers.contract.errors import UserError


@pytest.fixture
def chain(tmp_path):
    """Two jobs with the same script."""
    return Job(str(tmp_path / "submissions/1"), "#!/bin/bash\n", links=2)


@pytest.fixture
def cluster(monkeypatch, chain):
    """The ids in SLURM's queue, and what happens at each call of sbatch: (whether SLURM accepts the job, the error)."""
    queue, calls = [], []

    def call(*words, **_):
        accepted, error = calls.pop(0)
        if accepted:
            queue.append(str(100 + len(queue)))
        if error:
            raise UserError(f"`sbatch` failed: {error}")
        return f"{queue[-1]}\n"

    def job(id):
        return slurm.Queued(id, "PENDING", "JobHeldUser", None, 1, 1, "", "main", chain.file, None)

    monkeypatch.setattr(slurm, "call", call)
    monkeypatch.setattr(slurm, "queue", lambda ids=None: {id: job(id) for id in queue})
    monkeypatch.setattr(slurm, "cancel", lambda ids, signal=None: [queue.remove(id) for id in list(ids)])
    monkeypatch.setattr(slurm, "partitions", lambda: [])
    monkeypatch.setattr(submit.time, "sleep", lambda _: None)
    return queue, calls


TIMED_OUT = "Socket timed out on send/recv operation"


@pytest.mark.parametrize("answers", [
    [(True, None), (True, None)],
    [(False, TIMED_OUT), (True, None), (False, TIMED_OUT), (False, TIMED_OUT), (True, None)],
    [(True, TIMED_OUT), (True, TIMED_OUT)],
], ids=["it answers", "it fails", "it fails although SLURM has accepted the job"])
def test_each_job_of_a_chain_is_submitted_once(cluster, chain, answers, tmp_path):
    queue, calls = cluster
    calls += answers
    assert submit.hand_over(chain, {}, tmp_path) == ["100", "101"] == queue
    assert calls == []


def test_a_refusal_is_not_tried_again_and_leaves_nothing(cluster, chain, tmp_path):
    queue, calls = cluster
    calls += [(True, None), (False, "Batch job submission failed: Invalid qos specification"), (True, None)]
    with pytest.raises(UserError, match="SLURM refuses this job: Invalid qos"):
        submit.hand_over(chain, {}, tmp_path)
    assert queue == [] and len(calls) == 1
