"""Cancel runs, on this machine and on SLURM. A run that is running writes a checkpoint before it stops."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.records.naming import command_name
from launch.records.process import alive
from launch.records.read import element_of, read_sweep
from launch.records.run import Run, read_run
from launch.records.state import ACTIVE, FINAL, NOT_SUBMITTED, Truth, local_state, on_slurm, state_of, true_states
from trainers.contract.clock import utc_now
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, update_json
from trainers.contract.paths import RunPaths

if TYPE_CHECKING:
    from launch.cluster.slurm import Queued

QUIET_S = 2.0          # after so long, say what a cancellation waits for
BEYOND_GRACE_S = 15.0  # how much longer than run.grace_s a cancelled run on SLURM may take


def cancel(run: Run, wait_s: float | None = None, say: Callable[[str], object] = lambda text: None) -> str:
    """Ask a run to write a checkpoint and stop, and wait until it has stopped.

    Args:
        wait_s: how many seconds to wait; by default 90. On SLURM, the default is the run's grace period plus
            `BEYOND_GRACE_S`, and a job that still runs after the wait is ended.
        say: is called with what the wait is for, if the wait takes longer than `QUIET_S`.

    Returns:
        The run's state after the wait, with an explanation if the run has not stopped.

    Raises:
        UserError: the run is not running or waiting, or cannot be reached from this host.
    """
    if on_slurm(run.record):
        [(run, truth)] = looked = true_states([run])
        states = _cancel_on_slurm(looked, wait_s, say)
        if not states:
            raise _nothing_to_cancel(run, truth.state)
        return states[run.id]
    state, job = local_state(run.record), run.record.get("job")
    if state not in ACTIVE:
        raise _nothing_to_cancel(run, state)
    if not job:
        raise UserError(f"run `{run.id}` is {state}, but no process has started it yet", "try again in a moment")
    if job["host"] != socket.gethostname():
        raise UserError(f"run `{run.id}` is running on host `{job['host']}`, but this host is `{socket.gethostname()}`",
                        f"type `launch cancel {command_name(run.paths)}` on that host")
    sweep = run.record.get("sweep")
    if sweep and state == "submitted":  # the run waits for its turn; the sweep's process reads its record before starting it
        return update_json(run.paths.record, state="cancelled", updated=utc_now())["state"]
    # Write the marker first: the run must find the reason when the signal arrives.
    attempt = max(run.paths.attempt_numbers(), default=run.record["attempt"])
    run.paths.cancellation(attempt).touch()
    try:
        os.kill(job["pid"], signal.SIGTERM)
        os.kill(job["pid"], signal.SIGCONT)  # a process that Ctrl-Z has stopped would not see SIGTERM
    except ProcessLookupError:
        pass  # the process has just ended
    except PermissionError:
        run.paths.cancellation(attempt).unlink(missing_ok=True)  # the run continues: its later end is no cancellation
        raise UserError(f"process {job['pid']} of run `{run.id}` belongs to another user",
                        "ask that user to cancel the run") from None
    wait_s = 90.0 if wait_s is None else wait_s
    began, told = time.monotonic(), False
    while alive(job["pid"], job["started"]) and not (sweep and run.reread().record["state"] in FINAL):
        passed_s = time.monotonic() - began
        if passed_s > QUIET_S and not told:
            told = True
            say(_waits_for([run], wait_s))
        if passed_s > wait_s:
            return f"{state} (asked to stop, but process {job['pid']} still runs after {wait_s:.0f} s)"
        time.sleep(0.05)
    return state_of(run.reread())


def cancel_sweep(root: Path, sweep: str, wait_s: float | None = None, say: Callable[[str], object] = lambda text: None
                 ) -> list[dict[str, str]]:
    """Cancel all runs of a sweep that are waiting or running. Runs on SLURM are cancelled together.

    Returns:
        {"id", "state"} of each run, in the sweep's order.

    Raises:
        UserError: the sweep does not exist, none of its runs is waiting or running, or they cannot be reached from this host.
    """
    record = read_sweep(root, sweep)
    folder = Path(record["path"])
    looked = true_states([read_run(folder.parent / point["run"]) for point in record["points"]
                   if RunPaths(folder.parent / point["run"]).record.exists()])
    states = _cancel_on_slurm([(run, truth) for run, truth in looked if on_slurm(run.record)], wait_s, say)
    local = [run for run, truth in looked if truth.state in ACTIVE and not on_slurm(run.record)]
    # Cancel the waiting runs first: otherwise the next one starts when the running one ends.
    for run in sorted(local, key=lambda run: run.record["state"] != "submitted"):
        try:
            states[run.id] = cancel(run, wait_s, say)
        except UserError:  # the run has ended meanwhile; the others must be cancelled all the same
            states[run.id] = state_of(run.reread())
            if states[run.id] in ACTIVE:
                raise
    if not states:
        raise UserError(f"no run of sweep `{folder.name}` is waiting or running: there is nothing to cancel",
                        f"see `launch runs --sweep {folder.name}`")
    return [{"id": run.id, "state": states.get(run.id, truth.state)} for run, truth in looked]


def _cancel_on_slurm(looked: Sequence[tuple[Run, Truth]], wait_s: float | None, say: Callable[[str], object]
                     ) -> dict[str, str]:
    """Cancel the runs that have a job, or whose submission did not finish. Return each one's state by its id.

    Raises:
        UserError: a run cannot be cancelled from this host or just now, or SLURM refused.
    """
    from launch.cluster import slurm

    unfinished = [run for run, _ in looked if not run.record["job"]["ids"]]
    for run, truth in looked:
        if truth.unreachable:
            raise UserError(f"run `{run.id}` cannot be cancelled from here: {truth.note}",
                            "use a host of its cluster that has SLURM's commands")
        if truth.stale:
            raise UserError(f"run `{run.id}` is changing its state at this moment", "try again in a moment")
        if run in unfinished and truth.note != NOT_SUBMITTED and run.record["job"].get("host") == socket.gethostname():
            raise UserError(f"run `{run.id}` is being submitted at this moment", "try again in a moment")
    jobs = {run.id: truth.jobs for run, truth in looked}
    if unfinished:  # SLURM may have the job although its id was never recorded; the path of its script identifies it
        queue = list(slurm.queue().values())
        jobs |= {run.id: _jobs_by_script(run, queue) for run in unfinished}
    stopping = [run for run, _ in looked if jobs[run.id] or run in unfinished]
    attempts = {run.id: number for run in stopping if any(not job.waiting for job in jobs[run.id])
                and (number := _running_attempt(run))}

    # Write the record or the marker first: the reason must be on disk before the job ends. A running run gets the marker,
    # because its node process writes the record.
    waiting = {job.id for run in stopping for job in jobs[run.id] if run.id not in attempts or job.waiting}
    running = {job.id for run in stopping for job in jobs[run.id]} - waiting
    restored = stopping
    try:
        for run in stopping:
            if run.id in attempts:
                run.paths.cancellation(attempts[run.id]).touch()
            else:
                update_json(run.paths.record, state="cancelled", updated=utc_now())
        slurm.cancel(waiting)
        restored = [run for run in stopping if run.id in attempts]
        slurm.cancel(running, signal="TERM")
    except BaseException:  # Ctrl-C too: scancel may hang for minutes
        # These runs were not cancelled and continue. With the marker, a run's next stop would count as a cancellation.
        for run in restored:
            if run.id in attempts:
                run.paths.cancellation(attempts[run.id]).unlink(missing_ok=True)
            else:
                update_json(run.paths.record, state=run.record["state"])
        raise
    if running:
        working = [run for run in stopping if run.id in attempts]
        _wait_for(working, running, max(map(_grace_s, working)) + BEYOND_GRACE_S if wait_s is None else wait_s, say)
        slurm.cancel(running)
    return _end(stopping, waiting | running)


def _jobs_by_script(run: Run, queue: Sequence[Queued]) -> tuple[Queued, ...]:
    """Return the jobs that run the run's script, or the run's element of its sweep's script."""
    sweep, element = run.record.get("sweep"), element_of(run)
    return tuple(job for job in queue if job.script and (
        f"/{run.id}/" in job.script or sweep and f"/{sweep}/" in job.script and job.id.endswith(f"_{element}")))


def _waits_for(runs: Sequence[Run], wait_s: float) -> str:
    """What a cancellation waits for, in words."""
    name = f"run `{runs[0].id}`" if len(runs) == 1 else f"{len(runs)} runs"
    return f"waiting up to {wait_s:.0f} s for {name} to save and stop"


def _wait_for(runs: Sequence[Run], ids: set[str], wait_s: float, say: Callable[[str], object]) -> None:
    """Wait until the runs have ended by their records, or their jobs are gone, or `wait_s` seconds have passed."""
    from launch.cluster import slurm

    start = asked = time.monotonic()
    told = False
    while time.monotonic() < start + wait_s and any(run.reread().record["state"] in ACTIVE for run in runs):
        if not told and time.monotonic() > start + QUIET_S:
            told = True
            say(_waits_for(runs, wait_s))
        if time.monotonic() > asked + 5:
            asked = time.monotonic()
            if not slurm.queue(ids):
                return
        time.sleep(0.1)


def _end(runs: Sequence[Run], ids: set[str]) -> dict[str, str]:
    """Wait up to 5 s for the jobs to leave the queue, write the records, and return each run's state by its id.

    SLURM removes a cancelled job a few seconds late. After that nobody else writes the run's record. The record is then
    written again, because a job that was just starting may have overwritten it.
    """
    from launch.cluster import slurm

    deadline = time.monotonic() + 5
    while left := slurm.queue(ids) if ids else {}:
        if time.monotonic() > deadline:
            break
        slurm.cancel(id for id, job in left.items() if job.waiting)  # the job was being requeued when it was cancelled
        time.sleep(0.25)
    states = {}
    for run in runs:
        run = run.reread()
        remaining = [id for id in run.record["job"]["ids"] if id in left]
        if run.record["state"] not in FINAL and not remaining:
            update_json(run.paths.record, state="cancelled", updated=utc_now())
        states[run.id] = run.reread().record["state"]
        if states[run.id] not in FINAL:
            states[run.id] += f" (asked to stop; SLURM was told to end job {', '.join(remaining)}, but has not done so yet)"
    return states


def _running_attempt(run: Run) -> int | None:
    """Return the number of the last attempt if its record does not say how it ended, else None."""
    number = max(run.paths.attempt_numbers(), default=None)
    return number if number and run.attempt_record(number)["outcome"] in ("running", "unreadable") else None


def _grace_s(run: Run) -> float:
    """Return run.grace_s of the run's spec. A regular expression is enough, because launch itself writes run.yaml."""
    try:  # a resumption may have changed it
        return float(read_json(run.paths.changes)["run"]["grace_s"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        match = re.search(r"^\s+grace_s:\s*([\d.]+)", run.paths.spec.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return float(match[1]) if match else 60.0


def _nothing_to_cancel(run: Run, state: str) -> UserError:
    return UserError(f"run `{run.id}` is {state}: there is nothing to cancel", "see `launch runs`")
