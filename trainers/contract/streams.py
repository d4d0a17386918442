"""The standard streams of a process. Imports no torch."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import IO


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Return `\\uXXXX` for the characters that an encoding does not have: readable, and valid in JSON."""
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start:error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start:start + 4]}" for start in range(0, len(units), 4)), error.end


codecs.register_error("json", _escape)


def take_any_text(stream: IO[str]) -> None:
    """Let a stream write `\\uXXXX` for characters that its encoding does not have (LANG=C, PYTHONIOENCODING=ascii)."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="json")


def prepare_streams() -> None:
    """Let standard output and standard error take any text, and open /dev/null for each stream that the caller has closed.

    Otherwise, the next file that the process opens would be in the place of a closed stream, and would get its output.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        take_any_text(stream)
