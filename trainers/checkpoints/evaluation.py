"""The evaluation of a checkpoint's weights: a file beside the manifest, because it is written later. Imports no torch.

The manifest does not list this file. Without the file, or with a file that has changed, the checkpoint counts as not
evaluated, and a run that resumes from it evaluates again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.checkpoints import manifest
from trainers.config.schema import Checkpoint
from trainers.contract.files import jsonable, replace_text

NAME = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation has found."""

    metrics: Mapping[str, float]
    best: Sequence[float]  # the best values of `checkpoint.metric` in the run, with this evaluation, the best first
    waited: int = 0        # evaluations in a row, this one included, that brought no better value

    def then(self, metrics: Mapping[str, float], settings: Checkpoint) -> Evaluation:
        """Return the next evaluation, with these metrics. A value that is missing or not finite is not better."""
        value = None if settings.metric is None else metrics.get(settings.metric)
        if settings.metric is None or value is None or not math.isfinite(value):
            return Evaluation(metrics, self.best, self.waited + (settings.metric is not None))
        best = sorted([*self.best, value], reverse=settings.mode == "max")[:max(1, settings.keep_best)]
        return Evaluation(metrics, best, 0 if best[:1] != self.best[:1] else self.waited + 1)


def write(folder: Path, step: int, found: Evaluation) -> None:
    """Write the evaluation of checkpoint `step` in one piece. Raises: OSError: the file cannot be written."""
    content = {"step": step, "metrics": jsonable(dict(found.metrics)), "best": list(found.best), "waited": found.waited}
    replace_text(folder / NAME, manifest.sealed(content))


def read(folder: Path, step: int) -> Evaluation | None:
    """Return the evaluation of checkpoint `step`; None if the checkpoint has none, or if the file has changed."""
    try:
        content = manifest.unsealed((folder / NAME).read_text(encoding="utf-8"), NAME)
        if content["step"] != step:
            return None
        metrics = {name: math.nan if value is None else value for name, value in content["metrics"].items()}
        return Evaluation(metrics, content["best"], content.get("waited", 0))  # older versions wrote no `waited`
    except (OSError, ValueError, KeyError, TypeError, AttributeError, manifest.Broken):
        return None


def metrics(folder: Path, content: Mapping[str, Any]) -> Mapping[str, float | None]:
    """Return the metrics of a checkpoint, {} if it was not evaluated. Numbers that JSON does not have are None.

    Args:
        content: the manifest. Checkpoints of older versions have their metrics in it.
    """
    found = read(folder, content["step"])
    return jsonable(dict(found.metrics)) if found else content.get("metrics", {})
