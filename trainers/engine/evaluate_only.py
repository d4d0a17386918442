"""What a rank does that is to evaluate and not to train."""

from __future__ import annotations

import shutil
from typing import Any

from trainers.config.schema import RunConfig
from trainers.contract import events, exit_codes, heartbeat
from trainers.contract.errors import UserError
from trainers.contract.files import update_json
from trainers.contract.paths import RunPaths
from trainers.contract.signals import hold
from trainers.engine.evaluation import draw_figures, evaluate
from trainers.engine.parallel.strategy import close
from trainers.engine.saving.weights import open_source, take
from trainers.engine.setup import set_up
from trainers.engine.task import Task
from trainers.engine.world import World

# Without an optimizer ZeRO 1 and 2 are what ddp is: all of the weights on each rank. Stage 3's parts are fully_shard's,
# gathered in fp32 as ZeRO does.
PLACED: dict[str, dict[str, Any]] = {
    "zero1": {"strategy": "ddp"}, "zero2": {"strategy": "ddp"}, "zero3": {"strategy": "fsdp", "precision": "fp32"},
}


def evaluate_only(task: Task, config: RunConfig, world: World, paths: RunPaths, attempt: int | None) -> int:
    """Evaluate the weights of `init.source` on all ranks, once. The metrics go into the folder's record, its pictures into
    `figures`. Returns the rank's exit code.

    Raises:
        UserError: there is nothing to evaluate, or on nothing.
    """
    setup = set_up(task, config, world, placed(config))
    if setup.eval_set is None or not len(setup.eval_set):
        raise UserError(f"the task `{config.task}` has no evaluation set",
                        "give data=PATH that has one, or let the task's `data` return one")
    path = paths.first_weights(config.init.source)
    source = open_source(path, world)
    take(source, setup.layout, setup.strategy.fragments(setup.models), config.init.skip, f"`{config.init.source}`",
         "the model is made as the data needs it: give data like that of training, with as many classes or words")
    hold()
    note = _note if world.main else _silent
    note("info", f"evaluating {config.init.source}: {world.size} rank(s) on {world.device.type}, {config.train.precision}, "
         f"{setup.parameters:,} parameters, {len(setup.eval_set):,} samples")
    measured = evaluate(task, setup.models, setup.eval_set, config, world, setup.stopping)
    heartbeat.rest()
    if measured is not None:
        metrics = task.report(measured, None)
        if world.main:
            events.emit({"event": "eval", "step": source.step or 0, "total": None, "metrics": metrics})
            draw_figures(task, measured, paths.figures, note)
            if paths.record.exists():  # ranks started by hand have none
                update_json(paths.record, metrics=metrics)
            shutil.rmtree(paths.init, ignore_errors=True)
    setup.stopping.close()
    close()
    return exit_codes.PREEMPTED if measured is None else exit_codes.FINISHED


def placed(config: RunConfig) -> RunConfig:
    """What the strategy is to follow, which need not make room for an optimizer."""
    return config.model_copy(update={"train": config.train.model_copy(update=PLACED.get(config.train.strategy, {}))})


def _note(level: str, message: str) -> None:
    events.emit({"event": "note", "level": level, "message": message})


def _silent(level: str, message: str) -> None: ...
