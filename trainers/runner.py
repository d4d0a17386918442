"""Base class of tasks without steps (a search), which run themselves. Imports no torch: these tasks may not need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainers.config.schema import SearchConfig
from trainers.contract import exit_codes
from trainers.contract.cores import threads_asked_for, usable_cores
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths

FINISHED, STOPPED = exit_codes.FINISHED, exit_codes.PREEMPTED  # what `Runner.run` returns


@dataclass(frozen=True)
class Place:
    """This rank's number, the number of ranks, and how many CPU cores this rank may use."""

    rank: int
    size: int
    cores: int

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Place:
        """Read torchrun's variables. Without them, this is the only rank.

        Raises:
            UserError: RANK or WORLD_SIZE is not a number, or the two contradict each other.
        """
        try:
            rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        except ValueError:
            rank, size = -1, -1
        if not 0 <= rank < size:
            raise UserError(f"RANK={env.get('RANK')} is not possible with WORLD_SIZE={env.get('WORLD_SIZE')}",
                            "start ranks with `launch` or torchrun")
        if env.get("LAUNCH_DEBUG"):  # one core, and therefore no worker processes: breakpoint() works only in this process
            return cls(rank, size, 1)
        return cls(rank, size, threads_asked_for(env) or usable_cores())


class Runner:
    """Base class of tasks that run themselves. Every rank calls `run`."""

    def __init__(self, config: SearchConfig):
        self.config = config

    def prefetch(self) -> list[str]:
        """Download what ranks cannot download. See trainers.engine.task.Task.prefetch."""
        return []

    def run(self, place: Place, paths: RunPaths, attempt: int | None) -> int:
        """Do this rank's part of the run, starting from what earlier attempts have left. Return the exit code.

        A stop raises Stopped (trainers/contract/signals.py) until `hold` is called. Rank 0 writes run.json and reports the
        progress as events (trainers/contract/events.py).

        Raises:
            UserError: the run cannot start or cannot continue.
        """
        raise TypeError(f"{type(self).__name__} must define run(self, place, paths, attempt)")
