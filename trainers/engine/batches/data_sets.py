"""A task's data sets, checked and in the form that the loop uses."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from trainers.contract import events
from trainers.contract.cores import usable_cores
from trainers.contract.errors import UserError
from trainers.engine.batches.sampling import derive_seed
from trainers.engine.map_style import MapStyle
from trainers.engine.task import Dataset, Share, Task
from trainers.engine.world import World

ADVICE = 'see `Task.data` in trainers/engine/task.py, and README, "A task of your own"'


def data_of(task: Task, seed: int, world: World) -> tuple[Dataset, Dataset | None]:
    """Return the task's training set and evaluation set.

    Args:
        seed: of the run.

    Raises:
        UserError: the task returns something else than two data sets, or the training set is empty.
    """
    sets = task.data(world)
    if not isinstance(sets, tuple) or len(sets) != 2:
        raise UserError(f"the task's `data` returns a {type(sets).__name__}, but must return (training set, evaluation set or "
                        "None)", ADVICE)
    train = checked("training set", sets[0], seed, world)
    evaluation = checked("evaluation set", sets[1], seed, world) if sets[1] is not None else None
    if not len(train):
        raise UserError("the training set is empty", "check `data`")
    return train, evaluation


def test_set_of(task: Task, seed: int, world: World) -> Dataset | None:
    """Return the task's test set; None if it has none, or an empty one. Raises: UserError: it is not a data set."""
    test_set = task.test_set(world)
    dataset = checked("test set", test_set, seed, world) if test_set is not None else None
    return dataset if dataset is not None and len(dataset) else None


def checked(name: str, dataset: Any, seed: int, world: World) -> Dataset:
    """Return a data set of a task in the form that the loop uses: `batch(share)` gives a micro-batch on `world.device`.

    Args:
        name: "training set", for example. Data sets with different names draw different random numbers.
        dataset: of the kind `Dataset`, or of torch's map-style kind.
        seed: of the run.

    Raises:
        UserError: it is of neither kind.
    """
    # Hugging Face's data sets have a method `batch` that means something else; `__getitems__` is torch's extension of map-style.
    if not hasattr(dataset, "batch") or hasattr(dataset, "__getitems__"):
        try:
            dataset = MapStyle(dataset)
        except UserError as error:
            raise UserError(f"the {name}: {error.message}", error.hint) from None
    if not isinstance(dataset, MapStyle):
        if not hasattr(dataset, "__len__"):
            raise UserError(f"the {name} is a {type(dataset).__name__} without the method `__len__`", ADVICE)
        return dataset
    if world.main:
        _check_workers(name, dataset.workers, world)
    return dataset.bound(f"the {name}", derive_seed(seed, name), world.device)


def make_ahead(dataset: Dataset, shares: Iterable[Share]) -> None:
    """Tell a data set with workers which shares its `batch` will get, in this order. Starts its workers the first time."""
    if isinstance(dataset, MapStyle):
        dataset.ahead(shares)


def _check_workers(name: str, workers: int, world: World) -> None:
    """Warn if the ranks of this node have more workers than cores."""
    # A rank that was started with fewer cores than its parent has these cores for itself.
    own = os.sched_getaffinity(0) < os.sched_getaffinity(os.getppid())
    cores = usable_cores() // (1 if own else world.local_size)
    if workers > max(cores, 1):
        events.emit({"event": "note", "level": "warning", "message": f"the {name} has {workers} workers on each rank, but a rank "
                     f"has {max(cores, 1)} CPU core(s): more workers than cores only help where reading files takes the time"})
