"""Which checkpoint of a run a word means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers import yaml12
from trainers.config import Checkpoint
from trainers.engine import manifest, retention
from trainers.errors import UserError
from trainers.paths import RunPaths
from trainers.spec import mapping, read_text, validate


@dataclass(frozen=True)
class Choice:
    step: int
    passed_over: dict[int, str]  # what is wrong with each that was preferred, or may have been

    def warnings(self) -> list[str]:
        return [f"the checkpoint of step {step} is broken ({problem}): passed over" for step, problem in self.passed_over.items()]


def choose(paths: RunPaths, which: str | None, look: Callable[[Path, int], Any] = manifest.sealed) -> Choice:
    """A whole checkpoint of a run: of the newest, or the best, the first that is whole; of a step, that one or none.

    Args:
        which: a step, `best` by the run's `checkpoint.metric` (of equals the newer), or `newest`, as None.
        look: says whether one is whole: `manifest.sealed` by its manifest and the sizes of its files, `manifest.verify` by
            reading them all.

    Raises:
        UserError: there is none such, or none is whole.
    """
    steps = existing(paths)
    passed_over: dict[int, str] = {}
    if which in (None, "newest"):
        steps.reverse()
    elif which == "best":
        steps, passed_over = _best_first(paths)
    elif which.isdecimal():
        steps = existing(paths, int(which))
    else:
        raise UserError(f"`{which}` names no checkpoint of a run", f"give `newest`, `best` or a step: {_listed(steps)}")
    for step in steps:
        try:
            look(paths.checkpoint(step), step)
            return Choice(step, passed_over)
        except manifest.Broken as problem:
            passed_over[step] = str(problem)
    step, problem = max(passed_over.items())
    see = f"`launch checkpoint verify {paths.id}` looks at all"
    if which in (None, "newest", "best"):
        evaluated = " that was evaluated" if which == "best" else ""
        hint = "`newest` takes the newest whole one" if which == "best" else "put a good copy back"
        raise UserError(f"no checkpoint of `{paths.id}`{evaluated} is whole (step {step}: {problem})", f"{hint}; {see}")
    raise UserError(f"the checkpoint of step {step} of `{paths.id}` is broken: {problem}",
                    f"`newest` takes the newest whole one; {see}")


def existing(paths: RunPaths, step: int | None = None) -> list[int]:
    """The steps of which there are checkpoints, whole or not, oldest first; or this one alone.

    Raises:
        UserError: there is none, or not this one.
    """
    steps = paths.checkpoint_steps()
    if not steps:
        raise UserError(f"`{paths.id}` has no checkpoint", f"looked in {paths.checkpoints}")
    if step is not None and step not in steps:
        raise UserError(f"`{paths.id}` has no checkpoint of step {step}", f"there is {_listed(steps)}")
    return steps if step is None else [step]


def settings(paths: RunPaths) -> Checkpoint:
    """The run's `checkpoint` section: no more of its spec, which may need modules that are not here. Raises: UserError."""
    values = mapping(yaml12.read(read_text(paths.spec), paths.spec.name).value, paths.spec.name)
    return validate(Checkpoint, values.get("checkpoint") or {}, lambda key: paths.spec.name)


def _best_first(paths: RunPaths) -> tuple[list[int], dict[int, str]]:
    """(the steps that can be ranked, the problem of each that cannot say how good it is)"""
    config = settings(paths)
    see = f"`launch checkpoint list {paths.id}` shows the metrics of each: give a step"
    if config.metric is None:
        raise UserError(f"`{paths.id}` names no metric by which a checkpoint is the best (`checkpoint.metric`)", see)
    metrics, unreadable = {}, {}
    for step in existing(paths):
        try:
            metrics[step] = manifest.read(paths.checkpoint(step), step)["metrics"]
        except manifest.Broken as problem:
            unreadable[step] = str(problem)
    ranked = retention.ranked(metrics, config)[::-1]
    if not ranked and not unreadable:
        raise UserError(f"no checkpoint of `{paths.id}` was evaluated by `{config.metric}` (`checkpoint.metric`)", see)
    return ranked, unreadable


def _listed(steps: list[int], most: int = 8) -> str:
    return ("..., " if len(steps) > most else "") + ", ".join(f"step {step}" for step in steps[-most:])
