"""Times as records hold them, ISO 8601 in UTC, and as people read them. Imports no torch."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> str:
    """The time now: '2026-01-31T09:00:00+00:00'."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def utc_at(timestamp_s: float) -> str:
    """A time given in seconds since 1970."""
    return datetime.fromtimestamp(timestamp_s, UTC).isoformat(timespec="seconds")


def local_time(time: str | None) -> str:
    """A recorded time in the reader's time zone: '2026-01-31 10:00:00'; '?' where there is none."""
    return datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M:%S") if time else "?"


def seconds_between(first: str | None, second: str | None) -> float | None:
    """Seconds from one recorded time to a later one, never negative; None where either is missing."""
    if not first or not second:
        return None
    return max(0.0, (datetime.fromisoformat(second) - datetime.fromisoformat(first)).total_seconds())
