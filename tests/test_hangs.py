"""A rank that hangs is found and named, its stack is shown, and the next attempt changes no loss. A slow rank is named."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from conftest import BLOBS, Command, attempt, logged_steps, ranks_of, record, rows, wait_until

pytestmark = pytest.mark.slow

HANG_S = 3
# The longest time until the next attempt: HANG_S and the time between two looks at the ranks, 1 s to write the stacks, 5 s of
# grace for the ranks that hang, and 30 s because the machine may be busy.
ENDED_S = HANG_S * 1.2 + 1 + 5 + 30


def logged_values(run) -> tuple[list, list]:
    """Return what the run has logged: each step's loss and gradient norm, and each evaluation."""
    evaluations = [{k: v for k, v in row.items() if k != "time"} for row in rows(run, "eval")]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run)], evaluations


def uninterrupted(folder, *args) -> tuple[list, list]:
    """Return the logged values of the same run without a hang."""
    folder.mkdir()
    command = Command(folder)
    assert command(BLOBS, *args).returncode == 0
    return logged_values(command.run())


def test_a_stopped_rank_is_found_and_the_next_attempt_changes_no_loss(tmp_path, launch):
    """tests/slurm/test_interruptions.py does the same with four ranks on two nodes."""
    process = launch.start(BLOBS, "--procs", 2, "run.max_restarts=1", f"run.hang_s={HANG_S}", "model.pause_s=0.02")
    wait_until(lambda: logged_steps(launch.folder) >= 40, process=process)
    os.kill(ranks_of(process.pid)[1], signal.SIGSTOP)
    began, run = time.monotonic(), launch.run()
    wait_until(lambda: record(run)["attempt"] == 2, process=process)
    seconds = time.monotonic() - began
    out, err = process.communicate(timeout=120)
    print(f"the next attempt started {seconds:.1f} s after SIGSTOP; {attempt(run, 1)['failure']['message']}")
    assert process.returncode == 0, err
    failure = attempt(run, 1)["failure"]
    assert failure["rank"] == 1 and "hung after step" in failure["message"] and "was stopped" in failure["message"]
    assert HANG_S < seconds < ENDED_S and "trying again" in out
    for rank in range(2):
        assert "most recent call first" in (run / f"attempts/1/logs/{rank}.log").read_text()
    assert "trainers/engine/loop.py" in failure["traceback"]
    assert logged_values(run) == uninterrupted(tmp_path / "whole", "--procs", 2)


def test_a_rank_that_sleeps_is_named_with_its_stack(launch):
    process = launch.start(BLOBS, "--procs", 2, f"run.hang_s={HANG_S}", "model.hang=[1, 50]")
    out, err = process.communicate(timeout=120)
    run = launch.run()
    failure = attempt(run, 1)["failure"]
    assert process.returncode == 1 and failure["rank"] == 1
    assert "rank 1 hung after step 49" in failure["message"] and "the other rank waits for it" in failure["message"]
    assert failure["traceback"].splitlines()[-1].endswith("in batch") and "blobs.py" in failure["traceback"]
    assert "in batch" in (run / "attempts/1/logs/1.log").read_text()
    assert "in take_step" in (run / "attempts/1/logs/0.log").read_text()
    assert "rank 1 hung" in err and "run.hang_s is 3 s" in err
    explained = launch("explain", run.name).stdout
    assert "rank 1 hung after step 49" in explained and "in batch" in explained and "longer than run.hang_s" in explained
    assert f"run.hang_s={3 * HANG_S}" in explained


def test_a_slow_rank_is_named_but_a_slow_start_or_slow_steps_are_not_a_hang(launch):
    # The imports alone take longer than this hang_s.
    args = ("train.steps=100000", "model.pause_s=0.3", "model.slow=[1, 0.5]", "run.hang_s=3")
    process = launch.start(BLOBS, "--procs", 2, *args)
    try:
        wait_until(lambda: list(launch.folder.glob("runs/*/attempts/1/slow.json")), process=process)
        run = launch.run()
        (slow,) = json.loads(launch("status", run.name, "--json").stdout)["slow"]
        assert slow["rank"] == 1 and slow["factor"] > 1.5 and 0.8 <= slow["work_s"] <= slow["step_s"] * 1.1
        words = f"rank 1 on {slow['node']}: its own work in a step takes {slow['factor']:g} times as long as the others'"
        assert words in launch("status", run.name).stdout
        assert "slow: rank 1" in launch("explain", run.name).stdout
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 75 and record(run)["attempt"] == 1
    assert json.loads(launch("status", run.name, "--json").stdout)["slow"] == []
