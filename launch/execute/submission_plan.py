"""The plan of a run that goes to SLURM: its job, and its code as it is copied."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.cluster.resources import Resources
from launch.execute import snapshot
from launch.plan.job_script import Request, make_job
from launch.plan.plan import Plan, make_plan
from launch.plan.spec import Spec, with_values
from launch.plan.submission import Submission
from trainers.contract.paths import RunPaths

OWN = Path(__file__).parents[2]
OWN_MAY_CHANGE = not {"site-packages", "dist-packages"} & set(OWN.parts)  # a clone, not an installed package


def code_of(spec: Spec) -> list[Path]:
    """What a run that waits in a queue must find as it was: the user's code, and launch's own where it may change."""
    theirs = getattr(spec.config, "script", None) or getattr(spec.config, "path", None)
    return [*([Path(theirs)] if theirs else []), *([OWN] if OWN_MAY_CHANGE else [])]


def as_copied(spec: Spec, copy: snapshot.Snapshot | None) -> tuple[Spec, str | None]:
    """The spec with the user's code where its copy lies, and where that of launch's own packages does, if there is one."""
    moved = copy.moved if copy else Path
    for key in ("script", "path"):
        if path := getattr(spec.config, key, None):
            spec = with_values(spec, {key: str(moved(path))})
    own = moved(OWN)
    return spec, str(own) if own != OWN else None


def make_submission(run_id: str, spec: Spec, request: Request, resources: Resources, *, runs: Path, cwd: Path,
                    copy: snapshot.Snapshot | None, number: int = 1, here: bool = False) -> Plan:
    """The plan of a run that SLURM is asked to run: its job, and a spec that names the code as it is in `copy`.

    Raises:
        UserError: something in it cannot be.
    """
    spec, own = as_copied(spec, copy)
    paths, python = RunPaths(runs / run_id), request.cluster.python or sys.executable
    submission = Submission(number, [str(paths.root)], request.cluster, resources, python, str(cwd),
                            spec.config.run.max_restarts, request.time, dict(request.options), here)
    folder = paths.submission(number)
    job = make_job(request, resources, name=run_id, folder=str(folder), python=python, grace_s=spec.config.run.grace_s,
                   code=own)
    return make_plan(run_id, spec, request.cluster, resources, runs=runs, python=python, cwd=cwd, job=job,
                     files={f"{folder.relative_to(paths.root)}/submission.json": submission.text()})
