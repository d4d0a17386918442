"""Evaluation with exact counts: every sample once, whatever the number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.config.schema import RunConfig
from trainers.contract import heartbeat
from trainers.engine.batches.sampling import evaluation_shares, seed_noise
from trainers.engine.precision import autocast
from trainers.engine.stopping import Stopping
from trainers.engine.task import Dataset, Task
from trainers.engine.world import World


def evaluate(task: Task, models: Mapping[str, nn.Module], dataset: Dataset, config: RunConfig, world: World,
             stopping: Stopping) -> dict[str, Tensor] | None:
    """The task's measures over the whole set, divided, float64, the same on all ranks; None if the run
    is to stop before the end."""
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
                for name, pair in task.evaluate(models, dataset.batch(share)).items():
                    new = [torch.as_tensor(part, device=world.device).double() for part in pair]
                    sums[name] = tuple(old + more for old, more in zip(sums[name], new)) if name in sums else tuple(new)
                heartbeat.done("evaluation")
    finally:
        for name, model in models.items():
            model.train(training[name])
    return {name: _over_ranks(total, world) / _over_ranks(count, world) for name, (total, count) in sums.items()}


def draw_figures(task: Task, measured: Mapping[str, Tensor], figures: Path, note: Callable[[str, str], None]) -> None:
    """The pictures of an evaluation, if the task draws any; on one rank. `note(level, message)` is told what fails."""
    try:
        figures.mkdir(exist_ok=True)
        task.report(measured, figures)
    except OSError as error:
        note("warning", f"no figures in {figures}: {error.strerror}")


def _over_ranks(value: Tensor, world: World) -> Tensor:
    if world.size > 1:
        dist.all_reduce(value)
    return value
