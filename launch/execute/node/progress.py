"""Whether a run that is requeued again and again makes progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.execute import record
from launch.execute.node.forensics import attempt_of
from launch.plan.submission import Submission
from launch.supervise.rank import Failure, Outcome
from trainers.contract.clock import seconds_between, utc_now
from trainers.contract.paths import RunPaths

VAIN_ATTEMPTS = 5    # so many attempts in a row may end at the time limit without a new checkpoint
SHORT_ATTEMPTS = 10  # so many attempts of a script in a row may end at the time limit after less than SHORT_S
SHORT_S = 300.0


def no_progress(attempts: Sequence[Mapping[str, Any]], script: bool) -> str | None:
    """Return why a run must not be requeued after its last attempt: too many attempts in a row got no further; else None.

    Only attempts that ended at the time limit count. Attempts that ended otherwise, after a preemption for example, are
    skipped. The checkpoints of a script are not known: a script's attempt counts if it was short.

    Args:
        attempts: the records of the submission's attempts, oldest first.
    """
    limit, in_vain = SHORT_ATTEMPTS if script else VAIN_ATTEMPTS, 0
    for attempt in reversed(attempts):
        if attempt["outcome"] != "preempted" or attempt.get("signal") != "SIGUSR2":
            continue
        seconds = seconds_between(attempt.get("began"), attempt.get("ended"))
        # An older version may have written the record: without these keys, whether the attempt made progress is not known.
        known = attempt.keys() >= {"kept", "kept_before"}
        if seconds is None or seconds >= SHORT_S if script else not known or attempt["kept"] != attempt["kept_before"]:
            break
        in_vain += 1
    if in_vain < limit:
        return None
    how = f"after less than {SHORT_S / 60:g} minutes each" if script else "without a new checkpoint"
    return f"{in_vain} attempts in a row ended at the time limit {how}"


def stuck(paths: RunPaths, submission: Submission, number: int, script: bool, outcome: Outcome) -> Outcome:
    """The outcome of the last attempt, `number`: failed, if the attempts so far show that the run makes no progress."""
    if outcome.kind != "preempted" or outcome.signal != "SIGUSR2" or paths.cancellation(number).exists():
        return outcome
    attempts = [attempt for number in paths.attempt_numbers() if (attempt := attempt_of(paths, number))
                and attempt.get("submission") == submission.number]
    if not attempts or attempts[-1]["attempt"] != number:
        return outcome
    attempts[-1] |= {"outcome": "preempted", "signal": outcome.signal, "ended": utc_now(), "kept": record.kept(paths)}
    message = no_progress(attempts, script)
    if message is None:
        return outcome
    hint = "give the job more time with --time" + ("" if script else ", or save more often with checkpoint.every")
    message += f" ({outcome.note})" if outcome.note else ""
    return Outcome("failed", Failure(None, None, None, message, hint, None, False), outcome.signal, outcome.checkpoint_s)
