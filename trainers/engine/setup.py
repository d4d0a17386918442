"""The common start of training and evaluation: set the precision, load the data, make and place the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainers.checkpoints.facts import checked
from trainers.config import compatibility
from trainers.config.schema import RunConfig
from trainers.contract.errors import UserError
from trainers.engine.batches import data_sets
from trainers.engine.batches.evaluating import lengths_to_evaluate
from trainers.engine.batches.sampler import lengths_to_train
from trainers.engine.batches.sampling import derive_seed
from trainers.engine.parallel.batch_norm import synchronize
from trainers.engine.parallel.blocks import blocks
from trainers.engine.parallel.strategy import Strategy, make_strategy
from trainers.engine.precision import set_deterministic, set_precision
from trainers.engine.saving.weights import Layout, layout
from trainers.engine.stopping import Stopping
from trainers.engine.task import Dataset, MapDataset, Task
from trainers.engine.world import World


@dataclass(frozen=True)
class Setup:
    """What a rank needs before it trains or evaluates."""

    task: Task
    strategy: Strategy
    stopping: Stopping
    train_set: Dataset            # in a prediction from lines: the lines
    eval_set: Dataset | None
    test_set: Dataset | None      # None also in an evaluation without training
    models: dict[str, nn.Module]  # by name, placed by the strategy
    layout: Layout                # names and shapes of the models' tensors, read before the models were placed
    parameters: int               # number of parameters of all models, counted before the models were placed
    facts: dict[str, Any]         # what the task keeps with the weights (`Task.facts`)


def set_up(task: Task, config: RunConfig, world: World, placed: RunConfig | None = None,
           before_placement: Callable[[Mapping[str, nn.Module]], None] = lambda models: None,
           inputs: Callable[[], Dataset | MapDataset] | None = None) -> Setup:
    """Load the data, then make and place the models. All ranks call this together.

    Args:
        placed: the settings that the strategy follows; None: `config`.
        before_placement: called with the models by name, before the strategy places them.
        inputs: makes the only data set, in place of the task's `data`; then there are no facts either.

    Raises:
        UserError: the input is bad, settings contradict each other, or the device does not support the precision.
    """
    train = config.train
    compatibility.check(config, world.device.type)  # torchrun may have started the ranks, without the checks of `launch`
    world.use_device()
    set_precision(train.precision, world.device)
    set_deterministic(train.deterministic, train.compile, world.device)
    strategy = make_strategy(world, placed or config)
    stopping = Stopping(world)
    test_set = None
    if inputs is None:
        train_set, eval_set = data_sets.data_of(task, train.seed, world)
        if not config.eval.only:
            test_set = data_sets.test_set_of(task, train.seed, world)
        facts = checked(task.facts())
    else:
        train_set, eval_set, facts = data_sets.checked("set of inputs", inputs(), train.seed, world), None, {}
    # Refuse now what would fail at the first evaluation, or at the test at the end.
    batching = config.batching(world.size)
    if inputs is None and not config.eval.only and batching.tokens:
        lengths_to_train(train_set)
    evaluated = eval_set if config.eval.only or config.eval.every != "never" else None
    for dataset in (evaluated if inputs is None else train_set, test_set):
        if dataset is not None and len(dataset):
            lengths_to_evaluate(dataset, batching)
    torch.manual_seed(derive_seed(train.seed, "models"))
    models = task.models()
    before_placement(models)
    tensors = layout(models)
    parameters = sum(parameter.numel() for model in models.values() for parameter in model.parameters())
    if train.checkpoint_activations and not any(map(blocks, models.values())):
        raise UserError("`train.checkpoint_activations` is true, but the model has no blocks to compute again",
                        "put the model's blocks in a ModuleList, name their classes in `_no_split_modules`, or use "
                        "train.checkpoint_activations=false")
    if train.sync_batchnorm and world.size > 1:
        models = {name: synchronize(model, world.device) for name, model in models.items()}
    models = {name: strategy.place(model) for name, model in models.items()}
    return Setup(task, strategy, stopping, train_set, eval_set, test_set, models, tensors, parameters, facts)
