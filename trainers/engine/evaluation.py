"""Evaluate the models on every sample exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.config.schema import RunConfig
from trainers.contract import heartbeat
from trainers.contract.errors import UserError
from trainers.engine.batches.data_sets import make_ahead
from trainers.engine.batches.evaluating import shares_to_evaluate
from trainers.engine.batches.noise import seed_noise
from trainers.engine.failures import memory_for
from trainers.engine.precision import autocast, inexact_kernels
from trainers.engine.stopping import Stopping
from trainers.engine.task import Dataset, Measures, Task
from trainers.engine.world import World


def evaluate(task: Task, models: Mapping[str, nn.Module], dataset: Dataset, config: RunConfig, world: World,
             stopping: Stopping) -> dict[str, Tensor] | None:
    """Return the task's measures over the whole data set, or None if the run must stop before the end.

    A measure (sum, count) becomes the sum divided by the count, as float64. A measure that is a plain sum stays a sum: int64 if
    the task returned integers, otherwise float64. All are on `world.device`, and the same on all ranks. Collective.

    Args:
        models: by name; run in evaluation mode, and put back into their old mode afterwards.
        dataset: the evaluation set.

    Raises:
        UserError: the task returns something else than measures, or other measures on another rank.
    """
    totals: Totals = {}
    shares = shares_to_evaluate(dataset, config.batching(world.size), world.rank, world.size)
    make_ahead(dataset, shares)
    with evaluating(models, config, world):
        for number, share in enumerate(shares):
            if stopping.at_boundary():
                return None
            heartbeat.beat("evaluation")
            seed_noise(world.device, config.train.seed, "evaluation", world.rank, number)
            measures = _checked(task.evaluate(models, dataset.batch(share)), world.device)
            totals = _plus(totals, _zeroed(measures) if share.filler else measures)
            heartbeat.done("evaluation")
    tensors = {name: tuple(_tensor(part, world.device) for part in parts) for name, parts in totals.items()}
    _check_equal_measures(tensors, world)
    summed = _sum_over_ranks(tensors, world)
    return {name: parts[0] if len(parts) == 1 else parts[0] / parts[1] for name, parts in summed.items()}


@contextmanager
def evaluating(models: Mapping[str, nn.Module], config: RunConfig, world: World) -> Iterator[None]:
    """Run a block with the models in evaluation mode, without gradients, and in the run's precision.

    An operation without a deterministic kernel warns here: an error would move the whole run to the kernels of
    train.deterministic=warn, also those of the training steps.
    """
    training = {name: model.training for name, model in models.items()}
    try:
        for model in models.values():
            model.eval()
        with torch.no_grad(), autocast(config.train.precision, world.device), memory_for("evaluation"), inexact_kernels():
            yield
    finally:
        for name, model in models.items():
            model.train(training[name])


# By name: (sum, count), or (sum,) of a plain sum. Numbers stay numbers: as a tensor on a GPU, each would cost a copy.
Totals = dict[str, tuple[Tensor | float, ...]]


def _checked(measures: Measures, device: torch.device) -> Totals:
    """Return the measures of one batch, on `device`. Raises: UserError: the task returned something else."""
    advice = "return {name: (sum, count)}, or {name: tensor} for a sum that stays a sum: `Measures` in trainers/engine/task.py"
    if not isinstance(measures, Mapping):
        raise UserError(f"the task returns {_described(measures)} as its measures, but must return a dict", advice)
    checked: Totals = {}
    for name, value in measures.items():
        if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Tensor | Real) for part in value):
            checked[name] = tuple(part.to(device, torch.float64, non_blocking=True) if isinstance(part, Tensor) else float(part)
                                  for part in value)
        elif isinstance(value, Tensor):
            kind = torch.float64 if value.is_floating_point() else torch.int64
            checked[name] = (value.to(device, kind, non_blocking=True),)
        else:
            raise UserError(f"the task returns {_described(value)} as its measure `{name}`, but must return (sum, count) or a "
                            "tensor", advice)
    return checked


def _zeroed(measures: Totals) -> Totals:
    """Return measures of the same names and shapes that count nothing."""
    return {name: tuple(torch.zeros_like(part) if isinstance(part, Tensor) else 0.0 for part in parts)
            for name, parts in measures.items()}


def _plus(totals: Totals, measures: Totals) -> Totals:
    """Return the totals with the measures of one more batch. Raises: UserError: a measure has changed its shape."""
    added = dict(totals)
    for name, parts in measures.items():
        before = totals.get(name)
        if before is None:
            added[name] = parts
            continue
        if (was := _shapes(before)) != (now := _shapes(parts)):
            raise UserError(f"the task's measure `{name}` has the shape {was} in one batch and {now} in another",
                            "return the same shapes for every batch; for counts by class: torch.bincount(..., minlength=classes)")
        added[name] = tuple(old + new for old, new in zip(before, parts))
    return added


def _shapes(parts: tuple[Tensor | float, ...]) -> str:
    """Return '[3, 3]' of a plain sum, '[3] and []' of a sum and a count."""
    return " and ".join(str(list(part.shape) if isinstance(part, Tensor) else []) for part in parts)


def _tensor(value: Tensor | float, device: torch.device) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device=device)


def _check_equal_measures(totals: Mapping[str, tuple[Tensor, ...]], world: World) -> None:
    """Raise a UserError on every rank if ranks have measures of other names, kinds or shapes than rank 0."""
    if world.size == 1:
        return
    own = {name: [(str(part.dtype), tuple(part.shape)) for part in parts] for name, parts in totals.items()}
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, own)
    for rank, other in enumerate(gathered):
        if other != gathered[0]:
            names = sorted(name for name in {*other, *gathered[0]} if other.get(name) != gathered[0].get(name))
            raise UserError(f"the measures of rank {rank} differ from those of rank 0: `{names[0]}` is missing on one of them, "
                            "or has another shape",
                            "return the same names with the same shapes for every batch")


def _sum_over_ranks(totals: Mapping[str, tuple[Tensor, ...]], world: World) -> Mapping[str, tuple[Tensor, ...]]:
    """Return the totals summed over ranks, with one reduction for all totals of a dtype."""
    if world.size == 1:
        return totals
    # Ranks may have the names in different orders, but every rank must reduce the same measure at the same place.
    places = [(name, index) for name in sorted(totals) for index in range(len(totals[name]))]
    summed: dict[tuple[str, int], Tensor] = {}
    for dtype in (torch.float64, torch.int64):
        parts = {place: totals[place[0]][place[1]] for place in places if totals[place[0]][place[1]].dtype == dtype}
        if not parts:
            continue
        flat = torch.cat([part.reshape(-1) for part in parts.values()])
        dist.all_reduce(flat)
        pieces = flat.split([part.numel() for part in parts.values()])
        summed |= {place: piece.view(parts[place].shape) for place, piece in zip(parts, pieces)}
    return {name: tuple(summed[name, index] for index in range(len(parts))) for name, parts in totals.items()}


def reported(task: Task, measured: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the metrics of an evaluation, by name. Raises: UserError: as `plain_metrics`."""
    with inexact_kernels():
        return plain_metrics(task.report(measured, None))


def plain_metrics(metrics_of_task: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that a task reports as plain numbers. Single numbers of numpy and torch are converted.

    Raises:
        UserError: a metric is not one number, or its name is not text that a file can hold.
    """
    metrics: dict[str, float] = {}
    for name, value in metrics_of_task.items():
        if not isinstance(name, str) or not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
            raise UserError(f"the task's `report` names a metric {name!r}, which is not valid text", "use text as the name")
        try:
            number = value.item() if hasattr(value, "item") else value
        except (RuntimeError, ValueError):  # a tensor or an array with several values
            number = None
        if not isinstance(number, (int, float)):
            raise UserError(f"the task's `report` returns `{name}` as {_described(value)}, but a metric must be one number",
                            "return a number for each metric: float(x) or x.item()")
        metrics[name] = number
    return metrics


def _described(value: Any) -> str:
    name, shape = type(value).__name__, getattr(value, "shape", None)
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}" + (f" of shape {tuple(shape)}" if shape is not None else "")
