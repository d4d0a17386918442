"""After some ends the next attempt uses other settings: a smaller micro-batch, or warnings about determinism."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Command, attempt, record, rows, set_pause, wait_until

NARROW, SCATTERED = (Path(__file__).parent / "sentences" / name for name in ("narrow.yaml", "scattered.yaml"))
LANGUAGE = NARROW.with_name("language.yaml")


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


@pytest.mark.slow
def test_auto_takes_the_largest_micro_batch_that_fits_and_changes_no_loss(tmp_path):
    """Rank 1 runs out of memory: in one run at its first micro-batch, in another run after three micro-batches.

    The smaller micro-batches are tried although `run.max_restarts` is 0.
    """
    at_once, later, given = (Command(tmp_path / name) for name in ("at-once", "later", "given"))
    for command, *args in ((at_once, "train.micro_batch_size=auto", "data.max_sentences=4"),
                           (later, "train.micro_batch_size=auto", "data.max_sentences=6", "data.unlimited_calls=3",
                            "model.pause_s=2"),  # leaves time for the checkpoint of step 2
                           (given, "train.micro_batch_size=4")):
        command.folder.mkdir()
        process = command.start(NARROW, "--procs", 2, "run.max_restarts=0", *args)
        if command is later:
            wait_until(lambda: list(command.folder.glob("runs/*/attempts/2")), process=process)
            set_pause(command.run(), 0)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        if command is at_once:
            assert "train.micro_batch_size=auto: 4 micro-batch x 3 accumulation (12, 6 did not fit)" in out
        if command is later:
            assert "resuming at step 2 " in out
    assert record(at_once.run())["attempt"] == 3 and record(later.run())["attempt"] == 2
    assert losses(at_once.run()) == losses(given.run())
    assert losses(later.run()) == pytest.approx(losses(given.run()), abs=1e-6)
    failure = attempt(at_once.run(), 1)["failure"]
    assert (failure["rank"], failure["retry"]) == (1, True)
    assert failure["message"] == "rank 1 ran out of memory with a micro-batch of 12"
    assert failure["hint"] == "the next attempt uses a micro-batch of 6"
    assert "micro_batch_size: auto" in (at_once.run() / "run.yaml").read_text()


@pytest.mark.slow
def test_auto_halves_a_budget_of_tokens_and_changes_no_loss(tmp_path):
    """300 tokens on 2 ranks. A sentence of up to 60 tokens is computed alone, where a micro-batch has a budget of 37."""
    at_once, given = Command(tmp_path / "at-once"), Command(tmp_path / "given")
    for command, *args in ((at_once, "train.micro_batch_size=auto", "data.max_tokens=60"), (given, "data.max_tokens=300")):
        command.folder.mkdir()
        done = command(LANGUAGE, "--procs", 2, "task=language:Narrow", "run.max_restarts=0", "train.steps=12", *args)
        assert done.returncode == 0, done.stdout + done.stderr
        if command is at_once:
            assert "train.micro_batch_size=auto: 37 micro-batch x 5 accumulation (150, 75 did not fit)" in done.stdout
            assert "up to 300 tokens = 2 rank(s) x auto micro-batch" in command(
                LANGUAGE, "--procs", 2, "--dry-run", "train.micro_batch_size=auto", "task=language:Narrow").stdout
    assert losses(at_once.run()) == pytest.approx(losses(given.run()), rel=1e-5) and len(losses(given.run())) == 12
    message = attempt(at_once.run(), 1)["failure"]["message"]
    assert message == "rank 1 ran out of memory with a micro-batch of 150 tokens"


@pytest.mark.slow
def test_out_of_memory_with_a_micro_batch_of_1_is_not_retried(launch):
    done = launch(NARROW, "--procs", 2, "run.max_restarts=2", "train.batch_size=2", "train.micro_batch_size=auto",
                  "data.max_sentences=0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:-1] == ["error: rank 1 ran out of memory with a micro-batch of 1, the smallest possible"]
    assert record(launch.run())["attempt"] == 1


@pytest.mark.slow
def test_an_operation_without_a_deterministic_kernel_makes_the_next_attempt_warn(tmp_path):
    """Only rank 1 meets the operation, in step 3. The other rank must neither hang nor go on."""
    met, warned = (Command(tmp_path / name) for name in ("met", "warned"))
    for command, *more in ((met,), (warned, "train.deterministic=warn")):
        command.folder.mkdir()
        done = command(SCATTERED, "--procs", 2, "run.max_restarts=0", *more)
        assert done.returncode == 0, done.stdout + done.stderr
        if command is met:
            assert "resuming at step 2 " in done.stdout
            assert "warning: `put_` has no deterministic kernel, so operations without one only give warnings" in done.stdout
    assert record(met.run())["attempt"] == 2 and record(warned.run())["attempt"] == 1
    failure = attempt(met.run(), 1)["failure"]
    assert (failure["rank"], failure["retry"], failure["message"]) == (1, True, "rank 1: `put_` has no deterministic kernel")
    assert json.loads((met.run() / "not_deterministic.json").read_text()) == {"attempt": 1, "operation": "put_"}
    assert "put_ does not have a deterministic implementation" in (met.run() / "attempts/2/logs/1.log").read_text()
    assert losses(met.run()) == losses(warned.run())
