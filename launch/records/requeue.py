"""The files in a submission's folder by which a job's batch script and its head node process tell each other of a requeue.

Each name holds the job's id and how often SLURM had restarted the job: an older start's files say nothing about this start.
"""

from __future__ import annotations

from pathlib import Path

REQUEUE = 76       # exit code of a head whose job must be requeued
FLAG = "requeue"   # FLAG-JOB-RESTART: the script requeues the job when its node processes have ended
AGAIN = "again"    # AGAIN-JOB-RESTART-CODE: the script requeues the job, whose head ended with exit code CODE


def flag_file(folder: Path, job: str, restart: int) -> Path:
    """Return the file that asks the batch script to requeue the job."""
    return folder / f"{FLAG}-{job}-{restart}"


def code_of_head(folder: Path, job: str, restart: int) -> str | None:
    """Return the exit code of the head with which the batch script requeued the job; None: the script did not do so."""
    return next((file.name.rpartition("-")[2] for file in folder.glob(f"{AGAIN}-{job}-{restart}-*")), None)
