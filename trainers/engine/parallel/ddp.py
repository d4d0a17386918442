"""Distributed data parallel: every rank holds everything (Li et al. 2020, arXiv:2006.15704)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from trainers.config.schema import Optim, RunConfig
from trainers.engine.optimizer import make_optimizer
from trainers.engine.parallel.blocks import checkpoint_activations
from trainers.engine.parallel.fragments import Fragment, state
from trainers.engine.parallel.sharded_model import ShardedModel
from trainers.engine.world import World


class Ddp:
    def __init__(self, world: World, config: RunConfig):
        self.world, self.config = world, config.train
        # Accelerate starts the process group (nccl or gloo) and places models; all else is ours.
        self.accelerator = Accelerator(
            cpu=world.device.type == "cpu",
            mixed_precision="no",  # ours, and not what ACCELERATE_MIXED_PRECISION may say
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self._wrapped: dict[nn.Module, nn.Module] = {}  # two updates may train one model

    @property
    def settles(self) -> bool:
        """DDP orders its buckets anew after its first step, which with three or more ranks changes the order of sums."""
        return self.world.size > 2

    def place(self, model: nn.Module) -> nn.Module:
        if self.config.checkpoint_activations:
            checkpoint_activations(model)
        return model.to(self.world.device)

    def shard(self, model: nn.Module, optim: Optim) -> ShardedModel:
        if model not in self._wrapped:
            module = torch.compile(model) if self.config.compile else model
            self._wrapped[model] = module if self.world.size == 1 else self.accelerator.prepare_model(module)
        return DdpModel(self._wrapped[model], model, make_optimizer(optim, model.parameters()))

    def clear(self, models: Iterable[nn.Module]) -> None:
        for model in models:
            model.zero_grad(set_to_none=True)

    def fragments(self, models: Mapping[str, nn.Module]) -> dict[str, Fragment]:
        return {f"models/{name}/{key}": Fragment.whole(tensor) for name, model in models.items()
                for key, tensor in state(model).items()}


class DdpModel(ShardedModel):
    def accumulating(self, last: bool) -> AbstractContextManager:
        # Gradients cross ranks only in the last micro-batch of a step.
        alone = last or not isinstance(self.module, nn.parallel.DistributedDataParallel)
        return nullcontext() if alone else self.module.no_sync()
