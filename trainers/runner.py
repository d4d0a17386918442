"""Tasks without steps, which run themselves: a search. Imports no torch, and neither need they."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from trainers.config.schema import SearchConfig
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths


@dataclass(frozen=True)
class Place:
    """Which rank this is, of how many, and the cores that are its own."""

    rank: int
    size: int
    cores: int

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Place:
        """From torchrun's variables; without them, alone. Raises: UserError if they contradict each other."""
        try:
            rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        except ValueError:
            rank, size = -1, -1
        if not 0 <= rank < size:
            raise UserError(f"RANK={env.get('RANK')} of WORLD_SIZE={env.get('WORLD_SIZE')} cannot be",
                            "start ranks with `launch` or torchrun")
        if env.get("LAUNCH_DEBUG"):  # breakpoint() works in this process alone
            return cls(rank, size, 1)
        asked = env.get("OMP_NUM_THREADS", "")
        return cls(rank, size, int(asked) if asked.isdigit() and int(asked) else len(os.sched_getaffinity(0)))


class Runner:
    """Base class of tasks that run themselves, each rank on its own."""

    def __init__(self, config: SearchConfig):
        self.config = config

    def prefetch(self) -> list[str]:
        """As trainers.engine.task.Task.prefetch."""
        return []

    def run(self, place: Place, paths: RunPaths, attempt: int | None) -> int:
        """One rank's part of the run, which goes on where earlier attempts have left it. Returns its exit code.

        A stop raises Stopped (trainers/contract/signals.py), until `hold` was called. Rank 0 keeps run.json and says how the
        run goes (trainers/contract/events.py). Raises: UserError.
        """
        raise TypeError(f"{type(self).__name__} must define run(self, place, paths, attempt)")
