"""The plan of a sweep: which runs it has, and what SLURM gets."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.cluster.resources import Resources
from launch.execute import snapshot
from launch.execute.submission_plan import as_copied, make_submission
from launch.plan.grid import Point
from launch.plan.job_script import Job, Request, make_job
from launch.plan.plan import Plan, make_plan
from launch.plan.show import as_json, show
from launch.plan.spec import Spec
from launch.plan.submission import Submission
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths


@dataclass(frozen=True)
class Sweep:
    """What is submitted, or run, of a sweep: data, as a run's Plan is."""

    id: str
    folder: str                          # absolute
    points: tuple[Mapping[str, Any], ...]  # of all its runs: {"run", "overrides"}
    elements: tuple[int, ...]            # the points that are to be run now
    plans: tuple[Plan, ...]              # their runs
    submission: Submission
    array: Job | None                    # of all of them; None: each has jobs of its own, or runs on this machine
    parallel: int | None

    @property
    def jobs(self) -> list[Job]:
        return [self.array] if self.array else [plan.job for plan in self.plans if plan.job]


def load_specs(points: Sequence[Point], load: Callable[[Sequence[str]], Spec]) -> list[Spec]:
    """The spec of each point.

    Raises:
        UserError: of some point there is none, or two points are the same run.
    """
    specs, first = [], {}
    for point in points:
        with at_point(point.overrides):
            specs.append(load(point.words))
        twin = first.setdefault(specs[-1].text, point)
        if twin is not point:
            raise UserError(f"two points are the same run: {said(twin.overrides)} and {said(point.overrides)}",
                            "give each value once; `train.seed` makes runs differ that are else alike")
    return specs


@contextmanager
def at_point(overrides: Sequence[str]) -> Iterator[None]:
    """Errors in it name the point."""
    try:
        yield
    except UserError as error:
        raise UserError(f"at {said(overrides)}: {error.message}", error.hint) from error


def said(overrides: Sequence[str]) -> str:
    return " ".join(overrides)


def make_sweep(sweep_id: str, points: Sequence[Mapping[str, Any]], specs: Mapping[int, Spec], request: Request,
               resources: Resources, *, root: Path, cwd: Path, copy: snapshot.Snapshot | None, number: int = 1,
               parallel: int | None = None) -> Sweep:
    """The plan of those runs of a sweep whose specs are given, by their points' places.

    Raises:
        UserError: something in it cannot be.
    """
    cluster, paths = request.cluster, RunPaths(root / sweep_id)
    here = cluster.kind == "local"
    python = (not here and cluster.python) or sys.executable
    first, array = next(iter(specs.values())), None
    submission = Submission(number, [str(root / point["run"]) for point in points], cluster, resources, python, str(cwd),
                            first.config.run.max_restarts, request.time, dict(request.options))
    if parallel and (here or not cluster.requeue):
        raise UserError("--max-parallel is for arrays on SLURM", "on this machine runs go one after another" if here else
                        f"cluster `{cluster.name}` forbids requeueing, so each run has jobs of its own")
    if not here and cluster.requeue:
        if any(spec.config.run != first.config.run for spec in specs.values()):
            raise UserError("`run.*` differs between points, and the jobs of an array have all the same",
                            "start a sweep for each value of it")
        array = make_job(request, resources, name=sweep_id, folder=str(paths.submission(number)), python=python,
                         grace_s=first.config.run.grace_s, code=as_copied(first, copy)[1], elements=tuple(specs),
                         parallel=parallel)
    plans = []
    for element, spec in specs.items():
        with at_point(points[element]["overrides"]):
            if here or array:
                plan = make_plan(points[element]["run"], as_copied(spec, copy)[0], cluster, resources, runs=root,
                                 python=python, cwd=cwd)
            else:
                plan = make_submission(points[element]["run"], spec, request, resources, runs=root, cwd=cwd, copy=copy,
                                       number=number)
        plans.append(plan)
    return Sweep(sweep_id, str(paths.root), tuple(points), tuple(specs), tuple(plans), submission, array, parallel)


def show_sweep(sweep: Sweep) -> str:
    """The sweep for a person: all of the first run's plan, and where the others' differ."""
    first = sweep.plans[0]
    lines = [f"sweep      {sweep.id}", f"directory  {sweep.folder}", f"points     {many(len(sweep.plans), 'point')}"]
    lines += [f"           {plan.run_id}  {said(sweep.points[element]['overrides'])}"
              for plan, element in zip(sweep.plans, sweep.elements)]
    if sweep.array:
        lines += ["", "# handed to SLURM", shlex.join(sweep.array.command),
                  "scontrol release ID  # once each run's record holds its element's id",
                  "", f"# file {sweep.array.file}", sweep.array.script.rstrip("\n")]
    lines += ["", f"# file {sweep.folder}/{submission_file(sweep)}", sweep.submission.text().rstrip("\n")]
    shown = show(first)
    lines += ["", f"# the run {first.run_id}", shown.rstrip("\n")]
    for plan in sweep.plans[1:]:
        lines += ["", f"# the run {plan.run_id}, where it differs by more than its id",
                  *_differences(shown, show(plan).replace(plan.run_id, first.run_id))]
    return "\n".join(lines) + "\n"


def _differences(before: str, after: str) -> list[str]:
    _, _, *lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return [line for line in lines if not line.startswith("@@")]


def sweep_json(sweep: Sweep) -> dict[str, Any]:
    return {"id": sweep.id, "folder": sweep.folder, "points": list(sweep.points), "elements": sweep.elements,
            "job": sweep.array and {**asdict(sweep.array), "command": sweep.array.command},
            "files": {submission_file(sweep): sweep.submission.text()}, "plans": [as_json(plan) for plan in sweep.plans]}


def submission_file(sweep: Sweep) -> str:
    return str(RunPaths(Path()).submission(sweep.submission.number) / "submission.json")


def many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
