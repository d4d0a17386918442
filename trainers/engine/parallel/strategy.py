"""How models are spread over ranks: the interface between the loop and the parallelism of torch and DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch.distributed as dist
from torch import nn

from trainers.config.schema import Optim, RunConfig
from trainers.engine.groups import ParameterGroup
from trainers.engine.parallel.fragments import Fragment
from trainers.engine.parallel.sharded_model import ShardedModel
from trainers.engine.world import World


class Strategy(Protocol):
    """How models are spread over ranks, chosen by `train.strategy`. All methods are collective."""

    @property
    def needs_settling(self) -> bool:
        """Whether two backward passes must run and be discarded before the first step. Without them the first step after a
        resume differs in its last bits from the same step of an uninterrupted run."""
        ...

    def place(self, model: nn.Module) -> nn.Module:
        """Prepare a model for training: move it to the device, or shard it. Every rank has built the same model on the CPU."""
        ...

    def shard(self, model: nn.Module, optim: Optim, groups: Sequence[ParameterGroup]) -> ShardedModel:
        """Combine a placed model with a new optimizer for the parameters of `groups`."""
        ...

    def clear_gradients(self, models: Iterable[nn.Module]) -> None:
        """Clear all gradients."""
        ...

    def fragments(self, models: Mapping[str, nn.Module]) -> dict[str, Fragment]:
        """Return this rank's part of the models' parameters and buffers, by their names in checkpoints."""
        ...


def make_strategy(world: World, config: RunConfig) -> Strategy:
    """Return the strategy of `train.strategy`. Imports only the libraries of this strategy: DeepSpeed takes seconds."""
    return STRATEGIES[config.train.strategy](world, config)


def close_process_group() -> None:
    """Shut down the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _ddp(world: World, config: RunConfig) -> Strategy:
    from trainers.engine.parallel.ddp import Ddp

    return Ddp(world, config)


def _fsdp(world: World, config: RunConfig) -> Strategy:
    from trainers.engine.parallel.fsdp import Fsdp

    return Fsdp(world, config)


def _zero(world: World, config: RunConfig) -> Strategy:
    from trainers.engine.parallel.zero import Zero

    return Zero(world, config)


STRATEGIES: dict[str, Callable[[World, RunConfig], Strategy]] = {
    "ddp": _ddp, "fsdp": _fsdp, "zero1": _zero, "zero2": _zero, "zero3": _zero,
}
