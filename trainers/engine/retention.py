"""Which checkpoints a new one makes superfluous. Pure; imports no torch."""

from __future__ import annotations

import math
from typing import Mapping

from trainers.config import Checkpoint


def stale(metrics: Mapping[int, Mapping[str, float | None]], config: Checkpoint, newest: int) -> list[int]:
    """The steps to delete after `newest` was committed, oldest first.

    Kept are the last `keep_last`, the best `keep_best` by `metric` (of equals the newer), and every
    multiple of `keep_every`; and whatever is newer than `newest`.

    Args:
        metrics: of each committed step, by name; a step without the metric is never among the best.
    """
    steps = sorted(step for step in metrics if step <= newest)
    keep = set(steps[-config.keep_last:])
    if config.keep_every is not None:
        keep.update(step for step in steps if step % config.keep_every == 0)
    if config.metric is not None and config.keep_best:
        sign = 1 if config.mode == "max" else -1
        values = {step: metrics[step].get(config.metric) for step in steps}
        ranked = sorted((sign * v, step) for step, v in values.items() if v is not None and math.isfinite(v))
        keep.update(step for _, step in ranked[-config.keep_best:])
    return [step for step in steps if step not in keep]
