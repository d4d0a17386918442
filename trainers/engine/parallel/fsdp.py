"""Fully sharded data parallel, by torch's `fully_shard` (Zhao et al. 2023, arXiv:2304.11277): each rank holds a slice of
every parameter, gradient and optimizer state, and a block's whole parameters only while it computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.modules.batchnorm import _BatchNorm

from trainers.config.schema import Optim, RunConfig
from trainers.contract.errors import UserError
from trainers.engine.optimizer import make_optimizer
from trainers.engine.parallel.blocks import blocks, checkpoint_activations
from trainers.engine.parallel.fragments import Fragment, state
from trainers.engine.parallel.sharded_model import Shapes, ShardedModel
from trainers.engine.precision import HALVES
from trainers.engine.world import World


class Fsdp:
    settles = False

    def __init__(self, world: World, config: RunConfig):
        self.world, self.config = world, config.train
        world.start_process_group()
        self.mesh = init_device_mesh(world.device.type, (world.size,))

    def place(self, model: nn.Module) -> nn.Module:
        """Blocks are sharded each by itself, what is left with the model as a whole: also a block that shares a parameter
        with something outside (tied embeddings)."""
        if self.config.checkpoint_activations:
            checkpoint_activations(model)
        if scalar := next((name for name, parameter in model.named_parameters() if parameter.ndim == 0), None):
            raise UserError(f"`train.strategy` is `fsdp`, which cannot take apart `{scalar}`, a parameter without dimensions",
                            "make it of shape [1], or use ddp or zero1 to zero3")
        # Gathered in half precision, which halves what crosses ranks; gradients are summed over ranks in fp32.
        half = HALVES.get(self.config.precision)
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
        on_host = self.config.offload == "parameters"
        offload = CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda") if on_host else OffloadPolicy()
        if half:  # beside statistics in fp32, BatchNorm's parameters must be too
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    fully_shard(module, mesh=self.mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
                                offload_policy=offload)
        for module in [*(block for block in blocks(model) if _by_itself(block, model)), model]:
            if self.config.compile:
                module.compile()  # before it is sharded, so that its hooks stay outside
            fully_shard(module, mesh=self.mesh, mp_policy=policy, offload_policy=offload)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.world.device)
        return model

    def shard(self, model: nn.Module, optim: Optim) -> ShardedModel:
        fused = optim.name != "sgd"  # which torch cannot do on sharded parameters (2.14)
        return FsdpModel(model, model, make_optimizer(optim, model.parameters(), fused))

    def clear(self, models: Iterable[nn.Module]) -> None:
        for model in models:
            _reshard(model)  # else whole parameters would stand before those that have the gradients
            model.zero_grad(set_to_none=True)

    def fragments(self, models: Mapping[str, nn.Module]) -> dict[str, Fragment]:
        for model in models.values():
            _reshard(model)
        return {f"models/{name}/{key}": fragment(tensor) for name, model in models.items()
                for key, tensor in state(model).items()}


class FsdpModel(ShardedModel):
    def fragments(self, update: str) -> dict[str, Fragment]:
        _reshard(self.model)
        return super().fragments(update)

    def allocate(self, update: str, shapes: Shapes) -> None:
        _reshard(self.model)
        super().allocate(update, shapes)

    def _fragment(self, tensor: Tensor) -> Fragment:
        return fragment(tensor)

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local()

    def _norms(self, gradients: list[Tensor]) -> Tensor:
        squares = super()._norms(gradients).square()
        dist.all_reduce(squares)
        return squares.sqrt()


def _by_itself(block: nn.Module, model: nn.Module) -> bool:
    """Whether no module outside has a parameter of the block."""
    inside = set(block.modules())
    others = {id(parameter) for module in model.modules() if module not in inside
              for parameter in module.parameters(recurse=False)}
    return not any(id(parameter) in others for parameter in block.parameters())


def _reshard(model: nn.Module) -> None:
    """Let go of whole parameters: the outermost module keeps its own after a forward that no backward followed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def fragment(tensor: Tensor) -> Fragment:
    """The slice of the first dimension that this rank holds of a DTensor; the whole of any other."""
    if not isinstance(tensor, DTensor):
        return Fragment.whole(tensor)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    row = tensor.shape[1:].numel()
    return Fragment(tensor.to_local(), offset[0] * row, tuple(tensor.shape))
