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

HEADER_BYTES = 100_000_000  # the limit of the safetensors library
SHOWN = 8  # items of a list in a message


def checked(facts: Any, method: str = "facts") -> dict[str, Any]:
    """Return the facts that a task gives, as they will be read from a checkpoint.

    Args:
        method: the task's method that has returned them, for messages.

    Raises:
        UserError: the facts are not a mapping of names to values that JSON can hold.
    """
    if not isinstance(facts, Mapping):
        raise UserError(f"the task's `{method}` returns a {type(facts).__name__}, but must return names with values")
    for name, value in facts.items():
        try:
            json.dumps({name: value})
        except (TypeError, ValueError) as error:
            raise UserError(f"the task's `{method}` returns `{name}`, which JSON cannot hold: {error}",
                            "return text, numbers, and lists and mappings of text and numbers") from error
    return json.loads(json.dumps(dict(facts)))


def read(checkpoint: Path) -> dict[str, Any]:
    """Return the facts in a checkpoint, or in an export of one: a safetensors file, or a folder of such files.

    The result is empty if there are none: in a checkpoint of an older version, or in files of other programs.
    """
    try:
        if (checkpoint / STATE).exists():
            return read_json(checkpoint / STATE).get("facts", {})
        files = sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]
        return _from_metadata(_metadata(files[0])) if files else {}
    except (OSError, ValueError, AttributeError, TypeError):  # whoever loads the weights reports what is broken
        return {}


def metadata(facts: Facts, run: str, step: int) -> dict[str, str]:
    """Return the metadata of an export: the facts as JSON, and the run and the step. `read` reads them back."""
    return {**{key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()}, "run": run, "step": str(step)}


def _metadata(file: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > HEADER_BYTES:
            raise ValueError(f"{file} is not a safetensors file")
        return json.loads(opened.read(length)).get("__metadata__", {})


def _from_metadata(texts: Mapping[str, str]) -> dict[str, Any]:
    if not {"run", "step"} <= texts.keys():  # not an export of this software
        return {}
    found: dict[str, Any] = {}
    for key in texts.keys() - {"run", "step", "format"}:
        try:
            found[key] = json.loads(texts[key])
        except ValueError:  # older versions wrote text as it is
            found[key] = texts[key]
    return found


def names(facts: Facts) -> dict[str, list[str]]:
    """Return the facts that are lists of text: what the model's inputs or outputs mean, in order."""
    return {key: value for key, value in facts.items()
            if isinstance(value, list) and value and all(isinstance(word, str) for word in value)}


def differences(before: Facts, now: Facts) -> list[str]:
    """Return a phrase for each fact that is in both and differs. Numbers may differ by a relative error of 0.001."""
    return [_difference(key, before[key], now[key]) for key in before if key in now and not _equal(before[key], now[key])]


def _difference(key: str, before: Any, now: Any) -> str:
    phrase = f"`{key}` was {_shown(before)}, and is {_shown(now)}"
    if not (isinstance(before, list) and isinstance(now, list)):
        return phrase
    place = next((place for place, pair in enumerate(zip(before, now)) if not _equal(*pair)), min(len(before), len(now)))
    if place < SHOWN:
        return phrase
    one, other = (_part(values[place]) if place < len(values) else "nothing" for values in (before, now))
    return f"{phrase}: number {place + 1:,} was {one}, and is {other}"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-6)
    return one == other


def _shown(value: Any) -> str:
    if isinstance(value, list):
        more = f", ... ({len(value):,} in all)" if len(value) > SHOWN else ""
        return f"[{', '.join(map(_part, value[:SHOWN]))}{more}]"
    return "null" if value is None else f"`{value}`"


def _part(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
