"""How models are spread over ranks: the one place where the loop meets torch's and DeepSpeed's parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch.distributed as dist
from torch import nn

from trainers.config.schema import Optim, RunConfig
from trainers.engine.parallel.fragments import Fragment
from trainers.engine.parallel.sharded_model import ShardedModel
from trainers.engine.world import World


class Strategy(Protocol):
    """What `train.strategy` chooses. All methods are collective."""

    settles: bool
    """Whether discarded backwards must come before the first step, so that the first step after a resumption has the bits
    of the same step in an uninterrupted run."""

    def place(self, model: nn.Module) -> nn.Module:
        """Put a model, which all ranks have made alike on the CPU, where it is trained: on the device, in parts."""
        ...

    def shard(self, model: nn.Module, optim: Optim) -> ShardedModel:
        """A placed model with an optimizer of its parameters."""
        ...

    def clear(self, models: Iterable[nn.Module]) -> None:
        """Forget all gradients."""
        ...

    def fragments(self, models: Mapping[str, nn.Module]) -> dict[str, Fragment]:
        """What this rank holds of the models' parameters and buffers, by the names that a checkpoint gives them."""
        ...


def make_strategy(world: World, config: RunConfig) -> Strategy:
    """Imports what the strategy needs, and nothing for others: DeepSpeed takes seconds."""
    return STRATEGIES[config.train.strategy](world, config)


def share_buffers(models: Mapping[str, nn.Module], world: World) -> None:
    """Give every rank rank 0's buffers (BatchNorm statistics), which ranks let drift apart: the ones of checkpoints."""
    if world.size > 1:
        for model in models.values():
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


def close() -> None:
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
