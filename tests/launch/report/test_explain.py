from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from launch.records.process import identity
from launch.records.read import status
from launch.records.run import read_run
from launch.report.explain import explain, told
from launch.report.tables import details
from launch.supervise.watchdog import Limits, Sign, blamed
from trainers.contract.files import read_json, replace_json
from trainers.contract.heartbeat import REPORT
from trainers.contract.paths import RunPaths

SPEC = """\
name: bert
train: {batch_size: 32, micro_batch_size: null}
optim: {lr: 0.03}
run: {grace_s: 60.0}
"""
TRACE = """\
Traceback (most recent call last):
  File "task.py", line 3, in loss
    return model(images)
           ^^^^^^^^^^^^^
{}"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function that makes a run and explains it. It takes the run's state, the outcome and other values of each attempt's
    record, and logs by (attempt, rank)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # no SLURM

    def make(state, *attempts, logs=(), job=None, spec=SPEC, **record):
        paths = RunPaths(tmp_path / "runs" / "bert-1")
        paths.attempts.mkdir(parents=True)
        paths.spec.write_text(spec)
        job = job or {"kind": "local", "host": socket.gethostname(), "pid": os.getpid(), "started": identity(os.getpid())}
        replace_json(paths.record, {
            "id": "bert-1", "task": "bert", "state": state, "step": 0, "total": 100, "attempt": len(attempts), "job": job,
            "sweep": None, "metrics": {}, "checkpoint": None, "created": "2026-01-02T00:00:00+00:00", **record})
        for number, (outcome, more) in enumerate(attempts, 1):
            paths.attempt(number).mkdir()
            replace_json(paths.attempt_record(number), {
                "attempt": number, "outcome": outcome, "ranks": 4, "device": "cpu", "failure": None, "exit_code": None,
                "began": f"2026-01-02T00:0{number}:00+00:00", "ended": f"2026-01-02T00:0{number}:50+00:00", **more})
        for (number, rank), text in dict(logs).items():
            paths.log(number, rank).parent.mkdir(exist_ok=True)
            paths.log(number, rank).write_text(text)
        found = explain(read_run(paths.root))
        assert json.loads(json.dumps(found)) == found
        return found

    return make


def failure(rank=0, code=1, **more):
    return {"failure": {"rank": rank, "exit_code": code, "signal": None, "message": f"rank {rank} ended with exit code {code}: x",
                        "hint": None, "traceback": None, "retry": True, "node": None, **more}}


def commands(found) -> list[str]:
    return [step["command"] for step in found["next"]]


# --- the text


def test_the_whole_text_of_a_failed_run(make):
    log = "training from step 0 of 100: 4 rank(s)\nstep 40/100  loss 1\ncheckpoint 40\nstep 57/100  loss 1\n"
    again = "resuming at step 40 of 100: 4 rank(s)\nstep 61/100  loss 1\n"
    trace = TRACE.format("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    found = make("failed", ("failed", failure(3, None, signal="SIGKILL", message="rank 3 was ended by SIGKILL")),
                 ("failed", {**failure(2, message="rank 2 ended with exit code 1: CUDA out of memory", traceback=trace),
                             "device": "cuda"}),
                 logs={(1, 0): log, (2, 0): again, (2, 2): "hello\n" + trace}, checkpoint=60)
    assert told(found) == f"""\
bert-1: failed at step 61 in attempt 2: rank 2 ended with exit code 1: CUDA out of memory

cause       the GPU's memory was full
log         {RunPaths(Path.cwd() / "runs/bert-1").log(2, 2)}
              Traceback (most recent call last):
                File "task.py", line 3, in loss
                  return model(images)
                         ^^^^^^^^^^^^^
              torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
attempt 1   failed after 0:50 at step 57: rank 3 was ended by SIGKILL; the next attempt continued at step 40, 0:10 later, \
17 step(s) repeated
attempt 2   failed after 0:50 at step 61 (from 40): rank 2 ended with exit code 1: CUDA out of memory
next        launch resume bert-1 --gpus 8
              on twice as many ranks, each with half as large a share of the batch
            launch runs/bert-1/run.yaml train.micro_batch_size=4 --gpus 4
              a new run of the same spec with a smaller micro-batch"""


def test_a_running_run_without_a_problem(make):
    log = "training from step 0 of 100: 4\nstep 40/100  loss 1  lr 0.1  1,234 samples/s  data 3%  eta 1:02:03\neval 40/100\n"
    found = make("running", ("running", {"ended": None}), logs={(1, 0): log}, step=39)
    assert found["sentence"] == "attempt 1 is at step 40 of 100, 1,234 samples/s, with 1:02:03 to go; nothing is wrong"
    assert commands(found) == ["launch logs bert-1 --follow", "launch cancel bert-1"]
    os.utime(Path("runs/bert-1/attempts/1/logs/0.log"), (1, 1))
    assert "it may hang" in explain(read_run(Path("runs/bert-1").absolute()))["sentence"]


@pytest.mark.parametrize("state, outcome, sentence, next", [
    ("finished", ("finished", {}), "finished at step 90 in attempt 1", []),
    ("cancelled", ("cancelled", {}), "cancelled at step 90 in attempt 1, with a checkpoint of step 90", ["launch resume bert-1"]),
    ("preempted", ("preempted", {"reason": "time limit"}),
     "stopped at step 90 in attempt 1 (time limit); it does not continue by itself", ["launch resume bert-1"]),
])
def test_runs_that_did_not_fail(make, state, outcome, sentence, next):
    found = make(state, outcome, logs={(1, 0): "training from step 0 of 100:\nfinished at step 90/100\n"}, checkpoint=90)
    assert (found["sentence"], found["cause"], commands(found)) == (sentence, None, next)


SEARCH = "name: wine\nsearch: {grid: {n_estimators: [5, 20]}, cv: 3}\n"


def test_a_stopped_search_says_that_its_pieces_are_kept(make):
    """A search has no checkpoint and keeps its finished pieces. Without pieces, nothing is said."""
    logs = {(1, 0): "from fit 0 of 36\nfit 12/36  trees 9/40  eta 0:10\npreempted at fit 12/36\n"}
    stopped = ("preempted", {"reason": "time limit"})
    found = make("preempted", stopped, logs=logs, spec=SEARCH, total=36)
    assert "\nattempt 1   stopped after 0:50 at step 12: time limit\n" in told(found)
    paths = RunPaths(Path("runs/bert-1").absolute())
    paths.pieces.mkdir()
    found = explain(read_run(paths.root))
    assert found["attempts"][0]["kept"] == "pieces" and "checkpoint" not in told(found)
    assert "\nattempt 1   stopped after 0:50 at step 12: time limit; its finished pieces are kept\n" in told(found)
    assert found["next"] == [{"command": "launch resume bert-1", "why": "it does the missing pieces; finished pieces are kept"}]

    ended = read_json(paths.attempt_record(1))
    replace_json(paths.attempt_record(1), {**ended, "outcome": "cancelled", "reason": None})
    cancelled = explain(read_run(paths.root))
    assert "\nattempt 1   was cancelled after 0:50 at step 12; its finished pieces are kept\n" in told(cancelled)

    replace_json(paths.attempt_record(1), ended)
    replace_json(paths.record, {**read_json(paths.record), "state": "running"})
    assert [step["why"] for step in explain(read_run(paths.root))["next"]] == [
        "shows the log as it grows", "stops it; finished pieces are kept"]


def test_a_stopped_attempt_says_that_it_kept_a_checkpoint(make):
    found = make("preempted", ("preempted", {"reason": "time limit"}), checkpoint=90,
                 logs={(1, 0): "training from step 0 of 100:\npreempted at step 90/100\n"})
    assert found["attempts"][0]["kept"] == "checkpoint"
    assert "\nattempt 1   stopped with a checkpoint after 0:50 at step 90: time limit\n" in told(found)


def test_a_run_whose_process_is_gone(make):
    job = {"kind": "local", "host": socket.gethostname(), "pid": 1, "started": "another"}
    found = make("running", ("running", {"ended": None}), job=job, logs={(1, 0): "training from step 0 of 9:\nstep 7/9\n"})
    assert found["sentence"] == "lost at step 7 in attempt 1: its processes are gone, and the reason is not known"
    assert found["cause"]["log_end"][-1] == "step 7/9" and commands(found) == ["launch resume bert-1"]
    assert found["next"][0]["why"].endswith("it has no checkpoint, and starts from the beginning")


def test_without_slurm_the_rest_is_still_explained(make):
    job = {"kind": "slurm", "cluster": "here", "ids": ["101"], "submission": 1}
    lost = {"message": "the node process on n2 is gone", "rank": None, "retry": True, "node": "n2", "exit_code": None}
    found = make("failed", ("failed", {"failure": lost, "job": "101", "nodes": ["n1", "n2"], "submission": 1}), job=job)
    assert found["sentence"] == "failed in attempt 1: the node process on n2 is gone"
    assert "slurm       cannot be asked: there is no SLURM here: `squeue` is not installed" in told(found)
    assert "launch resume bert-1 sbatch.exclude=n2" in commands(found)


# --- the first rank that failed


def test_a_rank_that_lost_another_is_not_the_cause(make):
    gloo = TRACE.format("RuntimeError: [gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:39656. This is")
    logs = {(1, 0): gloo, (1, 1): gloo, (1, 2): TRACE.format("ValueError: odd number") + "\n", (1, 3): "nothing"}
    found = make("failed", ("failed", {**failure(1, traceback=gloo), "nodes": ["n1", "n2"]}), logs=logs)
    assert found["cause"]["message"] == "rank 2 on node n2 ended with ValueError: odd number"
    assert found["cause"]["log"].endswith("attempts/1/logs/2.log") and found["cause"]["meaning"] is None
    assert commands(found) == ["launch resume bert-1"] and found["next"][0]["why"].startswith("after you have fixed this")


def test_why_another_rank_ended_may_not_be_known(make):
    gloo = TRACE.format("RuntimeError: Connection reset by peer")
    found = make("failed", ("failed", failure(1, traceback=gloo)), logs={(1, 0): gloo, (1, 1): gloo})
    assert found["cause"]["rank"] == 1 and "why that rank ended is not known" in found["cause"]["meaning"]


# --- known failures


@pytest.mark.parametrize("last, meaning, command", [
    ("RuntimeError: CUDA error: out of memory", "the GPU's memory was full", "launch resume bert-1 --procs 8"),
    ("MemoryError", "the host's memory, or the job's share of it, was full", "launch resume bert-1 --procs 8"),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate memory",
     "the host's memory, or the job's share of it, was full", "launch resume bert-1 --procs 8"),
    ("ModuleNotFoundError: No module named 'einops'", "the Python that ran it has no module `einops`", "launch resume bert-1"),
    ("torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: 29500, "
     "useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use", "another process was using the port",
     "launch resume bert-1"),
    ("OSError: [Errno 28] No space left on device", "the disk is full, or your quota is used up", "df -h runs/bert-1"),
    ("OSError: [Errno 122] Disk quota exceeded: 'x'", "the disk is full, or your quota is used up", "df -h runs/bert-1"),
    ("PermissionError: [Errno 13] Permission denied: '/data/x'", "you have no permission to read or write a file or folder",
     "ls -ld runs/bert-1"),
    ("torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error (run with "
     "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclSystemError: System call (e.g. socket, malloc) failed",
     "NCCL could not use a GPU, or the network between ranks", "NCCL_DEBUG=INFO launch resume bert-1"),
    ("[rank0]:[E1 ProcessGroupNCCL.cpp:683] [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, "
     "OpType=ALLREDUCE) ran for 600000 milliseconds before timing out.",
     "a rank waited for other ranks that did not arrive: one of them hung, or took another path through the code",
     "launch logs bert-1 --rank K"),
    ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out "
     "of shared memory.", "shared memory (/dev/shm) was full, or a memory-mapped file was truncated", "df -h /dev/shm"),
    ("torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", "a GPU or its driver does not work properly",
     "launch resume bert-1"),
])
def test_a_known_traceback_is_explained(make, last, meaning, command):
    found = make("failed", ("failed", failure(0, traceback=TRACE.format(last))))
    assert found["cause"]["meaning"] == meaning and commands(found)[0] == command


@pytest.mark.parametrize("message, meaning, command", [
    ("the loss of update `main` is nan at step 3", "training diverged, and would diverge again",
     "launch runs/bert-1/run.yaml optim.lr=0.01 --procs 4"),
    ("update `main`, step 3: the gradient of `0.weight` is not finite", "training diverged, and would diverge again",
     "launch runs/bert-1/run.yaml optim.lr=0.01 --procs 4"),
    ("rank 1 did not stop within 60 s of SIGTERM and was killed", "a step and a checkpoint took longer than run.grace_s (60 s)",
     "launch resume bert-1 run.grace_s=180"),
    ("2 attempts in a row ended at the time limit", "the time limit is too short for this run: it starts again and again and "
     "gets no further", "launch resume bert-1 run.grace_s=180"),
    ("rank 1 needs GPU 1; torch 2.15.0 sees 1", "torch sees 1 GPU(s) on that machine, fewer than the run was given",
     "nvidia-smi"),
    ("rank 1 ran out of memory in an evaluation, 64 samples at a time", "the memory of the GPU, or of the CPU rank, was too "
     "small to evaluate 64 samples at a time", "launch resume bert-1 eval.batch_size=16"),
])
def test_a_known_message_is_explained(make, message, meaning, command):
    found = make("failed", ("failed", failure(1, message=message, hint="its own")), logs={(1, 1): "error: x\n"})
    assert found["cause"]["meaning"] == meaning and commands(found)[0] == command and found["cause"]["hint"] == "its own"


@pytest.mark.parametrize("state, resting, meaning, command, key", [
    ("T", 0, "its process was stopped (by SIGSTOP or a debugger) and not continued", "launch resume bert-1", None),
    ("D", 0, "a file system does not answer", "launch resume bert-1", None),
    ("S", 0, "it made no progress for longer than run.hang_s; its stack shows where it was", "launch logs bert-1 --rank K",
     "run.hang_s=900"),
    ("S", REPORT, "the task's `report` took longer than eval.report_s; its stack shows where it was",
     "launch logs bert-1 --rank K", "eval.report_s=5400"),
])
def test_a_hang_is_explained(make, state, resting, meaning, command, key):
    hang = blamed([Sign(0, 7, 100, 320.0, True, "S", None), Sign(1, 7, 99, 320.0, True, state, None, resting)],
                  Limits(300.0, None, 1800.0))
    found = make("failed", ("failed", failure(hang.rank, None, message=hang.message, hint=hang.hint, traceback="Stack (")),
                 spec=SPEC.replace("grace_s: 60.0", "grace_s: 60.0, hang_s: 300.0") + "eval: {report_s: 1800.0}\n")
    assert found["sentence"] == f"failed in attempt 1: {hang.message}" and hang.message.startswith("rank 1 hung after step 7")
    assert found["cause"]["meaning"] == meaning and commands(found)[0] == command
    longer = [line for line in commands(found) if "_s=" in line]
    assert longer == ([f"launch resume bert-1 {key}"] if key else [])


def test_a_slow_rank_is_named(make):
    log = "training from step 0 of 100:\nstep 9/100  loss 1\n"
    found = make("running", ("running", {"ended": None, "host": "n1"}), logs={(1, 0): log}, updated="2026-01-02T00:01:00+00:00")
    assert found["sentence"].endswith("nothing is wrong")
    run = RunPaths(Path("runs/bert-1").absolute())
    replace_json(run.attempt_record(1), {**read_json(run.attempt_record(1)), "nodes": ["n1", "n2"]})
    replace_json(run.slow(1), [{"rank": 3, "factor": 2.4, "work_s": 0.31, "others_s": 0.13, "step_s": 0.33}])
    slow = ("rank 3 on n2: its own work in a step takes 2.4 times as long as the others' (310 ms against 130 ms; "
            "a whole step takes 330 ms)")
    assert explain(read_run(run.root))["sentence"].endswith(f"; slow: {slow}")
    assert f"slow        {slow}" in details(status(read_run(run.root)))


@pytest.mark.parametrize("name, meaning", [
    ("SIGKILL", "it was killed from outside: by the kernel when memory ran out, or by a person"),
    ("SIGBUS", "shared memory (/dev/shm) was full, or a memory-mapped file was truncated"),
    ("SIGSEGV", "it crashed in native code"),
])
def test_a_known_signal_is_explained(make, name, meaning):
    found = make("failed", ("failed", failure(1, None, signal=name, message=f"rank 1 was ended by {name}")),
                 logs={(1, 1): "step 1\n" * 50})
    assert found["cause"]["meaning"] == meaning and len(found["cause"]["log_end"]) == 8


def test_advice_that_does_not_apply_is_left_out(make):
    """A script has no batch, and this run has no cluster."""
    trace = TRACE.format("RuntimeError: CUDA out of memory")
    found = make("failed", ("failed", failure(0, traceback=trace)), spec="name: train\nscript: /x/train.py\n")
    assert found["cause"]["meaning"] == "the GPU's memory was full" and commands(found) == ["launch resume bert-1"]


SCRIPT = "name: train\nscript: /x/train.py\n"


def test_nothing_is_said_about_the_steps_and_checkpoints_of_a_script(make):
    """What the script prints may look like the lines of a task."""
    logs = {(1, 0): "training from step 0 of 100:\nstep 7/100\n"}
    found = make("preempted", ("preempted", {"reason": "time limit"}), logs=logs, spec=SCRIPT, total=None)
    assert found["sentence"] == "stopped in attempt 1 (time limit); it does not continue by itself"
    assert found["next"][0]["why"].startswith("it starts the script again from its first line")
    paths = RunPaths(Path("runs/bert-1").absolute())
    replace_json(paths.record, {**read_json(paths.record), "state": "running"})
    replace_json(paths.attempt_record(1), {**read_json(paths.attempt_record(1)), "outcome": "running"})
    assert explain(read_run(paths.root))["sentence"] == "attempt 1 runs the script; nothing is wrong"


@pytest.mark.parametrize("kept, words", [
    (61, "stopped with a checkpoint after 0:50 at step 61: Ctrl-C twice: stopped at once"),
    (50, "stopped after 0:50 at step 61: Ctrl-C twice: stopped at once; its newest checkpoint is of step 50"),
])
def test_an_attempt_that_was_stopped_at_once_kept_an_older_checkpoint(make, kept, words):
    logs = {(1, 0): "training from step 0 of 100:\nstep 61/100  loss 1\n"}
    found = make("preempted", ("preempted", {"reason": "Ctrl-C twice: stopped at once"}), logs=logs, checkpoint=kept)
    assert f"\nattempt 1   {words}\n" in told(found)


def test_advice_is_given_only_with_a_reason_that_is_known(make):
    """The reason to resume after a missing module names the cluster's file. A local run has no cluster."""
    found = make("failed", ("failed", failure(message="execve(): /x/python: No such file or directory")))
    assert all(step["why"] for step in found["next"]) and "None" not in told(found)


def test_slurms_lines_are_those_of_the_last_attempt(make, tmp_path):
    """The first attempt was preempted; the last attempt ran out of memory."""
    job = {"kind": "slurm", "cluster": "here", "ids": ["101"], "submission": 1}
    folder = RunPaths(tmp_path / "runs/bert-1").submission(1)
    folder.mkdir(parents=True)
    (folder / "job.sh").write_text("#!/bin/bash\n#SBATCH --mem=64G\n")
    (folder / "101_0_log.out").write_text("""\
attempt 1 of bert-1 on n1: 4 rank(s)
slurmstepd-n1: error: *** STEP 101.0 ON n1 CANCELLED AT 2026-01-02T00:01:50 DUE TO PREEMPTION ***
attempt 2 of bert-1 on n1: 4 rank(s)
srun: error: n1: task 0: Exited with exit code 1
slurmstepd: error: Detected 1 oom_kill event in StepId=101.0. Some of the step tasks have been OOM Killed.
""")
    killed = {**failure(2, None, signal="SIGKILL", message="rank 2 was ended by SIGKILL"), "nodes": ["n1"], "submission": 1}
    found = make("failed", ("preempted", {"submission": 1}), ("failed", killed), job=job)
    assert found["cause"]["meaning"] == "the host's memory, or the job's share of it, was full"
    assert found["slurm"]["said"] == ["slurmstepd: error: Detected 1 oom_kill event in StepId=101.0. Some of the step tasks have "
                                      "been OOM Killed."]
