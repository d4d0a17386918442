"""Interrupted runs on SLURM give exactly the results of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from contextlib import ExitStack

import pytest
from conftest import BLOBS, alive, attempt, fill, record, rows, set_pause, small_disk, wait_until
from slurm.conftest import explanation_of

pytestmark = pytest.mark.slow

STEPS = 400
KEYS = (BLOBS, f"train.steps={STEPS}", "eval.every=100", "checkpoint.every=50", "run.grace_s=10")
SLOWLY = "model.pause_s=0.05"  # `set_pause` changes the pause later
WHERE = ("--cluster", "here", "--gpus", 4, "--nodes", 2)


def results(run) -> tuple[list, list]:
    """Return (step, loss and gradient norm of each training row, all evaluation rows without their times)."""
    evaluations = [{k: v for k, v in row.items() if k != "time"} for row in rows(run, "eval")]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run)], evaluations


def submit(launch, *args) -> tuple:
    """Submit a run and return (the run's folder, its job's id)."""
    done = launch(*args, "--json")
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    return launch.folder / "runs" / output["id"], output["jobs"][0]


def state(run) -> str:
    return record(run)["state"]


def step(run) -> int:
    try:
        return (run / "metrics.jsonl").read_text().count('"train"')
    except FileNotFoundError:
        return 0


def reach(run, at: int) -> None:
    """Wait until a run is at a step, then slow the run down, so that it cannot finish before the test interrupts it."""
    wait_until(lambda: step(run) >= at or state(run) == "failed", timeout_s=180)
    assert state(run) != "failed", attempt(run, record(run)["attempt"])
    set_pause(run, 0.5)


def run_to_the_end(run) -> None:
    """Let a run continue without pauses and wait until it has finished."""
    set_pause(run, 0)
    wait_until(lambda: state(run) in ("finished", "failed", "cancelled"), timeout_s=240)
    assert state(run) == "finished", job_log(run)


def job_log(run) -> str:
    return "\n".join(path.read_text() for path in sorted(run.glob("submissions/*/*_log.out")))


@pytest.fixture(scope="module")
def whole(launch_in, tmp_path_factory):
    """The results of the same run on the same nodes without an interruption."""
    run, _ = submit(launch_in(tmp_path_factory.mktemp("whole")), *KEYS, *WHERE)
    run_to_the_end(run)
    return results(run)


def test_a_time_limit_a_requeue_and_a_cancellation(slurm, slurm_launch, whole):
    seed = random.randrange(2**32)
    print(f"random.seed({seed})")
    random.seed(seed)
    run, job = submit(slurm_launch, *KEYS, SLOWLY, *WHERE, "--wandb", "offline")

    reach(run, random.randint(10, 40))
    slurm.shorten_time_limit(job)
    wait_until(lambda: attempt(run, 1)["outcome"] != "running")
    at = record(run)["step"]
    print(f"time limit (USR2) at step {at}: {attempt(run, 1)['outcome']}")
    assert (attempt(run, 1)["outcome"], attempt(run, 1)["reason"]) == ("preempted", "time limit")
    assert record(run)["checkpoint"] == at
    slurm.wait_until_requeued(job)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    slurm.start_now(job)

    set_pause(run, 0.05)
    reach(run, at + random.randint(10, 40))
    slurm.run("scontrol", "requeue", job)
    wait_until(lambda: attempt(run, 2)["outcome"] != "running")
    print(f"requeue (TERM) at step {record(run)['step']}: {attempt(run, 2)['outcome']}")
    assert attempt(run, 2)["outcome"] == "preempted" and record(run)["checkpoint"] == record(run)["step"]
    slurm.wait_until_requeued(job)
    slurm.start_now(job)

    set_pause(run, 0.05)
    reach(run, record(run)["step"] + random.randint(10, 40))
    cancelled = slurm_launch("cancel", run.name)
    assert cancelled.returncode == 0, cancelled.stderr
    print(f"launch cancel at step {record(run)['step']}: {cancelled.stdout.strip()}")
    assert state(run) == "cancelled" and record(run)["checkpoint"] == record(run)["step"]
    wait_until(lambda: slurm.job(job)["JobState"] == "CANCELLED")
    resumed = slurm_launch("resume", run.name, "--time", "10m", "--json")
    assert resumed.returncode == 0, resumed.stderr
    run_to_the_end(run)

    assert results(run) == whole
    assert record(run)["attempt"] == 4 and [attempt(run, n)["restart"] for n in (1, 2, 3, 4)] == [0, 1, 2, 0]
    logs = [f"attempts/{n}/logs/{rank}.log" for n in (1, 2, 3, 4) for rank in range(4)]
    assert all((run / log).exists() for log in logs)
    folders = list((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 4 and {re.split(r"-\d{8}_\d{6}-", folder.name)[1] for folder in folders} == {run.name}


@pytest.mark.parametrize("victim", ["rank", "node process", "head node process"])
def test_a_killed_process(slurm, slurm_launch, whole, victim):
    run, job = submit(slurm_launch, *KEYS, SLOWLY, *WHERE)
    at = random.randint(60, 200)
    reach(run, at)
    os.kill(find_process(run, victim), signal.SIGKILL)
    killed, killed_at = time.monotonic(), step(run)
    if victim != "rank":
        slurm.wait_until_requeued(job)
        slurm.start_now(job)
    resumed = resumed_at(run, 2)
    seconds = time.monotonic() - killed
    run_to_the_end(run)
    print(f"{victim} killed at step {killed_at}: training continued after {seconds:.1f} s from step {resumed}; "
          f"attempt 1: {attempt(run, 1)['outcome']}: {attempt(run, 1)['failure']['message']}")
    assert killed_at - resumed <= 50 + 5 and results(run) == whole
    restarts = [attempt(run, n)["restart"] for n in (1, 2)]
    assert restarts == ([0, 0] if victim == "rank" else [0, 1])  # after a killed rank, the job itself starts the new attempt


def find_process(run, kind: str) -> int:
    """Return the pid of rank 3, of the second node's process, or of the head node's process of the first attempt."""
    if kind == "head node process":
        return attempt(run, 1)["pid"]
    pids = []
    for entry in os.listdir("/proc"):
        try:
            words = open(f"/proc/{entry}/cmdline", "rb").read().split(b"\0")
            env = dict(word.split(b"=", 1) for word in open(f"/proc/{entry}/environ", "rb").read().split(b"\0") if b"=" in word)
        except OSError:
            continue
        if kind == "rank" and b"trainers.run" in words and str(run).encode() in words and env[b"RANK"] == b"3":
            pids.append(int(entry))
        node = b"launch.execute.node_process" in words and str(run / "submissions/1").encode() in words and b"-u" in words
        if kind == "node process" and node and env.get(b"SLURM_PROCID") == b"1" and b"srun" not in words[0]:
            pids.append(int(entry))
    (pid,) = pids
    assert alive(pid)
    return pid


def test_a_rank_that_hangs(slurm_launch, whole):
    """A rank of the second node hangs. All four ranks then wait, and the head node names the right rank."""
    run, _ = submit(slurm_launch, *KEYS, SLOWLY, "run.hang_s=8", *WHERE)
    reach(run, random.randint(60, 200))
    os.kill(find_process(run, "rank"), signal.SIGSTOP)
    stopped, stopped_at = time.monotonic(), step(run)
    wait_until(lambda: attempt(run, 1)["outcome"] != "running")
    print(f"rank 3 was stopped at step {stopped_at}: its attempt ended after {time.monotonic() - stopped:.1f} s")
    failure = attempt(run, 1)["failure"]
    assert (failure["rank"], failure["node"]) == (3, "n2") and "was stopped" in failure["message"]
    assert "loop.py" in failure["traceback"]
    for rank in range(4):
        assert "most recent call first" in (run / f"attempts/1/logs/{rank}.log").read_text()
    run_to_the_end(run)
    assert results(run) == whole and [attempt(run, n)["restart"] for n in (1, 2)] == [0, 0]


def test_a_dead_node(slurm, slurm_launch, whole, monkeypatch, node="n1"):
    """The head node dies, and with it the batch shell. The death of the other node is noticed at once and takes less time."""
    run, job = submit(slurm_launch, *KEYS, SLOWLY, *WHERE)
    reach(run, random.randint(60, 200))
    assert attempt(run, 1)["nodes"] == ["n1", "n2"]
    slurm.kill_slurmd(node, steps=True)
    killed, killed_at = time.monotonic(), step(run)
    slurm.wait_until_requeued(job)
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    explanation = explanation_of(run)
    first = explanation["attempts"][0]
    assert (explanation["state"], first["outcome"]) == ("preempted", "lost")
    assert explanation["cause"]["meaning"] == "a node of its job failed"
    assert explanation["sentence"].startswith("waits in SLURM's queue: its start time has not come")
    lost = f"it was lost at step {first['to_step']} in attempt 1: node n1 is down (DOWN, Not responding)"
    assert lost in explanation["sentence"]
    assert [step["command"] for step in explanation["next"]] == [f"launch logs {run} --follow", f"launch cancel {run}"]
    slurm.start_now(job)
    resumed = resumed_at(run, 2)
    seconds = time.monotonic() - killed
    print(f"node {node} died at step {killed_at}: training continued after {seconds:.1f} s from step {resumed}; "
          f"attempt 1: {attempt(run, 1)['outcome']}: {attempt(run, 1)['failure']['message']}")
    run_to_the_end(run)
    assert killed_at - resumed <= 50 + 5 and results(run) == whole
    assert attempt(run, 2)["nodes"] == ["n2", "n3"] and attempt(run, 2)["job"] == job
    first = explanation_of(run)["attempts"][0]
    assert first["outcome"] == "lost" and "node n1 went down" in first["why"]
    assert (first["next_step"], first["lost_steps"]) == (resumed, first["to_step"] - resumed)


def resumed_at(run, number: int, timeout_s: float = 150) -> int:
    """Wait until an attempt has resumed and return its first step."""
    log = run / f"attempts/{number}/logs/0.log"
    match = wait_until(lambda: log.exists() and re.search(r"resuming at step (\d+)", log.read_text()), timeout_s=timeout_s)
    return int(match[1])


def test_ranks_that_outlive_their_attempt_commit_nothing(slurm, slurm_launch):
    """A slurmd dies, but its ranks do not. SLURM starts the job again on another node while the old ranks still run."""
    where = ("--cluster", "here", "--gpus", 2)
    whole, _ = submit(slurm_launch, *KEYS, *where)
    run_to_the_end(whole)
    run, job = submit(slurm_launch, *KEYS, SLOWLY, *where)
    reach(run, random.randint(60, 90))
    (node,) = attempt(run, 1)["nodes"]
    slurm.kill_slurmd(node)
    killed, killed_at = time.monotonic(), step(run)
    slurm.wait_until_requeued(job)
    slurm.start_now(job)
    resumed = resumed_at(run, 2)
    set_pause(run, 0)  # the first attempt's ranks also reach a checkpoint
    print(f"slurmd of {node} killed at step {killed_at}: the second attempt started after {time.monotonic() - killed:.1f} s, "
          f"from step {resumed}")
    assert resumed >= killed_at - 50 and node not in attempt(run, 2)["nodes"]
    log = run / "attempts/1/logs/0.log"
    wait_until(lambda: "taken the run over" in log.read_text())
    print(f"the last lines of the first attempt: {log.read_text().splitlines()[-2:]}")
    run_to_the_end(run)
    assert results(run) == results(whole)
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))


def test_a_preemption(slurm, slurm_launch, whole):
    run, job = submit(slurm_launch, *KEYS, SLOWLY, *WHERE)
    reach(run, random.randint(60, 150))
    urgent = slurm.run("sbatch", "--parsable", "--partition=urgent", "-N3", "--exclusive", "--output=/dev/null",
                       "--wrap", "sleep 3").strip()
    wait_until(lambda: attempt(run, 1)["outcome"] != "running")
    at = record(run)["step"]
    preempted = time.monotonic()
    assert resumed_at(run, 2) == at == record(run)["checkpoint"]
    print(f"preempted at step {at}: training continued from this step after {time.monotonic() - preempted:.1f} s")
    run_to_the_end(run)
    assert results(run) == whole and slurm.job(urgent)["JobState"] == "COMPLETED" and attempt(run, 2)["job"] == job


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_job_that_starts_again_on_a_full_disk_waits_for_room(slurm, slurm_launch, whole):
    with small_disk(slurm_launch.folder / "disk", "40m") as disk, ExitStack() as last:
        last.callback(slurm.clean)  # before the disk goes
        run, job = submit(slurm_launch, *KEYS, SLOWLY, *WHERE, "--runs", disk)
        run = disk / run.name
        reach(run, random.randint(20, 40))
        slurm.run("scontrol", "requeue", job)
        slurm.wait_until_requeued(job)
        filler = fill(disk)
        slurm.start_now(job)
        slurm.wait(job, "RUNNING")
        time.sleep(6)
        assert slurm.job(job)["JobState"] == "RUNNING" and not (run / "attempts/2/attempt.json").exists()
        filler.unlink()
        run_to_the_end(run)
        assert results(run) == whole and attempt(run, 2)["job"] == job
        assert "until the run directory could be written (No space left on device)" in attempt(run, 2)["reason"]


def test_a_rank_that_runs_out_of_memory_costs_no_restart(slurm_launch):
    """A rank of the second node runs out of memory. Micro-batches are halved until they fit.

    The results are those of a run with the last micro-batch size from the start.
    """
    narrow = BLOBS.parents[1] / "sentences" / "narrow.yaml"
    where = ("--cluster", "here", "--gpus", 2, "--nodes", 2, "run.max_restarts=0", "train.batch_size=8")
    run, _ = submit(slurm_launch, narrow, *where, "train.micro_batch_size=auto", "data.max_sentences=1")
    run_to_the_end(run)
    expected, _ = submit(slurm_launch, narrow, *where, "train.micro_batch_size=1")
    assert [attempt(run, number)["outcome"] for number in (1, 2, 3)] == ["failed", "failed", "finished"]
    failure = attempt(run, 2)["failure"]
    assert (failure["rank"], failure["message"]) == (1, "rank 1 ran out of memory with a micro-batch of 2")
    run_to_the_end(expected)
    assert results(run) == results(expected)
