"""Read and cancel runs on a real cluster.

The jobs run a small stand-in for the node process. The stand-in leaves the same files in the run directory.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from conftest import wait_until

from launch.cluster import slurm as slurm_commands
from launch.records import read as runs
from launch.records import state as run_states
from launch.records.cancel import cancel, cancel_sweep
from launch.records.run import read_run
from launch.records.state import state_of
from launch.report import logs
from launch.report.tables import details, table
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, replace_json, update_json
from trainers.contract.paths import RunPaths

pytestmark = pytest.mark.slow  # each test is fast, the file is slow

NODE = """
import os, signal, sys, time
from pathlib import Path
from trainers.contract.files import replace_json, update_json
from trainers.contract.paths import RunPaths

root, behaviour = Path(sys.argv[1]), sys.argv[2]
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

signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "deaf" else stop)
replace_json(paths.attempt_record(number), attempt)
paths.log(number, 0).parent.mkdir()
paths.log(number, 0).write_text(f"rank 0 of attempt {number}\\n")
update_json(paths.record, state="running", attempt=number, step=10 * number)
print(f"node process of attempt {number}", flush=True)
if behaviour == "finish" or behaviour == "twice" and number == 2:
    ended("finished")
time.sleep(300)
"""


@pytest.fixture
def make_run(slurm, tmp_path, monkeypatch):
    """A function that creates a run and submits its job: `make_run(id, sbatch's options, script=..., state=...)`."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    root = tmp_path / "runs of 中文"
    monkeypatch.setenv("LAUNCH_RUNS", str(root))  # so that commands name the run by its id
    (tmp_path / "node.py").write_text(NODE)

    def make(id, *options, behaviour="obey", script=None, state="submitted", ids=None, **changes):
        paths = RunPaths(root / id)
        paths.submission(1).mkdir(parents=True)
        paths.spec.write_text("name: cifar10\nrun:\n  grace_s: 2\n")
        record = {"id": id, "task": "cifar10", "state": state, "step": 0, "total": 100, "attempt": 0, "job": None, "sweep": None,
                  "metrics": {}, "checkpoint": None, "created": "2026-01-02T00:00:00+00:00", "updated": None, **changes}
        replace_json(paths.record, record)
        if ids is None:
            file = paths.submission(1) / "job.sh"
            file.write_text(f"#!/bin/bash\n{script or srun(tmp_path / 'node.py', paths.root, behaviour)}\n")
            log = f"{paths.submission(1)}/%j_0_log.out"
            ids = [slurm.run("sbatch", "--parsable", "--open-mode=append", f"--output={log}", *options, file).strip()]
        update_json(paths.record, job={"kind": "slurm", "cluster": "test", "ids": ids, "submission": 1})
        return read_run(paths.root)

    return make


def srun(node, root, behaviour):
    """Return a line of a job script that starts `node`, the stand-in, by srun."""
    return f"PYTHONPATH={':'.join(sys.path)} exec srun {sys.executable} {node} '{root}' {behaviour}"


def wait_for(run, *states):
    """Wait until readers see a run in one of `states`."""
    return wait_until(lambda: (now := state_of(run)) in states and now)


def test_a_state_comes_from_the_queue_then_from_ended_jobs_then_from_the_record(slurm, make_run, monkeypatch):
    held = make_run("held", "--hold")
    waits = make_run("waits", "--hold", state="preempted", attempt=1)
    died = make_run("died", "--hold", state="running", attempt=1)  # its node went down and SLURM requeued the job
    working = make_run("working")
    failed = make_run("failed", script="exit 3")
    killed = make_run("killed", "--hold", state="running", attempt=1)
    dropped = make_run("dropped", "--hold", state="preempted", attempt=1)
    silent = make_run("silent", script="exit 0", state="running", attempt=1)
    stopped = make_run("stopped", script="exit 75", state="preempted", attempt=1)
    unlucky = make_run("unlucky", script="exit 1", state="preempted", attempt=1)
    forgotten = make_run("forgotten", state="running", ids=["99999"], attempt=1)
    marked = make_run("marked", state="running", ids=["99998"], attempt=1)
    marked.paths.attempt(1).mkdir(parents=True)
    marked.paths.cancellation(1).touch()
    make_run("over", state="failed", ids=["99997"])
    chain = make_run("chain", "--hold", state="preempted", attempt=1)
    update_json(chain.paths.record, job={**chain.record["job"], "ids": ["99996", *chain.record["job"]["ids"]]})
    another = make_run("another", state="running", ids=held.record["job"]["ids"], attempt=1)
    for run in (killed, dropped):
        slurm.run("scancel", *run.record["job"]["ids"])
    wait_for(failed, "failed")
    wait_for(silent, "lost")
    wait_until(lambda: not run_states.true_states([stopped])[0][1].jobs and not run_states.true_states([unlucky])[0][1].jobs)
    wait_until(lambda: working.reread().record["state"] == "running")

    calls = Counter()
    call = slurm_commands.call
    monkeypatch.setattr(slurm_commands, "call", lambda *words, **options: (calls.update([words[0]]), call(*words, **options))[1])
    rows = {row["id"]: row for row in runs.list_runs(held.paths.root.parent)}
    assert {id: row["state"] for id, row in rows.items()} == {
        "held": "submitted", "waits": "preempted", "died": "preempted", "working": "running", "failed": "failed",
        "killed": "cancelled", "dropped": "cancelled", "silent": "lost", "stopped": "preempted", "unlucky": "preempted",
        "forgotten": "lost",
        "marked": "cancelled", "over": "failed", "chain": "preempted", "another": "running"}
    assert calls == {"squeue": 1, "sacct": 1}, "one squeue for queued and ended jobs, one sacct for the rest"
    assert rows["working"]["step"] == 10
    assert "ended as FAILED on n" in rows["failed"]["note"] and "ended as FAILED on n" in rows["unlucky"]["note"]
    assert "note" not in rows["stopped"], "exit code 75 is how a preempted run ends"
    assert "not this run's" in rows["another"]["note"]
    assert runs.status(died)["next"] == ["launch logs died --follow", "launch cancel died"]
    assert runs.status(forgotten)["next"][0] == "launch explain forgotten"
    with pytest.raises(UserError, match="cannot be cancelled from here"):
        cancel(another)
    assert state_of(held) == "submitted", "a job with the same id that belongs to another run must not be cancelled"

    calls.clear()
    for run in (held, waits, died, working, failed, killed, dropped, silent, forgotten, marked, chain, another, stopped,
                unlucky):
        update_json(run.paths.record, state="finished")
    runs.list_runs(held.paths.root.parent)
    assert not calls, "SLURM is not asked about runs that have ended"


def test_status_of_a_waiting_and_then_running_run(slurm, make_run):
    first = make_run("first", "--exclusive", "--nodes=3", "--time=10", script="sleep 300")
    wait_until(lambda: runs.status(first)["queue"]["state"] == "RUNNING")
    ahead = make_run("ahead", "--exclusive", "--nodes=3")
    run = make_run("run", "--exclusive", "--nodes=2")
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
    wait_until(lambda: run.reread().record["state"] == "running")
    status = runs.status(run)
    assert status["state"] == "running" and status["queue"]["state"] == "RUNNING" and len(status["queue"]["nodes"]) == 2
    assert status["queue"]["reason"] is None and status["queue"]["position"] is None
    job = run.record["job"]["ids"][0]
    assert status["job_log"] == str(run.paths.submission(1) / f"{job}_0_log.out")
    assert f"job {job} on n1" in details(status) and "job log" in details(status)


def test_cancel_a_waiting_run(slurm, make_run):
    run = make_run("run", "--hold")
    assert cancel(run) == "cancelled"
    assert run.reread().record["state"] == "cancelled"
    assert not slurm_commands.queue(run.record["job"]["ids"])
    with pytest.raises(UserError, match="is cancelled: there is nothing to cancel"):
        cancel(run.reread())


def test_cancel_records_the_cancellation_before_it_signals_a_running_run(slurm, make_run):
    run = make_run("run")
    link = make_run("link", "--hold")  # the next job of a chain
    ids = [*run.record["job"]["ids"], *link.record["job"]["ids"]]
    wait_until(lambda: run.reread().record["state"] == "running")
    update_json(run.paths.record, job={**run.record["job"], "ids": ids[:1]})
    assert cancel(run.reread()) == "cancelled"
    assert read_json(run.paths.attempt_record(1))["outcome"] == "cancelled", "the node process handled SIGTERM and was not killed"
    assert not slurm_commands.queue(ids[:1]) and slurm_commands.queue(ids[1:])


def test_cancel_ends_all_jobs_of_a_chain(slurm, make_run):
    run = make_run("run")
    wait_until(lambda: run.reread().record["state"] == "running")
    next_job = slurm.run("sbatch", "--parsable", "--hold", "--output=/dev/null", run.paths.submission(1) / "job.sh").strip()
    update_json(run.paths.record, job={**run.record["job"], "ids": [*run.record["job"]["ids"], next_job]})
    assert runs.status(run.reread())["queue"]["ids"] == [*run.record["job"]["ids"], next_job]
    assert cancel(run.reread()) == "cancelled"
    assert slurm.job(next_job)["JobState"] == "CANCELLED"


@pytest.mark.slow
def test_cancel_ends_a_job_that_ignores_sigterm(slurm, make_run):
    run = make_run("run", behaviour="deaf")
    wait_until(lambda: run.reread().record["state"] == "running")
    message = cancel(run, wait_s=0.5)
    assert "SLURM was told to end job" in message
    wait_for(run, "cancelled")


def test_cancel_of_a_job_step_keeps_its_allocation(slurm, make_run, tmp_path):
    step = srun(tmp_path / "node.py", tmp_path / "runs of 中文" / "run", "obey")
    allocation = make_run("allocation", script=f"sleep 300 & ({step}) & wait")
    run = make_run("run", ids=[f"{allocation.record['job']['ids'][0]}.0"])
    wait_until(lambda: run.reread().record["state"] == "running")
    assert state_of(run) == "running" and runs.status(run)["queue"]["nodes"] == ["n1"]
    assert cancel(run.reread()) == "cancelled"
    assert read_json(run.paths.attempt_record(1))["outcome"] == "cancelled"
    assert slurm.job(allocation.record["job"]["ids"][0])["JobState"] == "RUNNING"


def test_a_sweep_is_listed_and_cancelled_as_a_whole(slurm, make_run, tmp_path):
    first = make_run("s-1-0", ids=[])
    for element in (1, 2, 3):
        make_run(f"s-1-{element}", ids=[])
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
    assert "as many elements as it may run at once" in runs.status(waiting)["queue"]["reason_words"]

    update_json(root / "s-1-2" / "run.json", state="cancelled")  # cancelled by hand before
    slurm.run("scancel", f"{job}_2")
    cancelled = cancel_sweep(root, "s-1")
    assert cancelled == [{"id": f"s-1-{i}", "state": "cancelled"} for i in range(4)]
    assert [read_json(root / f"s-1-{i}" / "attempts" / "1" / "attempt.json")["outcome"] for i in (0, 1)] == ["cancelled"] * 2
    assert not (root / "s-1-3" / "attempts").exists()
    with pytest.raises(UserError, match="nothing to cancel"):
        cancel_sweep(root, "s-1")


def test_cancel_finds_the_job_of_an_interrupted_submission(slurm, make_run):
    run = make_run("run", "--hold")
    job = {"kind": "slurm", "cluster": "test", "ids": [], "submission": 1, "host": socket.gethostname()}
    (id,) = run.record["job"]["ids"]
    update_json(run.paths.record, job={**job, "pid": os.getpid(), "started": "another"})
    status = runs.status(run)
    assert status["state"] == "submitted" and status["next"] == ["launch resume run"]
    assert "its submission did not finish" in details(status) and status["queue"] is None
    assert cancel(run.reread()) == "cancelled"
    assert slurm.job(id)["JobState"] == "CANCELLED", "the job must be found by the path of its script"


def test_cancel_a_point_of_a_sweep_whose_submission_was_interrupted(slurm, make_run):
    job = {"kind": "slurm", "cluster": "test", "ids": [], "submission": 1, "host": socket.gethostname(), "pid": 1,
           "started": "another"}
    points = [make_run(f"p-{i}", ids=[], sweep="s") for i in range(2)]
    for point in points:
        update_json(point.paths.record, job=job)
    root = points[0].paths.root.parent
    folder = RunPaths(root / "s").submission(1)
    folder.mkdir(parents=True)
    (folder / "job.sh").write_text("#!/bin/bash\n")
    replace_json(root / "s" / "sweep.json", {"id": "s", "points": [{"run": f"p-{i}", "overrides": []} for i in range(2)]})
    id = slurm.run("sbatch", "--parsable", "--hold", "--array=0-1", "--output=/dev/null", folder / "job.sh").strip()
    assert cancel(points[1].reread()) == "cancelled"
    assert list(slurm_commands.queue([f"{id}_0", f"{id}_1"])) == [f"{id}_0"]
    assert cancel_sweep(root, "s") == [{"id": "p-0", "state": "cancelled"}, {"id": "p-1", "state": "cancelled"}]
    assert not slurm_commands.queue([f"{id}_0", f"{id}_1"])


@pytest.mark.slow
def test_cancel_a_run_while_slurm_requeues_its_job(slurm, make_run):
    run = make_run("run", "--requeue", script="trap '' TERM; sleep 300 & wait; sleep 300", state="preempted", attempt=1)
    (job,) = run.record["job"]["ids"]
    slurm.wait(job, "RUNNING")
    slurm.run("scontrol", "requeue", job)
    slurm.wait(job, "COMPLETING", "PENDING")
    cancel(run)
    assert run.reread().record["state"] == "cancelled"
    assert slurm.wait(job)["JobState"] == "CANCELLED"


def test_without_slurm_the_state_comes_from_the_record(slurm, make_run, monkeypatch):
    run = make_run("run", "--hold")
    monkeypatch.setenv("PATH", "/nowhere")
    [row] = runs.list_runs(run.paths.root.parent)
    assert row["state"] == "submitted" and "`squeue` is not installed" in row["note"]
    assert "SLURM cannot be asked here" in table([row]) and "SLURM cannot be asked here" in details(runs.status(run))
    with pytest.raises(UserError, match="cannot be cancelled from here"):
        cancel(run)
    assert run.reread().record["state"] == "submitted"
    monkeypatch.undo()
    slurm.run("scancel", run.record["job"]["ids"][0])


@pytest.mark.slow
def test_follow_continues_after_a_requeue(slurm, make_run, monkeypatch):
    monkeypatch.setattr(logs, "ASK_OFTEN_S", 1.0)
    run = make_run("run", "--requeue", "--hold", behaviour="twice")
    (job,) = run.record["job"]["ids"]
    output, node_output = [], []
    following = threading.Thread(target=lambda: logs.follow(run, follow=True, write=output.append))
    following_node = threading.Thread(target=lambda: logs.follow(run, follow=True, node=0, write=node_output.append))
    following.start(), following_node.start()
    wait_until(lambda: "held by its owner" in "".join(output))
    slurm.run("scontrol", "release", job)
    wait_until(lambda: "rank 0 of attempt 1" in "".join(output))
    slurm.run("scontrol", "requeue", job)
    following.join(60), following_node.join(60)
    assert not following.is_alive() and not following_node.is_alive()
    lines = "".join(output).splitlines()
    parts = ["--- waiting in the queue", "rank 0 of attempt 1", "--- attempt 1 has ended; ", "its start time has not come",
             "--- attempt 2 ---", "rank 0 of attempt 2"]  # between them, what is known while the job starts and ends
    places = [next(number for number, line in enumerate(lines) if part in line) for part in parts]
    assert places == sorted(places) and lines.count("--- attempt 2 ---") == 1, lines
    assert "node process of attempt 1\n" in node_output and "node process of attempt 2\n" in node_output
    assert {"job": job, "node": 0, "line": "node process of attempt 2"} in list(logs.lines(run.reread(), node=0))


def test_the_job_log_is_offered_when_no_rank_has_a_log(slurm, make_run):
    run = make_run("run", script="echo module not found; exit 1")
    wait_for(run, "failed")
    with pytest.raises(UserError) as caught:
        list(logs.lines(run, follow=True))
    assert "`launch logs run --node 0`" in caught.value.hint
    assert [line["line"] for line in logs.lines(run, node=0)] == ["module not found"]
    with pytest.raises(UserError, match="no job log of node 1") as caught:
        list(logs.lines(run, node=1))
    assert caught.value.hint == "it has node 0"


def test_slurm_remembers_ended_jobs_without_accounting(slurm, make_run):
    failed, signalled = make_run("a", script="exit 3"), make_run("b", script="kill -9 $$")
    for run in (failed, signalled):
        wait_for(run, "failed")
    ids = [*failed.record["job"]["ids"], *signalled.record["job"]["ids"]]
    jobs = slurm_commands.history([*ids, "99999"])
    assert [(jobs[id].state, jobs[id].exit_code, jobs[id].signal, jobs[id].nodes) for id in ids] == [
        ("FAILED", 3, None, ["n1"]), ("FAILED", None, 9, ["n1"])]
    assert abs(datetime.now(UTC) - datetime.fromisoformat(jobs[ids[0]].ended)) < timedelta(minutes=1)
    assert "99999" not in jobs
