"""The true state of runs. It comes from squeue, then from SLURM's memory of ended jobs and what was seen of it
earlier, then from the run's own record.

None of them is required.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cluster import reasons
from launch.records import verdicts
from launch.records.naming import command_name
from launch.records.process import alive
from launch.records.requeue import flag_file
from launch.records.run import Run, read_run
from trainers.contract import exit_codes
from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths

if TYPE_CHECKING:  # `slurm` is imported only where SLURM is asked
    from launch.cluster.slurm import Ended, Queued

ACTIVE = ("submitted", "running")
FINAL = ("finished", "failed", "cancelled")
# The state of a run whose job is gone, by SLURM's state of the ended job. For any other state the run is `lost`.
# TIMEOUT and DEADLINE give `preempted` only if the run has a checkpoint, otherwise `failed`.
GONE = {"CANCELLED": "cancelled", "FAILED": "failed", "OUT_OF_MEMORY": "failed", "TIMEOUT": "preempted",
        "DEADLINE": "preempted", "PREEMPTED": "preempted"}
UNREACHABLE = "SLURM cannot be asked here"
NOT_SUBMITTED = "its submission did not finish"
STILL = ("SUSPENDED", "STOPPED")  # states of jobs whose processes stand still

Stage = tuple[str, int, list[str]]  # a record's state, attempt and job ids: they show whether the record has changed


def local_state(record: Mapping[str, Any]) -> str:
    """Return the recorded state, or `lost` if the run's process was on this host and is gone."""
    job = record.get("job")
    if record["state"] not in ACTIVE or not job or job["kind"] != "local" or job["host"] != socket.gethostname():
        return record["state"]
    return record["state"] if alive(job["pid"], job["started"]) else "lost"


@dataclass(frozen=True)
class SlurmAnswer:
    """SLURM's answer about the jobs of some runs."""

    stages: Mapping[str, Stage] = field(default_factory=dict)  # by the id in the run's record: its stage before
    queued: Mapping[str, Queued] = field(default_factory=dict)  # by job id
    ended: Mapping[str, Ended] = field(default_factory=dict)    # by job id
    problem: str | None = None  # why SLURM did not answer


@dataclass(frozen=True)
class Truth:
    """The true state of a run."""

    state: str
    note: str | None = None           # an explanation of the state, if it needs one
    jobs: tuple[Queued, ...] = ()     # the run's jobs that are waiting or running
    unreachable: bool = False               # whether SLURM could not be asked
    stale: bool = False               # whether the record changed after SLURM was asked; then `state` is the record's
    restarted: bool = False           # whether a job has started that has recorded no attempt yet


def state_of(run: Run) -> str:
    """Return the true state of one run. SLURM is asked only if the run's record is not enough."""
    return true_states([run])[0][1].state


def true_states(runs: Sequence[Run]) -> list[tuple[Run, Truth]]:
    """Return each run as it is now, with its true state.

    SLURM is asked once about all runs together, and a second time about runs whose record changed in between.
    """
    looked = _look(runs)
    if stale := {run.id: run for run, truth in looked if truth.stale}:
        again = {run.id: (run, truth) for run, truth in _look(list(stale.values()))}
        looked = [again.get(run.id, (run, truth)) for run, truth in looked]
    return looked


def _look(runs: Sequence[Run]) -> list[tuple[Run, Truth]]:
    """Do what `true_states` does, but ask SLURM only once."""
    seen = ask([run.record for run in runs])
    # Read the records again after SLURM has answered: a run that ends writes its record before its job disappears.
    current = [run.reread() if run.record["id"] in seen.stages else run for run in runs]
    return [(run, truth_of(run, seen)) for run in current]


def ask(records: Sequence[Mapping[str, Any]]) -> SlurmAnswer:
    """Ask SLURM about the jobs of the runs that have not ended according to their own record."""
    asked = [record for record in records if on_slurm(record) and record["job"]["ids"]]
    if not asked:
        return SlurmAnswer()
    from launch.cluster import slurm

    stages = {record["id"]: _stage(record) for record in asked}
    try:
        queued, ended = slurm.look(id for record in asked for id in record["job"]["ids"])
        gone = {id for record in asked if not queued.keys() & set(record["job"]["ids"]) for id in record["job"]["ids"]}
        forgotten = gone - ended.keys()
        return SlurmAnswer(stages, queued, ended | slurm.accounted(forgotten) if forgotten else ended)
    except UserError as error:
        return SlurmAnswer(stages, problem=error.message)


def truth_of(run: Run, seen: SlurmAnswer) -> Truth:
    """Return the true state of a run, from its record and SLURM's answer. Local runs: look for the run's process."""
    record = run.record
    if not on_slurm(record):
        return Truth(local_state(record))
    recorded, job = record["state"], record["job"]
    if not job["ids"]:
        return Truth(recorded, _submitting(job))
    if seen.stages.get(record["id"]) != _stage(record):
        return Truth(recorded, stale=True)
    if seen.problem:
        return Truth(recorded, f"{UNREACHABLE}: {seen.problem}", unreachable=True)
    jobs = tuple(seen.queued[id] for id in job["ids"] if id in seen.queued)
    told_of: list[Queued | Ended] = [*jobs, *(seen.ended[id] for id in job["ids"] if id in seen.ended)]
    if foreign := [told.id for told in told_of if not _ours(told, run)]:
        return Truth(recorded, f"job {foreign[0]} here is not this run's: the run was submitted to cluster `{job['cluster']}`",
                     unreachable=True)
    if not jobs:
        return _gone(run, list(verdicts.known(run, seen.ended).values()))
    if all(queued.waiting for queued in jobs):
        never = any(queued.reason == "DependencyNeverSatisfied" for queued in jobs)
        return Truth("submitted" if recorded == "submitted" else "preempted", _waits_in_vain(run) if never else None, jobs)
    return _started(run, jobs)


def waits_for(run: Run) -> RunPaths | None:
    """Return the run that must finish before this one starts (`--after`), as the run's last submission says."""
    number, sweep = run.record["job"]["submission"], run.record.get("sweep")
    for paths in (run.paths, *([RunPaths(run.paths.root.parent / sweep)] if sweep else [])):
        try:
            after = read_json(paths.submission(number) / "submission.json").get("after")
        except (OSError, ValueError):
            continue
        return RunPaths(Path(after)) if after else None
    return None


def _waits_in_vain(run: Run) -> str | None:
    """Return what became of the run for which this one waits, although no job of that run can finish it."""
    after = waits_for(run)
    if after is None:
        return None
    try:
        state = read_run(after.root).record["state"]
    except UserError:
        return f"it waits for run {after.id}, whose folder cannot be read"
    name = command_name(after)
    if state == "finished":
        return (f"it waits for a job of run {after.id}, which has finished without that job: `launch cancel {run.id}`, then "
                f"`launch resume {run.id}`")
    if state in ACTIVE:
        return (f"it waits for a job of run {after.id} that has ended, but by its record that run is {state}: "
                f"`launch cancel {run.id}`, then `launch resume {run.id}`, which waits for the run's present job")
    how = f"is {state}" if state in FINAL else "has stopped"
    return f"it waits for run {after.id}, which {how}: it starts if `launch resume {name}` finishes that run"


def _stage(record: Mapping[str, Any]) -> Stage:
    return record["state"], record["attempt"], record["job"]["ids"]


def _started(run: Run, jobs: tuple[Queued, ...]) -> Truth:
    """Return the state of a run that has a job which does not wait."""
    recorded = run.record["state"]
    job = next(job for job in jobs if not job.waiting)
    last = run.attempt_record(max(run.paths.attempt_numbers(), default=0))
    # An attempt begins after its job has started. A later start of the job belongs to the next attempt.
    began = last.get("began")
    restarted = job.state != "COMPLETING" and (recorded == "preempted" if began is None else
                                               job.id != last.get("job") or (job.start or "") > began)
    if job.state in STILL:
        return Truth(recorded, f"SLURM has suspended job {job.id}: its ranks stand still until SLURM continues it", jobs)
    if restarted:
        return Truth("running", None, jobs, restarted=True)
    if recorded == "preempted":
        return Truth(recorded, _what_follows(run, last, job), jobs)
    if job.state == "COMPLETING" and recorded == "running":
        return Truth(recorded, f"job {job.id} is ending, and how its attempt ended is not recorded yet", jobs)
    return Truth(recorded, None, jobs)


def _what_follows(run: Run, last: Mapping[str, Any], job: Queued) -> str:
    """Return what is known about the job of an attempt that has ended, until the job waits in the queue or is gone."""
    flag = flag_file(job_folder(run, last), last.get("job", job.id), last.get("restart", 0))
    if flag.exists() or _stopped_by(last) == reasons.REQUEUED:
        return f"job {job.id} is being requeued"
    if _stopped_by(last) == reasons.CANCELLED:
        return f"SLURM is ending job {job.id}"
    return f"job {job.id} is ending; whether SLURM starts it again is not known yet"


def job_folder(run: Run, attempt: Mapping[str, Any]) -> Path:
    """Return the folder of the submission to which an attempt belongs: the run's, or its sweep's for an element of an array."""
    number = attempt.get("submission", 1)
    return run.submission(number).submission(number)


def _stopped_by(attempt: Mapping[str, Any]) -> str:
    """Return why an attempt was stopped, without the notes that `record.recorded` puts after it."""
    return (attempt.get("reason") or "").partition("; ")[0]


def _gone(run: Run, ended: Sequence[Ended]) -> Truth:
    """Return the state of a run whose jobs are gone, although its record does not say that it ended."""
    record = run.record
    note = "; ".join(map(_how_it_ended, ended)) or "SLURM no longer knows its job"
    if record["state"] == "preempted":  # the last attempt has recorded how it ended
        stopped_by = _stopped_by(run.attempt_record(record["attempt"]))
        if any(end.state == "CANCELLED" for end in ended) or not ended and stopped_by == reasons.CANCELLED:
            return Truth("cancelled", note)
        return Truth("preempted", note if ended and ended[-1].exit_code != exit_codes.PREEMPTED else None)
    if not ended:
        cancelled = record["state"] == "running" and run.paths.cancellation(record["attempt"]).exists()
        return Truth("cancelled" if cancelled else "lost", note)
    last = ([end for end in ended if end.node_list] or ended)[-1]  # the last job of a chain that started
    state = GONE.get(last.state, "lost")
    if last.state in ("TIMEOUT", "DEADLINE") and record.get("checkpoint") is None:
        state = "failed"
    return Truth(state, note)


def _how_it_ended(end: Ended) -> str:
    why = reasons.of_end(end.reason, end.signal)
    return (f"SLURM says that job {end.id} ended as {end.state}" + (f" on {end.node_list}" if end.node_list else "")
            + (f": {why}" if why else ""))


def on_slurm(record: Mapping[str, Any]) -> bool:
    """Return whether the run was submitted to SLURM and its record does not say that it ended."""
    job = record.get("job")
    return bool(job and job["kind"] == "slurm" and record["state"] not in FINAL)


def _ours(job: Queued | Ended, run: Run) -> bool:
    """Return whether the job is this run's: its script is in the run's folder or in its sweep's folder.

    A job of another cluster may have the same number. A folder that was renamed may have been submitted under either name.
    """
    names = (run.record["id"], run.id, run.record.get("sweep"))
    return job.script is None or any(f"/{name}/" in job.script for name in names if name)


def _submitting(job: Mapping[str, Any]) -> str:
    """Return a note about a run whose job has no id yet."""
    if job.get("host") == socket.gethostname() and not alive(job["pid"], job["started"]):
        return NOT_SUBMITTED
    return f"it is being submitted by process {job.get('pid', '?')} on host {job.get('host', '?')}"
