"""metrics.jsonl: one JSON object in each line, for a logged step, an evaluation or the test at the end.

Each logged step and each evaluation is in the file once, even if an attempt repeated it.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, Callable, Mapping

from trainers.contract.files import jsonable, replace_text


def whole_rows(text: str) -> list[dict[str, Any]]:
    """Return the rows in the text of a metrics file. Lines that a crash cut off are dropped."""
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
    """The metrics file of a run, opened to append rows.

    While the disk is full, new rows stay in memory. Each append tries to write them again.

    Attributes:
        kept: the rows of earlier attempts that are still in the file.
    """

    def __init__(self, path: Path, step: int, evaluated: bool, warn: Callable[[str], None]):
        """Open the file and remove the rows after `step`, and the test's: the test is repeated at the end.

        Args:
            step: the step from which the run resumes.
            evaluated: whether the evaluation of that step is done. If not, its row is removed too.
            warn: called with a warning for the user.

        Raises:
            OSError: the file cannot be read or written.
        """
        self.path, self.warn = path, warn
        self._waiting: list[str] = []
        self._failing = False
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.kept = [row for row in whole_rows(text) if row.get("split") != "test"
                     and (row["step"] < step or row["step"] == step and (evaluated or row.get("split") != "eval"))]
        # Write a new file even if all rows stay: an older attempt that is still running on another host then appends to
        # the old file, which has no name any more.
        if path.exists():
            replace_text(path, "".join(map(_line, self.kept)))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, or keep it in memory if the disk is full."""
        self._waiting.append(_line(row))
        self.flush()

    def flush(self, durable: bool = False) -> None:
        """Write the rows that are still in memory. With `durable` the rows also survive a power failure."""
        try:
            while self._waiting:
                line = self._waiting[0].encode()
                end = os.lseek(self._file, 0, os.SEEK_END)
                if os.write(self._file, line) < len(line):  # the disk became full within the line
                    os.ftruncate(self._file, end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                del self._waiting[0]
            if durable:
                os.fsync(self._file)
        except OSError as error:
            if not self._failing:
                self.warn(f"metrics cannot be written to {self.path}: {error.strerror}; training continues, and the metrics "
                          "are kept in memory until they can be written")
            self._failing = True
        else:
            if self._failing:
                self.warn(f"metrics can be written to {self.path} again; none is lost")
            self._failing = False

    def close(self) -> None:
        """Write the rows that are still in memory, and close the file."""
        self.flush(durable=True)
        if self._waiting:
            self.warn(f"{len(self._waiting)} rows of metrics could not be written to {self.path}")
        os.close(self._file)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(jsonable(row), ensure_ascii=False) + "\n"
