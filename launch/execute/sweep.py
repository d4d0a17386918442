"""Sweeps: one run for each point of a grid, as one array on SLURM, or one after another on this machine.

A run with several seeds (`--seeds 3`) is a sweep over its seed.

    runs/<sweep>/sweep.json          the points, in order; written after the folders of all runs
    runs/<sweep>/submissions/<n>/    submission.json lists the runs, by element of the array
    runs/<sweep>/code/               one copy of the code for all runs
    runs/<sweep>-<i>/                the run of point i, from 0: an ordinary run; <sweep>-seed<s>/ if only the seed varies

Where jobs may not be requeued, the sweep is not an array: each run has its own chain of jobs. In a chain, a job starts
only if all jobs before it failed. SLURM cannot make an element of an array wait until the same element of another array fails.
An element can only wait for the whole other array, or (aftercorr) for the success of the same element.
"""

from __future__ import annotations

import json as jsonlib
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from launch.cluster import reasons, slurm
from launch.cluster.config import load_cluster
from launch.cluster.resources import Wanted, resources_of
from launch.execute import after, record, renewal, snapshot
from launch.execute.local import run_attempts
from launch.execute.on_slurm import check
from launch.execute.submission_plan import code_of, describe_code, take_code
from launch.execute.submit import hand_over, release, try_out, withdraw
from launch.execute.sweep_plan import (
    Sweep,
    at_point,
    counted,
    load_specs,
    make_sweep,
    overrides_text,
    show_sweep,
    submission_file,
    sweep_json,
)
from launch.plan.grid import Seeds, grid
from launch.plan.initial_weights import find_weights, warn_of_broken, with_weights
from launch.plan.job_script import Request
from launch.plan.spec import Spec, spec_of
from launch.plan.submission import last_submission, plan_of
from launch.records import read as runs
from launch.records import seeds as over_seeds
from launch.records.naming import command_name, new_run_id, short_path
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

# Starting a sweep


def start(*, words: Sequence[str], load: Callable[[Sequence[str]], Spec], request: Request, root: Path, wanted: Wanted,
          parallel: int | None, dry_run: bool, json: bool, seeds: Seeds | None = None) -> int:
    """Run a new sweep on this machine, or submit it to SLURM. Returns the exit code.

    Args:
        words: `key=value` words, some with several values.
        load: makes the spec of a point's words.
        request: on this machine, only its cluster counts.
        parallel: how many elements of the array may run at once.
        seeds: run each point once with each of these seeds.

    Raises:
        UserError: the user must fix something; nothing was written or submitted.
    """
    grid_points, local = grid(words, seeds), request.cluster.kind == "local"
    find = cache(find_weights)  # checking a checkpoint reads all of it
    specs = load_specs(grid_points, lambda words: with_weights(load(words), root, find))
    warn_of_broken(specs)
    resources = resources_of(specs[0].config, request.cluster, wanted, partition=request.partition)
    for point, spec in zip(grid_points, specs):
        with at_point(point.overrides):
            check(spec, request, dry_run)
    only_seeds = seeds is not None and len(grid_points) == len(seeds.values)
    sweep_id = new_run_id(f"{specs[0].name}-{'seeds' if only_seeds else 'sweep'}")
    names = [f"seed{seed}" for seed in seeds.values] if seeds and only_seeds else _numbers(len(specs))
    points = [{"run": f"{sweep_id}-{name}", "overrides": list(point.overrides)} for name, point in zip(names, grid_points)]
    copy = None if local else snapshot.survey([path for spec in specs for path in code_of(spec)], RunPaths(root / sweep_id).code)
    sweep = make_sweep(sweep_id, points, dict(enumerate(specs)), request, resources, root=root, cwd=Path.cwd(), copy=copy,
                       parallel=parallel)
    if dry_run:
        print(jsonlib.dumps(sweep_json(sweep), indent=1, ensure_ascii=False) if json else show_sweep(sweep), end="\n" * json)
        return 0
    if local:
        _write(sweep, specs, record.local_job())
        return _run_in_turn(sweep, json)
    try_out(sweep.jobs[0], resources)
    for warning in _write(sweep, specs, _submitting(sweep)):
        print(f"warning: {warning}", file=sys.stderr)
    try:
        ids = _submit(sweep)
    except BaseException:
        _remove(sweep)
        raise
    _print_submitted(sweep, ids, json)
    return 0


def _numbers(count: int) -> list[str]:
    """00, 01, ... 11: numbers of equal length, so that the names of runs sort by number."""
    return [f"{index:0{len(str(count - 1))}d}" for index in range(count)]


def _submitting(sweep: Sweep) -> dict[str, Any]:
    return record.submitting(sweep.submission.cluster.name, sweep.submission.number)


def _write(sweep: Sweep, specs: Sequence[Spec], job: Mapping[str, Any]) -> list[str]:
    """Make the folders of a new sweep and of its runs. A sweep on this machine only records what code there is.

    Args:
        specs: of the runs, with the paths of the user's original code.

    Returns:
        Warnings about files that were not copied with the code.

    Raises:
        UserError: a file cannot be written. No folder is left.
    """
    paths = RunPaths(Path(sweep.folder))
    try:
        _write_submission(sweep)
        if sweep.submission.cluster.kind == "local":
            describe_code(specs, paths.code)
            warnings = []
        else:
            warnings = take_code(specs, paths.code).warnings
        for plan in sweep.plans:
            record.create_run(plan, sweep=sweep.id, job=dict(job))
        with _write_errors(paths.root):
            replace_json(paths.root / SWEEP, {"id": sweep.id, "task": specs[0].name, "created": utc_now(), "job": dict(job),
                                              "max_parallel": sweep.parallel, "seed_key": _seed_key(sweep, specs[0]),
                                              "points": list(sweep.points)})
    except BaseException:
        _remove(sweep)
        raise
    return warnings


def _seed_key(sweep: Sweep, spec: Spec) -> str | None:
    """The task's key for the seed, if the sweep varies it."""
    varied = [override.partition("=")[0] for override in sweep.points[0]["overrides"]]
    return next((key for key in getattr(spec.config, "seed_keys", ()) if key in varied), None)


def _write_submission(sweep: Sweep) -> None:
    """Write submission.json. Of two processes that try, one can make its folder.

    Raises:
        UserError: another process has made the folder, or it cannot be written.
    """
    file = Path(sweep.folder) / submission_file(sweep)
    with _write_errors(file.parent):
        try:
            file.parent.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"sweep {sweep.id} has just been resumed by another process",
                            f"see `launch runs --sweep {sweep.id}`") from None
        replace_text(file, sweep.submission.text())


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError raised inside into a UserError: the folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}",
                        "make room there, or choose another place with --runs DIR or LAUNCH_RUNS") from error


def _remove(sweep: Sweep) -> None:
    for folder in (sweep.folder, *(plan.folder for plan in sweep.plans)):
        shutil.rmtree(folder, ignore_errors=True)


# On SLURM


def _submit(sweep: Sweep) -> list[str]:
    """Submit the sweep's jobs on hold, write their ids to the records of the runs, and release the jobs.

    Returns:
        The ids of the jobs.

    Raises:
        UserError: SLURM refuses a job, or a file cannot be written. No job stays in the queue.
    """
    root = Path(sweep.folder)
    job = {key: value for key, value in _submitting(sweep).items() if key in ("kind", "cluster", "submission")}
    try:
        if sweep.array:
            all_ids = hand_over(sweep.array, {}, root)
            ids_by_run = [[f"{all_ids[0]}_{element}"] for element in sweep.elements]
        else:
            ids_by_run = [hand_over(run_job, plan.files, Path(plan.folder))
                          for run_job, plan in zip(sweep.jobs, sweep.plans, strict=True)]
            all_ids = [id for ids in ids_by_run for id in ids]
        for plan, ids in zip(sweep.plans, ids_by_run):
            update_json(RunPaths(Path(plan.folder)).record, job={**job, "ids": ids}, updated=utc_now())
        update_json(root / SWEEP, job={**job, "ids": all_ids})
        if sweep.submission.number > 1:  # before, no other run can wait for one of these
            after.follow({RunPaths(Path(plan.folder)): ids for plan, ids in zip(sweep.plans, ids_by_run)})
        release(all_ids)
    except BaseException:
        withdraw(sweep.jobs)
        raise
    return all_ids


def _print_submitted(sweep: Sweep, ids: Sequence[str], json: bool) -> None:
    paths, resources = RunPaths(Path(sweep.folder)), sweep.submission.resources
    name = command_name(paths)
    commands = [f"launch runs --sweep {name}", f"launch cancel {name}"]
    if json:
        print(jsonlib.dumps({"id": sweep.id, "jobs": list(ids), "path": sweep.folder,
                             "runs": [plan.run_id for plan in sweep.plans], "next": commands}))
        return
    ranks = f"{resources.gpus} GPU(s)" if resources.gpus else f"{resources.ranks} CPU rank(s)"
    jobs = f"array {ids[0]}" if sweep.array else f"{len(ids)} jobs, {len(ids) // len(sweep.plans)} for each run"
    at_once = f", {sweep.parallel} at once" if sweep.parallel else ""
    print(f"sweep {sweep.id} submitted to {sweep.submission.cluster.name} as {jobs}: {counted(len(sweep.plans), 'run')} of "
          f"{ranks} on {resources.nodes} node(s){at_once}\nfolder  {short_path(paths.root)}\n"
          f"next    {commands[0]}\n        {commands[1]}")


# On this machine


def _run_in_turn(sweep: Sweep, json: bool) -> int:
    """Execute the runs that wait, one after another. Returns the exit code.

    The sweep continues after a run that failed. A stop signal ends the present run with a checkpoint, and the sweep.
    """
    job, stopped = record.local_job(), False
    codes: list[int] = []
    files = [RunPaths(Path(plan.folder)).record for plan in sweep.plans]

    def waiting(file: Path) -> bool:
        """Whether this process may still start the run: nobody has cancelled or started it in the meantime."""
        now = _read_record(file)
        return (now["state"], now["job"]) == ("submitted", job)

    with stop_signals() as stop:
        for element, plan, file in zip(sweep.elements, sweep.plans, files):
            if stopped := stopped or bool(stop.received):
                break
            if not waiting(file):
                continue
            paths, view = RunPaths(Path(plan.folder)), make_view(json)
            view.notice(f"point {element + 1} of {len(sweep.points)}, {overrides_text(sweep.points[element]['overrides'])}: "
                        f"run {paths.id} in {short_path(paths.root)}")
            try:
                codes.append(run_attempts(partial(plan_of, sweep.submission, paths), paths, record.next_attempt(paths), view,
                                      plan.max_restarts, debug=False))
            except UserError as error:
                view.close()
                print(error, file=sys.stderr)
                codes.append(error.exit_code)
            stopped = codes[-1] == exit_codes.KILLED or _read_record(file)["state"] == "preempted"
        for file in filter(waiting, files if stopped else ()):
            update_json(file, state="preempted", updated=utc_now())
    _notice(_ending(sweep), json)
    _tell_means(sweep, json)
    if stopped:
        return exit_codes.KILLED if codes[-1:] == [exit_codes.KILLED] else exit_codes.PREEMPTED
    failed = any(code not in (exit_codes.FINISHED, exit_codes.PREEMPTED) for code in codes)
    return exit_codes.FAILED if failed else max(codes, default=0)


def _ending(sweep: Sweep) -> str:
    """How many runs of the sweep are in each state, and what to do next, as one line."""
    states = [_read_record(RunPaths(Path(folder)).record)["state"] for folder in sweep.submission.runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    name = command_name(RunPaths(Path(sweep.folder)))
    advice = "" if set(states) == {"finished"} else f"; continue with `launch sweep --resume {name}`"
    return f"sweep {sweep.id}: {counts}; compare them with `launch runs --sweep {name}`{advice}"


def _tell_means(sweep: Sweep, json: bool) -> None:
    """Show the means over seeds, if the sweep varies the seed."""
    root, view = Path(sweep.folder).parent, make_view(json)
    points = over_seeds.means(root, sweep.id, runs.list_runs(root, sweep.id))
    if json and points:
        view.event({"event": "seeds", "points": points})
    elif points:
        for line in over_seeds.lines(points):
            view.notice(line)
    view.close()


def _read_record(file: Path) -> dict[str, Any]:
    """A run's record as it is now; a stand-in if the record cannot be read (its folder may have been deleted)."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return {"state": "unreadable", "job": None}


def _notice(message: str, json: bool) -> None:
    view = make_view(json)
    view.notice(message)
    view.close()


# Resuming a sweep


def resume(root: Path, word: str, *, request: Request | None, wanted: Wanted, parallel: int | None, json: bool) -> int:
    """Continue the runs of a sweep that have not finished. Returns the exit code.

    Args:
        root: the folder of runs.
        word: names the sweep.
        request: None: run where the sweep was last.

    Raises:
        UserError: there is no such sweep, it is being submitted just now, or the user must fix something else.
    """
    sweep_record = runs.read_sweep(root, word)
    paths, points = RunPaths(Path(sweep_record["path"])), sweep_record["points"]
    _adopt_jobs(paths, _members(paths, points))
    members = _members(paths, points)
    active = _active(members.values())
    to_resume = {element: run for element, run in members.items()
                 if run.id not in active and run.record["state"] != "finished"}
    if active:
        _notice(f"sweep {paths.id}: {counted(len(active), 'run')} running or waiting, left alone", json)
    if not to_resume:
        _notice(f"sweep {paths.id}: nothing {'else ' * bool(active)}to resume", json)
        return 0
    before = last_submission(paths)
    assert before is not None  # sweep.json is written after the first submission
    if request is None:
        request = Request(load_cluster(before.cluster.name), before.time, before.options)
    local = request.cluster.kind == "local"
    if not local:
        request = after.as_before(request, before, begun=any(run.paths.attempt_numbers() for run in members.values()))
    specs = {element: spec_of(run.paths) for element, run in to_resume.items()}
    first = next(iter(specs.values()))
    resources = (resources_of(first.config, request.cluster, wanted, partition=request.partition) if wanted
                 else renewal.resources_again(first, before.resources, before.cluster, request.cluster))
    for element, spec in specs.items():
        with at_point(points[element]["overrides"]):
            check(spec, request, False)
    # The submissions of a run that was resumed alone are counted together with its sweep's.
    homes = (paths, *(run.paths for run in members.values()))
    number = max(number for home in homes for number in home.submission_numbers()) + 1
    if active:
        print(f"sweep {paths.id} uses the code as it was submitted: other runs of the sweep still use it", file=sys.stderr)
    own_specs, copy = ([], snapshot.load(paths.code)) if active else renewal.survey([*specs.values()], paths.code)
    sweep = make_sweep(paths.id, points, specs, request, resources, root=paths.root.parent, cwd=Path(before.cwd),
                       copy=None if local else copy, number=number,
                       parallel=parallel or (None if local else sweep_record["max_parallel"]))
    if not local:
        try_out(sweep.jobs[0], resources)
    _write_submission(sweep)
    try:
        renewal.say_cluster_changes(before.cluster, request.cluster)
        renewal.renew(own_specs, paths.code, f"code-until-submission-{number - 1}")
    except UserError:
        shutil.rmtree(paths.submission(number), ignore_errors=True)
        raise
    job = record.local_job() if local else _submitting(sweep)
    with _write_errors(paths.root.parent):
        for run in to_resume.values():
            update_json(run.paths.record, state="submitted", job=job, updated=utc_now())
    if local:
        update_json(paths.root / SWEEP, job=job)
        return _run_in_turn(sweep, json)
    try:
        ids = _submit(sweep)
    except BaseException:
        for run in to_resume.values():
            update_json(run.paths.record, state=run.record["state"], job=run.record["job"])
        shutil.rmtree(paths.submission(number), ignore_errors=True)
        raise
    _print_submitted(sweep, ids, json)
    return 0


def _members(sweep: RunPaths, points: Sequence[Mapping[str, Any]]) -> dict[int, Run]:
    """The runs of a sweep by the index of their point, without runs whose folders were deleted."""
    folders = {element: sweep.root.parent / point["run"] for element, point in enumerate(points)}
    return {element: read_run(folder) for element, folder in folders.items() if folder.exists()}


def _adopt_jobs(sweep: RunPaths, members: Mapping[int, Run]) -> None:
    """Record and release the jobs of a submission that was interrupted before it could do so.

    Raises:
        UserError: the submission is still in progress, or SLURM does not answer.
    """
    unfinished = {element: run for element, run in members.items()
                  if run.record["state"] != "finished" and (run.record["job"] or {}).get("kind") == "slurm"}
    queue = list(slurm.queue().values()) if unfinished else []
    held: list[str] = []
    follows: list[tuple[Run, list[str]]] = []
    adopted: dict[str, Any] = {}
    for element, run in unfinished.items():
        job = run.record["job"]
        if not job["ids"] and job["host"] == socket.gethostname() and alive(job["pid"], job["started"]):
            raise UserError(f"sweep {sweep.id} is being submitted by process {job['pid']}", "wait a moment")
        scripts = {f"{paths.submission(job['submission'])}/job.sh" for paths in (sweep, run.paths)}
        own = [queued for queued in queue
               if queued.script in scripts and ("_" not in queued.id or queued.id.endswith(f"_{element}"))]
        on_hold = [queued.id for queued in own if queued.reason == reasons.HELD_BY_OWNER]
        held += on_hold
        if on_hold:
            follows.append((run, [queued.id for queued in own]))
        if own and not job["ids"]:
            ids = sorted((queued.id for queued in own), key=_job_number)
            adopted = {**{key: job[key] for key in ("kind", "cluster", "submission")}, "ids": ids}
            update_json(run.paths.record, job=adopted)
    if adopted:
        update_json(sweep.root / SWEEP, job={**adopted, "ids": [str(id) for id in sorted(set(map(_job_number, held)))]})
    if held:
        after.follow({run.paths: ids for run, ids in follows})
        release(held)


def _job_number(id: str) -> int:
    """101 for the job "101" and for the element "101_3" of an array."""
    return int(id.partition("_")[0])


def _active(members: Iterable[Run]) -> set[str]:
    """The ids of the runs that are running, or that wait to be started."""
    jobs = {run.id: (run, run.record["job"] or {}) for run in members if run.record["state"] != "finished"}
    ids = [id for _, job in jobs.values() for id in job.get("ids", ())]
    queued = slurm.queue(ids) if ids else {}

    def active(run: Run, job: Mapping[str, Any]) -> bool:
        if job.get("kind") != "local":
            return bool(queued.keys() & set(job.get("ids", ())))
        # A run that waits on another host belongs to whichever host starts it first.
        state = state_of(run)
        return state == "running" or state == "submitted" and job["host"] == socket.gethostname()

    return {id for id, (run, job) in jobs.items() if active(run, job)}
