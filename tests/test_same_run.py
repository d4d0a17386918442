"""The promise: an interrupted run and an uninterrupted one are the same run, to the last bit."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from conftest import BLOBS, SENTENCES, Command, alive, attempt, logged_steps, ranks_of, record, rows, wait_until

STEPS = 120


def told(run) -> tuple[list, list]:
    """What a run is: each step's loss, each evaluation."""
    evaluations = [{k: v for k, v in row.items() if k != "time"} for row in rows(run, "eval")]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run)], evaluations


def interrupt(launch: Command, how: str, at: int, *args: object, task: object = BLOBS) -> int:
    """Start a run, interrupt it once `at` rows are logged, and return its exit code."""
    process = launch.start(task, *args)
    wait_until(lambda: logged_steps(launch.folder) >= at, process=process)
    ranks = ranks_of(process.pid)
    match how:
        case "kill node":
            process.kill()
        case "kill rank":
            os.kill(random.choice(ranks), signal.SIGKILL)
        case "SIGTERM":
            process.send_signal(signal.SIGTERM)
        case "Ctrl-C":
            process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    began = time.monotonic()
    wait_until(lambda: not any(map(alive, ranks)), timeout_s=5)
    print(f"{how} at row {at}: exit code {process.returncode}, ranks gone {time.monotonic() - began:.2f} s later")
    return process.returncode


EXIT_CODES = {"kill node": -signal.SIGKILL, "kill rank": 1, "SIGTERM": 75, "Ctrl-C": 75}
STATES = {"kill node": "running", "kill rank": "failed", "SIGTERM": "preempted", "Ctrl-C": "preempted"}


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_interrupted_run_is_the_same_run(tmp_path, ranks, accumulation):
    args = ["--procs", ranks, f"train.micro_batch_size={32 // ranks // accumulation}"]
    folder = tmp_path / "whole"
    folder.mkdir()
    whole = Command(folder)
    done = whole(BLOBS, *args)
    assert done.returncode == 0, done.stderr
    expected = told(whole.run())
    assert [step for step, *_ in expected[0]] == list(range(1, STEPS + 1))

    seed = random.randrange(2**32)
    print(f"random.seed({seed})")
    random.seed(seed)
    for how in EXIT_CODES:
        folder = tmp_path / how.replace(" ", "-")
        folder.mkdir()
        cut = Command(folder)
        assert interrupt(cut, how, random.randint(5, 100), *args) == EXIT_CODES[how]
        run = cut.run()
        stopped = record(run)
        assert stopped["state"] == STATES[how]
        resumed = cut("resume", run.name)
        assert resumed.returncode == 0, resumed.stderr
        assert told(run) == expected, how
        assert record(run)["state"] == "finished" and record(run)["attempt"] == 2
        assert attempt(run, 2)["ranks"] == ranks
        if how in ("SIGTERM", "Ctrl-C"):  # nothing done twice
            assert f"resuming at step {stopped['step']} " in resumed.stdout


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp"])
def test_each_strategy_is_the_same_run(tmp_path, strategy):
    """One run through a kill -9 and a SIGTERM, each at a random step."""
    args = ["--procs", 2, "--strategy", strategy, "train.micro_batch_size=6", "model.dropout=0.1", "model.pause_s=0.02"]
    (tmp_path / "whole").mkdir(), (tmp_path / "cut").mkdir()
    whole, cut = Command(tmp_path / "whole"), Command(tmp_path / "cut")
    done = whole(SENTENCES, *args)
    assert done.returncode == 0, done.stderr
    expected = told(whole.run())
    assert len(expected[0]) == 30

    seed = random.randrange(2**32)
    print(f"random.seed({seed})")
    random.seed(seed)
    assert interrupt(cut, "kill rank", random.randint(3, 14), *args, task=SENTENCES) == 1
    run = cut.run()
    at = random.randint(16, 25)
    process = cut.start("resume", run.name)
    wait_until(lambda: logged_steps(cut.folder) >= at, process=process)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 75
    print(f"{strategy}: SIGTERM at row {at}")
    resumed = cut("resume", run.name)
    assert resumed.returncode == 0, resumed.stderr
    assert told(run) == expected and record(run)["attempt"] == 3


def test_a_stopped_run_resumes_where_it_stopped(launch):
    assert interrupt(launch, "Ctrl-C", 40, "--procs", 1) == 75
    run = launch.run()
    at = record(run)["step"]
    assert 40 * STEPS // 124 <= at < STEPS and record(run)["checkpoint"] == at
    resumed = launch("resume", run.name[:-2])
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming at step {at} " in resumed.stdout
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    again = launch("resume", run)
    assert again.returncode == 0 and "nothing to resume" in again.stdout


@pytest.mark.slow
def test_it_may_go_on_with_other_ranks(tmp_path):
    args = ["model.exact_over_ranks=true", "train.precision=fp32"]
    (tmp_path / "whole").mkdir(), (tmp_path / "moved").mkdir()
    whole, moved = Command(tmp_path / "whole"), Command(tmp_path / "moved")
    assert whole(BLOBS, "--procs", 2, *args).returncode == 0
    assert interrupt(moved, "SIGTERM", 30, "--procs", 2, *args) == 75
    run = moved.run()
    process = moved.start("resume", run.name, "--procs", 1)
    wait_until(lambda: logged_steps(moved.folder) >= 70, process=process)
    process.terminate()
    process.communicate()
    assert process.returncode == 75
    assert moved("resume", run.name, "--procs", 2).returncode == 0
    assert [attempt(run, n)["ranks"] for n in (1, 2, 3)] == [2, 1, 2]
    expected, got = told(whole.run())[0], told(run)[0]
    assert len(got) == STEPS
    assert max(abs(a[1] - b[1]) for a, b in zip(expected, got)) < 1e-4


@pytest.mark.slow
def test_a_failed_attempt_is_repeated_if_asked_for(launch):
    process = launch.start(BLOBS, "--procs", 2, "run.max_restarts=1")
    wait_until(lambda: logged_steps(launch.folder) >= 40, process=process)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    run = launch.run()
    assert "trying again" in out and record(run)["attempt"] == 2
    first = attempt(run, 1)["failure"]
    assert (first["rank"], first["signal"]) == (1, "SIGKILL")
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
