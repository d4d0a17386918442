"""`--after RUN`: a job that waits for a run, whichever of the run's jobs finishes it.

SLURM can only wait for jobs. A run that is cancelled or fails, and is resumed, gets a new job. So the jobs that wait for the
run are told to wait for the new job instead. While nobody resumes the run they stay in the queue, and hold no node.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launch.cluster import slurm
from launch.plan.job_script import Request, dependency
from launch.plan.submission import Submission, read_submission
from launch.records.naming import command_name
from launch.records.run import Run, read_run
from launch.records.state import ACTIVE, state_of
from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths


def follow(jobs: Mapping[RunPaths, Sequence[str]]) -> None:
    """Let all jobs that wait for one of these runs wait for its new jobs. Print a warning for each job that SLURM does not
    change.

    Args:
        jobs: the ids of each run's new jobs.
    """
    names = ", ".join(paths.id for paths in jobs)
    try:
        queue = slurm.queue()
    except UserError as error:
        print(f"warning: runs that wait for {names} still wait for its last job: {error}", file=sys.stderr)
        return
    by_folder = {str(paths.root.resolve()): (paths, ids) for paths, ids in jobs.items()}
    # All waiting elements of an array have one dependency.
    waiting = {job.id.partition("_")[0]: job.script for job in queue.values() if job.waiting and job.script}
    for id, script in waiting.items():
        submission = _submission(id, Path(script).parent)
        if submission is None or submission.after not in by_folder:
            continue
        paths, ids = by_folder[submission.after]
        own = {**submission.cluster.sbatch, **submission.options}.get("dependency")
        try:
            slurm.call("scontrol", "update", f"JobId={id}", f"Dependency={dependency(ids, own)}")
            print(f"job {id} of {RunPaths(Path(script).parents[2]).id} waits for job {', '.join(ids)}", file=sys.stderr)
        except UserError as error:
            print(f"warning: job {id} still waits for the last job of {paths.id}: {error}", file=sys.stderr)


def _submission(id: str, folder: Path) -> Submission | None:
    """The submission of a job in the queue; None for a later job of a chain, which waits for the jobs before it.

    Args:
        id: the job's.
        folder: the folder of its script. It may be of a job that launch did not submit.
    """
    try:
        submission = read_submission(folder)
        home = RunPaths(folder.parents[1])
        first = read_json(home.record)["job"]["ids"][0] if home.record.exists() else id  # a sweep has no run.json, and no chain
    except (OSError, UserError, ValueError, KeyError, TypeError, IndexError):  # also another version's, or another tool's
        return None
    return submission if id == first.partition("_")[0] else None


def as_before(request: Request, before: Submission | None, begun: bool) -> Request:
    """The request of a resumption, which waits for the run for which its last submission waited, unless that run has finished.

    Args:
        before: the last submission.
        begun: whether an attempt has begun: then the other run had finished by that time.

    Raises:
        UserError: the other run has not finished, and none of its jobs is in the queue.
    """
    if request.after_run or before is None or before.after is None or begun:
        return request
    paths = RunPaths(Path(before.after))
    if not paths.record.exists():
        print(f"warning: run {paths.id}, for which the last submission waited, has been deleted: nothing waits for it now",
              file=sys.stderr)
        return request
    run = read_run(paths.root)
    try:
        ids = jobs_of(run)
    except UserError as error:
        raise UserError(f"as before, the run starts after another one (--after): {error.message}", error.hint) from None
    if ids:
        print(f"--after {run.id}: as before, the run starts after that run has finished", file=sys.stderr)
    return replace(request, after=ids, after_run=before.after)


def jobs_of(run: Run) -> tuple[str, ...]:
    """The ids of the run's jobs in SLURM's queue, for a job that must wait for the run; empty if the run is finished.

    Raises:
        UserError: the run is not finished, and none of its jobs is in the queue.
    """
    job = run.record.get("job") or {}
    state = state_of(run)
    if state == "finished":
        return ()
    if job.get("kind") == "slurm" and (queued := slurm.queue(job["ids"])):
        return tuple(sorted(queued))
    raise UserError(f"run {run.id} is {state}: nothing to wait for",
                    "SLURM can only wait for SLURM's jobs" if job.get("kind") == "local" and state in ACTIVE
                    else f"continue it with `launch resume {command_name(run.paths)}`")
