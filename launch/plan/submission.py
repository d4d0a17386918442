"""submission.json, which a submission leaves for its job. Every node makes the same plan from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Resources
from launch.plan.plan import Plan, make_plan
from launch.plan.spec import spec_of
from trainers.contract.errors import UserError
from trainers.contract.files import FORMAT, check_format, read_json
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
    after: str | None = None    # the folder of the run that must finish first, absolute
    here: bool = False          # whether the run uses an allocation that the user made

    def text(self) -> str:
        """Return the submission as JSON."""
        content = {"format": FORMAT, **asdict(self), "cluster": self.cluster.model_dump(mode="json")}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_submission(folder: Path) -> Submission:
    """Read submission.json from a submission's folder. Another version of launch may have written it.

    Raises:
        OSError: the file cannot be read.
        UserError: the file is not that of a submission, or a newer version of launch has written it.
    """
    file = folder / "submission.json"
    try:
        content = read_json(file)
        check_format(content)
        cluster = {key: value for key, value in content["cluster"].items() if key in ClusterConfig.model_fields}
        return Submission(**{**_known(Submission, content), "cluster": ClusterConfig(**cluster),
                             "resources": Resources(**_known(Resources, content["resources"]))})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read `{file}`: {error}",
                        "use the version of launch that submitted the run, or start a new run with --from RUN") from None


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values for the fields of a dataclass, without keys that it does not have."""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


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
