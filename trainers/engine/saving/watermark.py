"""What a checkpoint remembers of the data, so that no run continues on other data unnoticed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from trainers.checkpoints import facts
from trainers.contract.errors import UserError
from trainers.engine.map_style import MapStyle
from trainers.engine.setup import Setup
from trainers.engine.task import Dataset

HINT = "restore the old data, or start a new run"


def watermark(setup: Setup) -> dict[str, Any]:
    """Return what `check_data` compares, for a checkpoint's state."""
    sets = (setup.train_set, setup.eval_set)
    return {"samples": [0 if dataset is None else len(dataset) for dataset in sets], "facts": setup.facts,
            "data": [None if dataset is None else fingerprint(dataset) for dataset in sets]}


def fingerprint(dataset: Dataset) -> str | None:
    """Return a text that differs for data sets with other samples: the data set's own, or a hash of the samples' lengths or
    targets in order; None if it has nothing of these.

    Samples themselves are not hashed: their values may depend on the device, and on the version of a library.
    """
    samples = dataset.dataset if isinstance(dataset, MapStyle) else dataset
    if hasattr(samples, "fingerprint"):
        return str(samples.fingerprint())
    for given in (getattr(samples, "lengths", None), getattr(getattr(samples, "dataset", samples), "targets", None)):
        try:
            values = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
        except (TypeError, ValueError):  # lists of unequal lengths
            continue
        if values.dtype.kind in "iu":
            return hashlib.sha256(repr(values.shape).encode() + values.astype("<i8").tobytes()).hexdigest()[:16]
    return None


def check_data(setup: Setup, state: Mapping[str, Any]) -> None:
    """Check that the data has not changed: otherwise the run would be another run.

    Args:
        state: a checkpoint's, with what `watermark` returned. Older versions kept no `facts` and no `data`.

    Raises:
        UserError: the number of samples, the task's facts or a fingerprint has changed.
    """
    now, before, trained = watermark(setup), state["samples"], state.get("facts")
    if before != now["samples"]:
        older = trained is None and bool(setup.facts)
        reason = (", or the older version that started the run read it differently (other folders, other files)" if older
                  else "")
        raise UserError(f"the data has changed since this run started{reason}: it had {before[0]} training and {before[1]} "
                        f"evaluation samples, now it has {now['samples'][0]} and {now['samples'][1]}",
                        HINT + ("; or go on with the version of `launch` that started this run" if older else ""))
    if changes := facts.differences(trained or {}, setup.facts):
        raise UserError(f"the data has changed since this run started: {'; '.join(changes)}", HINT)
    for name, was, is_now in zip(("training", "evaluation"), state.get("data", (None, None)), now["data"], strict=True):
        if None not in (was, is_now) and was != is_now:
            raise UserError(f"the data has changed since this run started: the {name} set has as many samples as before, but "
                            "other ones, or in another order", HINT)
