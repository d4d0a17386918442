"""What an exit code is worth: a rank has finished only if its work was done, and a script has stopped only if it was asked to."""

from __future__ import annotations

import pytest
from conftest import attempt, record, wait_until

LEAVES = """
import os
from blobs import BlobsTask
from trainers.contract.signals import stop_requested

class Leaves(BlobsTask):
    losses = 0

    def loss(self, model, batch):
        self.losses += 1
        if self.losses == 8 and os.environ["RANK"] == str(self.config.model["rank"]) and os.environ["LAUNCH_ATTEMPT"] == "1":
            os._exit(0)
        result = super().loss(model, batch)
        if stop_requested() and os.environ["LAUNCH_ATTEMPT"] == "1":
            raise RuntimeError("a worker is gone")
        return result
"""


@pytest.fixture
def leaves(launch):
    """A task of which one rank calls `os._exit(0)` at step 6 to 8 of 12, in its first attempt, and which fails if it is asked to
    stop there."""
    from conftest import BLOBS

    (launch.folder / "blobs.py").write_text(BLOBS.with_name("blobs.py").read_text())
    (launch.folder / "leaves.py").write_text(LEAVES)
    (launch.folder / "leaves.yaml").write_text("task: leaves:Leaves\ntrain: {steps: 12, batch_size: 12}\n"
                                               "model: {exact_over_ranks: true, pause_s: 0.1, rank: 0}\ncheckpoint: {every: 4}\n")
    return launch


@pytest.mark.slow
@pytest.mark.parametrize("procs", [1, 2])
def test_a_task_that_leaves_with_code_0_has_failed_and_the_rank_is_named(leaves, procs):
    done = leaves("leaves.yaml", "--procs", procs, f"model.rank={procs - 1}")
    run = leaves.run()
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith(f"error: rank {procs - 1} ended with exit code 0 before its work was done\nhint: code of")
    assert record(run)["state"] == "failed" and record(run)["checkpoint"] == 4
    failure = attempt(run, 1)["failure"]
    assert (failure["rank"], failure["exit_code"], failure["retry"]) == (procs - 1, 0, True)
    assert leaves("resume", run.name).returncode == 0
    assert record(run)["state"] == "finished" and record(run)["step"] == 12


@pytest.mark.slow
def test_a_rank_that_fails_because_of_a_stop_has_stopped(leaves):
    """SLURM's SIGTERM also ends the workers of a rank, and the rank fails without them."""
    process = leaves.start("leaves.yaml", "--procs", 2, "model.rank=none", "train.steps=60")
    wait_until(lambda: any(leaves.folder.glob("runs/*/checkpoints/step_4")), process=process)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    run = leaves.run()
    assert process.returncode == 75 and "failed while it was to stop: rank" in out and "run.grace_s=" not in out, out
    assert record(run)["state"] == "preempted" and "a worker is gone" in attempt(run, 1)["reason"]
    assert leaves("resume", run.name).returncode == 0
    assert record(run)["state"] == "finished" and record(run)["step"] == 60


def test_a_scripts_code_75_without_a_request_to_stop_is_a_failure(launch):
    (launch.folder / "work.py").write_text("raise SystemExit(75)\n")
    done = launch("work.py", "--procs", 1)
    assert done.returncode == 1 and "rank 0 ended with exit code 75" in done.stderr
    assert record(launch.run())["state"] == "failed"
