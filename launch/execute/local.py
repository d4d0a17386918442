"""Run attempts on this machine: start a run, resume a run, and retry after failures."""

from __future__ import annotations

import bdb
import importlib
import json as jsonlib
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable

from launch.cluster.config import ClusterConfig, load_cluster
from launch.cluster.resources import Resources, Wanted, resources_of
from launch.execute import record, renewal
from launch.execute.copies import adopt
from launch.execute.record import EXIT_CODES, local_job, recorded, take_attempt
from launch.execute.submission_plan import describe_code
from launch.plan.initial_weights import warn_of_broken, with_weights
from launch.plan.plan import Plan, make_plan
from launch.plan.show import as_json, show
from launch.plan.spec import Spec, record_changes, spec_of, with_changes
from launch.records.naming import command_name, new_run_id, short_path
from launch.records.run import Run
from launch.records.state import state_of
from launch.supervise.port import reserved_port
from launch.supervise.rank import Failure, Outcome
from launch.supervise.supervisor import folder_deleted, is_there, supervise
from launch.supervise.terminal import View, make_view
from trainers.config.retries import changes_settings
from trainers.contract import exit_codes
from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths
from trainers.contract.text import duration


def start(*, spec: Spec, runs: Path, wanted: Wanted, debug: bool, dry_run: bool, json: bool, cluster: ClusterConfig) -> int:
    """Plan a new run on this machine and execute the plan. Returns the exit code.

    Raises:
        UserError: the user must fix something; nothing was written.
    """
    if debug and max(wanted.gpus or 0, wanted.procs or 0) > 1:
        raise UserError("--debug runs one rank in this process", "leave out --gpus and --procs, or give 1")
    resources = resources_of(spec.config, cluster, wanted)
    spec = with_weights(spec, runs)
    warn_of_broken([spec])
    if hasattr(spec.config, "check"):
        spec.config.check()
    plan_of = partial(plan_here, new_run_id(spec.name), spec, cluster, resources, runs.absolute(), Path.cwd())
    plan = plan_of(1)
    if dry_run:
        print(jsonlib.dumps(as_json(plan), indent=1, ensure_ascii=False) if json else show(plan), end="\n" * json)
        return 0
    view = make_view(json)
    paths = record.create_run(plan)
    describe_code([spec], paths.code)
    view.notice(f"run {plan.run_id} in {short_path(paths.root)}: {ranks_text(resources)}")
    return run_attempts(plan_of, paths, 1, view, plan.max_restarts, debug)


def resume(run: Run, *, wanted: Wanted, changes: Sequence[str] = (), json: bool, take_over: bool = False) -> int:
    """Continue a run that is not running and not finished. Returns the exit code.

    Args:
        changes: keys that may change when a run is resumed, as `with_changes` takes them.
        take_over: ignore a record that says that the run is running on another host. If the run is in fact running
            there, its attempt can commit nothing more.

    Raises:
        UserError: the run is running, or its record cannot be read.
    """
    paths, view = run.paths, make_view(json)
    adopt(run)
    # The number is read before the state: two processes that see the same state also get the same number, and only
    # one of them can take the attempt.
    number = record.next_attempt(paths)
    running_here = number > 1 and record.runs_here(paths, number - 1)
    run = run.reread()
    state, job = state_of(run), run.record["job"] or {}
    elsewhere = job.get("host") not in (None, socket.gethostname())
    if running_here or state == "running" and not (take_over and elsewhere):
        where = f" on host {job['host']}" if elsewhere else ""
        raise UserError(f"run {paths.id} is running{where}",
                        f"if that host or process is gone: `launch resume {command_name(paths)} --take-over`" if elsewhere else
                        f"see `launch status {command_name(paths)}`, or stop the run: `launch cancel {command_name(paths)}`")
    if state == "finished" and (told := renewal.complete(run, changes)):
        view.notice(told)
        view.close()
        return 0
    spec = spec_of(paths)
    specs, _ = renewal.survey([spec], paths.code)
    if changes:
        spec = with_changes(spec, changes)
    resources, cwd = as_before(paths, spec, wanted)
    plan_of = partial(plan_here, paths.id, spec, load_cluster("local"), resources, paths.root.parent, cwd)
    plan = plan_of(number)
    renewal.renew(specs, paths.code, f"code-until-attempt-{number - 1}")
    if changes:
        record_changes(paths, spec)
    view.notice(f"run {paths.id} in {short_path(paths.root)}, attempt {plan.attempt}: {ranks_text(resources)}")
    return run_attempts(plan_of, paths, number, view, plan.max_restarts, debug=False)


def as_before(paths: RunPaths, spec: Spec, wanted: Wanted) -> tuple[Resources, Path]:
    """The resources and the working folder of the run's last attempt, for another attempt on this machine.

    If `wanted` asks for GPUs or CPU ranks, its numbers replace those of the last attempt. If the working folder of the last
    attempt no longer exists, the current folder replaces it.

    Raises:
        UserError: this machine does not have that many GPUs.
    """
    before = _last_attempt(paths)
    if wanted.gpus is None and wanted.procs is None and before:
        wanted = replace(wanted, **{"gpus" if before["device"] == "cuda" else "procs": before["ranks"]})
    cwd = Path(before["cwd"]) if before and Path(before["cwd"]).is_dir() else Path.cwd()
    # Keep the number of threads: another number sums in another order.
    threads = before.get("threads") if before and before["ranks"] == (wanted.gpus or wanted.procs) else None
    return resources_of(spec.config, load_cluster("local"), wanted, threads), cwd


def _last_attempt(paths: RunPaths) -> dict[str, Any] | None:
    """The newest attempt record that says on what the attempt ran: an attempt that could not start does not say it."""
    for number in reversed(paths.attempt_numbers()):
        try:
            record = read_json(paths.attempt_record(number))
        except (OSError, ValueError):
            continue
        if {"device", "ranks", "cwd"} <= record.keys():
            return record
    return None


def plan_here(run_id: str, spec: Spec, cluster: ClusterConfig, resources: Resources, runs: Path, cwd: Path,
              attempt: int) -> Plan:
    """The plan of an attempt that runs with this Python. Raises: UserError."""
    return make_plan(run_id, spec, cluster, resources, runs=runs, python=sys.executable, cwd=cwd, attempt=attempt)


def ranks_text(resources: Resources) -> str:
    """'1 GPU', '2 CPU ranks'"""
    what = "GPU" if resources.device == "cuda" else "CPU rank"
    return f"{resources.ranks} {what}{'s' if resources.ranks > 1 else ''}"


def run_attempts(plan_of: Callable[[int], Plan], paths: RunPaths, number: int, view: View, restarts: int, debug: bool) -> int:
    """Run attempts from `number` on, and tell the user how the last one ended. Returns the exit code.

    Args:
        plan_of: makes the plan of an attempt from its number.
        restarts: how often an attempt that failed is retried.
        debug: run a single attempt in this process.

    Raises:
        UserError: another process has taken the run, or the run directory cannot be written.
    """
    began = time.monotonic()
    try:
        if debug:
            return _debug(plan_of(number), paths, view)
        outcome, code = execute(plan_of, paths, number, view, restarts)
        if outcome.failure:
            view.event({"event": "failure", **outcome.failure.as_dict()})
        else:
            for line in _ending(outcome, paths, time.monotonic() - began, script=plan_of(number).batch is None):
                view.notice(line)
    finally:
        view.close()
    if outcome.failure:
        _print_failure(outcome.failure, paths)
    return code


def execute(plan_of: Callable[[int], Plan], paths: RunPaths, number: int, view: View, restarts: int
            ) -> tuple[Outcome, int]:
    """Run attempts from `number` on. Retry an attempt that failed, at most `restarts` times, if a retry may succeed.

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
                            f"fix that, then `launch resume {command_name(paths)}`") from error
        failure = outcome.failure
        if failure and not is_there(paths.root):
            outcome = Outcome("failed", folder_deleted(str(paths.root)), outcome.signal)
        elif failure and _worth_retrying(outcome, restarts, paths, plan.attempt):
            if changes_settings(paths, plan.attempt):
                view.notice(f"attempt {plan.attempt} ended: {failure.message}; {failure.hint or 'trying again'}")
                continue
            restarts -= 1
            view.notice(f"attempt {plan.attempt} failed: {failure.message}; trying again ({restarts} more after this)")
            continue
        return outcome, record.exit_code(plan, outcome)


def _attempt(plan: Plan, paths: RunPaths, view: View, restarts: int) -> Outcome:
    with recorded(plan, paths, view, local_job()) as ended:
        with reserved_port() as port:
            # A script reads the terminal or the pipe, as under torchrun. A closed standard input is not passed on: its number may
            # belong to another file by then.
            stdin = None if plan.batch is None and sys.stdin is not None else subprocess.DEVNULL
            outcome = supervise(plan, paths, view, port=port, stdin=stdin)
        ended(outcome, retrying=_worth_retrying(outcome, restarts, paths, plan.attempt))
    return outcome


def _worth_retrying(outcome: Outcome, restarts: int, paths: RunPaths, attempt: int) -> bool:
    """Whether the next attempt may succeed. A retry with other settings does not count as a restart."""
    failure = outcome.failure
    if failure is None or outcome.signal is not None:
        return False
    return changes_settings(paths, attempt) or failure.retry and restarts > 0


def _debug(plan: Plan, paths: RunPaths, view: View) -> int:
    """Run one rank in this process, which keeps its standard input, so that `breakpoint()` works. Returns the exit code."""
    take_attempt(paths, plan.attempt)
    with recorded(plan, paths, view, local_job()) as ended:
        with reserved_port() as port:
            inherited = plan.inherited(os.environ)
            for name in os.environ.keys() - inherited.keys():
                del os.environ[name]
            os.environ.update({**inherited, **plan.env, **plan.rank_env(0, 0, "127.0.0.1", port), "LAUNCH_EVENTS": "0",
                               "LAUNCH_DEBUG": "1"})
            trace = None
            try:
                code = _in_process(plan)
            except (bdb.BdbQuit, KeyboardInterrupt):  # `q` in the debugger, or Ctrl-C
                code = exit_codes.KILLED
            except BaseException:
                trace = traceback.format_exc()
                print(trace, file=sys.stderr, end="")
                code = exit_codes.FAILED
        kind = next((kind for kind, known in EXIT_CODES.items() if known == code), None)
        if kind is None or kind == "failed":
            message = trace.splitlines()[-1] if trace else f"ended with exit code {code}"
            outcome = Outcome("failed", Failure(0, code, None, message, None, trace, False))
        else:
            outcome = Outcome(kind)
        ended(outcome)
    return record.exit_code(plan, outcome)


def _in_process(plan: Plan) -> int:
    """Run the plan's script or task in this process. Returns its exit code."""
    if plan.batch is not None:
        return importlib.import_module("trainers.run").main([plan.folder])
    words = plan.command[plan.command.index("-u") + 1:]
    # The script's `import trainers` means its own package, as in a rank.
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("launch", "trainers")}
    for name in ours:
        del sys.modules[name]
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            sys.path.insert(0, plan.path or plan.cwd)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("launch", "trainers")]:
            del sys.modules[name]
        sys.modules.update(ours)
    return 0


def _ending(outcome: Outcome, paths: RunPaths, seconds: float, script: bool) -> list[str]:
    """Lines for the user about a run that did not fail: what it has written, or how to continue it.

    The steps and checkpoints of a script are not known.
    """
    record = read_json(paths.record)
    if outcome.kind == "finished":
        checkpoint = [paths.checkpoint(record["checkpoint"])] if record["checkpoint"] is not None else []
        files = [*(("model", path) for path in (*checkpoint, paths.model)), ("table", paths.results),
                 *(("figure", path) for folder in (paths.figures, *map(paths.pictures, paths.picture_steps()[-1:]))
                   for path in sorted(folder.glob("*.png")))]
        return [*(f"{what:<8}{short_path(path)}" for what, path in files if path.exists()), f"took    {duration(seconds)}"]
    longer = f"; raise it if a checkpoint takes longer: `launch resume {command_name(paths)} run.grace_s=SECONDS`"
    late = [f"warning: {outcome.note}{longer if 'run.grace_s' in outcome.note else ''}"] if outcome.note else []
    if script:
        return [*late, f"stopped; `launch resume {command_name(paths)}` starts the script again from its first line"]
    advice = f"continue with `launch resume {command_name(paths)}`"
    if paths.pieces.is_dir():  # a search
        return [f"stopped after {record['step']} of {record['total']} fits, which are kept; {advice}"]
    kept = f", checkpoint {record['checkpoint']}" if record["checkpoint"] is not None else ", without a checkpoint"
    where = "at once" if outcome.kind == "killed" else f"at step {record['step']}"  # a killed rank has not said its last step
    return [*late, f"stopped {where}{kept}; {advice}"]


def _print_failure(failure: Failure, paths: RunPaths) -> None:
    """Tell the user why the last attempt failed: the only place that prints a failure to the terminal."""
    # The output of rank 0 is on the terminal already.
    if failure.traceback and failure.rank != 0:
        print(failure.traceback, file=sys.stderr)
    hint = failure.hint
    if not hint:
        assert failure.rank is not None  # on this machine it is always a rank that fails
        checkpoint = read_json(paths.record)["checkpoint"]
        hint = f"its log is {short_path(paths.log(paths.attempt_numbers()[-1], failure.rank))}"
        if checkpoint is not None:
            hint += f"; `launch resume {command_name(paths)}` continues from checkpoint {checkpoint}"
    print(UserError(failure.message, hint), file=sys.stderr)
