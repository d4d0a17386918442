"""The plan of a sweep: its runs, and what is submitted to SLURM."""

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
    """The plan of a sweep, as plain data: all of its points, and the runs to execute now."""

    id: str
    folder: str                          # absolute
    points: tuple[Mapping[str, Any], ...]  # all of them: {"run": id, "overrides"}
    elements: tuple[int, ...]            # indices of the points to run now
    plans: tuple[Plan, ...]              # of their runs, in the same order
    submission: Submission
    array: Job | None                    # one array for all runs; None: each run has its own jobs, or runs on this machine
    parallel: int | None                 # how many elements of the array may run at once

    @property
    def jobs(self) -> list[Job]:
        return [self.array] if self.array else [plan.job for plan in self.plans if plan.job]


def load_specs(points: Sequence[Point], load: Callable[[Sequence[str]], Spec]) -> list[Spec]:
    """The spec of each point.

    Args:
        load: makes a spec of a point's words.

    Raises:
        UserError: a point's spec is wrong, or two points are the same run.
    """
    specs: list[Spec] = []
    first: dict[str, Point] = {}  # by the text of the spec
    for point in points:
        with at_point(point.overrides):
            specs.append(load(point.words))
        twin = first.setdefault(specs[-1].text, point)
        if twin is not point:
            both = f"{overrides_text(twin.overrides)} and {overrides_text(point.overrides)}"
            raise UserError(f"two points are the same run: {both}",
                            "give each value once, or vary `train.seed` to repeat a run")
    return specs


@contextmanager
def at_point(overrides: Sequence[str]) -> Iterator[None]:
    """Put the point's overrides in front of errors that are raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"at {overrides_text(overrides)}: {error.message}", error.hint) from error


def overrides_text(overrides: Sequence[str]) -> str:
    """The overrides of a point, as text to print."""
    return " ".join(overrides)


def make_sweep(sweep_id: str, points: Sequence[Mapping[str, Any]], specs: Mapping[int, Spec], request: Request,
               resources: Resources, *, root: Path, cwd: Path, copy: snapshot.Snapshot | None, number: int = 1,
               parallel: int | None = None) -> Sweep:
    """The plan of some runs of a sweep, or of all.

    Args:
        points: all of the sweep: {"run": id, "overrides"}.
        specs: of the runs to execute now, by the index of their point.
        root: the folder that holds the sweep's folder and those of its runs.
        number: of the submission.
        parallel: how many elements of an array may run at once.

    Raises:
        UserError: the plan is impossible, or the points differ in settings that the jobs of an array must share.
    """
    cluster, paths = request.cluster, RunPaths(root / sweep_id)
    local = cluster.kind == "local"
    python = (not local and cluster.python) or sys.executable
    first, array = next(iter(specs.values())), None
    submission = Submission(number, [str(root / point["run"]) for point in points], cluster, resources, python, str(cwd),
                            first.config.run.max_restarts, request.time, dict(request.options), request.after_run)
    if parallel and (local or not cluster.requeue):
        raise UserError("--max-parallel is for arrays on SLURM", "on this machine runs go one after another" if local else
                        f"cluster `{cluster.name}` forbids requeueing, so each run has its own jobs")
    if not local and cluster.requeue:
        if any(spec.config.run != first.config.run for spec in specs.values()):
            raise UserError("`run.*` differs between points, but the jobs of an array share these settings",
                            "start one sweep for each value of `run.*`")
        array = make_job(request, resources, name=sweep_id, folder=str(paths.submission(number)), python=python,
                         grace_s=first.config.run.grace_s, code=as_copied(first, copy)[1], elements=tuple(specs),
                         parallel=parallel)
    plans = []
    for element, spec in specs.items():
        with at_point(points[element]["overrides"]):
            if local or array:
                plan = make_plan(points[element]["run"], as_copied(spec, copy)[0], cluster, resources, runs=root,
                                 python=python, cwd=cwd)
            else:
                plan = make_submission(points[element]["run"], spec, request, resources, runs=root, cwd=cwd, copy=copy,
                                       number=number)
        plans.append(plan)
    return Sweep(sweep_id, str(paths.root), tuple(points), tuple(specs), tuple(plans), submission, array, parallel)


def show_sweep(sweep: Sweep) -> str:
    """The plan of a sweep as text: the whole plan of the first run, and how the plans of the other runs differ."""
    first = sweep.plans[0]
    lines = [f"sweep      {sweep.id}", f"directory  {sweep.folder}", f"points     {counted(len(sweep.plans), 'point')}"]
    lines += [f"           {plan.run_id}  {overrides_text(sweep.points[element]['overrides'])}"
              for plan, element in zip(sweep.plans, sweep.elements)]
    if sweep.array:
        lines += ["", "# handed to SLURM", shlex.join(sweep.array.command),
                  "scontrol release ID  # once each run's record holds the id of its element",
                  "", f"# file {sweep.array.file}", sweep.array.script.rstrip("\n")]
    lines += ["", f"# file {sweep.folder}/{submission_file(sweep)}", sweep.submission.text().rstrip("\n")]
    shown = show(first)
    lines += ["", f"# run {first.run_id}", shown.rstrip("\n")]
    for plan in sweep.plans[1:]:
        lines += ["", f"# run {plan.run_id}: differences, apart from the run id",
                  *_differences(shown, show(plan).replace(plan.run_id, first.run_id))]
    return "\n".join(lines) + "\n"


def _differences(before: str, after: str) -> list[str]:
    """The lines that differ, each with - or + before it."""
    _, _, *lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return [line for line in lines if not line.startswith("@@")]


def sweep_json(sweep: Sweep) -> dict[str, Any]:
    """The plan of a sweep as JSON values."""
    return {"id": sweep.id, "folder": sweep.folder, "points": list(sweep.points), "elements": sweep.elements,
            "job": sweep.array and {**asdict(sweep.array), "command": sweep.array.command},
            "files": {submission_file(sweep): sweep.submission.text()}, "plans": [as_json(plan) for plan in sweep.plans]}


def submission_file(sweep: Sweep) -> str:
    """The path of submission.json in the sweep's folder."""
    return str(RunPaths(Path()).submission(sweep.submission.number) / "submission.json")


def counted(count: int, what: str) -> str:
    """'1 run', '2 runs'"""
    return f"{count:,} {what}{'s' * (count != 1)}"
