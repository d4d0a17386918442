"""Execute a plan on this machine: the run directory, one attempt after another, and what became of each."""

from __future__ import annotations

import importlib
import os
import runpy
import socket
import sys
import time
import traceback
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Iterator

from launch.node import Failure, Outcome, supervise
from launch.plan import Plan
from launch.ports import reserved_port
from launch.processes import alive, identity
from launch.view import View
from trainers.errors import UserError
from trainers.files import read_json, replace_json, replace_text, update_json
from trainers.paths import RunPaths

# The state of a run, by how its last attempt ended, and the command's exit code.
STATES = {"finished": "finished", "failed": "failed", "preempted": "preempted", "killed": "preempted"}
EXIT_CODES = {"finished": 0, "failed": 1, "preempted": 75, "killed": 130}


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def create_run(plan: Plan) -> RunPaths:
    """Make the run directory with its spec and its record.

    Raises:
        UserError: it cannot be made.
    """
    paths = RunPaths(Path(plan.folder))
    try:
        paths.root.mkdir(parents=True)
        replace_text(paths.spec, plan.files["run.yaml"])
        replace_json(paths.record, {
            "id": plan.run_id, "task": plan.name, "state": "submitted", "step": 0, "total": None, "attempt": 0,
            "job": None, "sweep": None, "metrics": {}, "checkpoint": None, "created": now(), "updated": now(),
        })
    except OSError as error:
        raise UserError(f"the run directory {paths.root} cannot be made: {error.strerror}",
                        "choose another place with --runs DIR or LAUNCH_RUNS") from error
    return paths


def execute(plan_of: Callable[[int], Plan], paths: RunPaths, number: int, view: View, restarts: int
            ) -> tuple[Outcome, int]:
    """Attempts, from `number` on, until one ends otherwise than by a failure worth repeating, or `restarts` are
    used up.

    Returns the last attempt's outcome and the exit code.

    Raises:
        UserError: another process has taken the run, or the run directory cannot be written.
    """
    while True:
        _take_attempt(paths, number)
        plan = plan_of(number)
        number += 1
        try:
            outcome = _attempt(plan, paths, view)
        except OSError as error:
            raise UserError(f"attempt {plan.attempt} cannot run in {paths.root}: {error.strerror or error}",
                            f"mend that, then `launch resume {paths.id}`") from error
        failure = outcome.failure
        if outcome.kind == "failed" and failure.retry and outcome.signal is None and restarts > 0:
            restarts -= 1
            view.notice(f"attempt {plan.attempt} failed: {failure.message}; trying again ({restarts} more after this)")
            continue
        code = EXIT_CODES[outcome.kind]
        if failure and failure.exit_code == UserError.exit_code and not failure.traceback:
            code = UserError.exit_code
        return outcome, code


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


def _take_attempt(paths: RunPaths, number: int) -> None:
    """Making an attempt's folder is what decides between two who try."""
    try:
        paths.attempt(number).mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"attempt {number} of {paths.id} has just been started by another process",
                        f"see `launch status {paths.id}`") from None
    except OSError as error:
        raise UserError(f"{paths.attempt(number)} cannot be made: {error.strerror}", "make room there") from error


def _attempt(plan: Plan, paths: RunPaths, view: View) -> Outcome:
    with _recorded(plan, paths, view) as ended:
        with reserved_port() as port:
            outcome = supervise(plan, paths, view, port=port)
        ended(outcome)
    return outcome


@contextmanager
def _recorded(plan: Plan, paths: RunPaths, view: View) -> Iterator[Callable[[Outcome], None]]:
    """Write the attempt's files and records, before it and after it."""
    for name, text in plan.files.items():
        path = paths.root / name
        if not path.exists():  # run.yaml never changes
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, text)
    me = {"host": socket.gethostname(), "pid": os.getpid()}
    started = identity(os.getpid())
    attempt: dict[str, Any] = {
        "attempt": plan.attempt, **me, "process_started": started, "cwd": plan.cwd, "device": plan.resources.device,
        "ranks": plan.resources.ranks, "threads": plan.resources.threads, "began": now(), "ended": None,
        "outcome": "running", "exit_code": None, "failure": None,
    }
    replace_json(paths.attempt_record(plan.attempt), attempt)
    update_json(paths.record, state="running", attempt=plan.attempt, updated=now(),
                job={"kind": "local", **me, "started": started})

    def ended(outcome: Outcome) -> None:
        cancelled = outcome.signal is not None and paths.cancellation(plan.attempt).exists()
        state = "cancelled" if cancelled else STATES[outcome.kind]
        failure = outcome.failure and outcome.failure.as_dict()
        changes = {"ended": now(), "outcome": state, "exit_code": EXIT_CODES[outcome.kind], "failure": failure}
        try:
            replace_json(paths.attempt_record(plan.attempt), {**attempt, **changes})
            if next_attempt(paths) == plan.attempt + 1:  # else the record is that of a newer attempt
                update_json(paths.record, state=state, updated=now())
        except OSError as error:
            view.notice(f"warning: the record of {paths.id} cannot be written: {error.strerror}")

    yield ended


def debug(plan: Plan, paths: RunPaths, view: View) -> int:
    """One rank in this very process, standard input attached, so that `breakpoint()` works."""
    _take_attempt(paths, plan.attempt)
    with _recorded(plan, paths, view) as ended:
        with reserved_port() as port:
            for name in os.environ.keys() - plan.inherited(os.environ).keys():
                del os.environ[name]
            os.environ.update({**plan.env, **plan.rank_env(0, 0, "127.0.0.1", port), "LAUNCH_EVENTS": "0",
                               "LAUNCH_DEBUG": "1"})
            said = None
            try:
                code = _in_process(plan)
            except BaseException as error:
                said = traceback.format_exc()
                print(said, file=sys.stderr, end="")
                code = EXIT_CODES["killed"] if isinstance(error, KeyboardInterrupt) else EXIT_CODES["failed"]
        kind = {code: kind for kind, code in EXIT_CODES.items()}.get(code, "failed")
        message = said.splitlines()[-1] if said else f"ended with exit code {code}"
        ended(Outcome(kind, Failure(0, code, None, message, None, said, False) if kind == "failed" else None))
    return code if code in (*EXIT_CODES.values(), UserError.exit_code) else EXIT_CODES["failed"]


def _in_process(plan: Plan) -> int:
    if plan.batch is None:
        _, script, *args = plan.command
        sys.argv = [script, *args]
        sys.path.insert(0, str(Path(script).parent))
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0
    return importlib.import_module("trainers.run").main([plan.folder])
