"""Evaluate the models on every sample exactly once, on any number of ranks."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.config.schema import RunConfig
from trainers.contract import heartbeat
from trainers.contract.errors import UserError
from trainers.engine.batches.sampling import evaluation_shares, seed_noise
from trainers.engine.precision import autocast
from trainers.engine.stopping import Stopping
from trainers.engine.task import Dataset, Task
from trainers.engine.world import World


def evaluate(task: Task, models: Mapping[str, nn.Module], dataset: Dataset, config: RunConfig, world: World,
             stopping: Stopping) -> dict[str, Tensor] | None:
    """Return the task's measures over the whole data set, or None if the run must stop before the end.

    Each value is the sum divided by the count, as float64 on `world.device`, the same on all ranks. Collective.

    Args:
        models: by name; run in evaluation mode, and put back into their old mode afterwards.
        dataset: the evaluation set.
    """
    shares = evaluation_shares(len(dataset), config.evaluation_batch(world.size), world.rank, world.size)
    training = {name: model.training for name, model in models.items()}
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    try:
        for model in models.values():
            model.eval()
        with torch.no_grad(), autocast(config.train.precision, world.device):
            for number, share in enumerate(shares):
                if stopping.at_boundary():
                    return None
                heartbeat.beat("evaluation")
                seed_noise(world.device, config.train.seed, "evaluation", world.rank, number)
                for name, (total, count) in task.evaluate(models, dataset.batch(share)).items():
                    total, count = _to_float64(total, world.device), _to_float64(count, world.device)
                    if name in sums:
                        total, count = sums[name][0] + total, sums[name][1] + count
                    sums[name] = total, count
                heartbeat.done("evaluation")
    finally:
        for name, model in models.items():
            model.train(training[name])
    _check_equal_measures(sums, world)
    # Ranks may have the names in different orders, but every rank must reduce the same measure at the same time.
    means = {name: _sum_over_ranks(sums[name][0], world) / _sum_over_ranks(sums[name][1], world) for name in sorted(sums)}
    return {name: means[name] for name in sums}


def _check_equal_measures(sums: Mapping[str, tuple[Tensor, Tensor]], world: World) -> None:
    """Raise a UserError on every rank if ranks have measures of other names or shapes than rank 0."""
    if world.size == 1:
        return
    own = {name: (tuple(total.shape), tuple(count.shape)) for name, (total, count) in sums.items()}
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, own)
    for rank, other in enumerate(gathered):
        if other != gathered[0]:
            names = sorted(name for name in {*other, *gathered[0]} if other.get(name) != gathered[0].get(name))
            raise UserError(f"the measures of rank {rank} differ from those of rank 0: `{names[0]}` is missing on one of them, "
                            "or has another shape",
                            "return the same names with the same shapes for every batch, also for a batch without samples")


def plain_metrics(reported: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that a task reports as plain numbers. Single numbers of numpy and torch are converted.

    Raises:
        UserError: a metric is not one number, or its name is not text that a file can hold.
    """
    metrics: dict[str, float] = {}
    for name, value in reported.items():
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
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")


def draw_figures(task: Task, measured: Mapping[str, Tensor], figures: Path, note: Callable[[str, str], None]) -> None:
    """Let the task draw the pictures of an evaluation into the folder `figures`. Only one rank calls this.

    An error here does not end the run, whose results are saved already: `note(level, message)` gets a warning.
    """
    try:
        figures.mkdir(exist_ok=True)
        task.report(measured, figures)
    except OSError as error:
        note("warning", f"cannot write figures to {figures}: {error.strerror or error}")
    except Exception as error:
        traceback.print_exc()
        note("warning", f"the task cannot draw its figures: {type(error).__name__}: {error}")


def _to_float64(value: Tensor | int, device: torch.device) -> Tensor:
    return torch.as_tensor(value, device=device).double()


def _sum_over_ranks(value: Tensor, world: World) -> Tensor:
    if world.size > 1:
        dist.all_reduce(value)
    return value
