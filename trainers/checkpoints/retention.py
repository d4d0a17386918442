"""Which checkpoints a new one makes superfluous. Pure; imports no torch."""

from __future__ import annotations

import math
from typing import Mapping

from trainers.config.schema import Checkpoint


def kept(metrics: Mapping[int, Mapping[str, float | None]], config: Checkpoint) -> dict[int, list[str]]:
    """Why a step is kept: `last`, among the last `keep_last`; `best`, among the best `keep_best` by `metric` (of equals the
    newer); `every`, a multiple of `keep_every`; by step, newest first. Those of no reason are not in it.

    Args:
        metrics: of each committed step, by name; a step without the metric is never among the best.
    """
    steps = sorted(metrics)
    why = {"last": set(steps[-config.keep_last:]), "best": set(), "every": set()}
    if config.keep_every is not None:
        why["every"] = {step for step in steps if step % config.keep_every == 0}
    if config.keep_best:
        why["best"] = set(ranked(metrics, config)[-config.keep_best:])
    reasons = {step: [reason for reason, those in why.items() if step in those] for step in reversed(steps)}
    return {step: found for step, found in reasons.items() if found}


def ranked(metrics: Mapping[int, Mapping[str, float | None]], config: Checkpoint) -> list[int]:
    """The steps that have a finite `metric`, the best last (of equals the newer)."""
    sign = 1 if config.mode == "max" else -1
    values = {step: found.get(config.metric) for step, found in metrics.items()} if config.metric is not None else {}
    return [step for _, step in sorted((sign * value, step) for step, value in values.items()
                                       if value is not None and math.isfinite(value))]


def stale(metrics: Mapping[int, Mapping[str, float | None]], config: Checkpoint, newest: int) -> list[int]:
    """The steps to delete after `newest` was committed, oldest first: those that nothing keeps and that are no newer."""
    older = {step: found for step, found in metrics.items() if step <= newest}
    keep = kept(older, config)
    return [step for step in sorted(older) if step not in keep]
