"""The promise: an interrupted run and an uninterrupted one are the same run, to the last bit."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time

import pytest
from conftest import BLOBS, PAIRS, SENTENCES, Command, alive, attempt, logged_steps, ranks_of, record, rows, set_pause, wait_until

STEPS = 120
LANGUAGE = SENTENCES.with_name("language.yaml")


def logged_values(run) -> tuple[list, list]:
    """Return what identifies a run: each step's losses and gradient norms, and each evaluation."""
    evaluations = [{k: v for k, v in row.items() if k != "time"} for row in rows(run, "eval")]
    steps = [(row["step"], *(row[key] for ending in ("loss", "grad_norm") for key in sorted(row) if key.endswith(ending)))
             for row in rows(run)]
    return steps, evaluations


def interrupt(launch: Command, how: str, at: int, *args: object) -> tuple[int, str]:
    """Train the only run of the folder, and interrupt the command when `at` rows are logged. Return its exit code and output.

    From then on the ranks pause longer before each batch, so that the run cannot finish, or train many more steps, before the
    interruption reaches it.
    """
    for run in launch.runs():
        (run / "pace").unlink(missing_ok=True)
    process = launch.start(*args)
    wait_until(lambda: logged_steps(launch.folder) >= at, process=process)
    set_pause(launch.run(), 0.3)
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
    wait_until(lambda: not any(map(alive, ranks)), timeout_s=20)
    print(f"{how} at row {at}: exit code {process.returncode}, ranks gone {time.monotonic() - began:.2f} s later")
    return process.returncode, out


EXIT_CODES = {"kill node": -signal.SIGKILL, "kill rank": 1, "SIGTERM": 75, "Ctrl-C": 75}
STATES = {"kill node": "running", "kill rank": "failed", "SIGTERM": "preempted", "Ctrl-C": "preempted"}


@pytest.mark.slow
@pytest.mark.parametrize("ranks, accumulation", [(1, 1), (1, 4), (2, 4), (4, 1), (4, 4)])
def test_an_interrupted_run_is_the_same_run(tmp_path, ranks, accumulation):
    """Interrupt one run in every way, each time after more steps than lie between two checkpoints.

    Each attempt therefore writes a checkpoint, and a difference in any attempt would stay in the run.
    """
    args = ["--procs", ranks, f"train.micro_batch_size={32 // ranks // accumulation}"]
    (tmp_path / "whole").mkdir(), (tmp_path / "cut").mkdir()
    whole, cut = Command(tmp_path / "whole"), Command(tmp_path / "cut")
    done = whole(BLOBS, *args)
    assert done.returncode == 0, done.stderr
    expected = logged_values(whole.run())
    assert [step for step, *_ in expected[0]] == list(range(1, STEPS + 1))

    seed = random.randrange(2**32)
    print(f"random.seed({seed})")
    random.seed(seed)
    interruptions = random.sample(sorted(EXIT_CODES), len(EXIT_CODES))
    command_args, before = (BLOBS, *args, f"model.pause_s={0.05 / accumulation}"), None
    for how in interruptions:
        code, out = interrupt(cut, how, logged_steps(cut.folder) + random.randint(17, 22), *command_args)
        run = cut.run()
        check_resume_step(out, before)
        before = record(run)
        assert (code, before["state"]) == (EXIT_CODES[how], STATES[how])
        command_args = ("resume", run.name)
    set_pause(run, 0)
    resumed = cut(*command_args)
    assert resumed.returncode == 0, resumed.stderr
    check_resume_step(resumed.stdout, before)
    assert logged_values(run) == expected, interruptions
    assert record(run)["state"] == "finished" and record(run)["attempt"] == 5
    assert [attempt(run, number)["ranks"] for number in range(1, 6)] == [ranks] * 5


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp"])
def test_an_interrupted_run_is_the_same_run_under_each_strategy(tmp_path, strategy):
    """Interrupt one run by SIGKILL and by SIGTERM, each at a random step. It has batches of tokens, averaged weights and
    parameter groups."""
    args = ["--procs", 2, "--strategy", strategy, "train.micro_batch_size=80", "model.dropout=0.1", "train.ema=0.9",
            "optim.decay_norms_and_biases=false", "optim.groups=[{match: out, lr_scale: 0.5, weight_decay: 0.1}]"]
    (tmp_path / "whole").mkdir(), (tmp_path / "cut").mkdir()
    whole, cut = Command(tmp_path / "whole"), Command(tmp_path / "cut")
    done = whole(LANGUAGE, *args)
    assert done.returncode == 0, done.stderr
    expected = logged_values(whole.run())
    assert len(expected[0]) == 30 and len(expected[1]) == 3

    seed = random.randrange(2**32)
    print(f"random.seed({seed})")
    random.seed(seed)
    code, _ = interrupt(cut, "kill rank", random.randint(3, 14), LANGUAGE, *args, "model.pause_s=0.05")
    assert code == 1
    run = cut.run()
    code, _ = interrupt(cut, "SIGTERM", random.randint(16, 25), "resume", run.name)
    assert code == 75
    set_pause(run, 0)
    resumed = cut("resume", run.name)
    assert resumed.returncode == 0, resumed.stderr
    assert logged_values(run) == expected and record(run)["attempt"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_interrupted_run_of_two_updates_is_the_same_run(tmp_path, strategy):
    """The critic draws two of the five batches of an epoch in each step, and a saved epoch may end between the two."""
    args = ["--procs", 2, "--strategy", strategy, "train.epochs=16", "eval.every=epoch", "checkpoint.every=epoch"]
    (tmp_path / "whole").mkdir(), (tmp_path / "cut").mkdir()
    whole, cut = Command(tmp_path / "whole"), Command(tmp_path / "cut")
    done = whole(PAIRS, *args)
    assert done.returncode == 0, done.stderr
    expected = logged_values(whole.run())
    assert [(len(row), row[0]) for row in expected[0]] == [(5, step) for step in range(1, 41)]  # two losses and two norms
    assert [row["step"] for row in expected[1]] == [-(-5 * epoch // 2) for epoch in range(1, 17)]

    seed = random.randrange(2**32)
    print(f"random.seed({seed})")
    random.seed(seed)
    code, _ = interrupt(cut, "kill rank", random.randint(4, 18), PAIRS, *args, "model.pause_s=0.03")
    assert code == 1
    run = cut.run()
    code, _ = interrupt(cut, "SIGTERM", random.randint(22, 30), "resume", run.name)
    assert code == 75
    set_pause(run, 0)
    resumed = cut("resume", run.name)
    assert resumed.returncode == 0, resumed.stderr
    assert logged_values(run) == expected and record(run)["attempt"] == 3


@pytest.mark.slow
def test_a_run_may_continue_with_another_strategy(tmp_path):
    (tmp_path / "whole").mkdir(), (tmp_path / "moved").mkdir()
    whole, moved = Command(tmp_path / "whole"), Command(tmp_path / "moved")
    assert whole(SENTENCES, "--procs", 2).returncode == 0
    code, _ = interrupt(moved, "SIGTERM", 12, SENTENCES, "--procs", 2, "--strategy", "zero2", "train.offload=optimizer",
                        "model.pause_s=0.1")
    run = moved.run()
    refused = moved("resume", run.name, "--strategy", "fsdp")
    assert (code, refused.returncode) == (75, 2)
    assert "`train.offload` is `optimizer`, which `fsdp` does not support" in refused.stderr
    refused = moved("resume", run.name, "optim.lr=1")
    assert refused.returncode == 2 and "a run's spec never changes" in refused.stderr
    assert not (run / "changes.json").exists()
    set_pause(run, 0)
    resumed = moved("resume", run.name, "--strategy", "fsdp", "train.offload=none", "--procs", 3)
    assert resumed.returncode == 0, resumed.stderr
    assert "strategy: zero2" in (run / "run.yaml").read_text()
    newest = max((run / "checkpoints").glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    assert json.loads((newest / "manifest.json").read_text())["strategy"] == "fsdp"
    expected, got = logged_values(whole.run())[0], logged_values(run)[0]
    assert len(got) == len(expected) == 30
    assert max(abs(a[1] - b[1]) for a, b in zip(expected, got)) < 1e-5


def check_resume_step(output: str, stopped: dict | None) -> None:
    """Check that the step at which the command resumed fits the record that the interrupted attempt left (`stopped`)."""
    match = re.search(r"resuming at step (\d+) ", output)
    step = int(match[1]) if match else 0
    if stopped is None:
        assert not match
    elif stopped["state"] == "preempted":
        assert step == stopped["step"] == stopped["checkpoint"], "a step was trained twice"
    else:  # the last checkpoint may be committed but not yet recorded
        assert (stopped["checkpoint"] or 0) <= step


@pytest.mark.slow
def test_a_stopped_run_resumes_where_it_stopped(launch):
    assert interrupt(launch, "Ctrl-C", 40, BLOBS, "--procs", 1, "model.pause_s=0.03")[0] == 75
    run = launch.run()
    at = record(run)["step"]
    assert 40 * STEPS // 124 <= at < STEPS and record(run)["checkpoint"] == at
    set_pause(run, 0)
    resumed = launch("resume", run.name[:-2])
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming at step {at} " in resumed.stdout
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    again = launch("resume", run)
    assert again.returncode == 0 and "nothing to resume" in again.stdout


@pytest.mark.slow
def test_a_run_may_continue_on_another_number_of_ranks(tmp_path):
    args = ["model.exact_over_ranks=true", "train.precision=fp32"]
    (tmp_path / "whole").mkdir(), (tmp_path / "moved").mkdir()
    whole, moved = Command(tmp_path / "whole"), Command(tmp_path / "moved")
    assert whole(BLOBS, "--procs", 2, *args).returncode == 0
    assert interrupt(moved, "SIGTERM", 30, BLOBS, "--procs", 2, *args, "model.pause_s=0.03")[0] == 75
    run = moved.run()
    assert interrupt(moved, "SIGTERM", 70, "resume", run.name, "--procs", 1)[0] == 75
    set_pause(run, 0)
    assert moved("resume", run.name, "--procs", 2).returncode == 0
    assert [attempt(run, n)["ranks"] for n in (1, 2, 3)] == [2, 1, 2]
    expected, got = logged_values(whole.run())[0], logged_values(run)[0]
    assert len(got) == STEPS
    assert max(abs(a[1] - b[1]) for a, b in zip(expected, got)) < 1e-4


@pytest.mark.slow
def test_a_failed_attempt_is_retried_with_max_restarts(launch):
    process = launch.start(BLOBS, "--procs", 2, "run.max_restarts=1", "model.pause_s=0.03")
    wait_until(lambda: logged_steps(launch.folder) >= 40, process=process)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    run = launch.run()
    assert "trying again" in out and record(run)["attempt"] == 2
    first = attempt(run, 1)["failure"]
    assert (first["rank"], first["signal"]) == (1, "SIGKILL")
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
