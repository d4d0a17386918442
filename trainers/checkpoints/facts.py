"""The facts that a task keeps with its weights: the names of classes, statistics of the data, a vocabulary. Imports no torch.

`Task.facts` in trainers/engine/task.py says what a fact is. Each checkpoint holds the facts in its state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainers.checkpoints.manifest import STATE
from trainers.contract.errors import UserError
from trainers.contract.files import read_json

Facts = Mapping[str, Any]

# Statistics of the same images may differ by this much if another version of a library has decoded the images.
TOLERANCE = 1e-3


def checked(facts: Any) -> dict[str, Any]:
    """Return the facts that a task gives, as they will be read from a checkpoint.

    Raises:
        UserError: the facts are not a mapping of names to values that JSON can hold.
    """
    if not isinstance(facts, Mapping):
        raise UserError(f"the task's `facts` returns a {type(facts).__name__}, but must return names with values")
    for name, value in facts.items():
        try:
            json.dumps({name: value})
        except (TypeError, ValueError) as error:
            raise UserError(f"the task's `facts` returns `{name}`, which JSON cannot hold: {error}",
                            "return text, numbers, and lists and mappings of text and numbers") from error
    return json.loads(json.dumps(dict(facts)))


def read(checkpoint: Path) -> dict[str, Any]:
    """Return the facts in a checkpoint. The result is empty if the folder is no checkpoint, or is from an older version."""
    try:
        return read_json(checkpoint / STATE).get("facts", {})
    except (OSError, ValueError, AttributeError):  # whoever loads the weights verifies the files and reports what is broken
        return {}


def names(facts: Facts) -> dict[str, list[str]]:
    """Return the facts that are lists of text: what the model's inputs or outputs mean, in order."""
    return {key: value for key, value in facts.items()
            if isinstance(value, list) and value and all(isinstance(word, str) for word in value)}


def differences(before: Facts, now: Facts) -> list[str]:
    """Return a phrase for each fact that is in both and differs. Numbers may differ by a relative error of 0.001."""
    return [f"`{key}` was {_shown(before[key])}, and is {_shown(now[key])}" for key in before
            if key in now and not _equal(before[key], now[key])]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-6)
    return one == other


def _shown(value: Any) -> str:
    if isinstance(value, list):
        parts = [f"{part:.3g}" if isinstance(part, float) else str(part) for part in value]
        return f"[{', '.join(parts[:8])}{f', ... ({len(parts):,} in all)' if len(parts) > 8 else ''}]"
    return f"`{value}`"
