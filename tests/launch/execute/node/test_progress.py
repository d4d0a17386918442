"""A run that is requeued again and again without progress is ended."""

from __future__ import annotations

import pytest

from launch.execute.node.progress import no_progress


def attempts(*rows: tuple) -> list[dict]:
    """Records of attempts, from rows of (outcome, signal, kept before, kept, minutes)."""
    return [{"outcome": outcome, "signal": signal, "kept_before": before, "kept": after, "began": "2026-01-01T00:00:00+00:00",
             "ended": f"2026-01-01T00:{minutes:02d}:00+00:00"} for outcome, signal, before, after, minutes in rows]


VAIN = ("preempted", "SIGUSR2", 50, 50, 2)
FURTHER = ("preempted", "SIGUSR2", 50, 60, 2)
FIRST = ("preempted", "SIGUSR2", None, None, 2)
PREEMPTED = ("preempted", "SIGTERM", 50, 50, 2)
LOST = ("lost", None, 50, None, 2)
LONG = ("preempted", "SIGUSR2", None, None, 5)


@pytest.mark.parametrize("rows, script, said", [
    ([VAIN] * 5, False, "5 attempts in a row ended at the time limit without a new checkpoint"),
    ([FIRST] * 6, False, "6 attempts in a row"),
    ([VAIN] * 4, False, None),
    ([VAIN] * 4 + [FURTHER] + [VAIN] * 4, False, None),
    ([FURTHER] + [VAIN] * 5, False, "5 attempts"),
    ([PREEMPTED] * 9, False, None),
    ([VAIN, PREEMPTED, VAIN, LOST, VAIN, PREEMPTED, VAIN], False, None),
    ([VAIN, PREEMPTED, VAIN, LOST, VAIN, PREEMPTED, VAIN, VAIN], False, "5 attempts"),
    ([FIRST] * 10, True, "10 attempts in a row ended at the time limit after less than 5 minutes each"),
    ([FIRST] * 9, True, None),
    ([FIRST] * 9 + [LONG] + [FIRST] * 9, True, None),
    ([LONG] * 20, True, None),
    ([], False, None),
])
def test_only_time_limits_without_progress_count(rows, script, said):
    found = no_progress(attempts(*rows), script)
    assert (found or "").startswith(said) if said else found is None


@pytest.mark.parametrize("missing", ["kept", "kept_before", "began"])
def test_the_record_of_an_older_version_ends_the_count(missing):
    old = [{key: value for key, value in attempt.items() if key != missing} for attempt in attempts(VAIN)]
    script = missing == "began"
    vain = attempts(*[VAIN] * 9 if script else [VAIN] * 4)
    assert no_progress([*vain, *old, *vain], script) is None
    assert no_progress([*old, *vain, *attempts(VAIN)], script) is not None
