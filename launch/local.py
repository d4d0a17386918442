"""Execute a plan on this machine: one attempt after another."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Callable

from launch.node import Failure, Outcome, supervise
from launch.plan import Plan
from launch.ports import reserved_port
from launch.record import EXIT_CODES, recorded, take_attempt, worker_here
from launch.view import View
from trainers.errors import UserError
from trainers.micro_batch import gave_way
from trainers.paths import RunPaths


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
        if failure and failure.exit_code == UserError.exit_code and not failure.traceback:
            code = UserError.exit_code
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


def debug(plan: Plan, paths: RunPaths, view: View) -> int:
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
                code = EXIT_CODES["killed"] if isinstance(error, KeyboardInterrupt) else EXIT_CODES["failed"]
        kind = {code: kind for kind, code in EXIT_CODES.items()}.get(code, "failed")
        message = said.splitlines()[-1] if said else f"ended with exit code {code}"
        ended(Outcome(kind, Failure(0, code, None, message, None, said, False) if kind == "failed" else None))
    return code if code in (*EXIT_CODES.values(), UserError.exit_code) else EXIT_CODES["failed"]


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
