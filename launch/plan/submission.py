"""submission.json, which a submission leaves for its job. Every node makes the same plan from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Resources
from launch.plan.plan import Plan, make_plan
from launch.plan.spec import spec_of
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths


@dataclass(frozen=True)
class Submission:
    """What was submitted to SLURM: the content of submission.json."""

    number: int                 # counted from 1, for a run and its sweep together
    runs: list[str]             # run directories, absolute; an array has one for each element
    cluster: ClusterConfig
    resources: Resources
    python: str
    cwd: str
    max_restarts: int           # new attempts after failures, in all jobs of this submission together
    time: str | None            # the time limit that the user asked for; None: the cluster's
    options: dict[str, Any]     # options for sbatch; they override the cluster's
    here: bool = False          # whether the run uses an allocation that the user made

    def text(self) -> str:
        """Return the submission as JSON."""
        return json.dumps({**asdict(self), "cluster": self.cluster.model_dump(mode="json")}, indent=1, ensure_ascii=False) + "\n"


def read_submission(folder: Path) -> Submission:
    """Read submission.json from a submission's folder.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON.
    """
    content = read_json(folder / "submission.json")
    return Submission(**{**content, "cluster": ClusterConfig(**content["cluster"]),
                         "resources": Resources(**content["resources"])})


def last_submission(paths: RunPaths, sweep: str | None = None) -> Submission | None:
    """Return the last submission of a run; None if there is none.

    A run counts its submissions together with its sweep's, so the last one may be the sweep's.

    Args:
        paths: the run, or a sweep.
        sweep: the id of the run's sweep.
    """
    folders = [home.submission(number) for home in _homes(paths, sweep) for number in home.submission_numbers()]
    complete = [folder for folder in folders if (folder / "submission.json").exists()]  # a submission may have been interrupted
    return read_submission(max(complete, key=lambda folder: int(folder.name))) if complete else None


def next_submission(paths: RunPaths, sweep: str | None = None) -> int:
    """Return the number of a run's next submission. The process that creates the folder of this number owns it."""
    return max((number for home in _homes(paths, sweep) for number in home.submission_numbers()), default=0) + 1


def _homes(paths: RunPaths, sweep: str | None) -> list[RunPaths]:
    """Return the directories that hold a run's submissions: its own and its sweep's."""
    return [paths, *([RunPaths(paths.root.parent / sweep)] if sweep else [])]


def plan_of(submission: Submission, paths: RunPaths, attempt: int) -> Plan:
    """Return the plan of one attempt of one of the submission's runs.

    Raises:
        UserError: the run's spec cannot be read, or does not fit the resources.
    """
    return make_plan(paths.id, spec_of(paths), submission.cluster, submission.resources, runs=paths.root.parent,
                     python=submission.python, cwd=Path(submission.cwd), attempt=attempt)
