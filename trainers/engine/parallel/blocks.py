"""The blocks that a deep model repeats. FSDP shards a model block by block, and activations are recomputed block by block."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.utils.checkpoint import checkpoint

from trainers.engine.parallel.buffers import replaced, snapshot


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost repeated blocks of a model; an empty list if the model has none.

    Blocks are the modules of the classes that the model names in `_no_split_modules` (as transformers' models do).
    If the model names no classes, blocks are the children of its ModuleLists, without children that are lists themselves.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    result: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            listed = isinstance(module, nn.ModuleList) and not names and not isinstance(child, (nn.ModuleList, nn.ModuleDict))
            # `fully_shard` puts a class of another name in front of the block's own class.
            if listed or any(cls.__name__ in names for cls in type(child).__mro__):
                result.append(child)
            else:
                search(child)

    search(model)
    return result


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only each block's input for backward, and recompute the block's other activations (Chen et al. 2016,
    arXiv:1604.06174). Changes the blocks in place, so that parameters keep their names."""
    for block in blocks(model):
        # torch.compile does not support `context_fn`, so blocks without buffers do not get it.
        contexts = {"context_fn": functools.partial(_contexts, block)} if any(True for _ in block.buffers()) else {}
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **contexts)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of a block's forward and of its recomputation. The recomputation reads the buffers as the forward
    found them and leaves them alone: otherwise BatchNorm would count every batch twice."""
    return nullcontext(), replaced(snapshot([block]))
