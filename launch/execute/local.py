"""Execute a plan on this machine: one attempt after another."""

from __future__ import annotations

import importlib
import json as jsonlib
import os
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable

from launch.cluster.config import ClusterConfig, load_cluster
from launch.cluster.resources import Resources, Wanted, resources_of
from launch.execute import record
from launch.execute.record import EXIT_CODES, recorded, take_attempt, worker_here
from launch.plan.initial_weights import resolved, warn
from launch.plan.plan import Plan, make_plan
from launch.plan.show import as_json, show
from launch.plan.spec import Spec, record_spread, spec_of, spread_anew
from launch.records.naming import named, new_run_id, shown
from launch.records.run import Run
from launch.records.state import state_of
from launch.supervise.port import reserved_port
from launch.supervise.rank import Failure, Outcome
from launch.supervise.supervisor import supervise
from launch.supervise.terminal import View, make_view
from trainers.config.micro_batch import gave_way
from trainers.contract import exit_codes
from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths
from trainers.contract.text import duration


def execute(plan_of: Callable[[int], Plan], paths: RunPaths, number: int, view: View, restarts: int
            ) -> tuple[Outcome, int]:
    """Attempts, from `number` on, until one ends otherwise than by a failure worth repeating, or `restarts` are
    used up.

    Returns the last attempt's outcome and the exit code.

    Raises:
        UserError: another process has taken the run, or the run directory cannot be written.
    """
    while True:
        take_attempt(paths, number)
        plan = plan_of(number)
        number += 1
        try:
            outcome = _attempt(plan, paths, view, restarts)
        except OSError as error:
            raise UserError(f"attempt {plan.attempt} cannot run in {paths.root}: {error.strerror or error}",
                            f"mend that, then `launch resume {paths.id}`") from error
        failure = outcome.failure
        if _again(outcome, restarts, paths, plan.attempt):
            if gave_way(paths, plan.attempt):
                view.notice(f"attempt {plan.attempt} ended: {failure.message}; {failure.hint or 'trying again'}")
                continue
            restarts -= 1
            view.notice(f"attempt {plan.attempt} failed: {failure.message}; trying again ({restarts} more after this)")
            continue
        code = EXIT_CODES[outcome.kind]
        if failure and failure.exit_code == exit_codes.USER_ERROR and not failure.traceback:
            code = exit_codes.USER_ERROR
        return outcome, code


def _again(outcome: Outcome, restarts: int, paths: RunPaths, attempt: int) -> bool:
    """Whether another attempt may fare better. One with a smaller micro-batch counts as no restart."""
    if outcome.kind != "failed" or outcome.signal is not None:
        return False
    return gave_way(paths, attempt) or outcome.failure.retry and restarts > 0


def _attempt(plan: Plan, paths: RunPaths, view: View, restarts: int) -> Outcome:
    with recorded(plan, paths, view, worker_here()) as ended:
        with reserved_port() as port:
            outcome = supervise(plan, paths, view, port=port)
        ended(outcome, again=_again(outcome, restarts, paths, plan.attempt))
    return outcome


def debug_here(plan: Plan, paths: RunPaths, view: View) -> int:
    """One rank in this very process, standard input attached, so that `breakpoint()` works."""
    take_attempt(paths, plan.attempt)
    with recorded(plan, paths, view, worker_here()) as ended:
        with reserved_port() as port:
            for name in os.environ.keys() - plan.inherited(os.environ).keys():
                del os.environ[name]
            os.environ.update({**plan.env, **plan.rank_env(0, 0, "127.0.0.1", port), "LAUNCH_EVENTS": "0",
                               "LAUNCH_DEBUG": "1"})
            said = None
            try:
                code = _in_process(plan)
            except BaseException as error:
                said = traceback.format_exc()
                print(said, file=sys.stderr, end="")
                code = exit_codes.KILLED if isinstance(error, KeyboardInterrupt) else exit_codes.FAILED
        kind = {code: kind for kind, code in EXIT_CODES.items()}.get(code, "failed")
        message = said.splitlines()[-1] if said else f"ended with exit code {code}"
        ended(Outcome(kind, Failure(0, code, None, message, None, said, False) if kind == "failed" else None))
    return code if code in (*EXIT_CODES.values(), exit_codes.USER_ERROR) else exit_codes.FAILED


def _in_process(plan: Plan) -> int:
    if plan.batch is None:
        _, script, *args = plan.command
        sys.argv = [script, *args]
        sys.path.insert(0, str(Path(script).parent))
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0
    return importlib.import_module("trainers.run").main([plan.folder])


def start(*, spec: Spec, runs: Path, wanted: Wanted, debug: bool, dry_run: bool, json: bool, cluster: ClusterConfig) -> int:
    """Plan a new run on this machine and execute it. Returns the exit code.

    Raises:
        UserError: something the user must mend; nothing was written.
    """
    if debug and max(wanted.gpus or 0, wanted.procs or 0) > 1:
        raise UserError("--debug runs one rank in this process", "leave out --gpus and --procs, or give 1")
    resources = resources_of(spec.config, cluster, wanted)
    spec = resolved(spec, runs)
    warn([spec])
    if hasattr(spec.config, "check"):
        spec.config.check()
    plan_of = partial(plan_here, new_run_id(spec.name), spec, cluster, resources, runs.absolute(), Path.cwd())
    plan = plan_of(1)
    if dry_run:
        print(jsonlib.dumps(as_json(plan), indent=1, ensure_ascii=False) if json else show(plan), end="\n" * json)
        return 0
    view = make_view(json)
    paths = record.create_run(plan)
    view.notice(f"run {plan.run_id} in {shown(paths.root)}: {on(resources)}")
    return run_attempts(plan_of, paths, 1, view, plan.max_restarts, debug)


def resume(run: Run, *, wanted: Wanted, spread: Sequence[str] = (), json: bool, take_over: bool = False) -> int:
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
    state, job = state_of(run), run.record["job"] or {}
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
    resources, cwd = as_before(paths, spec, wanted)
    plan_of = partial(plan_here, paths.id, spec, load_cluster("local"), resources, paths.root.parent, cwd)
    plan = plan_of(number)
    if spread:
        record_spread(paths, spec)
    view.notice(f"run {paths.id} in {shown(paths.root)}, attempt {plan.attempt}: {on(resources)}")
    return run_attempts(plan_of, paths, number, view, plan.max_restarts, debug=False)


def as_before(paths: RunPaths, spec: Spec, wanted: Wanted) -> tuple[Resources, Path]:
    """(as many ranks of this machine as the run's last attempt had, unless told; the folder where that stood)

    Raises:
        UserError: this machine has not as many.
    """
    before = _last_attempt(paths)
    if wanted.gpus is None and wanted.procs is None and before:
        wanted = replace(wanted, **{"gpus" if before["device"] == "cuda" else "procs": before["ranks"]})
    cwd = Path(before["cwd"]) if before and Path(before["cwd"]).is_dir() else Path.cwd()
    # As many threads as before: another number sums in another order.
    same = before and before["ranks"] == (wanted.gpus or wanted.procs)
    threads = before.get("threads") if same else None
    return resources_of(spec.config, load_cluster("local"), wanted, threads), cwd


def plan_here(run_id: str, spec: Spec, cluster: ClusterConfig, resources: Resources, runs: Path, cwd: Path,
              attempt: int) -> Plan:
    return make_plan(run_id, spec, cluster, resources, runs=runs, python=sys.executable, cwd=cwd, attempt=attempt)


def run_attempts(plan_of, paths: RunPaths, number: int, view: View, restarts: int, debug: bool) -> int:
    began = time.monotonic()
    try:
        if debug:
            return debug_here(plan_of(number), paths, view)
        outcome, code = execute(plan_of, paths, number, view, restarts)
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
