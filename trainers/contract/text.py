"""Numbers, sizes, durations and lists as people read them; the last traceback of a log. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable


def either(words: Iterable[object]) -> str:
    """'a', 'a or b', 'a, b or c'."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


def last_traceback(text: str, more_lines: int = 0) -> str | None:
    """The last Python traceback in a text, to the line of its exception; None if there is none.

    Args:
        more_lines: lines to include after the exception's first line, since a message may have several.
    """
    start = text.rfind("Traceback (most recent call last)")
    if start < 0:
        return None
    lines = text[start:].splitlines()
    end = next((i for i, line in enumerate(lines) if i and not line.startswith(" ")), len(lines))
    return "\n".join(lines[:end + 1 + more_lines])


def number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: int) -> str:
    """Bytes as people read them."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {unit}" if count < 1000 * 2**power else f"{count / 2**power:.0f} {unit}"
    return f"{count} B"
