"""Finding, listing and cancelling runs, and their true state."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys

import pytest

from launch.cluster import slurm
from launch.records import read as runs
from launch.records import state as truth
from launch.records.cancel import cancel, cancel_sweep
from launch.records.process import alive, identity
from launch.records.run import read_run
from launch.records.state import state_of
from launch.report.explain import explain
from launch.report.tables import details, table
from trainers.contract.clock import utc_now
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, replace_json
from trainers.contract.paths import RunPaths

LAST = {"rank": 1, "exit_code": None, "signal": "SIGKILL", "message": "killed", "hint": "was memory short?",
        "traceback": "Traceback\n  here", "retry": True}


def make_run(root, id="cifar10-1", state="finished", **changes):
    paths = RunPaths(root / id)
    paths.root.mkdir(parents=True)
    replace_json(paths.record, {
        "id": id, "task": "cifar10", "state": state, "step": 120, "total": 1000, "attempt": 1, "job": None,
        "sweep": None, "metrics": {"top1": 0.5}, "checkpoint": 100,
        "created": "2026-01-02T00:00:00+00:00", "updated": "2026-01-02T01:00:00+00:00", **changes,
    })
    return paths


def make_attempt(paths, number, **changes):
    paths.attempt(number).mkdir(parents=True)
    replace_json(paths.attempt_record(number), {
        "attempt": number, "host": "here", "pid": 1, "process_started": "1", "cwd": "/", "device": "cpu", "ranks": 2,
        "began": "2026-01-02T00:00:00+00:00", "ended": "2026-01-02T00:10:00+00:00", "outcome": "failed",
        "exit_code": 1, "failure": None, **changes,
    })


def job_of(pid, **changes):
    return {"kind": "local", "host": socket.gethostname(), "pid": pid, "started": identity(pid) or "none", **changes}


@pytest.fixture
def gone():
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_process_is_identified_by_pid_and_start():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = identity(process.pid)
    assert started == identity(process.pid)
    assert alive(process.pid, started)
    assert not alive(process.pid, started + "0"), "another process with the same pid"
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not alive(process.pid, started), "a zombie is dead"
    process.wait()
    assert identity(process.pid) is None


def test_find_by_id_by_the_beginning_of_an_id_and_by_path(tmp_path, monkeypatch):
    make_run(tmp_path, "cifar10-1")
    make_run(tmp_path, "cifar10-12")
    make_run(tmp_path, "gan-7")
    assert runs.find_run(tmp_path, "cifar10-1").id == "cifar10-1", "an exact id is found although another id starts with it"
    assert runs.find_run(tmp_path, "g").id == "gan-7"
    assert runs.find_run(tmp_path / "elsewhere", str(tmp_path / "gan-7")).id == "gan-7"
    monkeypatch.chdir(tmp_path)
    assert runs.find_run(tmp_path / "elsewhere", "gan-7").id == "gan-7"
    assert runs.find_run(tmp_path / "elsewhere", "./gan-7/").id == "gan-7"


def test_errors_of_find(tmp_path):
    make_run(tmp_path, "cifar10-1")
    make_run(tmp_path, "cifar10-2")
    (tmp_path / "notes").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text('{"id": "bro')
    for word, message, hint in [
        ("cifar", "cifar10-1, cifar10-2", "more of the id"),
        ("cifar10_1", "no run `cifar10_1`", "cifar10-1"),
        ("zzzzzz", "no run `zzzzzz`", "launch runs"),
        ("notes", "is not a run", "launch runs"),
        ("broken", str(tmp_path / "broken" / "run.json"), "restore"),
        ("no/where", "the folder `no/where` does not exist", "launch runs"),
        ("", "empty", "launch runs"),
    ]:
        with pytest.raises(UserError) as caught:
            runs.find_run(tmp_path, word)
        assert message in caught.value.message and hint in caught.value.hint, word
    with pytest.raises(UserError, match="no run `x`"):
        runs.find_run(tmp_path / "nowhere", "x")


def test_list_is_newest_first_and_survives_broken_records(tmp_path):
    make_run(tmp_path, "a", created="2026-01-01T00:00:00+00:00")
    make_run(tmp_path, "b", created="2026-01-03T00:00:00+00:00")
    make_run(tmp_path, "c", created="2026-01-02T00:00:00+00:00")
    for name, text in [("half", '{"id": "ha'), ("list", "[]"), ("binary", "\0\xff"), ("other", '{"id": "other"}')]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text, encoding="latin-1")
    make_run(tmp_path, "time", updated="yesterday")
    make_run(tmp_path, "zone", created="2026-01-01")
    (tmp_path / "none").mkdir()
    (tmp_path / "file").touch()
    rows = runs.list_runs(tmp_path)
    assert [row["id"] for row in rows if row["state"] != "unreadable"] == ["b", "c", "a"]
    assert {row["id"] for row in rows if row["state"] == "unreadable"} == {"half", "list", "binary", "other",
                                                                                  "time", "zone"}
    assert runs.list_runs(tmp_path / "nowhere") == []
    shown = table(rows, width=80)
    assert "unreadable" in shown and max(map(len, shown.splitlines())) <= 80


def test_a_run_is_lost_if_its_process_on_this_host_is_gone(tmp_path, gone):
    def state(recorded, job):
        return truth.local_state({"state": recorded, "job": job})

    assert state("running", job_of(os.getpid())) == "running"
    assert state("running", job_of(gone)) == "lost"
    assert state("submitted", job_of(gone)) == "lost"
    assert state("running", job_of(os.getpid(), started="1")) == "lost"
    assert state("running", job_of(gone, host="another")) == "running"
    assert state("finished", job_of(gone)) == "finished"
    assert state("submitted", None) == "submitted"


def test_status_gathers_everything_that_is_known(tmp_path, gone, monkeypatch):
    monkeypatch.setenv("LAUNCH_RUNS", str(tmp_path))
    paths = make_run(tmp_path, state="running", job=job_of(gone), attempt=2)
    make_attempt(paths, 1, outcome="preempted", exit_code=75)
    make_attempt(paths, 2, failure=LAST)
    paths.log(2, 0).parent.mkdir()
    paths.log(2, 0).touch()
    lines = [{"step": s, "split": "train", "loss": 1 / s, "rate": 10.0 * s} for s in range(1, 3000)]
    lines.append({"step": 2999, "split": "eval", "loss": 7.0})
    paths.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3000, "spl')
    status = runs.status(runs.find_run(tmp_path, "cifar10-1"))
    assert status["state"] == "lost"
    assert (status["loss"], status["rate"]) == (1 / 2999, 29990.0)
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["preempted", "failed"]
    assert status["failure"] == LAST
    assert status["log"] == str(paths.log(2, 0))
    assert status["checkpoint_path"] == str(paths.checkpoint(100))
    assert status["next"] == ["launch explain cifar10-1", "launch logs cifar10-1", "launch resume cifar10-1"]
    shown = details(status)
    for text in ("lost", "120/1000", "rank 1 was ended by SIGKILL: killed", "was memory short?", "took 10:00",
                 "launch resume cifar10-1", str(paths.checkpoint(100)), "top1 0.5"):
        assert text in shown


def test_the_commands_of_status_work_for_a_run_in_another_folder(tmp_path, monkeypatch):
    make_run(tmp_path / "other runs", state="failed")
    monkeypatch.chdir(tmp_path)
    commands = runs.status(runs.find_run(tmp_path / "other runs", "cifar10-1"))["next"]
    assert commands[2] == "launch resume 'other runs/cifar10-1'"
    assert runs.find_run(tmp_path / "runs", shlex.split(commands[2])[2]).id == "cifar10-1"


def test_status_of_a_run_that_has_written_only_its_record(tmp_path):
    paths = make_run(tmp_path, state="submitted", attempt=0, step=0, checkpoint=None, total=None)
    paths.attempt(1).mkdir(parents=True)
    status = runs.status(runs.find_run(tmp_path, "cifar10-1"))
    assert status["attempts"] == [{"attempt": 1, "outcome": "unreadable", "failure": None}]
    assert status["loss"] is status["log"] is status["checkpoint_path"] is status["failure"] is None
    assert "unreadable" in details(status)


NODE = """
import signal, sys, time
from pathlib import Path
from trainers.contract.files import update_json
from trainers.contract.paths import RunPaths
paths = RunPaths(Path(sys.argv[1]))
def stop(*_):
    update_json(paths.record, state="cancelled" if paths.cancellation(2).exists() else "preempted")
    sys.exit()
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2] == "deaf" else stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def node():
    """Start a process that behaves like a node process of attempt 2."""
    started = []

    def start(paths, manner):
        process = subprocess.Popen([sys.executable, "-c", NODE, str(paths.root), manner], stdout=subprocess.PIPE)
        started.append(process)
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_cancel_writes_the_reason_before_it_sends_the_signal(tmp_path, node):
    paths = make_run(tmp_path, state="running", attempt=2)
    make_attempt(paths, 1)
    make_attempt(paths, 2)
    process = node(paths, "obedient")
    replace_json(paths.record, {**read_run(paths.root).record, "job": job_of(process.pid)})
    assert cancel(runs.find_run(tmp_path, "cifar10-1")) == "cancelled"
    assert not paths.cancellation(1).exists()


def test_cancel_does_not_wait_for_ever_and_says_what_it_waits_for(tmp_path, node, monkeypatch):
    paths = make_run(tmp_path, state="running", attempt=2)
    make_attempt(paths, 2)
    process = node(paths, "deaf")
    replace_json(paths.record, {**read_run(paths.root).record, "job": job_of(process.pid)})
    monkeypatch.setattr("launch.records.cancel.QUIET_S", 0.0)
    said = []
    state = cancel(runs.find_run(tmp_path, "cifar10-1"), wait_s=0.2, say=said.append)
    assert said == ["waiting up to 0 s for run `cifar10-1` to save and stop"]
    assert re.match(r"running \(.*still runs after 0 s\)", state)


def test_cancel_of_a_local_sweep_cancels_the_waiting_runs_first(tmp_path, node):
    working = make_run(tmp_path, "s-0", state="running", attempt=2, sweep="s")
    make_attempt(working, 1)
    make_attempt(working, 2)
    process = node(working, "obedient")
    replace_json(working.record, {**read_run(working.root).record, "job": job_of(process.pid)})
    for id in ("s-1", "s-2"):
        make_run(tmp_path, id, state="submitted", attempt=0, sweep="s", job=job_of(process.pid))
    (tmp_path / "s").mkdir()
    replace_json(tmp_path / "s" / "sweep.json", {"id": "s", "points": [{"run": f"s-{i}", "overrides": []} for i in (0, 1, 2)]})
    assert cancel(runs.find_run(tmp_path, "s-1")) == "cancelled"
    assert process.poll() is None, "the running run continues"
    assert cancel_sweep(tmp_path, "s") == [{"id": f"s-{i}", "state": "cancelled"} for i in (0, 1, 2)]
    process.wait(10)


def test_a_run_that_ends_meanwhile_does_not_keep_a_sweep_from_being_cancelled(tmp_path, monkeypatch):
    for id in ("s-0", "s-1"):
        make_run(tmp_path, id, state="submitted", attempt=0, sweep="s", job=job_of(os.getpid()))
    (tmp_path / "s").mkdir()
    replace_json(tmp_path / "s" / "sweep.json", {"id": "s", "points": [{"run": f"s-{i}", "overrides": []} for i in (0, 1)]})

    def ends(run, *_):
        file = run.paths.record
        if run.id == "s-0":
            replace_json(file, {**read_json(file), "state": "finished"})
            raise UserError("nothing to cancel")
        return "cancelled"

    monkeypatch.setattr("launch.records.cancel.cancel", ends)
    assert [row["state"] for row in cancel_sweep(tmp_path, "s")] == ["finished", "cancelled"]


def test_cancel_refuses_runs_that_are_not_running_on_this_host(tmp_path, gone):
    make_run(tmp_path, "done")
    make_run(tmp_path, "lost", state="running", job=job_of(gone))
    make_run(tmp_path, "far", state="running", job=job_of(gone, host="node17"))
    make_run(tmp_path, "new", state="submitted")
    for id, message in [("done", "is finished"), ("lost", "is lost"), ("far", "node17"), ("new", "no process")]:
        with pytest.raises(UserError, match=message):
            cancel(runs.find_run(tmp_path, id))
        assert not (tmp_path / id / "attempts").exists()


@pytest.mark.parametrize("error", [UserError("`scancel` failed"), KeyboardInterrupt()], ids=["refused", "Ctrl-C"])
def test_a_cancel_that_fails_leaves_no_marker_of_a_cancellation(tmp_path, monkeypatch, node, error):
    """With the marker, the run's next stop, at a time limit for example, would count as a cancellation."""
    on_cluster = make_run(tmp_path, "far", state="running", attempt=2, job=job_at("7"))
    make_attempt(on_cluster, 2)
    replace_json(on_cluster.attempt_record(2), {**read_json(on_cluster.attempt_record(2)), "outcome": "running"})

    def refuse(ids, signal=None):
        if list(ids):
            raise error

    monkeypatch.setattr(slurm, "queue", lambda ids=None: {"7": queued("7", "RUNNING")})
    monkeypatch.setattr(slurm, "look", lambda ids: ({"7": queued("7", "RUNNING")}, {}))
    monkeypatch.setattr(slurm, "cancel", refuse)
    with pytest.raises(type(error)):
        cancel(runs.find_run(tmp_path, "far"))
    assert not on_cluster.cancellation(2).exists() and read_run(on_cluster.root).record["state"] == "running"

    local = make_run(tmp_path, "near", state="running", attempt=2)
    make_attempt(local, 2)
    process = node(local, "deaf")
    replace_json(local.record, {**read_run(local.root).record, "job": job_of(process.pid)})

    def forbid(pid, number):
        raise PermissionError

    with monkeypatch.context() as patch, pytest.raises(UserError, match="belongs to another user"):
        patch.setattr(os, "kill", forbid)
        cancel(runs.find_run(tmp_path, "near"))
    assert not local.cancellation(2).exists()


def test_the_table_fits_and_is_aligned(tmp_path):
    make_run(tmp_path, "a", task="语料", metrics={"top1": 0.25, "loss": 1.5, "another": 2.0, "and": 0.125})
    make_run(tmp_path, "cifar10-20260102-030405-ab12", total=None)
    shown = table(runs.list_runs(tmp_path), width=86).splitlines()
    assert len(shown) == 3 and max(map(len, shown)) <= 86
    assert "120/1000" in "".join(shown) and "top1 0.25" in "".join(shown)
    column = shown[0].index("STATE")
    assert [line.index("finished") + 2 * ("语料" in line) for line in shown[1:]] == [column, column]
    assert table([]) == "no runs"


def test_a_narrow_table_keeps_states_and_metrics(tmp_path):
    """Also beside a run with a long name."""
    make_run(tmp_path, "cifar10-20260102-030405-ab12", metrics={"loss": 0.1466, "top1": 0.986, "class/ship": 0.5}, total=None)
    make_run(tmp_path, "a_very_long_name_of_a_task_of_somebody-20260102-030405-ab12", state="failed", metrics={"loss": 1.0})
    for width, metrics in ((60, "loss 0.1466  top1 0.986"), (80, "loss 0.1466  …")):
        shown = table(runs.list_runs(tmp_path), width=width).splitlines()
        assert max(map(len, shown)) <= width
        for text in ("finished", "failed", "120/1000", metrics, "_somebody-20260102-030405-ab12"):
            assert any(text in line for line in shown), (width, text)
        assert "class/ship" not in "".join(shown)
    assert len(table(runs.list_runs(tmp_path), width=200).splitlines()) == 3


def test_metrics_of_single_parts_are_only_counted(tmp_path):
    make_run(tmp_path, metrics={"top1": 0.5, **{f"class/{i}": 0.1 for i in range(10)}})
    shown = details(runs.status(runs.find_run(tmp_path, "cifar10-1")))
    assert "metrics     top1 0.5  and 10 more, of single parts: see metrics.jsonl\n" in shown


# On SLURM. The output of its commands is made up here; tests/slurm/test_reading.py asks a real cluster.


def job_at(*ids):
    return {"kind": "slurm", "cluster": "c", "ids": list(ids), "submission": 1}


def queued(id, state, script=None):
    return slurm.Queued(id, state, "Priority", None, 1, 1, "", "main", script, None)


def ended(id, state, code=None, nodes="n1"):
    return slurm.Ended(id, state, code, None, "None", nodes, None)


@pytest.mark.parametrize("recorded, checkpoint, found, true", [
    ("submitted", None, [queued("7", "PENDING")], "submitted"),
    ("submitted", None, [queued("7", "RUNNING")], "submitted"),
    ("running", None, [queued("7", "PENDING")], "preempted"),
    ("running", None, [queued("7", "COMPLETING")], "running"),
    ("preempted", 5, [queued("7", "REQUEUE_HOLD")], "preempted"),
    ("preempted", 5, [queued("7", "RUNNING")], "running"),
    ("preempted", 5, [queued("7", "COMPLETING")], "preempted"),
    ("preempted", 5, [queued("7", "COMPLETING"), queued("8", "PENDING")], "preempted"),
    ("running", 5, [queued("7", "RUNNING"), queued("8", "PENDING")], "running"),
    ("running", None, [], "lost"),
    ("submitted", None, [], "lost"),
    ("preempted", 5, [], "preempted"),
    ("running", 5, [ended("7", "CANCELLED")], "cancelled"),
    ("preempted", 5, [ended("7", "CANCELLED")], "cancelled"),
    ("preempted", 5, [ended("7", "FAILED", 75), ended("8", "CANCELLED", nodes="")], "cancelled"),
    ("preempted", 5, [ended("7", "FAILED", 75)], "preempted"),
    ("running", 5, [ended("7", "OUT_OF_MEMORY")], "failed"),
    ("submitted", None, [ended("7", "FAILED", 1)], "failed"),
    ("running", 5, [ended("7", "TIMEOUT")], "preempted"),
    ("running", None, [ended("7", "TIMEOUT")], "failed"),
    ("running", 5, [ended("7", "NODE_FAIL")], "lost"),
    ("running", 5, [ended("7", "FAILED", 75), ended("8", "OUT_OF_MEMORY"), ended("9", "CANCELLED", nodes="")], "failed"),
    ("finished", 5, [queued("7", "COMPLETING")], "finished"),
    ("failed", 5, [ended("7", "CANCELLED")], "failed"),
])
def test_the_true_state_from_the_queue_then_the_history_then_the_record(tmp_path, monkeypatch, recorded, checkpoint, found, true):
    paths = make_run(tmp_path, state=recorded, checkpoint=checkpoint, job=job_at("7", "8", "9"), updated=utc_now())
    asked = []

    def look(ids):
        asked.extend(ids)
        return tuple({job.id: job for job in found if isinstance(job, kind)} for kind in (slurm.Queued, slurm.Ended))

    monkeypatch.setattr(slurm, "look", look)
    monkeypatch.setattr(slurm, "accounted", lambda ids: {})
    run = read_run(paths.root)
    assert state_of(run) == true
    assert asked == ([] if recorded in truth.FINAL else ["7", "8", "9"])
    assert runs.list_runs(tmp_path)[0]["state"] == true


def test_slurm_is_not_asked_for_ever_about_lost_runs(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(truth, "ask", lambda records: asked.extend(record["id"] for record in records) or truth.SlurmAnswer())
    job = {"kind": "slurm", "cluster": "c", "ids": ["7"], "submission": 1}
    old, new = "2020-01-01T00:00:00+00:00", utc_now()
    for id, recorded, updated in (("a", "running", old), ("b", "submitted", old), ("c", "submitted", new)):
        make_run(tmp_path, id, recorded, job=job, updated=updated)
    rows = {row["id"]: row for row in runs.list_runs(tmp_path)}
    assert set(asked) == {"c"} and [rows[id]["state"] for id in "abc"] == ["lost", "submitted", "submitted"]
    assert "`launch status a` asks SLURM" in rows["a"]["note"]


def test_a_record_that_changes_while_slurm_is_asked_counts(tmp_path, monkeypatch):
    """The job is gone from the queue because the run has just ended."""
    paths = make_run(tmp_path, state="running", job=job_at("7"))

    def look(ids):
        replace_json(paths.record, {**read_run(paths.root).record, "state": "finished"})
        return {}, {}

    monkeypatch.setattr(slurm, "look", look)
    monkeypatch.setattr(slurm, "accounted", lambda ids: {})
    assert state_of(read_run(paths.root)) == "finished"


def test_a_sweep_is_found_and_its_runs_are_compared(tmp_path):
    sweep = tmp_path / "lr-1"
    sweep.mkdir()
    points = [{"run": f"cifar10-2026-{i}", "overrides": [f"optim.lr=1e-{i}", f"model.lr={i}", "train.seed=7"]} for i in (3, 1)]
    replace_json(sweep / "sweep.json", {"id": "lr-1", "points": [*points, {"run": "not-made-yet", "overrides": []}]})
    for point in points:
        make_run(tmp_path, point["run"], sweep="lr-1", metrics={"top1": 0.123456, "loss": 1.25, "class/ship": 0.5, "top5": 0.75})
    make_run(tmp_path, "other")
    assert runs.find_sweep(tmp_path, "lr-1") == runs.find_sweep(tmp_path, "lr") == runs.find_sweep(tmp_path, str(sweep)) == sweep
    assert runs.find_sweep(tmp_path, "cifar10-2026-3") is runs.find_sweep(tmp_path, "") is None
    rows = runs.list_runs(tmp_path, sweep="lr-1")
    assert [row["id"] for row in rows] == ["cifar10-2026-3", "cifar10-2026-1"]
    lines = table(rows, width=80).splitlines()
    assert lines[0].split() == ["optim.lr", "model.lr", "STATE", "STEP", "top1", "loss", "top5", "RUN"]
    assert lines[1].split() == ["1e-3", "3", "finished", "120/1000", "0.1235", "1.25", "0.75", "cifar10-2026-3"]
    with pytest.raises(UserError, match="is a sweep, not a run"):
        runs.find_run(tmp_path, "lr-1")
    with pytest.raises(UserError, match="there is no sweep `nothing`"):
        runs.list_runs(tmp_path, sweep="nothing")
    with pytest.raises(UserError, match="no run of sweep `lr-1` is waiting or running"):
        cancel_sweep(tmp_path, "lr-1")
    (tmp_path / "lr-2").mkdir()
    replace_json(tmp_path / "lr-2" / "sweep.json", {"id": "lr-2", "points": []})
    with pytest.raises(UserError, match="2 sweeps have an id that starts with `lr`"):
        runs.find_sweep(tmp_path, "lr")


def test_an_attempt_without_a_recorded_end_is_shown_as_lost(tmp_path, gone):
    paths = make_run(tmp_path, state="running", job=job_of(gone))
    make_attempt(paths, 1, outcome="running", ended=None, exit_code=None, nodes=["n1", "n2"], job="7")
    status = runs.status(runs.find_run(tmp_path, "cifar10-1"))
    assert status["attempts"][0]["outcome"] == "lost"
    assert "lost, 2 rank(s) on cpu, job 7 on n1, n2" in details(status)


@pytest.mark.parametrize("state, note", [
    ("failed", "it waits for run a-1, which is failed: it starts if `launch resume {a}` finishes that run"),
    ("cancelled", "it waits for run a-1, which is cancelled: it starts if `launch resume {a}` finishes that run"),
    ("preempted", "it waits for run a-1, which has stopped: it starts if `launch resume {a}` finishes that run"),
    ("running", "it waits for a job of run a-1 that has ended, but by its record that run is running: `launch cancel b-1`, "
                "then `launch resume b-1`, which waits for the run's present job"),
    ("finished", "it waits for a job of run a-1, which has finished without that job: `launch cancel b-1`, then "
                 "`launch resume b-1`"),
    (None, "it waits for run a-1, whose folder cannot be read"),
])
def test_a_run_that_waits_in_vain_for_another_run_says_so(tmp_path, monkeypatch, state, note):
    """Every reader says it: `runs`, `status` and `explain`."""
    monkeypatch.setenv("LAUNCH_RUNS", str(tmp_path))
    after = make_run(tmp_path, "a-1", state) if state else RunPaths(tmp_path / "a-1")
    paths = make_run(tmp_path, "b-1", "submitted", attempt=0, step=0, checkpoint=None, job=job_at("7"),
                     updated=utc_now())
    paths.submission(1).mkdir(parents=True)
    replace_json(paths.submission(1) / "submission.json", {"after": str(after.root)})
    waiting = slurm.Queued("7", "PENDING", "DependencyNeverSatisfied", None, 1, 1, "", "main", None, None)
    monkeypatch.setattr(slurm, "look", lambda ids, ended=True: ({"7": waiting}, {}))
    monkeypatch.setattr(slurm, "position", lambda job: (1, 1))
    note = note.format(a="a-1")
    assert state_of(read_run(paths.root)) == "submitted"
    assert note in table(runs.list_runs(tmp_path)) and runs.status(read_run(paths.root))["note"] == note
    explanation = explain(read_run(paths.root))
    assert note in explanation["sentence"]
    assert [step["command"] for step in explanation["next"]][:2] == ["launch resume a-1", "launch cancel b-1"]


def test_an_attempt_names_the_signal_that_ended_its_rank(tmp_path):
    paths = make_run(tmp_path, state="failed")
    make_attempt(paths, 1, failure=LAST)
    assert "failed, rank 1 ended by SIGKILL, 2 rank(s)" in details(runs.status(runs.find_run(tmp_path, "cifar10-1")))


def test_no_step_is_shown_where_none_is_known(tmp_path):
    """Of a script, for example: its record says step 0, of an unknown total."""
    make_run(tmp_path, state="running", step=0, total=None, metrics={})
    shown = details(runs.status(runs.find_run(tmp_path, "cifar10-1")))
    assert "\nstep" not in shown and table(runs.list_runs(tmp_path), width=100).splitlines()[1].split()[3] == "-"
