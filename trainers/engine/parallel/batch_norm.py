"""BatchNorm over all ranks (`train.sync_batchnorm`): a rank normalizes by the statistics of the micro-batches of all ranks."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with every BatchNorm synchronized over ranks. Parameters and buffers keep their names."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():  # torch's SyncBatchNorm has kernels for GPUs only
        if isinstance(module, _BatchNorm):
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]
    return model


def _forward(module: _BatchNorm, inputs: Tensor) -> Tensor:
    """Do what torch's SyncBatchNorm does on GPUs."""
    if not module.training:
        return F.batch_norm(inputs, module.running_mean, module.running_var, module.weight, module.bias,
                            training=module.running_mean is None, eps=module.eps)
    dims = [0, *range(2, inputs.ndim)]
    shape = [1, -1, *[1] * (inputs.ndim - 2)]
    values = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    count = values.numel() // values.shape[1]
    sums = SumOverRanks.apply(torch.cat([values.sum(dims), values.new_tensor([count])]))
    total = sums[-1].detach()  # number of values in each channel, over all ranks
    mean = sums[:-1] / total
    centered = values - mean.view(shape)
    variance = SumOverRanks.apply(centered.square().sum(dims)) / total
    if module.running_mean is not None and module.running_var is not None and module.num_batches_tracked is not None:
        with torch.no_grad():
            module.num_batches_tracked += 1
            weight = 1 / module.num_batches_tracked if module.momentum is None else module.momentum
            module.running_mean.lerp_(mean, weight)
            module.running_var.lerp_(variance * total / (total - 1), weight)
    result = centered * (variance.view(shape) + module.eps).rsqrt()
    if module.affine:
        result = result * module.weight.view(shape) + module.bias.view(shape)
    return result.to(inputs.dtype)


class SumOverRanks(torch.autograd.Function):
    """Sum a tensor over ranks. The gradient is summed over ranks too, because every rank's loss depends on the sum."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    @once_differentiable  # a second derivative through this sum would be wrong, so torch refuses it
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient
