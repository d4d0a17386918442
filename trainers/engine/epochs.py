"""How many training steps a run has, and which of them end an epoch."""

from __future__ import annotations

from collections.abc import Sequence

from trainers.config.schema import Train
from trainers.engine.update_runner import UpdateRunner


def total_steps(train: Train, runners: Sequence[UpdateRunner]) -> int:
    """Return the number of training steps of the whole run.

    An epoch is one pass over the training set by the update that draws most in a step (of several, the first): in
    `train.epochs` epochs, no update sees a sample more often.
    """
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None  # the schema demands `steps` or `epochs`
    leader = defines_epochs(runners)
    return -(-leader.samples.steps(train.epochs) // leader.update.draws)


def total_steps_before_draws(train: Train, runners: Sequence[UpdateRunner]) -> int:
    """Return the number of training steps as older versions counted it: one draw of the first update in each step."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None
    return runners[0].samples.steps(train.epochs)


def ends_epoch(step: int, runners: Sequence[UpdateRunner]) -> bool:
    """Return whether training step `step` (from 0) draws the last sample of an epoch. The epoch may end within the step."""
    leader = defines_epochs(runners)
    return any(map(leader.samples.ends_epoch, leader.draws(step)))


def defines_epochs(runners: Sequence[UpdateRunner]) -> UpdateRunner:
    """Return the runner of the update whose passes over the training set are the run's epochs."""
    return max(runners, key=lambda runner: runner.update.draws)
