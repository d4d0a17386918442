"""Make the optimizer that `optim.name` names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trainers.config.schema import Optim
from trainers.engine.groups import ParameterGroup


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


def make_optimizer(optim: Optim, model: nn.Module, groups: Sequence[ParameterGroup], fused: bool = True) -> torch.optim.Optimizer:
    """Return an optimizer of the parameters of `groups`, which belong to the model.

    Each group of the optimizer has an entry `lr_scale`. The caller sets the group's `lr` to this times the learning rate.
    """
    parameters = dict(model.named_parameters())
    settings: list[dict[str, Any]] = [
        {"params": [parameters[name] for name in group.names], "lr": optim.lr * group.lr_scale, "lr_scale": group.lr_scale,
         **group.options} for group in groups]
    match optim.name:
        case "sgd":
            return Sgd(settings, lr=optim.lr, nesterov=optim.nesterov, momentum=optim.momentum, fused=fused, foreach=not fused)
        case "adam":
            return torch.optim.Adam(settings, lr=optim.lr, fused=fused)
        case "adamw":
            return torch.optim.AdamW(settings, lr=optim.lr, fused=fused)
