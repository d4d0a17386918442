"""Writes a run's directory: the run, its attempts, and how each ended. Readers: launch/records/read.py."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.plan.initial_weights import keep
from launch.plan.plan import Plan
from launch.records.process import alive, identity
from launch.supervise.rank import Failure, Outcome
from launch.supervise.terminal import View
from trainers.contract import exit_codes
from trainers.contract.clock import utc_now
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, replace_json, replace_text, update_json
from trainers.contract.paths import RunPaths

# The state of a run, by how its last attempt ended, and the command's exit code.
STATES = {"finished": "finished", "failed": "failed", "preempted": "preempted", "killed": "preempted"}
EXIT_CODES = {"finished": exit_codes.FINISHED, "failed": exit_codes.FAILED, "preempted": exit_codes.PREEMPTED,
              "killed": exit_codes.KILLED}


def me() -> dict[str, Any]:
    """This process, as records name it."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def worker_here() -> dict[str, Any]:
    """run.json's `job` of a run at which this process is at work."""
    return {"kind": "local", **me(), "started": identity(os.getpid())}


def submitting(cluster: str, number: int) -> dict[str, Any]:
    """run.json's `job` while this process submits it: whoever finds it so can tell whether that goes on."""
    return {"kind": "slurm", "cluster": cluster, "ids": [], "submission": number, **me(), "started": identity(os.getpid())}


def create_run(plan: Plan, **more: Any) -> RunPaths:
    """Make the run directory with its spec and its record, which has `more` besides.

    Raises:
        UserError: it cannot be made.
    """
    paths = RunPaths(Path(plan.folder))
    try:
        paths.root.mkdir(parents=True)
        if plan.weights:
            more = {"init": {"path": plan.weights.path, "run": plan.weights.run, "step": plan.weights.step}, **more}
            keep(plan.weights, paths)
        replace_text(paths.spec, plan.files["run.yaml"])
        replace_json(paths.record, {
            "id": plan.run_id, "task": plan.name, "state": "submitted", "step": 0, "total": None, "attempt": 0,
            "job": None, "sweep": None, "metrics": {}, "checkpoint": None, "created": utc_now(), "updated": utc_now(), **more,
        })
    except UserError:
        shutil.rmtree(paths.root, ignore_errors=True)
        raise
    except OSError as error:
        raise UserError(f"the run directory {paths.root} cannot be made: {error.strerror}",
                        "choose another place with --runs DIR or LAUNCH_RUNS") from error
    return paths


def next_attempt(paths: RunPaths) -> int:
    return max(paths.attempt_numbers(), default=0) + 1


def at_work(paths: RunPaths, number: int, patience_s: float = 2.0) -> bool:
    """Whether a process of this host runs this attempt. One that was taken just now gets its record in a moment."""
    end = time.monotonic() + patience_s
    while True:
        try:
            found = read_json(paths.attempt_record(number))
            break
        except (OSError, ValueError):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
    return (found["outcome"] == "running" and found["host"] == socket.gethostname()
            and alive(found["pid"], found["process_started"]))


def take_attempt(paths: RunPaths, number: int) -> None:
    """Making an attempt's folder is what decides between two who try."""
    try:
        paths.attempt(number).mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"attempt {number} of {paths.id} has just been started by another process",
                        f"see `launch status {paths.id}`") from None
    except OSError as error:
        raise UserError(f"{paths.attempt(number)} cannot be made: {error.strerror}", "make room there") from error


def never_began(paths: RunPaths, number: int, failure: Failure, **more: Any) -> None:
    """Record an attempt, taken already, whose ranks could not be started, and the run's failure with it."""
    replace_json(paths.attempt_record(number), {
        "attempt": number, **me(), "process_started": identity(os.getpid()), **more, "began": utc_now(), "ended": utc_now(),
        "outcome": "failed", "exit_code": EXIT_CODES["failed"], "failure": failure.as_dict(), "reason": None,
        "checkpoint_s": None,
    })
    update_json(paths.record, state="failed", attempt=number, updated=utc_now())


@contextmanager
def recorded(plan: Plan, paths: RunPaths, view: View, worker: Mapping[str, Any] | None = None, **more: Any
             ) -> Iterator[Callable[..., str]]:
    """Write the attempt's files and records before it, and after it what the function that this gives is told;
    that returns how it ended. `again`: another attempt follows at once, so the run has not ended.

    Args:
        worker: who is at work, for run.json; None: as it says already (a SLURM job).
        more: of this attempt, for attempt.json.
    """
    for name, text in plan.files.items():
        path = paths.root / name
        if not path.exists():  # run.yaml never changes
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, text)
    attempt: dict[str, Any] = {
        "attempt": plan.attempt, **me(), "process_started": identity(os.getpid()), "cwd": plan.cwd,
        "device": plan.resources.device, "ranks": plan.resources.ranks, "threads": plan.resources.threads, **more,
        "began": utc_now(), "ended": None, "outcome": "running", "exit_code": None, "failure": None,
        "reason": None, "checkpoint_s": None,
    }
    replace_json(paths.attempt_record(plan.attempt), attempt)
    job = {"job": dict(worker)} if worker else {}
    update_json(paths.record, state="running", attempt=plan.attempt, updated=utc_now(), **job)

    def ended(outcome: Outcome, reason: str | None = None, again: bool = False) -> str:
        cancelled = outcome.signal is not None and paths.cancellation(plan.attempt).exists()
        state = "cancelled" if cancelled else STATES[outcome.kind]
        failure = outcome.failure and outcome.failure.as_dict()
        changes = {"ended": utc_now(), "outcome": state, "exit_code": EXIT_CODES[outcome.kind], "failure": failure,
                   "reason": reason, "checkpoint_s": outcome.checkpoint_s}
        try:
            if next_attempt(paths) == plan.attempt + 1:  # else the records are a newer attempt's to write
                replace_json(paths.attempt_record(plan.attempt), {**attempt, **changes})
                update_json(paths.record, state="running" if again else state, updated=utc_now())
        except OSError as error:
            view.notice(f"warning: the record of {paths.id} cannot be written: {error.strerror}")
        return state

    yield ended
