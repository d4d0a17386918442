"""The score of the best checkpoint on the task's test set, once, at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from trainers.config.schema import RunConfig
from trainers.contract import heartbeat
from trainers.engine.ema import models_to_evaluate
from trainers.engine.evaluation import evaluate, reported
from trainers.engine.saving import restore
from trainers.engine.saving.checkpoint import Checkpoints
from trainers.engine.setup import Setup
from trainers.engine.task import Task
from trainers.engine.update_runner import UpdateRunner
from trainers.engine.world import World


class Score(NamedTuple):
    """What the test has found."""

    checkpoint: int  # the step of the checkpoint that was scored
    metrics: dict[str, float]


def score_test_set(task: Task, config: RunConfig, setup: Setup, runners: Sequence[UpdateRunner], checkpoints: Checkpoints,
                   world: World, step: int) -> Score | None:
    """Score the best checkpoint by `checkpoint.metric` on the test set; without a best one, the weights as they are.

    Afterwards the models hold the weights of that checkpoint, so the caller must have saved everything. Collective.

    Args:
        step: the step of the weights as they are, which is the last checkpoint.

    Returns:
        None if the run must stop before the score is complete.
    """
    assert setup.test_set is not None
    heartbeat.rest()  # reading a checkpoint may take long
    best = checkpoints.best()
    if best is not None and best != step:
        restore.load_models(checkpoints.load(best)[0], setup, runners)
    with models_to_evaluate(setup.models, runners, world) as models:
        measured = evaluate(task, models, setup.test_set, config, world, setup.stopping)
    if measured is None:
        return None
    heartbeat.report()
    return Score(step if best is None else best, reported(task, measured))
