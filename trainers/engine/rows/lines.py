"""The lines of a file as a sequence, of which only the positions are in memory."""

from __future__ import annotations

import codecs
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

CHUNK = 2**24  # bytes that are searched for line ends at a time


class Lines(Sequence[str]):
    """The lines of a UTF-8 file, without their line ends. The last line needs no line end.

    Only `\\n` and `\\r\\n` end a line: other characters at which Python's splitlines splits, such as U+2028, are text. A byte
    order mark at the start of the file is left out.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        self._starts = self._find_starts()

    def _find_starts(self) -> np.ndarray:
        """Return int64 [lines + 1]: the byte at which each line starts, and the byte at which the next line would start."""
        starts, size, last = [np.zeros(1, np.int64)], 0, b"\n"
        while chunk := os.pread(self._file, CHUNK, size):
            starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + (size + 1))
            size, last = size + len(chunk), chunk[-1:]
        if last != b"\n":
            starts.append(np.array([size + 1]))
        return np.concatenate(starts)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # raises IndexError
        line = self.raw(number)
        return (line.removeprefix(codecs.BOM_UTF8) if number == 0 else line).removesuffix(b"\r").decode("utf-8")

    def raw(self, number: int) -> bytes:
        """Return the bytes of line `number`, counted from 0, up to its `\\n`."""
        start, end = int(self._starts[number]), int(self._starts[number + 1]) - 1
        return os.pread(self._file, end - start, start)

    def __reduce__(self) -> Any:  # for the workers of a data set: a file's descriptor has no meaning in another process
        return Lines, (self.path,)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)
