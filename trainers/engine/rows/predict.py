"""The work of a rank in a prediction (`eval.rows`): one row for each sample, from the weights of a checkpoint."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist

from trainers.config.schema import RunConfig
from trainers.contract import exit_codes, heartbeat
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths
from trainers.contract.signals import hold
from trainers.engine.batches.data_sets import make_ahead
from trainers.engine.batches.evaluating import shares_to_evaluate
from trainers.engine.batches.noise import seed_noise
from trainers.engine.evaluate_only import about, no_evaluation_set, note_of, set_up_trained
from trainers.engine.evaluation import evaluating
from trainers.engine.parallel.strategy import close_process_group
from trainers.engine.rows.lines import Lines
from trainers.engine.rows.parts import Part, merge
from trainers.engine.setup import Setup
from trainers.engine.task import Dataset, MapDataset, Task
from trainers.engine.world import World

PROGRESS_S = 10.0  # between two notes that say how far a prediction is


def predict(task: Task, config: RunConfig, world: World, paths: RunPaths, attempt: int | None) -> int:
    """Write the task's rows, in the order of the samples, from the weights of `init.source`. All ranks call this together.

    The rows go into the file `eval.rows.output`, or into rows.txt in the run directory. The file appears whole, or not at all.

    Returns:
        The exit code of this rank: 0 if the file is written, 75 if a signal stopped the prediction.

    Raises:
        UserError: the task has no rows, or takes no lines, or its rows are wrong; the weights do not fit; the disk is full.
    """
    settings = config.eval.rows
    assert settings is not None
    if type(task).rows is Task.rows:
        raise UserError(f"the task `{config.task}` gives no rows to predict",
                        "your own task can define rows(self, models, batch), which returns one row for each sample")
    lines = None if settings.lines is None else Lines(Path(settings.lines))
    inputs: Callable[[], Dataset | MapDataset] | None = None  # the task's `data` gives the evaluation set
    if lines is not None:
        inputs = partial(_of_lines, task, lines, world)
    elif settings.set == "test":
        inputs = partial(_test_set, task, world)
    setup, source = set_up_trained(task, config, world, paths, inputs)
    dataset = setup.eval_set if inputs is None else setup.train_set
    if dataset is None:
        raise no_evaluation_set(config)
    hold()
    note_of(world)("info", f"{len(dataset):,} samples, {config.init.source}{source.about}: {about(setup, config, world)}")
    target = Path(settings.output) if settings.output is not None else paths.rows
    with Part(paths.row_parts, world.rank, settings.format) as part:
        complete = _write(part, task, setup, dataset, config, world)
    if world.size > 1:
        dist.barrier()  # rank 0 reads what the others have written
    if complete and world.main:
        heartbeat.rest()
        merge(paths.row_parts, world.size, len(dataset), target)
        shutil.rmtree(paths.row_parts, ignore_errors=True)
        shutil.rmtree(paths.init, ignore_errors=True)
    setup.stopping.close()
    close_process_group()
    return exit_codes.FINISHED if complete else exit_codes.PREEMPTED


def _test_set(task: Task, world: World) -> Dataset | MapDataset:
    """Return the task's test set. Raises: UserError: it has none."""
    task.data(world)
    if (dataset := task.test_set(world)) is None:
        raise UserError(f"the task `{task.config.task}` has no test set", "--set eval predicts the evaluation set")
    return dataset


def _of_lines(task: Task, lines: Lines, world: World) -> Dataset | MapDataset:
    """Return the task's data set of the lines. Raises: UserError: it does not have one sample for each line."""
    dataset = task.inputs(lines, world)
    if hasattr(dataset, "__len__") and len(dataset) != len(lines):
        raise UserError(f"the task's `inputs` returns {len(dataset):,} samples for {len(lines):,} lines",
                        "return one sample for each line, also for an empty line")
    return dataset


def _write(part: Part, task: Task, setup: Setup, dataset: Dataset, config: RunConfig, world: World) -> bool:
    """Write this rank's rows. Return False if the run must stop before the end."""
    shares = shares_to_evaluate(dataset, config.batching(world.size), world.rank, world.size)
    make_ahead(dataset, shares)
    note, told_at = note_of(world), time.monotonic()
    with evaluating(setup.models, config, world):
        for number, share in enumerate(shares):
            if setup.stopping.at_boundary():
                return False
            heartbeat.beat("rows")
            seed_noise(world.device, config.train.seed, "rows", world.rank, number)
            rows = task.rows(setup.models, dataset.batch(share))
            if not share.filler:
                part.write(share.indices, rows)
            heartbeat.done("rows")
            if time.monotonic() > told_at + PROGRESS_S:
                told_at = time.monotonic()
                note("info", f"{(number + 1) / len(shares):.0%} of {len(dataset):,} samples")
    return True
