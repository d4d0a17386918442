"""The promise on SLURM: whatever interrupts a run, it is the run it would have been."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time

import pytest
from conftest import BLOBS, alive, attempt, pace, record, rows, wait_until
from slurm.conftest import explained

pytestmark = pytest.mark.slow

STEPS = 400
KEYS = (BLOBS, f"train.steps={STEPS}", "eval.every=100", "checkpoint.every=50", "run.grace_s=10")
SLOWLY = "model.pause_s=0.05"  # until `pace`
WHERE = ("--cluster", "here", "--gpus", 4, "--nodes", 2)


def told(run) -> tuple[list, list]:
    evaluations = [{k: v for k, v in row.items() if k != "time"} for row in rows(run, "eval")]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run)], evaluations


def submit(launch, *args) -> tuple:
    """(the run's folder, its job's id)"""
    done = launch(*args, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return launch.folder / "runs" / said["id"], said["jobs"][0]


def state(run) -> str:
    return record(run)["state"]


def step(run) -> int:
    try:
        return (run / "metrics.jsonl").read_text().count('"train"')
    except FileNotFoundError:
        return 0


def reach(run, at: int) -> None:
    """There it slows down, so that it cannot be over before what is to happen to it."""
    wait_until(lambda: step(run) >= at or state(run) == "failed", timeout_s=180)
    assert state(run) != "failed", attempt(run, record(run)["attempt"])
    pace(run, 0.5)


def finish(run) -> None:
    pace(run, 0)
    wait_until(lambda: state(run) in ("finished", "failed", "cancelled"), timeout_s=240)
    assert state(run) == "finished", job_log(run)


def job_log(run) -> str:
    return "\n".join(path.read_text() for path in sorted(run.glob("submissions/*/*_log.out")))


@pytest.fixture(scope="module")
def whole(login, tmp_path_factory):
    """What the run is when nothing interrupts it, on the same nodes."""
    run, _ = submit(login(tmp_path_factory.mktemp("whole")), *KEYS, *WHERE)
    finish(run)
    return told(run)


def test_a_time_limit_a_requeue_and_a_cancellation(slurm, slurm_launch, whole):
    seed = random.randrange(2**32)
    print(f"random.seed({seed})")
    random.seed(seed)
    run, job = submit(slurm_launch, *KEYS, SLOWLY, *WHERE, "--wandb", "offline")

    reach(run, random.randint(10, 40))
    slurm.end_soon(job)
    wait_until(lambda: attempt(run, 1)["outcome"] != "running")
    at = record(run)["step"]
    print(f"time limit (USR2) at step {at}: {attempt(run, 1)['outcome']}")
    assert (attempt(run, 1)["outcome"], attempt(run, 1)["reason"]) == ("preempted", "time limit")
    assert record(run)["checkpoint"] == at
    slurm.wait_requeued(job)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    slurm.start_now(job)

    pace(run, 0.05)
    reach(run, at + random.randint(10, 40))
    slurm.run("scontrol", "requeue", job)
    wait_until(lambda: attempt(run, 2)["outcome"] != "running")
    print(f"requeue (TERM) at step {record(run)['step']}: {attempt(run, 2)['outcome']}")
    assert attempt(run, 2)["outcome"] == "preempted" and record(run)["checkpoint"] == record(run)["step"]
    slurm.wait_requeued(job)
    slurm.start_now(job)

    pace(run, 0.05)
    reach(run, record(run)["step"] + random.randint(10, 40))
    cancelled = slurm_launch("cancel", run.name)
    assert cancelled.returncode == 0, cancelled.stderr
    print(f"launch cancel at step {record(run)['step']}: {cancelled.stdout.strip()}")
    assert state(run) == "cancelled" and record(run)["checkpoint"] == record(run)["step"]
    wait_until(lambda: slurm.job(job)["JobState"] == "CANCELLED")
    resumed = slurm_launch("resume", run.name, "--time", "10m", "--json")
    assert resumed.returncode == 0, resumed.stderr
    finish(run)

    assert told(run) == whole
    assert record(run)["attempt"] == 4 and [attempt(run, n)["restart"] for n in (1, 2, 3, 4)] == [0, 1, 2, 0]
    logs = [f"attempts/{n}/logs/{rank}.log" for n in (1, 2, 3, 4) for rank in range(4)]
    assert all((run / log).exists() for log in logs)
    folders = list((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 4 and {re.split(r"-\d{8}_\d{6}-", folder.name)[1] for folder in folders} == {run.name}


@pytest.mark.parametrize("what", ["rank", "node process", "head node process"])
def test_a_kill(slurm, slurm_launch, whole, what):
    run, job = submit(slurm_launch, *KEYS, SLOWLY, *WHERE)
    at = random.randint(60, 200)
    reach(run, at)
    pid, about = victim(run, what)
    os.kill(pid, signal.SIGKILL)
    began, killed_at = time.monotonic(), step(run)
    if what != "rank":
        slurm.wait_requeued(job)
        slurm.start_now(job)
    resumed = resumed_at(run, 2)
    seconds = time.monotonic() - began
    finish(run)
    print(f"kill -9 of {about} at step {killed_at}: training went on after {seconds:.1f} s from step {resumed}; "
          f"attempt 1: {attempt(run, 1)['outcome']}: {attempt(run, 1)['failure']['message']}")
    assert killed_at - resumed <= 50 + 5 and told(run) == whole
    restarts = [attempt(run, n)["restart"] for n in (1, 2)]
    assert restarts == ([0, 0] if what == "rank" else [0, 1])  # a rank's end needs no new job


def victim(run, what: str) -> tuple[int, str]:
    """The process to kill, by its command and place."""
    me = attempt(run, 1)
    if what == "head node process":
        return me["pid"], what
    found = []
    for entry in os.listdir("/proc"):
        try:
            words = open(f"/proc/{entry}/cmdline", "rb").read().split(b"\0")
            env = dict(word.split(b"=", 1) for word in open(f"/proc/{entry}/environ", "rb").read().split(b"\0") if b"=" in word)
        except OSError:
            continue
        if what == "rank" and b"trainers.run" in words and str(run).encode() in words and env[b"RANK"] == b"3":
            found.append(int(entry))
        node = b"launch.execute.node_process" in words and str(run / "submissions/1").encode() in words and b"-u" in words
        if what == "node process" and node and env.get(b"SLURM_PROCID") == b"1" and b"srun" not in words[0]:
            found.append(int(entry))
    (pid,) = found
    assert alive(pid)
    return pid, what


def test_a_rank_that_hangs(slurm_launch, whole):
    """Of the second node: all four wait, and the head names the right one."""
    run, _ = submit(slurm_launch, *KEYS, SLOWLY, "run.hang_s=8", *WHERE)
    reach(run, random.randint(60, 200))
    pid, _ = victim(run, "rank")
    os.kill(pid, signal.SIGSTOP)
    began, stopped_at = time.monotonic(), step(run)
    wait_until(lambda: attempt(run, 1)["outcome"] != "running")
    print(f"rank 3 stopped at step {stopped_at}: its attempt had ended after {time.monotonic() - began:.1f} s")
    failure = attempt(run, 1)["failure"]
    assert (failure["rank"], failure["node"]) == (3, "n2") and "was stopped" in failure["message"]
    assert "loop.py" in failure["traceback"]
    for rank in range(4):
        assert "most recent call first" in (run / f"attempts/1/logs/{rank}.log").read_text()
    finish(run)
    assert told(run) == whole and [attempt(run, n)["restart"] for n in (1, 2)] == [0, 0]


def test_a_dead_node(slurm, slurm_launch, whole, monkeypatch, node="n1"):
    """The head node, with the batch shell. (Of the other node the head's process hears at once; it takes less long.)"""
    run, job = submit(slurm_launch, *KEYS, SLOWLY, *WHERE)
    reach(run, random.randint(60, 200))
    assert attempt(run, 1)["nodes"] == ["n1", "n2"]
    slurm.kill_slurmd(node, steps=True)
    began, killed_at = time.monotonic(), step(run)
    slurm.wait_requeued(job)
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    found = explained(run)
    first = found["attempts"][0]
    assert (found["state"], first["outcome"], found["cause"]["meaning"]) == ("preempted", "lost", "a node of its job failed")
    assert found["sentence"].startswith("waits in SLURM's queue: its start time has not come")
    assert f"it was lost at step {first['to_step']} in attempt 1: node n1 is down (DOWN, Not responding)" in found["sentence"]
    assert [said["command"] for said in found["next"]] == [f"launch logs {run} --follow", f"launch cancel {run}"]
    slurm.start_now(job)
    resumed = resumed_at(run, 2)
    print(f"node {node} dead at step {killed_at}: training went on after {time.monotonic() - began:.1f} s from step {resumed}; "
          f"attempt 1: {attempt(run, 1)['outcome']}: {attempt(run, 1)['failure']['message']}")
    finish(run)
    assert killed_at - resumed <= 50 + 5 and told(run) == whole
    assert attempt(run, 2)["nodes"] == ["n2", "n3"] and attempt(run, 2)["job"] == job
    first = explained(run)["attempts"][0]
    assert first["outcome"] == "lost" and "node n1 went down" in first["why"]
    assert (first["next_step"], first["lost_steps"]) == (resumed, first["to_step"] - resumed)


def resumed_at(run, number: int, timeout_s: float = 150) -> int:
    """The step at which an attempt has gone on."""
    log = run / f"attempts/{number}/logs/0.log"
    found = wait_until(lambda: log.exists() and re.search(r"resuming at step (\d+)", log.read_text()), timeout_s=timeout_s)
    return int(found[1])


def test_ranks_that_outlive_their_attempt_commit_nothing(slurm, slurm_launch):
    """slurmd dies, its ranks do not: SLURM begins the job anew elsewhere beside them."""
    where = ("--cluster", "here", "--gpus", 2)
    whole, _ = submit(slurm_launch, *KEYS, *where)
    finish(whole)
    run, job = submit(slurm_launch, *KEYS, SLOWLY, *where)
    reach(run, random.randint(60, 90))
    (node,) = attempt(run, 1)["nodes"]
    slurm.kill_slurmd(node)
    began, killed_at = time.monotonic(), step(run)
    slurm.wait_requeued(job)
    slurm.start_now(job)
    resumed = resumed_at(run, 2)
    pace(run, 0)  # the first attempt's ranks, too, come to a checkpoint
    print(f"slurmd of {node} killed at step {killed_at}: a second attempt after {time.monotonic() - began:.1f} s, "
          f"from step {resumed}")
    assert resumed >= killed_at - 50 and node not in attempt(run, 2)["nodes"]
    log = run / "attempts/1/logs/0.log"
    wait_until(lambda: "taken the run over" in log.read_text())
    print(f"the first attempt's last words: {log.read_text().splitlines()[-2:]}")
    finish(run)
    assert told(run) == told(whole)
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))


def test_a_preemption(slurm, slurm_launch, whole):
    run, job = submit(slurm_launch, *KEYS, SLOWLY, *WHERE)
    reach(run, random.randint(60, 150))
    urgent = slurm.run("sbatch", "--parsable", "--partition=urgent", "-N3", "--exclusive", "--output=/dev/null",
                       "--wrap", "sleep 3").strip()
    wait_until(lambda: attempt(run, 1)["outcome"] != "running")
    at = record(run)["step"]
    began = time.monotonic()
    assert resumed_at(run, 2) == at == record(run)["checkpoint"]
    print(f"preempted at step {at}: training went on {time.monotonic() - began:.1f} s later, at that step")
    finish(run)
    assert told(run) == whole and slurm.job(urgent)["JobState"] == "COMPLETED" and attempt(run, 2)["job"] == job


def test_a_rank_that_runs_out_of_memory_costs_no_restart(slurm_launch):
    """One on the second node, whose sizes are halved until they fit; then the run is what it would have been with the last."""
    narrow = BLOBS.parents[1] / "sentences" / "narrow.yaml"
    where = ("--cluster", "here", "--gpus", 2, "--nodes", 2, "run.max_restarts=0", "train.batch_size=8")
    run, _ = submit(slurm_launch, narrow, *where, "train.micro_batch_size=auto", "data.most=1")
    finish(run)
    given, _ = submit(slurm_launch, narrow, *where, "train.micro_batch_size=1")
    assert [attempt(run, number)["outcome"] for number in (1, 2, 3)] == ["failed", "failed", "finished"]
    failure = attempt(run, 2)["failure"]
    assert (failure["rank"], failure["message"]) == (1, "rank 1 ran out of memory with a micro-batch of 2")
    finish(given)
    assert told(run) == told(given)
