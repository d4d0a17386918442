"""Which checkpoints are kept, and which are deleted after a new one. Pure functions; imports no torch."""

from __future__ import annotations

import math
from typing import Mapping

from trainers.config.schema import Checkpoint


def kept(metrics: Mapping[int, Mapping[str, float | None]], config: Checkpoint) -> dict[int, list[str]]:
    """Return the steps whose checkpoints are kept, newest first, each with the reasons why.

    The reasons are `last` (one of the `keep_last` newest), `best` (one of the `keep_best` best by `metric`; the newer one if
    two are equal), and `every` (the step is a multiple of `keep_every`).

    Args:
        metrics: the metrics of each committed step, by name. A step without `metric` is never one of the best.
    """
    steps = sorted(metrics)
    why: dict[str, set[int]] = {"last": set(steps[-config.keep_last:]), "best": set(), "every": set()}
    if config.keep_every is not None:
        why["every"] = {step for step in steps if step % config.keep_every == 0}
    if config.keep_best:
        why["best"] = set(ranked(metrics, config)[-config.keep_best:])
    reasons = {step: [reason for reason, kept_steps in why.items() if step in kept_steps] for step in reversed(steps)}
    return {step: step_reasons for step, step_reasons in reasons.items() if step_reasons}


def ranked(metrics: Mapping[int, Mapping[str, float | None]], config: Checkpoint) -> list[int]:
    """Return the steps with a finite `metric`, from the worst to the best. Of equal steps, the newer is the better."""
    sign = 1 if config.mode == "max" else -1
    values = {step: by_name.get(config.metric) for step, by_name in metrics.items()} if config.metric is not None else {}
    return [step for _, step in sorted((sign * value, step) for step, value in values.items()
                                       if value is not None and math.isfinite(value))]


def stale(metrics: Mapping[int, Mapping[str, float | None]], config: Checkpoint, newest: int) -> list[int]:
    """Return the steps to delete after step `newest` was committed, oldest first. Steps after `newest` are left alone."""
    candidates = {step: by_name for step, by_name in metrics.items() if step <= newest}
    keep = kept(candidates, config)
    return [step for step in sorted(candidates) if step not in keep]
