"""What readers see of runs on a real cluster, and cancelling them. The jobs are small stand-ins of the node process;
what they leave in the run directory is what it leaves."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from conftest import wait_until

from launch.cluster import slurm as commands
from launch.records import read as runs
from launch.records import state as truth
from launch.records.cancel import cancel, cancel_sweep
from launch.records.run import read_run
from launch.records.state import state_of
from launch.report import logs
from launch.report.tables import details, table
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, replace_json, update_json
from trainers.contract.paths import RunPaths

pytestmark = pytest.mark.slow  # not each, but together

NODE = """
import os, signal, sys, time
from pathlib import Path
from trainers.contract.files import replace_json, update_json
from trainers.contract.paths import RunPaths

root, manner = Path(sys.argv[1]), sys.argv[2]
if os.environ["SLURM_PROCID"] != "0":
    time.sleep(300)
if element := os.environ.get("SLURM_ARRAY_TASK_ID"):
    root = root.with_name(root.name + element)
paths = RunPaths(root)
number = max(paths.attempt_numbers(), default=0) + 1
paths.attempt(number).mkdir(parents=True)
job = os.environ["SLURM_JOB_ID"]
attempt = {"attempt": number, "job": job, "nodes": ["n1"], "host": "x", "device": "cpu", "ranks": 1, "submission": 1,
           "began": "2026-01-02T00:00:00+00:00", "ended": None, "outcome": "running", "exit_code": None, "failure": None}

def ended(state):
    replace_json(paths.attempt_record(number), {**attempt, "outcome": state, "exit_code": 75})
    update_json(paths.record, state=state)
    sys.exit(75)

def stop(*_):
    ended("cancelled" if paths.cancellation(number).exists() else "preempted")

signal.signal(signal.SIGTERM, signal.SIG_IGN if manner == "deaf" else stop)
replace_json(paths.attempt_record(number), attempt)
paths.log(number, 0).parent.mkdir()
paths.log(number, 0).write_text(f"rank 0 of attempt {number}\\n")
update_json(paths.record, state="running", attempt=number, step=10 * number)
print(f"node process of attempt {number}", flush=True)
if manner == "finish" or manner == "twice" and number == 2:
    ended("finished")
time.sleep(300)
"""


@pytest.fixture
def runs_of(slurm, tmp_path, monkeypatch):
    """Makes a run and its job: `make(id, sbatch's options, script=..., state=...)`."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    root = tmp_path / "runs of 中文"
    (tmp_path / "node.py").write_text(NODE)

    def make(id, *options, manner="obey", script=None, state="submitted", ids=None, **changes):
        paths = RunPaths(root / id)
        paths.submission(1).mkdir(parents=True)
        paths.spec.write_text("name: cifar10\nrun:\n  grace_s: 2\n")
        record = {"id": id, "task": "cifar10", "state": state, "step": 0, "total": 100, "attempt": 0, "job": None, "sweep": None,
                  "metrics": {}, "checkpoint": None, "created": "2026-01-02T00:00:00+00:00", "updated": None, **changes}
        replace_json(paths.record, record)
        if ids is None:
            file = paths.submission(1) / "job.sh"
            file.write_text(f"#!/bin/bash\n{script or srun(tmp_path / 'node.py', paths.root, manner)}\n")
            log = f"{paths.submission(1)}/%j_0_log.out"
            ids = [slurm.run("sbatch", "--parsable", "--open-mode=append", f"--output={log}", *options, file).strip()]
        update_json(paths.record, job={"kind": "slurm", "cluster": "test", "ids": ids, "submission": 1})
        return read_run(paths.root)

    return make


def srun(node, root, manner):
    return f"PYTHONPATH={':'.join(sys.path)} exec srun {sys.executable} {node} '{root}' {manner}"


def wait_for(run, *states):
    return wait_until(lambda: (now := state_of(run)) in states and now)


def test_states_by_the_queue_then_by_its_memory_then_by_the_record(slurm, runs_of, monkeypatch):
    held = runs_of("held", "--hold")
    waits = runs_of("waits", "--hold", state="preempted", attempt=1)
    died = runs_of("died", "--hold", state="running", attempt=1)  # its node went down, and SLURM requeued it
    working = runs_of("working")
    failed = runs_of("failed", script="exit 3")
    killed = runs_of("killed", "--hold", state="running", attempt=1)
    dropped = runs_of("dropped", "--hold", state="preempted", attempt=1)
    silent = runs_of("silent", script="exit 0", state="running", attempt=1)
    stopped = runs_of("stopped", script="exit 75", state="preempted", attempt=1)
    unlucky = runs_of("unlucky", script="exit 1", state="preempted", attempt=1)
    forgotten = runs_of("forgotten", state="running", ids=["99999"], attempt=1)
    marked = runs_of("marked", state="running", ids=["99998"], attempt=1)
    marked.paths.attempt(1).mkdir(parents=True)
    marked.paths.cancellation(1).touch()
    runs_of("over", state="failed", ids=["99997"])
    chain = runs_of("chain", "--hold", state="preempted", attempt=1)
    update_json(chain.paths.record, job={**chain.record["job"], "ids": ["99996", *chain.record["job"]["ids"]]})
    another = runs_of("another", state="running", ids=held.record["job"]["ids"], attempt=1)
    for run in (killed, dropped):
        slurm.run("scancel", *run.record["job"]["ids"])
    wait_for(failed, "failed")
    wait_for(silent, "lost")
    wait_until(lambda: not truth.look([stopped])[0][1].jobs and not truth.look([unlucky])[0][1].jobs)
    wait_until(lambda: working.again().record["state"] == "running")

    calls = Counter()
    call = commands.call
    monkeypatch.setattr(commands, "call", lambda *words, **options: (calls.update([words[0]]), call(*words, **options))[1])
    rows = {row["id"]: row for row in runs.list_runs(held.paths.root.parent)}
    assert {id: row["state"] for id, row in rows.items()} == {
        "held": "submitted", "waits": "preempted", "died": "preempted", "working": "running", "failed": "failed",
        "killed": "cancelled", "dropped": "cancelled", "silent": "lost", "stopped": "preempted", "unlucky": "preempted",
        "forgotten": "lost",
        "marked": "cancelled", "over": "failed", "chain": "preempted", "another": "running"}
    assert calls == {"squeue": 2, "sacct": 1}, "one for the queue, one for what it remembers, one for what it does not"
    assert rows["working"]["step"] == 10
    assert "ended as FAILED on n" in rows["failed"]["note"] and "ended as FAILED on n" in rows["unlucky"]["note"]
    assert "note" not in rows["stopped"], "it ended as a preempted run does"
    assert "not this run's" in rows["another"]["note"]
    assert runs.status(died)["next"] == ["launch logs died --follow", "launch cancel died"]
    assert runs.status(forgotten)["next"][0] == "launch explain forgotten"
    with pytest.raises(UserError, match="cannot be cancelled from here"):
        cancel(another)
    assert held.state == "submitted", "another cluster's job of the same number was left alone"

    calls.clear()
    for run in (held, waits, died, working, failed, killed, dropped, silent, forgotten, marked, chain, another, stopped,
                unlucky):
        update_json(run.paths.record, state="finished")
    runs.list_runs(held.paths.root.parent)
    assert not calls, "nothing is left to ask"


def test_status_of_a_waiting_and_of_a_running_run(slurm, runs_of):
    first = runs_of("first", "--exclusive", "--nodes=3", "--time=10", script="sleep 300")
    wait_until(lambda: runs.status(first)["queue"]["state"] == "RUNNING")
    ahead = runs_of("ahead", "--exclusive", "--nodes=3")
    run = runs_of("run", "--exclusive", "--nodes=2")
    status = wait_until(lambda: (status := runs.status(run))["queue"]["start"] and status["queue"]["reason"] == "Priority"
                        and status)
    assert status["state"] == "submitted"
    assert status["queue"] == {"state": "PENDING", "reason": "Priority", "reason_words": "jobs of higher priority come first",
                               "position": 2, "of": 2, "start": status["queue"]["start"], "nodes": [], "partition": "main",
                               "ids": run.record["job"]["ids"]}
    assert runs.status(ahead)["queue"]["position"] == 1
    shown = details(status)
    for text in ("place 2 of 2 in partition main: jobs of higher priority come first (Priority)", "by SLURM's estimate",
                 "cluster test: PENDING", "launch cancel run"):
        assert text in shown
    slurm.run("scancel", first.record["job"]["ids"][0], ahead.record["job"]["ids"][0])
    wait_until(lambda: run.again().record["state"] == "running")
    status = runs.status(run)
    assert status["state"] == "running" and status["queue"]["state"] == "RUNNING" and len(status["queue"]["nodes"]) == 2
    assert status["queue"]["reason"] is None and status["queue"]["position"] is None
    job = run.record["job"]["ids"][0]
    assert status["job_log"] == str(run.paths.submission(1) / f"{job}_0_log.out")
    assert f"job {job} on n1" in details(status) and "job log" in details(status)


def test_cancel_of_a_waiting_run(slurm, runs_of):
    run = runs_of("run", "--hold")
    assert cancel(run) == "cancelled"
    assert run.again().record["state"] == "cancelled"
    assert not commands.queue(run.record["job"]["ids"])
    with pytest.raises(UserError, match="is cancelled: there is nothing to cancel"):
        cancel(run.again())


def test_cancel_of_a_running_run_leaves_the_reason_before_the_signal(slurm, runs_of):
    run = runs_of("run")
    link = runs_of("link", "--hold")  # of a chain, the next
    ids = [*run.record["job"]["ids"], *link.record["job"]["ids"]]
    wait_until(lambda: run.again().record["state"] == "running")
    update_json(run.paths.record, job={**run.record["job"], "ids": ids[:1]})
    assert cancel(run.again()) == "cancelled"
    assert read_json(run.paths.attempt_record(1))["outcome"] == "cancelled", "it was asked, not killed"
    assert not commands.queue(ids[:1]) and commands.queue(ids[1:])


def test_cancel_takes_all_of_a_chain(slurm, runs_of):
    run = runs_of("run")
    wait_until(lambda: run.again().record["state"] == "running")
    next = slurm.run("sbatch", "--parsable", "--hold", "--output=/dev/null", run.paths.submission(1) / "job.sh").strip()
    update_json(run.paths.record, job={**run.record["job"], "ids": [*run.record["job"]["ids"], next]})
    assert runs.status(run.again())["queue"]["ids"] == [*run.record["job"]["ids"], next]
    assert cancel(run.again()) == "cancelled"
    assert slurm.job(next)["JobState"] == "CANCELLED"


@pytest.mark.slow
def test_cancel_ends_a_job_that_does_not_stop(slurm, runs_of):
    run = runs_of("run", manner="deaf")
    wait_until(lambda: run.again().record["state"] == "running")
    said = cancel(run, wait_s=0.5)
    assert "SLURM was told to end job" in said
    wait_for(run, "cancelled")


def test_cancel_of_a_step_leaves_its_allocation(slurm, runs_of, tmp_path):
    step = srun(tmp_path / "node.py", tmp_path / "runs of 中文" / "run", "obey")
    allocation = runs_of("allocation", script=f"sleep 300 & ({step}) & wait")
    run = runs_of("run", ids=[f"{allocation.record['job']['ids'][0]}.0"])
    wait_until(lambda: run.again().record["state"] == "running")
    assert state_of(run) == "running" and runs.status(run)["queue"]["nodes"] == ["n1"]
    assert cancel(run.again()) == "cancelled"
    assert read_json(run.paths.attempt_record(1))["outcome"] == "cancelled"
    assert slurm.job(allocation.record["job"]["ids"][0])["JobState"] == "RUNNING"


def test_a_sweep_is_compared_and_cancelled_whole(slurm, runs_of, tmp_path):
    first = runs_of("s-1-0", ids=[])
    for element in (1, 2, 3):
        runs_of(f"s-1-{element}", ids=[])
    root = first.paths.root.parent
    folder = RunPaths(root / "s-1").submission(1)
    folder.mkdir(parents=True)
    (folder / "job.sh").write_text(f"#!/bin/bash\n{srun(tmp_path / 'node.py', root / 's-1-', 'obey')}\n")
    job = slurm.run("sbatch", "--parsable", "--array=0-3%2", f"--output={folder}/%A_%a_0_log.out", folder / "job.sh").strip()
    replace_json(root / "s-1" / "sweep.json", {
        "id": "s-1", "task": "cifar10", "created": "2026-01-02T00:00:00+00:00", "job": {"kind": "slurm", "ids": [job]},
        "points": [{"run": f"s-1-{i}", "overrides": [f"optim.lr={lr}", "train.seed=7"]} for i, lr in enumerate((1, 2, 3, 4))]})
    for i in range(4):
        update_json(root / f"s-1-{i}" / "run.json", sweep="s-1", metrics={"top1": i / 8, "loss": 2.5, "class/ship": 1.0},
                    job={"kind": "slurm", "cluster": "test", "ids": [f"{job}_{i}"], "submission": 1})
    wait_until(lambda: Counter(row["state"] for row in runs.list_runs(root, "s-")) == {"running": 2, "submitted": 2})
    rows = runs.list_runs(root, "s-")
    assert [row["id"] for row in rows] == ["s-1-0", "s-1-1", "s-1-2", "s-1-3"]
    shown = table(rows, width=80).splitlines()
    assert shown[0].split() == ["lr", "STATE", "STEP", "top1", "loss", "RUN"]
    assert shown[4].split() == ["4", "submitted", "0/100", "0.375", "2.5", "s-1-3"]
    (log,) = runs.node_logs(runs.find_run(root, "s-1-1"))
    assert (log.job, log.node, log.path) == (f"{job}_1", 0, folder / f"{job}_1_0_log.out")
    waiting = runs.find_run(root, "s-1-3")
    assert "as many elements of its array run as may" in runs.status(waiting)["queue"]["reason_words"]

    update_json(root / "s-1-2" / "run.json", state="cancelled")  # one by hand, before
    slurm.run("scancel", f"{job}_2")
    said = cancel_sweep(root, "s-1")
    assert said == [{"id": f"s-1-{i}", "state": "cancelled"} for i in range(4)]
    assert [read_json(root / f"s-1-{i}" / "attempts" / "1" / "attempt.json")["outcome"] for i in (0, 1)] == ["cancelled"] * 2
    assert not (root / "s-1-3" / "attempts").exists()
    with pytest.raises(UserError, match="nothing to cancel"):
        cancel_sweep(root, "s-1")


def test_a_submission_that_died_half_way(slurm, runs_of):
    run = runs_of("run", "--hold")
    job = {"kind": "slurm", "cluster": "test", "ids": [], "submission": 1, "host": socket.gethostname()}
    (id,) = run.record["job"]["ids"]
    update_json(run.paths.record, job={**job, "pid": os.getpid(), "started": "another"})
    status = runs.status(run)
    assert status["state"] == "submitted" and status["next"] == ["launch resume run"]
    assert "its submission did not finish" in details(status) and status["queue"] is None
    assert cancel(run.again()) == "cancelled"
    assert slurm.job(id)["JobState"] == "CANCELLED", "its job was found by its script"


def test_a_point_of_a_sweep_whose_submission_died_half_way(slurm, runs_of):
    job = {"kind": "slurm", "cluster": "test", "ids": [], "submission": 1, "host": socket.gethostname(), "pid": 1,
           "started": "another"}
    points = [runs_of(f"p-{i}", ids=[], sweep="s") for i in range(2)]
    for point in points:
        update_json(point.paths.record, job=job)
    root = points[0].paths.root.parent
    folder = RunPaths(root / "s").submission(1)
    folder.mkdir(parents=True)
    (folder / "job.sh").write_text("#!/bin/bash\n")
    replace_json(root / "s" / "sweep.json", {"id": "s", "points": [{"run": f"p-{i}", "overrides": []} for i in range(2)]})
    id = slurm.run("sbatch", "--parsable", "--hold", "--array=0-1", "--output=/dev/null", folder / "job.sh").strip()
    assert cancel(points[1].again()) == "cancelled"
    assert list(commands.queue([f"{id}_0", f"{id}_1"])) == [f"{id}_0"]
    assert cancel_sweep(root, "s") == [{"id": "p-0", "state": "cancelled"}, {"id": "p-1", "state": "cancelled"}]
    assert not commands.queue([f"{id}_0", f"{id}_1"])


@pytest.mark.slow
def test_cancel_of_a_run_on_its_way_back_into_the_queue(slurm, runs_of):
    run = runs_of("run", "--requeue", script="trap '' TERM; sleep 300 & wait; sleep 300", state="preempted", attempt=1)
    (job,) = run.record["job"]["ids"]
    slurm.wait(job, "RUNNING")
    slurm.run("scontrol", "requeue", job)
    slurm.wait(job, "COMPLETING", "PENDING")
    cancel(run)
    assert run.again().record["state"] == "cancelled"
    assert slurm.wait(job)["JobState"] == "CANCELLED"


def test_without_slurm_the_record_speaks(slurm, runs_of, monkeypatch):
    run = runs_of("run", "--hold")
    monkeypatch.setenv("PATH", "/nowhere")
    [row] = runs.list_runs(run.paths.root.parent)
    assert row["state"] == "submitted" and "`squeue` is not installed" in row["note"]
    assert "SLURM cannot be asked here" in table([row]) and "SLURM cannot be asked here" in details(runs.status(run))
    with pytest.raises(UserError, match="cannot be cancelled from here"):
        cancel(run)
    assert run.again().record["state"] == "submitted"
    monkeypatch.undo()
    slurm.run("scancel", run.record["job"]["ids"][0])


@pytest.mark.slow
def test_follow_goes_on_through_a_requeue(slurm, runs_of, monkeypatch):
    monkeypatch.setattr(logs, "ASK_OFTEN_S", 1.0)
    run = runs_of("run", "--requeue", "--hold", manner="twice")
    (job,) = run.record["job"]["ids"]
    said, told = [], []
    following = threading.Thread(target=lambda: logs.follow(run, follow=True, write=said.append))
    node = threading.Thread(target=lambda: logs.follow(run, follow=True, node=0, write=told.append))
    following.start(), node.start()
    wait_until(lambda: "held by its owner" in "".join(said))
    slurm.run("scontrol", "release", job)
    wait_until(lambda: "rank 0 of attempt 1" in "".join(said))
    slurm.run("scontrol", "requeue", job)
    following.join(60), node.join(60)
    assert not following.is_alive() and not node.is_alive()
    lines = "".join(said).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "--- waiting in the queue", "rank 0 of attempt 1", "--- attempt 1 ended", "--- attempt 2 ---", "rank 0 of attempt 2"]
    assert "preempted; waiting in the queue: its start time has not come" in lines[2]
    assert "node process of attempt 1\n" in told and "node process of attempt 2\n" in told
    assert {"job": job, "node": 0, "line": "node process of attempt 2"} in list(logs.lines(run.again(), node=0))


def test_what_a_job_said_is_found_when_its_ranks_said_nothing(slurm, runs_of):
    run = runs_of("run", script="echo module not found; exit 1")
    wait_for(run, "failed")
    with pytest.raises(UserError) as caught:
        list(logs.lines(run, follow=True))
    assert "`launch logs run --node 0`" in caught.value.hint
    assert [line["line"] for line in logs.lines(run, node=0)] == ["module not found"]
    with pytest.raises(UserError, match="no job log of node 1") as caught:
        list(logs.lines(run, node=1))
    assert caught.value.hint == "it has node 0"


def test_ended_jobs_are_remembered_without_accounting(slurm, runs_of):
    failed, signalled = runs_of("a", script="exit 3"), runs_of("b", script="kill -9 $$")
    for run in (failed, signalled):
        wait_for(run, "failed")
    ids = [*failed.record["job"]["ids"], *signalled.record["job"]["ids"]]
    found = commands.history([*ids, "99999"])
    assert [(found[id].state, found[id].exit_code, found[id].signal, found[id].nodes) for id in ids] == [
        ("FAILED", 3, None, ["n1"]), ("FAILED", None, 9, ["n1"])]
    assert abs(datetime.now(UTC) - datetime.fromisoformat(found[ids[0]].ended)) < timedelta(minutes=1)
    assert "99999" not in found
