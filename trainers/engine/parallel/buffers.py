"""The buffers of models (BatchNorm statistics, for example): equal on all ranks, and untouched by forwards that are repeated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.engine.world import World

# For each module: the module's own dict of buffers, and copies of their values.
Snapshot = list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]]


def share_buffers(models: Mapping[str, nn.Module], world: World) -> None:
    """Copy rank 0's buffers to every rank, in one broadcast for each dtype. Collective.

    Buffers of ranks drift apart while a step computes. A checkpoint holds rank 0's, so every step must begin with them too:
    otherwise a forward that reads a buffer would notice an interruption.
    """
    if world.size == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in dict.fromkeys(buffer for model in models.values() for buffer in model.buffers()):
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.broadcast(flat, src=0)
        if not world.main:
            parts = flat.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(buffer) for buffer, part in zip(buffers, parts)])


def snapshot(modules: Iterable[nn.Module]) -> Snapshot:
    """Return copies of the buffers of these modules and of the modules inside them."""
    inside = dict.fromkeys(module for outer in modules for module in outer.modules())
    copies = {buffer: buffer.clone() for module in inside for buffer in module.buffers(recurse=False)}
    return [(module._buffers, {name: None if buffer is None else copies[buffer] for name, buffer in module._buffers.items()})
            for module in inside if module._buffers]


@contextmanager
def replaced(values: Snapshot) -> Iterator[None]:
    """Let forwards read and change copies of these values. Afterwards the modules have their own buffers again, unchanged.

    The tensors are exchanged instead of overwritten: a graph may still need the present ones for its backward.
    """
    own = [dict(buffers) for buffers, _ in values]
    copies: dict[Tensor, Tensor] = {}
    try:
        for buffers, replacements in values:
            for name, value in replacements.items():
                if value is not None:
                    buffers[name] = copies.setdefault(value, value.clone())
        yield
    finally:
        for (buffers, _), before in zip(values, own):
            buffers.update(before)
