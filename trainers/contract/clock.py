"""Times in records (ISO 8601, UTC) and times as people read them. Imports no torch."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> str:
    """Return the current time: '2026-01-31T09:00:00+00:00'."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def utc_at(timestamp_s: float) -> str:
    """Return a time, given in seconds since 1970, as records hold it."""
    return datetime.fromtimestamp(timestamp_s, UTC).isoformat(timespec="seconds")


def local_time(time: str | None) -> str:
    """Return a recorded time in the reader's time zone: '2026-01-31 10:00:00'. Return '?' for None."""
    return datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M:%S") if time else "?"


def seconds_between(first: str | None, second: str | None) -> float | None:
    """Return the seconds between two recorded times, never negative. Return None if either time is missing."""
    if not first or not second:
        return None
    return max(0.0, (datetime.fromisoformat(second) - datetime.fromisoformat(first)).total_seconds())
