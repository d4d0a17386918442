"""Seeds of the global random generators: for each micro-batch of a rank, and for each sample that is made by itself."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from trainers.engine.batches.sampling import derive_seed


def seed_noise(device: torch.device, *parts: int | str) -> None:
    """Seed Python's, numpy's and torch's global generators, torch's also on this rank's device, with `derive_seed(*parts)`.

    torch's generators give the same numbers as after torch.manual_seed. That call costs 0.3 ms where CUDA was never used,
    because it records a stack trace for every device type that could exist.
    """
    seed = derive_seed(*parts)
    _seed_on_cpu(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def seed_sample(seed: int, epoch: int, row: int) -> None:
    """Seed Python's, numpy's and torch's global generators on the CPU for one sample. Takes 9 microseconds.

    Transforms that draw from these generators then give the sample the same values on any rank, in any worker process, and in
    a micro-batch of any size. A generator of the data set's own (`numpy.random.default_rng()`) is not seeded.

    Args:
        seed: of the data set in this run.
        epoch: the epoch in which the sample is drawn.
        row: the sample's row in the data set.
    """
    _seed_on_cpu(derive_seed(seed, epoch, row))


def _seed_on_cpu(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # numpy takes 32 bits
    torch.default_generator.manual_seed(seed)


@contextmanager
def unchanged() -> Iterator[None]:
    """Give the global generators on the CPU their present states back at the end.

    Samples that a rank makes itself then change the noise of its step (dropout) no more than samples that a worker makes.
    """
    states = random.getstate(), np.random.get_state(legacy=False), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
