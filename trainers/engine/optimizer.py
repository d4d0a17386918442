"""The optimizers by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from trainers.config import Optim


def make_optimizer(optim: Optim, parameters: Iterable[nn.Parameter], fused: bool = True) -> torch.optim.Optimizer:
    """Of those parameters that are trained; one parameter group."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    common = dict(lr=optim.lr, weight_decay=optim.weight_decay, fused=fused)
    match optim.name:
        case "sgd":
            return torch.optim.SGD(trained, momentum=optim.momentum, nesterov=optim.nesterov, **common)
        case "adam":
            return torch.optim.Adam(trained, betas=tuple(optim.betas), eps=optim.eps, **common)
        case "adamw":
            return torch.optim.AdamW(trained, betas=tuple(optim.betas), eps=optim.eps, **common)
