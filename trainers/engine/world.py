"""Which rank this is, read once from the standard environment."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Iterator, Mapping

import torch
import torch.distributed as dist

from trainers.contract.errors import UserError


@dataclass(frozen=True)
class World:
    """This rank's place among `size` ranks, `local_size` of them on its node."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "World":
        """Read torchrun's variables; ACCELERATE_USE_CPU asks for CPU ranks.

        Raises:
            UserError: the variables contradict each other, or a GPU was asked for and is not there.
        """
        rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        local_rank, local_size = int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", size))
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            raise UserError(f"RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of "
                            f"LOCAL_WORLD_SIZE={local_size} cannot be", "start ranks with `launch` or torchrun")
        if env.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            return cls(rank, size, local_rank, local_size, torch.device("cpu"))
        if torch.cuda.device_count() <= local_rank:
            raise UserError(f"rank {rank} needs GPU {local_rank}; torch {torch.__version__} sees "
                            f"{torch.cuda.device_count()}",
                            "use --procs N for CPU ranks, or install the torch build for this driver")
        return cls(rank, size, local_rank, local_size, torch.device("cuda", local_rank))

    @property
    def main(self) -> bool:
        return self.rank == 0

    def start_process_group(self) -> None:
        """The default group, if nobody has started it: for collectives of this device, and of the host's memory too."""
        if dist.is_initialized():
            return
        backend = "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)

    def least(self, number: int) -> int:
        """The least of what ranks give."""
        if self.size == 1:
            return number
        self.start_process_group()
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MIN)
        return int(value)

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """The node's first rank goes through the block alone, the others after it (a download, a cache)."""
        # By gloo and with patience: nccl's barrier would give up on a long download.
        group = dist.new_group(backend="gloo", timeout=timedelta(hours=6)) if self.size > 1 else None
        if group and self.local_rank != 0:
            dist.barrier(group)
        try:
            yield
        finally:
            if group and self.local_rank == 0:
                dist.barrier(group)


FULL = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a device's memory is full."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
