"""Make the optimizer that `optim.name` names."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from trainers.config.schema import Optim


class Sgd(torch.optim.SGD):
    """torch's SGD, with a fused kernel that also takes parameters whose first gradient comes late.

    torch's fused kernel needs the momentum of all parameters or of none. A parameter that gets its first gradient after
    other parameters has no momentum yet, so it starts from zeros here. Its momentum then becomes that first gradient, the
    same as without the fused kernel.
    """

    def _init_group(self, group, params, grads, momentums):
        has_sparse_gradient = super()._init_group(group, params, grads, momentums)
        if group["momentum"] and any(momentum is not None for momentum in momentums):
            momentums[:] = [torch.zeros_like(p) if momentum is None else momentum for p, momentum in zip(params, momentums)]
        return has_sparse_gradient


def make_optimizer(optim: Optim, parameters: Iterable[nn.Parameter], fused: bool = True) -> torch.optim.Optimizer:
    """Return an optimizer with one parameter group: those of `parameters` that require gradients."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    beta1, beta2 = optim.betas
    match optim.name:
        case "sgd":
            return Sgd(trained, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov,
                       weight_decay=optim.weight_decay, fused=fused)
        case "adam":
            return torch.optim.Adam(trained, lr=optim.lr, betas=(beta1, beta2), eps=optim.eps,
                                    weight_decay=optim.weight_decay, fused=fused)
        case "adamw":
            return torch.optim.AdamW(trained, lr=optim.lr, betas=(beta1, beta2), eps=optim.eps,
                                     weight_decay=optim.weight_decay, fused=fused)
