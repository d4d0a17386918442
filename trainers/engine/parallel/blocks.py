"""The blocks that a deep model repeats: the units in which it is sharded, and its activations are computed again."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of the classes that the model names in `_no_split_modules` (as transformers' models do),
    else the outermost children of its ModuleLists that are no lists themselves; none if it has no such."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            listed = isinstance(module, nn.ModuleList) and not names and not isinstance(child, (nn.ModuleList, nn.ModuleDict))
            if listed or type(child).__name__ in names:
                found.append(child)
            else:
                look(child)

    look(model)
    return found


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only each block's input for backward, and compute the rest again (Chen et al. 2016, arXiv:1604.06174): in
    place, so that no parameter's name changes."""
    for block in blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
