"""The plan of a run that is submitted to SLURM: its job, and the code to copy for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.cluster.resources import Resources
from launch.execute import snapshot
from launch.plan.job_script import Request, make_job
from launch.plan.plan import Plan, make_plan
from launch.plan.spec import Spec, with_values
from launch.plan.submission import Submission
from trainers.config.schema import ScriptConfig
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths

# The folder that holds launch's own packages.
OWN = Path(__file__).parents[2]
OWN_MAY_CHANGE = not {"site-packages", "dist-packages"} & set(OWN.parts)  # true for a clone, not for an installed package


def code_of(spec: Spec) -> list[Path]:
    """The code that must not change while the run waits in a queue: the user's, and launch's own unless it is installed."""
    config = spec.config
    users = config.script if isinstance(config, ScriptConfig) and config.module is None else config.path
    return [*([Path(users)] if users else []), *([OWN] if OWN_MAY_CHANGE else [])]


def take_code(specs: Sequence[Spec], into: Path, strict: bool = True, copy: bool = True) -> snapshot.Snapshot:
    """Copy the code of these specs, as their `run.include` and `run.leave_out` say. See `snapshot.take`.

    Raises:
        UserError: the code cannot be copied.
    """
    sources = dict.fromkeys(path for spec in specs for path in code_of(spec))
    include, leave_out = (dict.fromkeys(pattern for spec in specs for pattern in getattr(spec.config.run, key))
                          for key in ("include", "leave_out"))
    return snapshot.take([*sources], into, include=[*include], leave_out=[*leave_out], strict=strict, copy=copy)


def describe_code(specs: Sequence[Spec], into: Path) -> None:
    """Record what code runs on this machine have: commit, diff, hashes and versions. A run does not fail without it."""
    try:
        take_code(specs, into, strict=False, copy=False)
    except UserError as error:
        print(f"warning: the code of the run is not recorded: {error.message}", file=sys.stderr)


def as_copied(spec: Spec, copy: snapshot.Snapshot | None) -> tuple[Spec, str | None]:
    """The spec with the paths of the user's code in `copy`; and the folder of launch's own packages in `copy`, or None."""
    moved = copy.moved if copy else Path
    for key in ("script", "path"):
        if path := getattr(spec.config, key, None):
            spec = with_values(spec, {key: str(moved(path))})
    own = moved(OWN)
    return spec, str(own) if own != OWN else None


def make_submission(run_id: str, spec: Spec, request: Request, resources: Resources, *, runs: Path, cwd: Path,
                    copy: snapshot.Snapshot | None, number: int = 1, here: bool = False) -> Plan:
    """The plan of a run that is submitted to SLURM. It holds the job, and its spec names the code in `copy`.

    Args:
        runs: the folder that holds the run directory.
        number: of the submission.
        here: whether the run uses the allocation that this command is in.

    Raises:
        UserError: the plan is impossible, for example because the batch cannot be split over the ranks.
    """
    spec, own = as_copied(spec, copy)
    paths, python = RunPaths(runs / run_id), request.cluster.python or sys.executable
    submission = Submission(number, [str(paths.root)], request.cluster, resources, python, str(cwd),
                            spec.config.run.max_restarts, request.time, dict(request.options), request.after_run, here)
    folder = paths.submission(number)
    job = make_job(request, resources, name=run_id, folder=str(folder), python=python, grace_s=spec.config.run.grace_s,
                   code=own)
    return make_plan(run_id, spec, request.cluster, resources, runs=runs, python=python, cwd=cwd, job=job,
                     files={f"{folder.relative_to(paths.root)}/submission.json": submission.text()})
