"""metrics.jsonl: one JSON object a logged step or evaluation, each step in it once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Callable, Mapping

from trainers.contract.files import jsonable, replace_text


def whole_rows(text: str) -> list[dict[str, Any]]:
    """The rows of a metrics file. A line cut off by a crash is dropped."""
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class MetricsFile:
    """Appends rows; while the disk is full it keeps them in memory and tries again with the next."""

    def __init__(self, path: Path, step: int, evaluated: bool, warn: Callable[[str], None]):
        """Cuts the file back to `step`, the one that the run resumes from, whose evaluation is yet to come if not
        `evaluated`; `kept` are the rows that stay.

        Raises:
            OSError: it cannot be written.
        """
        self.path, self.warn = path, warn
        self._waiting: list[str] = []
        self._failing = False
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.kept = [row for row in whole_rows(text)
                     if row["step"] < step or row["step"] == step and (evaluated or row.get("split") != "eval")]
        # A new file even if all stays: an attempt that has outlived its job elsewhere writes on into the old one.
        if path.exists():
            replace_text(path, "".join(map(_line, self.kept)))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(self, row: Mapping[str, Any]) -> None:
        self._waiting.append(_line(row))
        self.flush()

    def flush(self, durable: bool = False) -> None:
        """Write what waits; `durable`: also past a power cut."""
        try:
            while self._waiting:
                line = self._waiting[0].encode()
                end = os.lseek(self._file, 0, os.SEEK_END)
                if os.write(self._file, line) < len(line):  # the disk filled up in mid-line
                    os.ftruncate(self._file, end)
                    raise OSError(28, os.strerror(28))
                del self._waiting[0]
            if durable:
                os.fsync(self._file)
        except OSError as error:
            if not self._failing:
                self.warn(f"metrics cannot be written to {self.path}: {error.strerror}; they are kept in memory "
                          "and written when that is possible again; training goes on")
            self._failing = True
        else:
            if self._failing:
                self.warn(f"metrics are written to {self.path} again, none is lost")
            self._failing = False

    def close(self) -> None:
        self.flush(durable=True)
        if self._waiting:
            self.warn(f"{len(self._waiting)} rows of metrics could not be written to {self.path}")
        os.close(self._file)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(jsonable(row), ensure_ascii=False) + "\n"
