"""Write the records of a run: what it is, its attempts, and how each attempt ended. launch/records/ reads them."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from launch.plan.initial_weights import keep_checkpoint
from launch.plan.plan import Plan
from launch.records.naming import command_name
from launch.records.process import alive, identity
from launch.supervise.rank import Outcome
from launch.supervise.terminal import View
from trainers.contract import exit_codes
from trainers.contract.clock import utc_now
from trainers.contract.errors import UserError, system_error
from trainers.contract.files import FORMAT, read_json, replace_json, replace_text, temporary_path, update_json
from trainers.contract.paths import RunPaths

# By how an attempt ended: the state of the run, and the command's exit code.
STATES = {"finished": "finished", "failed": "failed", "preempted": "preempted", "killed": "preempted"}
EXIT_CODES: dict[Literal["finished", "failed", "preempted", "killed", "ended"], int] = {
    "finished": exit_codes.FINISHED, "failed": exit_codes.FAILED, "preempted": exit_codes.PREEMPTED, "killed": exit_codes.KILLED,
}
# Why an attempt was stopped, by the signal that this process got.
STOPPED_BY = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "its terminal was closed", "SIGUSR2": "SIGUSR2"}


def exit_code(plan: Plan, outcome: Outcome) -> int:
    """The command's exit code after an attempt. A script on one rank passes its own exit code on."""
    code, failure = EXIT_CODES[outcome.kind], outcome.failure
    if failure is None or failure.exit_code is None:
        return code
    if failure.exit_code == exit_codes.USER_ERROR and not failure.traceback:
        return exit_codes.USER_ERROR
    passed_on = plan.batch is None and plan.resources.ranks == 1 and failure.exit_code not in EXIT_CODES.values()
    return failure.exit_code if passed_on else code


def this_process() -> dict[str, Any]:
    """The host and pid of this process, as records hold them."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def local_job() -> dict[str, Any]:
    """The `job` in run.json of a run that this process executes."""
    return {"kind": "local", **this_process(), "started": identity(os.getpid())}


def submitting(cluster: str, number: int) -> dict[str, Any]:
    """The `job` in run.json while this process submits the run. A reader can check whether the process still exists."""
    return {"kind": "slurm", "cluster": cluster, "ids": [], "submission": number, **this_process(),
            "started": identity(os.getpid())}


def create_run(plan: Plan, **more: Any) -> RunPaths:
    """Make the run directory with its spec and its record. `more` holds further keys of the record.

    Raises:
        UserError: the directory cannot be made, or the checkpoint that the run starts from has been deleted.
    """
    paths = RunPaths(Path(plan.folder))
    try:
        paths.root.mkdir(parents=True)
        if plan.weights:
            older = {"older": list(plan.weights.older)} if plan.weights.older else {}  # averaged with the checkpoint
            more = {"init": {"path": plan.weights.path, "run": plan.weights.run, "step": plan.weights.step, **older}, **more}
            keep_checkpoint(plan.weights, paths)
        replace_text(paths.spec, plan.files["run.yaml"])
        replace_json(paths.record, {
            "format": FORMAT, "id": plan.run_id, "task": plan.name, "state": "submitted", "step": 0, "total": None, "attempt": 0,
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
    """The number of the run's next attempt, from 1."""
    return max(paths.attempt_numbers(), default=0) + 1


def kept(paths: RunPaths) -> int | None:
    """What the run would continue from: the step of its newest checkpoint, or the number of a search's finished pieces."""
    if paths.pieces.is_dir():
        return len(list(paths.pieces.glob("*.json")))
    return max(paths.checkpoint_steps(), default=None)


def runs_here(paths: RunPaths, number: int) -> bool:
    """Whether a process of this host runs this attempt, or has taken the attempt and is about to write its record."""
    try:
        attempt = read_json(paths.attempt_record(number))
        process, started = attempt, attempt["process_started"]
        if attempt["outcome"] != "running":
            return False
    except (OSError, ValueError):
        try:
            process = read_json(paths.attempt_owner(number))
        except (OSError, ValueError):
            return False
        started = process["started"]
    return process["host"] == socket.gethostname() and alive(process["pid"], started)


def take_attempt(paths: RunPaths, number: int) -> None:
    """Claim an attempt by making its folder. Of two processes that try, one succeeds.

    The folder appears with the name of its owner in it, so that another process can tell from the first moment on whether the
    owner is alive: the attempt's record follows only after the plan is made, which may take seconds on a busy machine.

    Raises:
        UserError: another process has taken the attempt, or the folder cannot be made.
    """
    target = paths.attempt(number)
    prepared = temporary_path(target)
    try:
        paths.attempts.mkdir(exist_ok=True)  # not its parents: the run's folder may have been deleted
        prepared.mkdir()
        replace_json(prepared / paths.attempt_owner(number).name, {**this_process(), "started": identity(os.getpid())})
        if target.exists():
            raise FileExistsError
        os.rename(prepared, target)  # fails if another process's folder is there: that folder is not empty
    except OSError as error:
        shutil.rmtree(prepared, ignore_errors=True)
        if target.exists():
            raise UserError(f"attempt {number} of {paths.id} has just been started by another process",
                            f"see `launch status {command_name(paths)}`") from None
        raise UserError(f"{target} cannot be made: {error.strerror}", system_error(error).hint) from error


def never_started(paths: RunPaths, number: int, outcome: Outcome, reason: str | None = None, **more: Any) -> None:
    """Record the end of an attempt, taken already, whose ranks were not started."""
    state = STATES[outcome.kind]
    replace_json(paths.attempt_record(number), {
        "format": FORMAT, "attempt": number, **this_process(), "process_started": identity(os.getpid()), **more,
        "began": utc_now(), "ended": utc_now(), "outcome": state, "exit_code": EXIT_CODES[outcome.kind],
        "failure": outcome.failure and outcome.failure.as_dict(), "reason": reason, "signal": outcome.signal,
        "checkpoint_s": None, "kept_before": kept(paths), "kept": kept(paths),
    })
    update_json(paths.record, state=state, attempt=number, updated=utc_now())


class RecordEnd(Protocol):
    """Records how an attempt ended."""

    def __call__(self, outcome: Outcome, reason: str | None = None, retrying: bool = False, again: bool = False) -> str:
        """Returns the attempt's state.

        Args:
            reason: why the attempt was stopped; None: told from the signal.
            retrying: whether another attempt follows at once; the run then stays `running`.
            again: whether the run is not over although the attempt has failed; the run is then `preempted`. It is never
                `failed` in between: who follows the run would leave.
        """


@contextmanager
def recorded(plan: Plan, paths: RunPaths, view: View, run_job: Mapping[str, Any] | None = None,
             write: Callable[[Callable[[], None]], None] = lambda write: write(), delay: Callable[[], str | None] = lambda: None,
             **more: Any) -> Iterator[RecordEnd]:
    """Write an attempt's files and its record, and give a function that records how the attempt ended.

    Args:
        run_job: the new `job` in run.json; None keeps the present one (of a SLURM job).
        write: calls a function that writes files; it may call the function again if that raises OSError.
        delay: returns what has delayed the attempt since the last call.
        more: further keys of attempt.json.
    """
    delays = [delay()]
    attempt: dict[str, Any] = {
        "format": FORMAT, "attempt": plan.attempt, **this_process(), "process_started": identity(os.getpid()), "cwd": plan.cwd,
        "device": plan.resources.device, "ranks": plan.resources.ranks, "threads": plan.resources.threads, **more,
        "began": utc_now(), "ended": None, "outcome": "running", "exit_code": None, "failure": None,
        "reason": delays[0], "signal": None, "checkpoint_s": None, "kept_before": None, "kept": None,
    }

    def began() -> None:
        attempt["kept_before"] = kept(paths)
        for name, text in plan.files.items():
            path = paths.root / name
            if not path.exists():  # run.yaml never changes
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_text(path, text)
        replace_json(paths.attempt_record(plan.attempt), attempt)
        changed = {"job": dict(run_job)} if run_job else {}
        update_json(paths.record, state="running", attempt=plan.attempt, updated=utc_now(), **changed)

    write(began)

    def ended(outcome: Outcome, reason: str | None = None, retrying: bool = False, again: bool = False) -> str:
        state = STATES[outcome.kind]
        failure = outcome.failure and outcome.failure.as_dict()
        reason = reason or (STOPPED_BY.get(outcome.signal) if outcome.signal else None)
        if outcome.kind == "killed":
            reason = f"{reason} twice: stopped at once"
        delays.append(delay())  # a wait of `began`
        changes = {"ended": utc_now(), "exit_code": exit_code(plan, outcome), "failure": failure,
                   "reason": "; ".join(filter(None, (reason, outcome.note, *delays))) or None, "signal": outcome.signal,
                   "checkpoint_s": outcome.checkpoint_s}

        def put() -> None:  # it reads too: the storage may fail for reads as well
            nonlocal state
            if outcome.signal is not None and paths.cancellation(plan.attempt).exists():
                state = "cancelled"
            run_state = "running" if retrying else "preempted" if again and state == "failed" else state
            if next_attempt(paths) == plan.attempt + 1:  # else the records belong to a newer attempt
                replace_json(paths.attempt_record(plan.attempt), {**attempt, **changes, "outcome": state, "kept": kept(paths)})
                update_json(paths.record, state=run_state, updated=utc_now())

        try:
            write(put)
        except OSError as error:
            view.notice(f"warning: the record of {paths.id} cannot be written: {error.strerror}")
        return state

    yield ended
