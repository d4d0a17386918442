"""The rows of a prediction on their way: each rank writes its rows into a file of its own, and rank 0 merges the files.

Ranks take the samples in an order of their own (one rank every third sample, or sorted by length). So each rank keeps the number
of the sample of each row, and no rank holds the rows of others in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from trainers.contract.errors import TrainingError, UserError, system_error
from trainers.contract.files import flush_folder, jsonable, temporary_path
from trainers.engine.rows.lines import Lines

Format = Literal["text", "json"]


def row_line(row: Any, format: Format) -> str:
    """Return a row as one line, without its line end.

    In `text`, a row that is text is the line itself, with `\\n` and `\\r` in place of line breaks. Everything else is JSON, in
    which numbers that are not finite are null, as in the other files of a run.

    Raises:
        TypeError, ValueError, RecursionError: JSON cannot hold the row.
    """
    if format == "text" and isinstance(row, str):
        return row.replace("\r", "\\r").replace("\n", "\\n")
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:  # a number is not finite, or the row contains itself
        return json.dumps(jsonable(json.loads(json.dumps(row, default=_plain))), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """Return an array, a tensor, or a number of numpy's as Python's lists and numbers."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"a {type(value).__name__} is not JSON")
    return value.tolist()


class Part:
    """The rows of one rank, in a file. A context: its end closes the file."""

    def __init__(self, folder: Path, rank: int, format: Format):
        """Open the rank's file. Raises: UserError: the file cannot be made."""
        self._path, self._format = _rows(folder, rank), format
        self._samples = _samples(folder, rank)
        self._numbers: list[np.ndarray] = []
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "wb")

    def write(self, numbers: np.ndarray, rows: Any) -> None:
        """Write what `Task.rows` returned for one batch.

        Args:
            numbers: int64 [n], the samples of the batch.

        Raises:
            UserError: there is not one row for each sample, JSON cannot hold a row, or the disk is full.
        """
        rows, lines = _checked(rows, len(numbers)), []
        for number, row in zip(numbers.tolist(), rows):
            try:
                line = row_line(row, self._format)
            except (TypeError, ValueError, RecursionError) as error:
                raise UserError(f"the task's row for sample {number + 1} cannot be written as JSON: {error}",
                                "return text, numbers, and lists and dicts of text and numbers as rows") from None
            lines.append(line.encode("utf-8", "backslashreplace") + b"\n")
        with _writing(self._path):
            self._file.write(b"".join(lines))
        self._numbers.append(numbers)

    def __enter__(self) -> Part:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            with suppress(OSError):
                self._file.close()
            return
        with _writing(self._path):
            self._file.close()
            np.save(self._samples, np.concatenate([np.zeros(0, np.int64), *self._numbers]))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"rows cannot be written to {path}: {error.strerror or error}", system_error(error).hint) from error


def _checked(rows: Any, count: int) -> Sequence[Any]:
    """Return the rows as a sequence. Raises: UserError: they are none, or their number is not `count`."""
    if hasattr(rows, "tolist"):
        rows = rows.tolist()
    if isinstance(rows, str | bytes | dict) or not isinstance(rows, Iterable):
        raise UserError(f"the task's `rows` returns a {type(rows).__name__}, but must return a list with one row for each sample",
                        "see `Task.rows` in trainers/engine/task.py")
    rows = list(rows)
    if len(rows) != count:
        raise UserError(f"the task's `rows` returns {len(rows):,} rows for a batch of {count:,} samples",
                        "return one row for each sample of the batch, in the same order")
    return rows


def merge(folder: Path, ranks: int, count: int, target: Path) -> None:
    """Write the rows of all ranks into one file, in the order of the samples. The file appears whole, or not at all.

    Raises:
        TrainingError: the ranks' rows are not those of `count` samples.
        UserError: the file cannot be written.
    """
    parts = [Lines(_rows(folder, rank)) for rank in range(ranks)]
    numbers = np.concatenate([np.load(_samples(folder, rank)) for rank in range(ranks)])
    order = np.argsort(numbers)
    if sum(map(len, parts)) != len(numbers) or not np.array_equal(numbers[order], np.arange(count)):
        raise TrainingError(f"the ranks have {len(numbers):,} rows, of {len(np.unique(numbers)):,} samples, but the input has "
                            f"{count:,}", "this is a fault of launch, or another program has changed its files: try again")
    firsts = np.cumsum([0, *map(len, parts)])
    owners = np.searchsorted(firsts, order, side="right") - 1
    temporary = temporary_path(target)
    try:
        with _writing(target):
            with open(temporary, "wb") as file:
                for owner, place in zip(owners.tolist(), (order - firsts[owners]).tolist()):
                    file.write(parts[owner].raw(place) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            flush_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _rows(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.txt"


def _samples(folder: Path, rank: int) -> Path:
    """The file with the number of the sample of each row."""
    return folder / f"{rank}.npy"
