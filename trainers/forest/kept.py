"""Finished pieces of work as files, one file for each piece. A search that was stopped continues from these files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trainers.contract.files import read_json, replace_json
from trainers.forest.fitting import Result

SCORES = ("test_scores", "train_scores")


class Kept:
    """A folder with the results of finished pieces, by the key of the piece.

    Several processes may write into the folder. They may write the same piece, because its results are the same.
    """

    def __init__(self, folder: Path):
        """Raises: OSError if the folder cannot be made."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keys(self) -> set[str]:
        """Return the keys of the pieces in the folder."""
        return {path.stem for path in self.folder.iterdir() if path.suffix == ".json" and not path.name.startswith(".")}

    def write(self, key: str, results: dict[int, Result], trees: int, seconds: float) -> None:
        """Write the results of a piece, by candidate. Raises: OSError if the file cannot be written."""
        distinct = {id(result): result for result in results.values()}.values()
        rows = [{"candidates": [number for number, other in results.items() if other is result], **_encoded(result)}
                for result in distinct]
        replace_json(self.folder / f"{key}.json", {"trees": trees, "seconds": round(seconds, 3), "results": rows})

    def read(self, key: str) -> dict[int, Result] | None:
        """Return the results of a piece, by candidate, or None if the file is missing or broken."""
        try:
            rows = read_json(self.folder / f"{key}.json")["results"]
            return {number: _decoded(row) for row in rows for number in row["candidates"]}
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _encoded(result: Result) -> dict[str, Any]:
    return {name: _map_scores(_json_number, value) if name in SCORES
            else value.item() if isinstance(value, np.generic) else value for name, value in result.items()}


def _decoded(row: dict[str, Any]) -> Result:
    return {name: _map_scores(float, value) if name in SCORES else value for name, value in row.items() if name != "candidates"}


def _map_scores(convert: Callable[[Any], Any], scores: Any) -> Any:
    return {name: convert(score) for name, score in scores.items()} if isinstance(scores, dict) else convert(scores)


def _json_number(score: Any) -> float | str:
    """Return a score as JSON can hold it: JSON keeps a finite number exactly, but has no nan and no infinity."""
    score = float(score)
    return score if math.isfinite(score) else repr(score)
