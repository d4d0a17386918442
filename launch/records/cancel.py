"""Stopping runs, with a checkpoint, wherever they are."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.records.process import alive
from launch.records.read import attempt_record, element_of, read_sweep
from launch.records.run import Run, read_run
from launch.records.state import ACTIVE, FINAL, NOT_SUBMITTED, Truth, local_state, look, on_slurm, state_of
from trainers.contract.clock import utc_now
from trainers.contract.errors import UserError
from trainers.contract.files import update_json
from trainers.contract.paths import RunPaths

if TYPE_CHECKING:
    from launch.cluster.slurm import Queued

BEYOND_GRACE_S = 15.0  # from the end of a run's grace to the end of its patience with a cancelled one


def cancel(run: Run, wait_s: float | None = None) -> str:
    """Ask a run to stop with a checkpoint and wait until it has, for `wait_s` seconds at most (by default 90 s; on
    SLURM somewhat longer than the run's own grace, after which its job is ended anyhow).

    Returns the state it is in then, with a word of explanation if it is still at work.

    Raises:
        UserError: it is not at work, or cannot be reached from this host.
    """
    if on_slurm(run.record):
        [(run, truth)] = looked = look([run])
        said = _cancel_on_slurm(looked, wait_s)
        if not said:
            raise _nothing_to_cancel(run, truth.state)
        return said[run.id]
    now, job = local_state(run.record), run.record.get("job")
    if now not in ACTIVE:
        raise _nothing_to_cancel(run, now)
    if not job:
        raise UserError(f"run `{run.id}` is {now}, but no process has taken it yet", "try again in a moment")
    if job["host"] != socket.gethostname():
        raise UserError(f"run `{run.id}` is at work on host `{job['host']}`, this is `{socket.gethostname()}`",
                        f"type `launch cancel {run.id}` there")
    sweep = run.record.get("sweep")
    if sweep and now == "submitted":  # it waits for its turn, before which the sweep's process looks at its record
        return update_json(run.paths.record, state="cancelled", updated=utc_now())["state"]
    # The marker first: whoever sees the signal must already find the reason.
    attempt = max(run.paths.attempt_numbers(), default=run.record["attempt"])
    run.paths.cancellation(attempt).touch()
    try:
        os.kill(job["pid"], signal.SIGTERM)
    except ProcessLookupError:
        pass  # it ended just now
    except PermissionError:
        raise UserError(f"process {job['pid']} of run `{run.id}` belongs to another user",
                        "ask them to cancel it") from None
    wait_s = 90.0 if wait_s is None else wait_s
    deadline = time.monotonic() + wait_s
    while alive(job["pid"], job["started"]) and not (sweep and run.again().record["state"] in FINAL):
        if time.monotonic() > deadline:
            return f"{now} (asked to stop, but process {job['pid']} still runs after {wait_s:.0f} s)"
        time.sleep(0.05)
    return state_of(run.again())


def cancel_sweep(root: Path, sweep: str, wait_s: float | None = None) -> list[dict[str, str]]:
    """Cancel all runs of a sweep that wait or are at work: those on SLURM together.

    Returns {"id", "state"} of each of its runs, in its order.

    Raises:
        UserError: there is no such sweep, none of its runs waits or is at work, or they cannot be reached from here.
    """
    found = read_sweep(root, sweep)
    folder = Path(found["path"])
    looked = look([read_run(folder.parent / point["run"]) for point in found["points"]
                   if RunPaths(folder.parent / point["run"]).record.exists()])
    said = _cancel_on_slurm([(run, truth) for run, truth in looked if on_slurm(run.record)], wait_s)
    here = [run for run, truth in looked if truth.state in ACTIVE and not on_slurm(run.record)]
    # Those that wait first: else the next begins when the one at work ends.
    said |= {run.id: cancel(run, wait_s) for run in sorted(here, key=lambda run: run.record["state"] != "submitted")}
    if not said:
        raise UserError(f"no run of sweep `{folder.name}` waits or is at work: there is nothing to cancel",
                        f"see `launch runs --sweep {folder.name}`")
    return [{"id": run.id, "state": said.get(run.id, truth.state)} for run, truth in looked]


def _cancel_on_slurm(looked: Sequence[tuple[Run, Truth]], wait_s: float | None) -> dict[str, str]:
    """Cancel those of the runs that have a job, or whose submission did not finish; what became of them."""
    from launch.cluster import slurm

    unfinished = [run for run, _ in looked if not run.record["job"]["ids"]]
    for run, truth in looked:
        if truth.blind:
            raise UserError(f"run `{run.id}` cannot be cancelled from here: {truth.note}",
                            "use a host of its cluster that has SLURM's commands")
        if truth.stale:
            raise UserError(f"run `{run.id}` is just changing its state", "try again in a moment")
        if run in unfinished and truth.note != NOT_SUBMITTED and run.record["job"].get("host") == socket.gethostname():
            raise UserError(f"run `{run.id}` is being submitted just now", "try again in a moment")
    jobs = {run.id: truth.jobs for run, truth in looked}
    if unfinished:  # whose job may be there all the same: its script tells
        there = [job for job in slurm.queue().values() if job.script]
        jobs |= {run.id: _by_script(run, there) for run in unfinished}
    stopping = [run for run, _ in looked if jobs[run.id] or run in unfinished]
    at_work = {run.id: number for run in stopping if any(not job.waiting for job in jobs[run.id])
               and (number := _attempt_at_work(run))}

    # The record or the marker first: whoever sees the job go must already find the reason. The record of a run that
    # is at work is its node process's to write.
    for run in stopping:
        if run.id in at_work:
            run.paths.cancellation(at_work[run.id]).touch()
        else:
            update_json(run.paths.record, state="cancelled", updated=utc_now())
    waiting = {job.id for run in stopping for job in jobs[run.id] if run.id not in at_work or job.waiting}
    running = {job.id for run in stopping for job in jobs[run.id]} - waiting
    try:
        slurm.cancel(waiting)
        slurm.cancel(running, signal="TERM")
    except UserError:  # it was not cancelled
        for run in stopping:
            if run.id not in at_work:
                update_json(run.paths.record, state=run.record["state"])
        raise
    if running:
        obeying = [run for run in stopping if run.id in at_work]
        _wait_for(obeying, running, max(map(_grace_s, obeying)) + BEYOND_GRACE_S if wait_s is None else wait_s)
        slurm.cancel(running)
    return _after(stopping, waiting | running)


def _by_script(run: Run, there: Sequence[Queued]) -> tuple[Queued, ...]:
    """The jobs that run its own script, or as its element that of its sweep."""
    sweep, element = run.record.get("sweep"), element_of(run)
    return tuple(job for job in there if f"/{run.id}/" in job.script
                 or sweep and f"/{sweep}/" in job.script and job.id.endswith(f"_{element}"))


def _wait_for(runs: Sequence[Run], ids: set[str], wait_s: float) -> None:
    """Until the attempts at work have ended, by the runs' records, or their jobs are gone."""
    from launch.cluster import slurm

    start = asked = time.monotonic()
    while time.monotonic() < start + wait_s and any(run.again().record["state"] in ACTIVE for run in runs):
        if time.monotonic() > asked + 5:
            asked = time.monotonic()
            if not slurm.queue(ids):
                return
        time.sleep(0.1)


def _after(runs: Sequence[Run], ids: set[str]) -> dict[str, str]:
    """What became of cancelled runs. SLURM lets a job go some seconds after it was told to; then nobody else writes
    the record, which says so in any case: a job that was just beginning may have overwritten it."""
    from launch.cluster import slurm

    deadline = time.monotonic() + 5
    while left := slurm.queue(ids) if ids else {}:
        if time.monotonic() > deadline:
            break
        slurm.cancel(id for id, job in left.items() if job.waiting)  # it was on its way back into the queue
        time.sleep(0.25)
    said = {}
    for run in runs:
        run = run.again()
        mine = [id for id in run.record["job"]["ids"] if id in left]
        if run.record["state"] not in FINAL and not mine:
            update_json(run.paths.record, state="cancelled", updated=utc_now())
        said[run.id] = run.again().record["state"]
        if said[run.id] not in FINAL:
            said[run.id] += f" (asked to stop; SLURM was told to end job {', '.join(mine)}, and has not yet)"
    return said


def _attempt_at_work(run: Run) -> int | None:
    """The number of the attempt that has begun and not said how it ended."""
    number = max(run.paths.attempt_numbers(), default=None)
    return number if number and attempt_record(run.paths, number)["outcome"] in ("running", "unreadable") else None


def _grace_s(run: Run) -> float:
    """run.grace_s of its spec, which is ours and so plainly laid out: no need for a YAML reader."""
    try:
        found = re.search(r"^\s+grace_s:\s*([\d.]+)", run.paths.spec.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return float(found[1]) if found else 60.0


def _nothing_to_cancel(run: Run, now: str) -> UserError:
    return UserError(f"run `{run.id}` is {now}: there is nothing to cancel", "see `launch runs`")
