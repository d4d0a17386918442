"""Fully sharded data parallel with torch's `fully_shard` (Zhao et al. 2023, arXiv:2304.11277).

Each rank holds a slice of every parameter, gradient and optimizer state. It gathers the whole parameters of a block only
while the block computes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.modules.batchnorm import _BatchNorm

from trainers.checkpoints.names import MODELS
from trainers.config.schema import Optim, RunConfig
from trainers.contract.errors import UserError
from trainers.engine.groups import ParameterGroup
from trainers.engine.optimizer import make_optimizer
from trainers.engine.parallel.blocks import blocks, checkpoint_activations
from trainers.engine.parallel.fragments import Fragment, model_tensors
from trainers.engine.parallel.sharded_model import Shapes, ShardedModel
from trainers.engine.precision import HALVES
from trainers.engine.world import World


class Fsdp:
    """The strategy `fsdp`."""

    needs_settling = False

    def __init__(self, world: World, config: RunConfig):
        self.world, self.config = world, config.train
        world.start_process_group()
        self.mesh = init_device_mesh(world.device.type, (world.size,))

    def place(self, model: nn.Module) -> nn.Module:
        """Shard each block separately, and the rest of the model as one unit. A block that shares a parameter with a module
        outside the block (tied embeddings) belongs to the rest.

        Raises:
            UserError: a parameter has no dimensions.
        """
        if self.config.checkpoint_activations:
            checkpoint_activations(model)
        if scalar := next((name for name, parameter in model.named_parameters() if parameter.ndim == 0), None):
            raise UserError(f"`train.strategy` is `fsdp`, which cannot shard the parameter `{scalar}`: it has no dimensions",
                            "give it shape [1], or use train.strategy=ddp, zero1, zero2 or zero3")
        # Parameters are gathered in half precision, which halves the traffic. Gradients are summed over ranks in fp32.
        half = HALVES.get(self.config.precision)
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
        on_host = self.config.offload == "parameters"
        offload = CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda") if on_host else OffloadPolicy()
        if half:  # BatchNorm's statistics are fp32, so its parameters must be fp32 too
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    fully_shard(module, mesh=self.mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
                                offload_policy=offload)
        for module in [*(block for block in blocks(model) if _shares_no_parameter(block, model)), model]:
            if self.config.compile:
                module.compile()  # before sharding, so that the hooks of fully_shard stay outside the compiled code
            fully_shard(module, mesh=self.mesh, mp_policy=policy, offload_policy=offload)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.register_forward_pre_hook(functools.partial(_copy_flags, _own_parameters(module)))
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.world.device)
        return model

    def shard(self, model: nn.Module, optim: Optim, groups: Sequence[ParameterGroup]) -> ShardedModel:
        # torch's fused SGD does not support sharded parameters (2.14), and torch does not choose foreach for them by itself.
        fused = optim.name != "sgd"
        return FsdpModel(model, model, make_optimizer(optim, model, groups, fused))

    def clear_gradients(self, models: Iterable[nn.Module]) -> None:
        for model in models:
            _reshard(model)  # otherwise the unsharded parameters hide the sharded ones, which hold the gradients
            model.zero_grad(set_to_none=True)

    def fragments(self, models: Mapping[str, nn.Module]) -> dict[str, Fragment]:
        for model in models.values():
            _reshard(model)
        return {f"{MODELS}{name}/{key}": _local_fragment(tensor) for name, model in models.items()
                for key, tensor in model_tensors(model).items()}


class FsdpModel(ShardedModel):
    """A model of which each rank holds a slice."""

    def fragments(self, update: str) -> dict[str, Fragment]:
        _reshard(self.model)
        return super().fragments(update)

    def allocate(self, update: str, shapes: Shapes) -> None:
        _reshard(self.model)
        super().allocate(update, shapes)

    def after_fill(self) -> None:
        _reshard(self.model)  # otherwise the next forward computes with parameters that were gathered before

    def _fragment(self, tensor: Tensor) -> Fragment:
        return _local_fragment(tensor)

    def _local(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)  # fully_shard makes every parameter and gradient a DTensor
        return tensor.to_local()

    def _norms(self, gradients: list[Tensor]) -> Tensor:
        squares = super()._norms(gradients).square()
        dist.all_reduce(squares)
        return squares.sqrt()


Places = list[tuple[nn.Module, str, nn.Parameter]]  # (module, name of the parameter in it, sharded parameter)


def _own_parameters(module: nn.Module) -> Places:
    """Return the parameters that `fully_shard` gathers for this module, without those of sharded modules inside."""
    places = [(module, name, parameter) for name, parameter in module.named_parameters(recurse=False)]
    for child in module.children():
        places += [] if isinstance(child, FSDPModule) else _own_parameters(child)
    return places


def _copy_flags(places: Places, *_: object) -> None:
    """Let gathered parameters require gradients as the sharded ones do: updates change that from turn to turn. Runs after the
    hook that gathers them."""
    for module, name, sharded in places:
        gathered = getattr(module, name)
        if gathered.requires_grad != sharded.requires_grad:
            gathered.requires_grad_(sharded.requires_grad)


def _shares_no_parameter(block: nn.Module, model: nn.Module) -> bool:
    """Return whether no module of the model outside the block has a parameter of the block."""
    inside = set(block.modules())
    outside = {id(parameter) for module in model.modules() if module not in inside
               for parameter in module.parameters(recurse=False)}
    return not any(id(parameter) in outside for parameter in block.parameters())


def _reshard(model: nn.Module) -> None:
    """Free the gathered parameters. The outermost module keeps its own after a forward without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _local_fragment(tensor: Tensor) -> Fragment:
    """Return the slice of a DTensor's first dimension that this rank holds, or the whole of any other tensor."""
    if not isinstance(tensor, DTensor):
        return Fragment.whole(tensor)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    row = tensor.shape[1:].numel()
    return Fragment(tensor.to_local(), offset[0] * row, tuple(tensor.shape))
