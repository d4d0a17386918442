"""What a submission leaves for its job: submission.json, from which every node makes the same plan."""

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
    number: int                 # of the run, from 1
    runs: list[str]             # run directories, absolute; several for an array, by element
    cluster: ClusterConfig
    resources: Resources
    python: str
    cwd: str
    max_restarts: int           # new attempts after failures, all jobs of this submission together
    time: str | None            # as asked for, over the cluster's
    options: dict[str, Any]     # of sbatch, over the cluster's
    here: bool = False          # in an allocation that is not ours

    def text(self) -> str:
        return json.dumps({**asdict(self), "cluster": self.cluster.model_dump(mode="json")}, indent=1, ensure_ascii=False) + "\n"


def read_submission(folder: Path) -> Submission:
    found = read_json(folder / "submission.json")
    return Submission(**{**found, "cluster": ClusterConfig(**found["cluster"]), "resources": Resources(**found["resources"])})


def last_submission(paths: RunPaths, sweep: str | None = None) -> Submission | None:
    """The last one of a run, which may be that of its sweep, or of a sweep; None if there was none. A run and its sweep
    count theirs together."""
    found = [home.submission(number) for home in _homes(paths, sweep) for number in home.submission_numbers()]
    whole = [folder for folder in found if (folder / "submission.json").exists()]  # one may have broken off
    return read_submission(max(whole, key=lambda folder: int(folder.name))) if whole else None


def next_submission(paths: RunPaths, sweep: str | None = None) -> int:
    """The number of a run's next submission: who makes its folder has it."""
    return max((number for home in _homes(paths, sweep) for number in home.submission_numbers()), default=0) + 1


def _homes(paths: RunPaths, sweep: str | None) -> list[RunPaths]:
    return [paths, *([RunPaths(paths.root.parent / sweep)] if sweep else [])]


def plan_of(submission: Submission, paths: RunPaths, attempt: int) -> Plan:
    """The plan of an attempt of one of its runs.

    Raises:
        UserError: the run's spec cannot be read, or does not fit the resources.
    """
    return make_plan(paths.id, spec_of(paths), submission.cluster, submission.resources, runs=paths.root.parent,
                     python=submission.python, cwd=Path(submission.cwd), attempt=attempt)
