"""The optimizers by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from trainers.config.schema import Optim


class Sgd(torch.optim.SGD):
    """torch's, whose fused kernel wants the momentum of all parameters or of none: one that gets its first gradient after
    others is given zeros, by which its momentum becomes that gradient, as without the kernel."""

    def _init_group(self, group, params, grads, momentums):
        found = super()._init_group(group, params, grads, momentums)
        if group["momentum"] and any(momentum is not None for momentum in momentums):
            momentums[:] = [torch.zeros_like(p) if momentum is None else momentum for p, momentum in zip(params, momentums)]
        return found


def make_optimizer(optim: Optim, parameters: Iterable[nn.Parameter], fused: bool = True) -> torch.optim.Optimizer:
    """Of those parameters that are trained; one parameter group."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    common = dict(lr=optim.lr, weight_decay=optim.weight_decay, fused=fused)
    match optim.name:
        case "sgd":
            return Sgd(trained, momentum=optim.momentum, nesterov=optim.nesterov, **common)
        case "adam":
            return torch.optim.Adam(trained, betas=tuple(optim.betas), eps=optim.eps, **common)
        case "adamw":
            return torch.optim.AdamW(trained, betas=tuple(optim.betas), eps=optim.eps, **common)
