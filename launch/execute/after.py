"""`--after RUN`: a job that waits for a run, whichever of the run's jobs finishes it.

SLURM can only wait for jobs. A run that is cancelled or fails, and is resumed, gets a new job. So the jobs that wait for the
run are told to wait for the new job instead. While nobody resumes the run they stay in the queue, and hold no node.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.cluster import slurm
from launch.plan.job_script import dependency
from launch.plan.submission import Submission, read_submission
from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths


def follow(paths: RunPaths, ids: Sequence[str]) -> None:
    """Let all jobs that wait for this run wait for its new jobs. Print a warning for each job that SLURM does not change.

    Args:
        ids: the run's new jobs.
    """
    try:
        queue = slurm.queue()
    except UserError as error:
        print(f"warning: runs that wait for {paths.id} still wait for its last job: {error}", file=sys.stderr)
        return
    # All waiting elements of an array have one dependency.
    waiting = {job.id.partition("_")[0]: job.script for job in queue.values() if job.waiting and job.script}
    for id, script in waiting.items():
        submission = _waits_for(id, Path(script).parent, paths)
        if submission is None:
            continue
        own = {**submission.cluster.sbatch, **submission.options}.get("dependency")
        try:
            slurm.call("scontrol", "update", f"JobId={id}", f"Dependency={dependency(ids, own)}")
            print(f"job {id} of {RunPaths(Path(script).parents[2]).id} waits for job {', '.join(ids)}", file=sys.stderr)
        except UserError as error:
            print(f"warning: job {id} still waits for the last job of {paths.id}: {error}", file=sys.stderr)


def _waits_for(id: str, folder: Path, paths: RunPaths) -> Submission | None:
    """The submission of a job in the queue, if the job waits for this run.

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
    # The later jobs of a chain wait for the jobs before them.
    return submission if submission.after == str(paths.root.resolve()) and id == first.partition("_")[0] else None
