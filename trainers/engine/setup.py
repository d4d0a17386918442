"""What training and evaluating begin with: the arithmetic, the data, the models where they are to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from trainers.config import compatibility
from trainers.config.schema import RunConfig
from trainers.contract.errors import UserError
from trainers.engine.batches.sampling import mix
from trainers.engine.parallel.blocks import blocks
from trainers.engine.parallel.strategy import Strategy, make_strategy
from trainers.engine.precision import set_deterministic, set_precision
from trainers.engine.saving.weights import Layout, layout
from trainers.engine.stopping import Stopping
from trainers.engine.task import Dataset, Task
from trainers.engine.world import World


@dataclass(frozen=True)
class Setup:
    strategy: Strategy
    stopping: Stopping
    train_set: Dataset
    eval_set: Dataset | None
    models: dict[str, nn.Module]  # placed by the strategy
    layout: Layout                # of the models before that
    parameters: int


def set_up(task: Task, config: RunConfig, world: World, placed: RunConfig | None = None,
           made: Callable[[Mapping[str, nn.Module]], None] = lambda models: None) -> Setup:
    """On all ranks.

    Args:
        placed: what the strategy is to follow, if not `config`.
        made: told the models before they are placed.

    Raises:
        UserError: bad input, settings that do not go together, a device that cannot compute so.
    """
    train = config.train
    compatibility.check(config, world.device.type)  # ranks may be started by hand
    set_precision(train.precision, world.device)
    if train.deterministic:
        set_deterministic(train.compile)
    strategy = make_strategy(world, placed or config)
    stopping = Stopping(world)
    train_set, eval_set = task.data(world)
    torch.manual_seed(mix(train.seed, "models"))
    models = task.models()
    made(models)
    found = layout(models)
    parameters = sum(parameter.numel() for model in models.values() for parameter in model.parameters())
    if train.checkpoint_activations and not any(map(blocks, models.values())):
        raise UserError("`train.checkpoint_activations` is given, and the model has no blocks to compute again",
                        "name their classes in its `_no_split_modules`, or put them in a ModuleList; or leave it out")
    return Setup(strategy, stopping, train_set, eval_set, {name: strategy.place(model) for name, model in models.items()},
                 found, parameters)
