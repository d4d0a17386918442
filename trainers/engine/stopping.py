"""Stop all ranks at the same step: a signal sets a flag, and the ranks agree on the flags at a boundary."""

from __future__ import annotations

import torch
import torch.distributed as dist

from trainers.contract.signals import stop_requested
from trainers.engine.world import World


class Stopping:
    """Answers whether the run must stop. Every rank gets the same answer at the same boundary.

    A boundary lies between two training steps, or between two batches of an evaluation. The flags of a boundary are reduced
    while the next step computes, so that no rank waits for the answer. A stop therefore takes effect one boundary after the
    first rank received its signal. The reduction uses a separate gloo group: the flags are in host memory, and other
    collectives may be running on the default group.
    """

    def __init__(self, world: World):
        self._group = world.new_gloo_group()
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None
        self._agreed = False

    def at_boundary(self) -> bool:
        """Return whether to stop now. Collective: all ranks call this equally often."""
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
        """Wait for the last reduction."""
        if self._work is not None:
            self._work.wait()
