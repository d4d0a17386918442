"""Sweeps: a run for each point of a grid, as one array on SLURM, or in turn on this machine.

    runs/<sweep>/sweep.json          its points, in order; written when all of its runs are there
    runs/<sweep>/submissions/<n>/    submission.json lists its runs, by element of the array
    runs/<sweep>/code/               one copy for all of them
    runs/<sweep>-<i>/                the run of point i, from 0: one like any other

Where jobs may not be requeued, each run gets a chain of jobs of its own: an array could wait for the whole of another
only, or (aftercorr) for each element's success.
"""

from __future__ import annotations

import json as jsonlib
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from launch.cluster import slurm
from launch.cluster.resources import Resources, Wanted, resources_of
from launch.execute import record, snapshot
from launch.execute.local import run_attempts
from launch.execute.on_slurm import check
from launch.execute.submission_plan import code_of
from launch.execute.submit import hand_over, release, try_out, withdraw
from launch.execute.sweep_plan import Sweep, at_point, load_specs, make_sweep, many, said, show_sweep, submission_file, sweep_json
from launch.plan.grid import grid
from launch.plan.initial_weights import resolved, warn
from launch.plan.job_script import Request
from launch.plan.spec import Spec, spec_of
from launch.plan.submission import Submission, last_submission, plan_of
from launch.records import read as runs
from launch.records.naming import named, new_run_id, shown
from launch.records.process import alive
from launch.records.run import SWEEP, Run, read_run
from launch.records.state import state_of
from launch.supervise.signals import stop_signals
from launch.supervise.terminal import make_view
from trainers.contract import exit_codes
from trainers.contract.clock import utc_now
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, replace_json, replace_text, update_json
from trainers.contract.paths import RunPaths

HELD = "JobHeldUser"


# The specs of its points


# The plan


# Starting one


def start(*, words: Sequence[str], load: Callable[[Sequence[str]], Spec], request: Request, root: Path, wanted: Wanted,
          parallel: int | None, dry_run: bool, json: bool) -> int:
    """Run a new sweep, or submit it. Returns the exit code.

    Args:
        words: `key=value`, some with several values.
        load: makes the spec of one point's words.
        request: of which only the cluster counts on this machine.
        parallel: how many of the array's elements may run at once.

    Raises:
        UserError: something the user must mend; nothing was written or submitted.
    """
    grid_points, here = grid(words), request.cluster.kind == "local"
    specs = load_specs(grid_points, lambda words: resolved(load(words), root))
    warn(specs)
    resources = resources_of(specs[0].config, request.cluster, wanted)
    for point, spec in zip(grid_points, specs):
        with at_point(point.overrides):
            check(spec, request, dry_run)
    sweep_id, digits = new_run_id(f"{specs[0].name}-sweep"), len(str(len(specs) - 1))
    points = [{"run": f"{sweep_id}-{place:0{digits}d}", "overrides": list(point.overrides)}
              for place, point in enumerate(grid_points)]
    sources = [] if here else list(dict.fromkeys(path for spec in specs for path in code_of(spec)))
    copy = None if here else snapshot.survey(sources, RunPaths(root / sweep_id).code)
    sweep = make_sweep(sweep_id, points, dict(enumerate(specs)), request, resources, root=root, cwd=Path.cwd(), copy=copy,
                       parallel=parallel)
    if dry_run:
        print(jsonlib.dumps(sweep_json(sweep), indent=1, ensure_ascii=False) if json else show_sweep(sweep), end="\n" * json)
        return 0
    if here:
        _write(sweep, specs[0].name, record.worker_here(), sources)
        return _in_turn(sweep, json)
    try_out(sweep.jobs[0], resources)
    for name in _write(sweep, specs[0].name, _submitting(sweep), sources)[:5]:
        print(f"warning: not copied with the code: {name}", file=sys.stderr)
    try:
        ids = _hand_over(sweep)
    except BaseException:
        _remove(sweep)
        raise
    _say(sweep, ids, json)
    return 0


def _submitting(sweep: Sweep) -> dict[str, Any]:
    return record.submitting(sweep.submission.cluster.name, sweep.submission.number)


def _write(sweep: Sweep, task: str, job: Mapping[str, Any], sources: Sequence[Path]) -> tuple[str, ...]:
    """Make the folders of a new sweep and of its runs. Returns what was left out of the code's copy. Nothing stays if it
    cannot be done. Raises: UserError."""
    paths = RunPaths(Path(sweep.folder))
    try:
        _write_submission(sweep)
        left_out = snapshot.take(sources, paths.code).left_out if sources else ()
        for plan in sweep.plans:
            record.create_run(plan, sweep=sweep.id, job=dict(job))
        with _writing(paths.root):
            replace_json(paths.root / SWEEP, {"id": sweep.id, "task": task, "created": utc_now(), "job": dict(job),
                                                   "max_parallel": sweep.parallel, "points": list(sweep.points)})
    except BaseException:
        _remove(sweep)
        raise
    return left_out


def _write_submission(sweep: Sweep) -> None:
    """Making its folder is what decides between two who try."""
    file = Path(sweep.folder) / submission_file(sweep)
    with _writing(file.parent):
        try:
            file.parent.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"sweep {sweep.id} has just been resumed by another process",
                            f"see `launch runs --sweep {sweep.id}`") from None
        replace_text(file, sweep.submission.text())


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}",
                        "make room there, or choose another place with --runs DIR or LAUNCH_RUNS") from error


def _remove(sweep: Sweep) -> None:
    for folder in (sweep.folder, *(plan.folder for plan in sweep.plans)):
        shutil.rmtree(folder, ignore_errors=True)


# On SLURM


def _hand_over(sweep: Sweep) -> list[str]:
    """Submit its jobs, and let them go once each run's record holds the ids of its own. Returns the ids. No job stays if
    it cannot be done. Raises: UserError."""
    root = Path(sweep.folder)
    job = {key: value for key, value in _submitting(sweep).items() if key in ("kind", "cluster", "submission")}
    try:
        if sweep.array:
            given = hand_over(sweep.array, {}, root)
            of_runs = [[f"{given[0]}_{element}"] for element in sweep.elements]
        else:
            of_runs = [hand_over(plan.job, plan.files, Path(plan.folder)) for plan in sweep.plans]
            given = [id for ids in of_runs for id in ids]
        for plan, ids in zip(sweep.plans, of_runs):
            update_json(RunPaths(Path(plan.folder)).record, job={**job, "ids": ids}, updated=utc_now())
        update_json(root / SWEEP, job={**job, "ids": given})
        release(given)
    except BaseException:
        withdraw(sweep.jobs)
        raise
    return given


def _say(sweep: Sweep, ids: Sequence[str], json: bool) -> None:
    paths, resources = RunPaths(Path(sweep.folder)), sweep.submission.resources
    name = named(paths)
    nexts = [f"launch runs --sweep {name}", f"launch cancel {name}"]
    if json:
        print(jsonlib.dumps({"id": sweep.id, "jobs": list(ids), "path": sweep.folder,
                             "runs": [plan.run_id for plan in sweep.plans], "next": nexts}))
        return
    ranks = f"{resources.gpus} GPU(s)" if resources.gpus else f"{resources.ranks} CPU rank(s)"
    jobs = f"array {ids[0]}" if sweep.array else f"{len(ids)} jobs, {len(ids) // len(sweep.plans)} for each run"
    most = f", {sweep.parallel} at once" if sweep.parallel else ""
    print(f"sweep {sweep.id} submitted to {sweep.submission.cluster.name} as {jobs}: {many(len(sweep.plans), 'run')} of "
          f"{ranks} on {resources.nodes} node(s){most}\nfolder  {shown(paths.root)}\n"
          f"next    {nexts[0]}\n        {nexts[1]}")


# On this machine


def _in_turn(sweep: Sweep, json: bool) -> int:
    """Run what waits in it, one after another. A run that fails ends only itself; a signal ends the run with its
    checkpoint, and the sweep. Returns the exit code."""
    job, codes, stopped = record.worker_here(), [], False
    files = [RunPaths(Path(plan.folder)).record for plan in sweep.plans]

    def waiting(file: Path) -> bool:
        """Unless it was cancelled meanwhile, or taken by somebody else."""
        now = _now(file)
        return (now["state"], now["job"]) == ("submitted", job)

    with stop_signals() as stop:
        for element, plan, file in zip(sweep.elements, sweep.plans, files):
            if stopped := stopped or bool(stop.received):
                break
            if not waiting(file):
                continue
            paths, view = RunPaths(Path(plan.folder)), make_view(json)
            view.notice(f"point {element + 1} of {len(sweep.points)}, {said(sweep.points[element]['overrides'])}: "
                        f"run {paths.id} in {shown(paths.root)}")
            try:
                codes.append(run_attempts(partial(plan_of, sweep.submission, paths), paths, record.next_attempt(paths), view,
                                      plan.max_restarts, debug=False))
            except UserError as error:
                view.close()
                print(error, file=sys.stderr)
                codes.append(error.exit_code)
            stopped = codes[-1] == exit_codes.KILLED or _now(file)["state"] == "preempted"
        for file in filter(waiting, files if stopped else ()):
            update_json(file, state="preempted", updated=utc_now())
    _tell(_ending(sweep), json)
    if stopped:
        return exit_codes.KILLED if codes[-1:] == [exit_codes.KILLED] else exit_codes.PREEMPTED
    failed = any(code not in (exit_codes.FINISHED, exit_codes.PREEMPTED) for code in codes)
    return exit_codes.FAILED if failed else max(codes, default=0)


def _ending(sweep: Sweep) -> str:
    states = [_now(RunPaths(Path(folder)).record)["state"] for folder in sweep.submission.runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    name = named(RunPaths(Path(sweep.folder)))
    onward = "" if set(states) == {"finished"} else f"; go on with `launch sweep --resume {name}`"
    return f"sweep {sweep.id}: {counts}; compare them with `launch runs --sweep {name}`{onward}"


def _now(file: Path) -> dict[str, Any]:
    """A run's record. Its folder may have been removed."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return {"state": "unreadable", "job": None}


def _tell(message: str, json: bool) -> None:
    view = make_view(json)
    view.notice(message)
    view.close()


# Going on with one


def resume(root: Path, word: str, *, request: Request | None, wanted: Wanted, parallel: int | None, json: bool) -> int:
    """Go on with those runs of a sweep that have not finished, where it was last (`request`: there). Returns the exit code.

    Raises:
        UserError: there is no such sweep, it is just being submitted, or something else that the user must mend.
    """
    found = runs.read_sweep(root, word)
    paths, points = RunPaths(Path(found["path"])), found["points"]
    _adopt(paths, _members(paths, points))
    members = _members(paths, points)
    going = _going(members.values())
    left = {element: run for element, run in members.items() if run.id not in going and run.record["state"] != "finished"}
    if going:
        _tell(f"sweep {paths.id}: {many(len(going), 'run')} at work or waiting, left alone", json)
    if not left:
        _tell(f"sweep {paths.id}: nothing {'else ' * bool(going)}to resume", json)
        return 0
    before = last_submission(paths)
    if request is None:
        request = Request(before.cluster, before.time, before.options)
    here = request.cluster.kind == "local"
    specs = {element: spec_of(run.paths) for element, run in left.items()}
    resources = _resources(next(iter(specs.values())), before, request, wanted)
    for element, spec in specs.items():
        with at_point(points[element]["overrides"]):
            check(spec, request, False)
    # Runs that were resumed alone have counted their own on from the sweep's.
    number = max(number for each in (paths, *(run.paths for run in members.values())) for number in each.submission_numbers()) + 1
    sweep = make_sweep(paths.id, points, specs, request, resources, root=paths.root.parent, cwd=Path(before.cwd),
                       copy=None if here else snapshot.load(paths.code), number=number,
                       parallel=parallel or (None if here else found["max_parallel"]))
    if not here:
        try_out(sweep.jobs[0], resources)
    _write_submission(sweep)
    job = record.worker_here() if here else _submitting(sweep)
    with _writing(paths.root.parent):
        for run in left.values():
            update_json(run.paths.record, state="submitted", job=job, updated=utc_now())
    if here:
        update_json(paths.root / SWEEP, job=job)
        return _in_turn(sweep, json)
    try:
        ids = _hand_over(sweep)
    except BaseException:
        for run in left.values():
            update_json(run.paths.record, state=run.record["state"], job=run.record["job"])
        shutil.rmtree(paths.submission(number))
        raise
    _say(sweep, ids, json)
    return 0


def _resources(spec: Spec, before: Submission, request: Request, wanted: Wanted) -> Resources:
    last = before.resources
    if not wanted and before.cluster.name == request.cluster.name:
        return last
    if not wanted:
        on_gpus = last.gpus or last.device == "cuda"
        wanted = Wanted(gpus=last.gpus or last.ranks) if on_gpus else Wanted(procs=last.ranks)
    return resources_of(spec.config, request.cluster, wanted)


def _members(sweep: RunPaths, points: Sequence[Mapping[str, Any]]) -> dict[int, Run]:
    """Its runs by their points' places, but for those that were removed."""
    folders = {element: sweep.root.parent / point["run"] for element, point in enumerate(points)}
    return {element: read_run(folder) for element, folder in folders.items() if folder.exists()}


def _adopt(sweep: RunPaths, members: Mapping[int, Run]) -> None:
    """Note the jobs of a submission that broke off before it could, and let them go.

    Raises:
        UserError: it is under way; SLURM does not answer.
    """
    unfinished = {element: run for element, run in members.items()
                  if run.record["state"] != "finished" and (run.record["job"] or {}).get("kind") == "slurm"}
    queued = list(slurm.queue().values()) if unfinished else []
    held, adopted = [], {}
    for element, run in unfinished.items():
        job = run.record["job"]
        if not job["ids"] and job["host"] == socket.gethostname() and alive(job["pid"], job["started"]):
            raise UserError(f"sweep {sweep.id} is being submitted by process {job['pid']}", "wait a moment")
        scripts = {f"{paths.submission(job['submission'])}/job.sh" for paths in (sweep, run.paths)}
        mine = [each for each in queued if each.script in scripts and ("_" not in each.id or each.id.endswith(f"_{element}"))]
        held += [each.id for each in mine if each.reason == HELD]
        if mine and not job["ids"]:
            ids = sorted((each.id for each in mine), key=_job_number)
            adopted = {**{key: job[key] for key in ("kind", "cluster", "submission")}, "ids": ids}
            update_json(run.paths.record, job=adopted)
    if adopted:
        update_json(sweep.root / SWEEP, job={**adopted, "ids": [str(id) for id in sorted(set(map(_job_number, held)))]})
    if held:
        release(held)


def _job_number(id: str) -> int:
    return int(id.partition("_")[0])


def _going(members: Iterable[Run]) -> set[str]:
    """The ids of those runs that are at work, or wait to be."""
    jobs = {run.id: (run, run.record["job"] or {}) for run in members if run.record["state"] != "finished"}
    ids = [id for _, job in jobs.values() for id in job.get("ids", ())]
    queued = slurm.queue(ids) if ids else {}

    def going(run: Run, job: Mapping[str, Any]) -> bool:
        if job.get("kind") != "local":
            return bool(queued.keys() & set(job.get("ids", ())))
        # One that waits for its turn on another host is whose of the two begins it.
        state = state_of(run)
        return state == "running" or state == "submitted" and job["host"] == socket.gethostname()

    return {id for id, (run, job) in jobs.items() if going(run, job)}
