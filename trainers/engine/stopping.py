"""Stopping together: a signal sets a flag, the ranks agree on it at a boundary."""

from __future__ import annotations

import torch
import torch.distributed as dist

from trainers.contract.signals import stop_requested
from trainers.engine.world import World


class Stopping:
    """Whether the run is to stop, the same answer on every rank at the same boundary.

    One boundary's flags are reduced while the next step computes, so nobody waits for the answer: a
    stop takes effect one boundary after the first rank has seen its signal. The group is gloo's and
    its own, since flags live on the host and other collectives may be under way on the default group.
    """

    def __init__(self, world: World):
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None
        self._agreed = False

    def at_boundary(self) -> bool:
        """Called by all ranks, the same number of times."""
        if self._group is None:
            self._agreed = self._agreed or stop_requested()
            return self._agreed
        if self._agreed:
            return True
        if self._work is not None:
            self._work.wait()
            self._agreed = bool(self._flag.item())
            if self._agreed:
                return True
        self._flag.fill_(int(stop_requested()))
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return False

    def close(self) -> None:
        if self._work is not None:
            self._work.wait()
