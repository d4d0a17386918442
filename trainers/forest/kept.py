"""Finished pieces as files, one each: what makes a search go on where it was stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from trainers.contract.files import read_json, replace_json
from trainers.forest.fitting import Result


class Kept:
    """A folder of results by key. Several processes may write into it, also the same piece: it is the same then."""

    def __init__(self, folder: Path):
        """Raises: OSError if it cannot be made."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keys(self) -> set[str]:
        """Of the pieces there are."""
        return {path.stem for path in self.folder.iterdir() if path.suffix == ".json" and not path.name.startswith(".")}

    def write(self, key: str, results: dict[int, Result], trees: int, seconds: float) -> None:
        """Raises: OSError."""
        rows = [{"candidates": [number for number, other in results.items() if other is result], **_written(result)}
                for result in {id(result): result for result in results.values()}.values()]
        replace_json(self.folder / f"{key}.json", {"trees": trees, "seconds": round(seconds, 3), "results": rows})

    def read(self, key: str) -> dict[int, Result] | None:
        """None if it is not there, or is broken."""
        try:
            rows = read_json(self.folder / f"{key}.json")["results"]
            return {number: _read(row) for row in rows for number in row["candidates"]}
        except (OSError, ValueError, KeyError, TypeError):
            return None


SCORES = ("test_scores", "train_scores")


def _written(result: Result) -> dict[str, Any]:
    return {name: _each(value, _text) if name in SCORES else value.item() if isinstance(value, np.generic) else value
            for name, value in result.items()}


def _read(row: dict[str, Any]) -> Result:
    return {name: _each(value, float) if name in SCORES else value for name, value in row.items() if name != "candidates"}


def _each(scores: Any, of: Any) -> Any:
    return {name: of(score) for name, score in scores.items()} if isinstance(scores, dict) else of(scores)


def _text(score: Any) -> float | str:
    """JSON writes a number such that it is read as the same one; it has none for nan and the infinities."""
    score = float(score)
    return score if math.isfinite(score) else repr(score)
