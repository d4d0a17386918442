"""The rank of this process, its device and its process groups."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Iterator, Mapping

import torch
import torch.distributed as dist

from trainers.contract.errors import UserError

# Longer than any rank may take for one checkpoint, download or picture. `launch` finds ranks that hang (`run.hang_s`), and a rank
# that ends is noticed at once.
PATIENT = timedelta(days=30)


@dataclass(frozen=True)
class World:
    """The rank of this process among all ranks of the run, and its device."""

    rank: int        # from 0 to size - 1
    size: int        # number of ranks on all nodes (the world size)
    local_rank: int  # from 0 to local_size - 1
    local_size: int  # number of ranks on this node
    device: torch.device
    shares_gpu: bool = False  # whether ranks may use one GPU together (LAUNCH_SHARE_GPU), for tests

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "World":
        """Read the environment variables that torchrun sets. The device is a GPU unless ACCELERATE_USE_CPU is 1, true or yes.

        With LAUNCH_SHARE_GPU=1 a machine with too few GPUs is no error: ranks share them, and sum over gloo, because NCCL refuses
        two ranks on one GPU. This is for tests on one GPU. It is slow.

        Raises:
            UserError: the variables contradict each other, or the rank needs a GPU that torch does not see.
        """
        rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        local_rank, local_size = int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", size))
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            raise UserError(f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local_rank} and LOCAL_WORLD_SIZE={local_size} "
                            "contradict each other", "start ranks with `launch` or torchrun")
        if env.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            return cls(rank, size, local_rank, local_size, torch.device("cpu"))
        gpus = torch.cuda.device_count()
        if gpus and env.get("LAUNCH_SHARE_GPU") == "1":
            return cls(rank, size, local_rank, local_size, torch.device("cuda", local_rank % gpus), shares_gpu=True)
        if gpus <= local_rank:
            raise UserError(f"rank {rank} needs GPU {local_rank}; torch {torch.__version__} sees {gpus}",
                            "use --procs N for CPU ranks, or install the torch build for this driver")
        return cls(rank, size, local_rank, local_size, torch.device("cuda", local_rank))

    @property
    def main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def use_device(self) -> None:
        """Let this process use its device where torch asks for "cuda" without a number."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def start_process_group(self) -> None:
        """Start the default process group, unless it is started already. It serves tensors on the device and on the CPU."""
        if dist.is_initialized():
            return
        self.use_device()
        backend = "gloo" if self.device.type == "cpu" else f"cpu:gloo,cuda:{'gloo' if self.shares_gpu else 'nccl'}"
        if self.size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)

    def new_gloo_group(self, timeout: timedelta = PATIENT) -> dist.ProcessGroup | None:
        """Return a new gloo group of all ranks, for tensors on the CPU; None if there is only one rank. Collective.

        Args:
            timeout: how long a collective of this group waits for the other ranks. After a timeout the group is of no use.
        """
        if self.size == 1:
            return None
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)  # ranks outside the group would get a number, but every rank is inside
        return group

    def minimum(self, number: int) -> int:
        """Return the smallest `number` of all ranks. Collective."""
        if self.size == 1:
            return number
        self.start_process_group()
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MIN)
        return int(value)

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Run a block on local rank 0 of every node first, then on all other ranks: for downloads and caches. Collective."""
        group = self.new_gloo_group()
        if group and self.local_rank != 0:
            dist.barrier(group)
        try:
            yield
        finally:
            if group and self.local_rank == 0:
                dist.barrier(group)
