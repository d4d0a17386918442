"""Which checkpoint of a run is meant. Imports no torch."""

from __future__ import annotations

from trainers.config import Checkpoint
from trainers.engine import manifest, retention
from trainers.errors import UserError
from trainers.paths import RunPaths


def choose(paths: RunPaths, which: str | None, config: Checkpoint) -> int:
    """The step of a run's whole checkpoint.

    Whole by its manifest and the sizes of its files: their hashes are for whoever reads them.

    Args:
        which: a step, `best` by `config.metric`, or `newest`, as None.

    Raises:
        UserError: there is none such.
    """
    steps = paths.checkpoint_steps()
    if not steps:
        raise UserError(f"run {paths.id} has no checkpoint", f"looked in {paths.checkpoints}")
    if which not in (None, "newest", "best"):
        if not which.isdecimal():
            raise UserError(f"`{which}` names no checkpoint of a run", f"give `newest`, `best` or a step: {_listed(steps)}")
        if int(which) not in steps:
            raise UserError(f"run {paths.id} has no checkpoint of step {which}", f"there is {_listed(steps)}")
        steps = [int(which)]
    metrics, problems = {}, {}
    for step in reversed(steps):
        try:
            metrics[step] = manifest.sealed(paths.checkpoint(step), step)["metrics"]
        except manifest.Broken as problem:
            problems[step] = str(problem)
            continue
        if which != "best":
            return step
    if not metrics:
        step, problem = next(iter(problems.items()))
        raise UserError(f"no checkpoint of run {paths.id} is whole (step {step}: {problem})" if which in (None, "newest", "best")
                        else f"the checkpoint of step {step} of run {paths.id} is broken: {problem}",
                        f"there is {_listed(paths.checkpoint_steps())}")
    if config.metric is None:
        raise UserError(f"run {paths.id} names no metric by which a checkpoint is the best (`checkpoint.metric`)",
                        f"give a step: {_listed(steps)}")
    ranked = retention.ranked(metrics, config)
    if not ranked:
        raise UserError(f"no checkpoint of run {paths.id} was evaluated by `{config.metric}` (`checkpoint.metric`)",
                        f"give a step: {_listed(steps)}")
    return ranked[-1]


def _listed(steps: list[int], most: int = 8) -> str:
    return ("..., " if len(steps) > most else "") + ", ".join(f"step {step}" for step in steps[-most:])
