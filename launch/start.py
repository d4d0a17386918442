"""From a spec to a run, and from a run that was stopped to its next attempt."""

from __future__ import annotations

import json as jsonlib
import os
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from launch import local, record
from launch import runs as records
from launch.cluster import ClusterConfig, load_cluster
from launch.fit import memory_of
from launch.node import Outcome
from launch.plan import Plan, as_json, make_plan, show
from launch.resources import Resources, resources_of
from launch.spec import Spec, record_spread, spec_of, spread_anew
from launch.view import View, make_view
from launch.weights import resolved, warn
from trainers.errors import UserError
from trainers.events import duration
from trainers.files import read_json
from trainers.paths import RunPaths


def start(*, spec: Spec, runs: Path, gpus: int | None, procs: int | None, cpus: int | None = None, debug: bool,
          dry_run: bool, json: bool, cluster: ClusterConfig) -> int:
    """Plan a new run on this machine and execute it. Returns the exit code.

    Raises:
        UserError: something the user must mend; nothing was written.
    """
    if debug and max(gpus or 0, procs or 0) > 1:
        raise UserError("--debug runs one rank in this process", "leave out --gpus and --procs, or give 1")
    resources = resources_of(spec.config, cluster, gpus=gpus, procs=procs, cpus=cpus)
    spec = resolved(spec, runs)
    warn([spec])
    if hasattr(spec.config, "check"):
        spec.config.check()
    plan_of = partial(plan_here, new_run_id(spec.name), spec, cluster, resources, runs.absolute(), Path.cwd())
    plan = plan_of(1)
    if dry_run:
        plan = replace(plan, memory=memory_of(spec.config, resources))
        print(jsonlib.dumps(as_json(plan), indent=1, ensure_ascii=False) if json else show(plan), end="\n" * json)
        return 0
    view = make_view(json)
    paths = record.create_run(plan)
    view.notice(f"run {plan.run_id} in {shown(paths.root)}: {on(resources)}")
    return run_attempts(plan_of, paths, 1, view, plan.max_restarts, debug)


def resume(run: records.Run, *, gpus: int | None, procs: int | None, cpus: int | None = None, spread: Sequence[str] = (),
           json: bool, take_over: bool = False) -> int:
    """Continue a run that is neither running nor finished. Returns the exit code.

    Args:
        spread: how its models are spread from now on, as `spread_anew` takes it.
        take_over: believe no record that it runs on another host; should it do so after all, that attempt can commit
            nothing more.

    Raises:
        UserError: it is running, or its record cannot be read.
    """
    paths, view = run.paths, make_view(json)
    number = record.next_attempt(paths)  # before the state is read: whoever else read the same one gets this number too
    working = number > 1 and record.at_work(paths, number - 1)
    run = run.again()
    state, job = run.state, run.record["job"] or {}
    elsewhere = job.get("host") not in (None, socket.gethostname())
    if working or state == "running" and not (take_over and elsewhere):
        where = f" on host {job['host']}" if elsewhere else ""
        raise UserError(f"run {paths.id} is running{where}",
                        f"if that host or process is gone: `launch resume {named(paths)} --take-over`" if elsewhere else
                        f"see `launch status {named(paths)}`, or stop it: `launch cancel {named(paths)}`")
    if state == "finished":
        view.notice(f"run {paths.id} is finished: nothing to resume")
        view.close()
        return 0
    spec = spec_of(paths)
    if spread:
        spec = spread_anew(spec, spread)
    resources, cwd = as_before(paths, spec, gpus, procs, cpus)
    plan_of = partial(plan_here, paths.id, spec, load_cluster("local"), resources, paths.root.parent, cwd)
    plan = plan_of(number)
    if spread:
        record_spread(paths, spec)
    view.notice(f"run {paths.id} in {shown(paths.root)}, attempt {plan.attempt}: {on(resources)}")
    return run_attempts(plan_of, paths, number, view, plan.max_restarts, debug=False)


def new_run_id(name: str) -> str:
    """Sorts by time, fits W&B, and is told apart from one made in the same second."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def as_before(paths: RunPaths, spec: Spec, gpus: int | None, procs: int | None, cpus: int | None = None
              ) -> tuple[Resources, Path]:
    """(as many ranks of this machine as the run's last attempt had, unless told; the folder where that stood)

    Raises:
        UserError: this machine has not as many.
    """
    before = _last_attempt(paths)
    if gpus is None and procs is None and before:
        gpus, procs = (before["ranks"], None) if before["device"] == "cuda" else (None, before["ranks"])
    cwd = Path(before["cwd"]) if before and Path(before["cwd"]).is_dir() else Path.cwd()
    # As many threads as before: another number sums in another order.
    same = before and before["ranks"] == (gpus or procs)
    threads = before.get("threads") if same else None
    return resources_of(spec.config, load_cluster("local"), gpus=gpus, procs=procs, cpus=cpus, threads=threads), cwd


def plan_here(run_id: str, spec: Spec, cluster: ClusterConfig, resources: Resources, runs: Path, cwd: Path,
              attempt: int) -> Plan:
    return make_plan(run_id, spec, cluster, resources, runs=runs, python=sys.executable, cwd=cwd, attempt=attempt)


def run_attempts(plan_of, paths: RunPaths, number: int, view: View, restarts: int, debug: bool) -> int:
    began = time.monotonic()
    try:
        if debug:
            return local.debug(plan_of(number), paths, view)
        outcome, code = local.execute(plan_of, paths, number, view, restarts)
        if outcome.failure:
            view.event({"event": "failure", **outcome.failure.as_dict()})
        else:
            for line in _ending(outcome, paths, time.monotonic() - began):
                view.notice(line)
    finally:
        view.close()
    if outcome.failure:
        _print_failure(outcome, paths)
    return code


def _ending(outcome: Outcome, paths: RunPaths, seconds: float) -> list[str]:
    record = read_json(paths.record)
    if outcome.kind == "finished":
        model = [paths.checkpoint(record["checkpoint"])] if record["checkpoint"] is not None else []
        left = [*(("model", path) for path in (*model, paths.model)), ("table", paths.results),
                *(("figure", path) for path in sorted(paths.figures.glob("*.png")))]
        return [*(f"{what:<8}{shown(path)}" for what, path in left if path.exists()), f"took    {duration(seconds)}"]
    onward = f"go on with `launch resume {named(paths)}`"
    if paths.pieces.is_dir():  # a search
        return [f"stopped after {record['step']} of {record['total']} fits, which are kept; {onward}"]
    kept = f", checkpoint {record['checkpoint']}" if record["checkpoint"] is not None else ", without a checkpoint"
    return [f"stopped at step {record['step']}{kept}; {onward}"]


def _print_failure(outcome: Outcome, paths: RunPaths) -> None:
    """The one place where a failed attempt is told to the person at the terminal."""
    failure = outcome.failure
    # Rank 0's own words were on the terminal already.
    if failure.traceback and failure.rank != 0:
        print(failure.traceback, file=sys.stderr)
    log = shown(paths.log(paths.attempt_numbers()[-1], failure.rank))
    checkpoint = read_json(paths.record)["checkpoint"]
    onward = f"; `launch resume {named(paths)}` goes on from checkpoint {checkpoint}" if checkpoint is not None else ""
    hint = failure.hint or f"its log is {log}{onward}"
    print(UserError(failure.message, hint), file=sys.stderr)


def _last_attempt(paths: RunPaths) -> dict | None:
    for number in reversed(paths.attempt_numbers()):
        try:
            return read_json(paths.attempt_record(number))
        except (OSError, ValueError):
            continue
    return None


def on(resources: Resources) -> str:
    what = "GPU" if resources.device == "cuda" else "CPU rank"
    return f"{resources.ranks} {what}{'s' if resources.ranks > 1 else ''}"


def shown(path: Path) -> str:
    """Relative where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def named(paths: RunPaths) -> str:
    """What to call the run in the next command: its id where `launch` looks for it, else its path."""
    default = Path(os.environ.get("LAUNCH_RUNS", "runs")).absolute()
    return paths.id if paths.root.parent == default else shown(paths.root)
