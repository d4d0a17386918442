"""The work of a rank in an evaluation without training (`eval.only`)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

from trainers.checkpoints import facts
from trainers.config.schema import RunConfig
from trainers.contract import events, exit_codes, heartbeat
from trainers.contract.errors import UserError
from trainers.contract.files import update_json
from trainers.contract.paths import RunPaths
from trainers.contract.signals import hold
from trainers.engine.evaluation import evaluate, reported
from trainers.engine.parallel.strategy import close_process_group
from trainers.engine.pictures import Pictures, draw_figures
from trainers.engine.saving import task_state
from trainers.engine.saving.weights import Checkpoint, Source, load_weights, open_source
from trainers.engine.setup import Setup, set_up
from trainers.engine.task import Dataset, MapDataset, Task
from trainers.engine.world import World

# Without an optimizer ZeRO 1 and 2 hold all weights on every rank, the same as ddp. ZeRO 3 shards the weights, the same as
# fsdp, and gathers them in fp32.
REPLACEMENTS: dict[str, dict[str, Any]] = {
    "zero1": {"strategy": "ddp"}, "zero2": {"strategy": "ddp"}, "zero3": {"strategy": "fsdp", "precision": "fp32"},
}


def evaluate_only(task: Task, config: RunConfig, world: World, paths: RunPaths, attempt: int | None) -> int:
    """Evaluate the weights of `init.source` once. All ranks call this together.

    The metrics are written to run.json in the run directory, the pictures to the folder `figures` there.

    Returns:
        The exit code of this rank: 0 if the evaluation finished, 75 if a signal stopped it.

    Raises:
        UserError: the weights are missing or do not fit the model, the task has no evaluation set, or the input is bad.
    """
    setup, source = set_up_trained(task, config, world, paths)
    if setup.eval_set is None or not len(setup.eval_set):
        raise no_evaluation_set(config)
    hold()
    note = note_of(world)
    note("info", f"evaluating {config.init.source}{source.about}: {about(setup, config, world)}, {len(setup.eval_set):,} samples")
    if setup.facts and not task.trained_facts:
        note("warning", f"`{config.init.source}` does not say what the model was trained with: "
             f"{', '.join(f'`{name}`' for name in setup.facts)} are those of the data that is evaluated")
    measured = evaluate(task, setup.models, setup.eval_set, config, world, setup.stopping)
    heartbeat.report()
    if measured is not None:
        metrics = reported(task, measured)
        if world.main:
            events.emit({"event": "eval", "step": source.step or 0, "total": None, "metrics": metrics})
            draw_figures(task, measured, paths.figures, note)
            if paths.record.exists():  # without `launch` the run directory may have no run.json
                update_json(paths.record, metrics=metrics)
            shutil.rmtree(paths.init, ignore_errors=True)
        Pictures(task, config, world, paths, note).draw(setup.models, source.step or 0)
    setup.stopping.close()
    close_process_group()
    return exit_codes.PREEMPTED if measured is None else exit_codes.FINISHED


def set_up_trained(task: Task, config: RunConfig, world: World, paths: RunPaths,
                   inputs: Callable[[], Dataset | MapDataset] | None = None
                   ) -> tuple[Setup, Source]:
    """Set up the models with the weights of `init.source`, for work without an optimizer. All ranks call this together.

    Args:
        inputs: as in `set_up`.

    Returns:
        The setup, and the weights that it has loaded.

    Raises:
        UserError: the weights are missing or do not fit the model, or the input is bad.
    """
    weights = config.init.source
    assert weights is not None  # the schema allows eval.only only with init.source
    task.trained_facts = facts.read(paths.first_weights(weights))
    setup = set_up(task, config, world, placed(config), inputs=inputs)
    source = open_source(paths.first_weights(weights), world, config.init)
    load_weights(source, setup.layout, setup.strategy.fragments(setup.models), config.init.skip, f"`{weights}`",
                 "the size of the model depends on the data: use data with the same number of classes or words as in training")
    if isinstance(source, Checkpoint):
        task_state.load(task, source.reader, strict=False)
    return setup, source


def no_evaluation_set(config: RunConfig) -> UserError:
    return UserError(f"the task `{config.task}` has no evaluation set",
                     "use data=PATH with an evaluation set, or return an evaluation set from the task's `data`")


def about(setup: Setup, config: RunConfig, world: World) -> str:
    """Return in words on what the models run."""
    return f"{world.size} rank(s) on {world.device.type}, {config.train.precision}, {setup.parameters:,} parameters"


def placed(config: RunConfig) -> RunConfig:
    """Return the settings that place the models for an evaluation: the strategy needs no room for an optimizer."""
    return config.model_copy(update={"train": config.train.model_copy(update=REPLACEMENTS.get(config.train.strategy, {}))})


def note_of(world: World) -> Callable[[str, str], None]:
    """Return the function that writes a note (level, message) for the user: once, and not on every rank."""
    return _note if world.main else _silent


def _note(level: str, message: str) -> None:
    events.emit({"event": "note", "level": level, "message": message})


def _silent(level: str, message: str) -> None: ...
