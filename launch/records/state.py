"""The true state of runs: by squeue, then by what SLURM remembers of ended jobs, then by the run's own record; none of
them is required."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launch.cluster import reasons
from launch.records.process import alive
from launch.records.run import Run
from trainers.contract import exit_codes
from trainers.contract.errors import UserError

if TYPE_CHECKING:  # slurm is imported only where it is asked
    from launch.cluster.slurm import Ended, Queued
    from launch.records.run import Run

ACTIVE = ("submitted", "running")
FINAL = ("finished", "failed", "cancelled")
# The state of a run whose job is gone, by how SLURM says that the job ended; any other is `lost`. TIMEOUT: if it has
# a checkpoint.
GONE = {"CANCELLED": "cancelled", "FAILED": "failed", "OUT_OF_MEMORY": "failed", "TIMEOUT": "preempted",
        "DEADLINE": "preempted", "PREEMPTED": "preempted"}
NOT_SUBMITTED = "its submission did not finish"


def local_state(record: Mapping[str, Any]) -> str:
    """The recorded state, or `lost` if it says that processes of this host are at work which are gone."""
    job = record.get("job")
    if record["state"] not in ACTIVE or not job or job["kind"] != "local" or job["host"] != socket.gethostname():
        return record["state"]
    return record["state"] if alive(job["pid"], job["started"]) else "lost"


@dataclass(frozen=True)
class Seen:
    """What SLURM said when it was asked of some runs."""

    stages: Mapping[str, tuple] = field(default_factory=dict)  # by run id: what its record said before SLURM was asked
    queued: Mapping[str, Queued] = field(default_factory=dict)
    ended: Mapping[str, Ended] = field(default_factory=dict)
    problem: str | None = None  # why it said nothing


@dataclass(frozen=True)
class Truth:
    state: str
    note: str | None = None           # what there is to say of the state
    jobs: tuple[Queued, ...] = ()     # those of its jobs that SLURM has before it
    blind: bool = False               # whether SLURM could not be asked
    stale: bool = False               # whether its record has changed since SLURM was asked: it alone counts


def state_of(run: Run) -> str:
    """The true state of one run. SLURM is asked where the run's record alone cannot tell."""
    return look([run])[0][1].state


def look(runs: Sequence[Run]) -> list[tuple[Run, Truth]]:
    """The runs as they are now, and the truth of each; SLURM is asked once for all, if at all."""
    found = _look(runs)
    if stale := {run.id: run for run, truth in found if truth.stale}:
        again = {run.id: (run, truth) for run, truth in _look(list(stale.values()))}
        found = [again.get(run.id, (run, truth)) for run, truth in found]
    return found


def _look(runs: Sequence[Run]) -> list[tuple[Run, Truth]]:
    seen = ask([run.record for run in runs])
    # Records are read again after SLURM was asked: a run that has ended meanwhile says so before its job goes.
    now = [run.again() if run.id in seen.stages else run for run in runs]
    return [(run, truth_of(run, seen)) for run in now]


def ask(records: Sequence[Mapping[str, Any]]) -> Seen:
    """Ask SLURM of the jobs of those runs that have not ended by their own record."""
    asked = [record for record in records if on_slurm(record) and record["job"]["ids"]]
    if not asked:
        return Seen()
    from launch.cluster import slurm

    stages = {record["id"]: _stage(record) for record in asked}
    try:
        queued = slurm.queue(id for record in asked for id in record["job"]["ids"])
        gone = [id for record in asked if not queued.keys() & set(record["job"]["ids"]) for id in record["job"]["ids"]]
        return Seen(stages, queued, slurm.history(gone) if gone else {})
    except UserError as error:
        return Seen(stages, problem=error.message)


def truth_of(run: Run, seen: Seen) -> Truth:
    """Pure but for local runs, of which the process is looked for."""
    record = run.record
    if not on_slurm(record):
        return Truth(local_state(record))
    recorded, job = record["state"], record["job"]
    if not job["ids"]:
        return Truth(recorded, _submitting(job))
    if seen.stages.get(run.id) != _stage(record):
        return Truth(recorded, stale=True)
    if seen.problem:
        return Truth(recorded, f"SLURM cannot be asked here: {seen.problem}", blind=True)
    jobs = tuple(seen.queued[id] for id in job["ids"] if id in seen.queued)
    if strangers := [queued.id for queued in jobs if not _ours(queued, record)]:
        return Truth(recorded, f"job {strangers[0]} is not this run's here: it was submitted to cluster `{job['cluster']}`",
                     blind=True)
    if not jobs:
        return _gone(run, [seen.ended[id] for id in job["ids"] if id in seen.ended])
    if all(queued.waiting for queued in jobs):
        return Truth("submitted" if recorded == "submitted" else "preempted", None, jobs)
    # Its record was preempted, its job runs: the next attempt is being started, unless the job is just ending.
    starting = recorded == "preempted" and any(queued.state != "COMPLETING" for queued in jobs if not queued.waiting)
    return Truth("running" if starting else recorded, None, jobs)


def _stage(record: Mapping[str, Any]) -> tuple:
    return record["state"], record["attempt"], record["job"]["ids"]


def _gone(run: Run, ended: Sequence[Ended]) -> Truth:
    """Its record has not ended, but its jobs have."""
    record = run.record
    note = "; ".join(map(_said, ended)) or "SLURM knows its job no more"
    if record["state"] == "preempted":  # its last attempt said how it ended
        if any(end.state == "CANCELLED" for end in ended):
            return Truth("cancelled", note)
        return Truth("preempted", note if ended and ended[-1].exit_code != exit_codes.PREEMPTED else None)
    if not ended:
        cancelled = record["state"] == "running" and run.paths.cancellation(record["attempt"]).exists()
        return Truth("cancelled" if cancelled else "lost", note)
    last = ([end for end in ended if end.node_list] or ended)[-1]  # of a chain the last that began
    state = GONE.get(last.state, "lost")
    if last.state in ("TIMEOUT", "DEADLINE") and record.get("checkpoint") is None:
        state = "failed"
    return Truth(state, note)


def _said(end: Ended) -> str:

    why = reasons.words(end.reason)
    return (f"by SLURM, job {end.id} ended as {end.state}" + (f" on {end.node_list}" if end.node_list else "")
            + (f": {why}" if why != end.reason and end.reason != "None" else ""))


def on_slurm(record: Mapping[str, Any]) -> bool:
    """Whether SLURM may know more of it than its record."""
    job = record.get("job")
    return record["state"] not in FINAL and bool(job) and job["kind"] == "slurm"


def _ours(queued: Queued, record: Mapping[str, Any]) -> bool:
    """Another cluster has jobs of the same numbers; ours run a script in the run's folder, or its sweep's."""
    return queued.script is None or any(f"/{id}/" in queued.script for id in (record["id"], record.get("sweep")) if id)


def _submitting(job: Mapping[str, Any]) -> str:
    """Of a run whose job has no id yet."""
    if job.get("host") == socket.gethostname() and not alive(job["pid"], job["started"]):
        return NOT_SUBMITTED
    return f"it is being submitted by process {job.get('pid', '?')} on host {job.get('host', '?')}"
