"""Distributed data parallel: every rank holds the whole model and optimizer (Li et al. 2020, arXiv:2006.15704)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Mapping, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from trainers.checkpoints.names import MODELS
from trainers.config.schema import Optim, RunConfig
from trainers.engine.groups import ParameterGroup
from trainers.engine.optimizer import make_optimizer
from trainers.engine.parallel.blocks import checkpoint_activations
from trainers.engine.parallel.fragments import Fragment, model_tensors
from trainers.engine.parallel.sharded_model import ShardedModel
from trainers.engine.world import World


class Ddp:
    """The strategy `ddp`."""

    def __init__(self, world: World, config: RunConfig):
        self.world, self.config = world, config.train
        # Accelerate wraps models, and the engine does everything else. A single rank needs neither a process group nor wrapped
        # models: starting NCCL for one GPU takes seconds.
        self.accelerator = _accelerator(world) if world.size > 1 else None
        # Tensor cores compute convolutions in this order, and would otherwise convert every layer's inputs. DeepSpeed and
        # `fully_shard` need weights in the usual order.
        self.channels_last = world.device.type == "cuda" and config.train.precision != "fp32"
        self._wrapped: dict[nn.Module, nn.Module] = {}  # two updates may train the same model

    @property
    def needs_settling(self) -> bool:
        """DDP reorders its buckets after the first step. With three or more ranks this changes the order of sums."""
        return self.world.size > 2

    def place(self, model: nn.Module) -> nn.Module:
        if self.config.checkpoint_activations:
            checkpoint_activations(model)
        model = model.to(self.world.device)
        return channels_last(model) if self.channels_last else model

    def shard(self, model: nn.Module, optim: Optim, groups: Sequence[ParameterGroup]) -> ShardedModel:
        if model not in self._wrapped:
            # torch declares a compiled module as a callable.
            module = cast(nn.Module, torch.compile(model)) if self.config.compile else model
            self._wrapped[model] = _ddp(self.accelerator, module, self.world) if self.accelerator else module
        return DdpModel(self._wrapped[model], model, make_optimizer(optim, model, groups))

    def clear_gradients(self, models: Iterable[nn.Module]) -> None:
        for model in models:
            model.zero_grad(set_to_none=True)

    def fragments(self, models: Mapping[str, nn.Module]) -> dict[str, Fragment]:
        return {f"{MODELS}{name}/{key}": Fragment.whole(tensor) for name, model in models.items()
                for key, tensor in model_tensors(model).items()}


def channels_last(model: nn.Module) -> nn.Module:
    """Change the memory order of the weights of 2-d convolutions in place: the channels of a pixel become neighbours.

    Outputs of a convolution have the memory order of its weights, so activations follow. Convolutions in groups have fast
    kernels for the usual order only, so a model that has one stays as it is. Values, shapes and checkpoints stay the same.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    if all(convolution.groups == 1 for convolution in convolutions):
        for convolution in convolutions:
            convolution.to(memory_format=torch.channels_last)
    return model


def _accelerator(world: World) -> Accelerator:
    world.start_process_group()
    return Accelerator(
        cpu=world.device.type == "cpu",
        mixed_precision="no",  # the engine sets the precision; this ignores ACCELERATE_MIXED_PRECISION
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def _ddp(accelerator: Accelerator, module: nn.Module, world: World) -> nn.Module:
    if world.shares_gpu:  # otherwise accelerate tells DDP to use GPU number LOCAL_RANK, which does not exist
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    wrapped = accelerator.prepare_model(module)
    # The loop shares buffers once a step. DDP would share them in every forward, and a backward through two forwards then fails,
    # because DDP has written into the buffers in between. As an argument of DDP, torch 2.14 calls this deprecated.
    wrapped.broadcast_buffers = False
    return wrapped


class DdpModel(ShardedModel):
    """A model that every rank holds whole."""

    def accumulating(self, last: bool) -> AbstractContextManager:
        # DDP reduces the gradients over ranks only in the last micro-batch of a step.
        if last or not isinstance(self.module, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()
