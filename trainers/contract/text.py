"""Numbers, sizes, durations and lists as people read them, and the last traceback of a log. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)  # torch puts it before each line of a rank's traceback

MOST_SHOWN = 4  # of a list, in one message


def either(words: Iterable[object]) -> str:
    """Return the words as a choice: 'a', 'a or b', 'a, b or c'. There must be at least one word."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


def first_few(words: Sequence[object], most: int = MOST_SHOWN) -> str:
    """Return 'a, b, c, d and 3 more'."""
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return ", ".join(map(str, words[:most])) + more


def last_state(line: str) -> str:
    """Return what a terminal shows of a line that was overwritten with carriage returns, as progress bars do."""
    return next((part for part in reversed(line.split("\r")) if part.strip()), "") if "\r" in line else line


def whole_characters(data: bytes) -> tuple[bytes, bytes]:
    """Split UTF-8 after the last whole character: (whole characters, the beginning of the next one)."""
    for length in range(1, min(4, len(data)) + 1):
        first = data[-length]
        if first >= 0xC0:  # the first byte of a character of 2 to 4 bytes
            whole = (2 if first < 0xE0 else 3 if first < 0xF0 else 4) <= length
            return (data, b"") if whole else (data[:-length], data[-length:])
        if first < 0x80:
            break
    return data, b""


def last_traceback(text: str, to_end: bool = False) -> str | None:
    """Return the last Python traceback in a text; None if there is none. torch's prefix of each line is removed.

    Args:
        to_end: include everything after the traceback. The message of an exception may have many lines, and what a process
            printed last may say more than the traceback. Otherwise the result ends with the first line of the message.
    """
    lines = RANK_PREFIX.sub("", text).splitlines()
    start = max((i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")), default=None)
    if start is None:
        return None
    lines = lines[start:]
    end = next((i for i, line in enumerate(lines) if i and not line.startswith(" ")), len(lines))
    return "\n".join(lines if to_end else lines[:end + 1])


def number(value: float) -> str:
    """Return a number with at most 4 significant digits; a whole number (int) in full."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float | None) -> str:
    """Return a duration as '1:02:03' or '2:03'. Return '?' for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: int) -> str:
    """Return a number of bytes as '123 B', '1.2 KiB', '1.2 MiB' or '1.2 GiB'."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {unit}" if count < 1000 * 2**power else f"{count / 2**power:.0f} {unit}"
    return f"{count} B"
