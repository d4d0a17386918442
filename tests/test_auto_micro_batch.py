"""Runs that find the micro-batch that fits."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Command, attempt, pace, record, rows, wait_until

NARROW = Path(__file__).parent / "sentences" / "narrow.yaml"


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


@pytest.mark.slow
def test_auto_takes_the_largest_micro_batch_that_fits_and_changes_no_loss(tmp_path):
    """On one rank of two it does not, at once or after three micro-batches; of no restart is there any need."""
    at_once, later, given = (Command(tmp_path / name) for name in ("at-once", "later", "given"))
    for command, *words in ((at_once, "train.micro_batch_size=auto", "data.most=4"),
                            (later, "train.micro_batch_size=auto", "data.most=6", "data.calls=3",
                             "model.pause_s=2"),  # time for the checkpoint of step 2
                            (given, "train.micro_batch_size=4")):
        command.folder.mkdir()
        process = command.start(NARROW, "--procs", 2, "run.max_restarts=0", *words)
        if command is later:
            wait_until(lambda: list(command.folder.glob("runs/*/attempts/2")), process=process)
            pace(command.run(), 0)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        if command is at_once:
            assert "train.micro_batch_size=auto: 4, 3 to a step (12, 6 did not fit)" in out
        if command is later:
            assert "resuming at step 2 " in out
    assert record(at_once.run())["attempt"] == 3 and record(later.run())["attempt"] == 2
    assert losses(at_once.run()) == losses(given.run())
    assert losses(later.run()) == pytest.approx(losses(given.run()), abs=1e-6)
    failure = attempt(at_once.run(), 1)["failure"]
    assert (failure["rank"], failure["retry"]) == (1, True)
    assert failure["message"] == "rank 1 ran out of memory with a micro-batch of 12"
    assert failure["hint"] == "the next attempt takes 6 at a time"
    assert "micro_batch_size: auto" in (at_once.run() / "run.yaml").read_text()


@pytest.mark.slow
def test_out_of_memory_at_the_smallest_micro_batch_is_tried_once(launch):
    done = launch(NARROW, "--procs", 2, "run.max_restarts=2", "train.batch_size=2", "train.micro_batch_size=auto", "data.most=0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:-1] == ["error: rank 1 ran out of memory with a micro-batch of 1, the smallest there is"]
    assert record(launch.run())["attempt"] == 1
