"""Random numbers of a step: seeds of the global generators for each micro-batch and for each sample, and noise by sample."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from trainers.engine.batches.sampling import derive_seed
from trainers.engine.device import to_device
from trainers.engine.task import Share


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


def uniform(share: Share, *shape: int, device: torch.device, name: str = "") -> Tensor:
    """Return noise that is uniform in [0, 1): float32 [n, *shape] for the n samples of the share, on `device`.

    As with `normal`, a sample's values depend neither on the ranks nor on the micro-batches.
    """
    bits = _bits(share, math.prod(shape), device, name)
    return (_shifted(bits, 40).float() * 2.0**-24).view(len(bits), *shape)


def normal(share: Share, *shape: int, device: torch.device, name: str = "") -> Tensor:
    """Return noise of the standard normal distribution: float32 [n, *shape] for the n samples of the share, on `device`.

    A sample's values follow from the seed of the global batch and the sample's slot in it, so they depend neither on the ranks
    nor on the micro-batches. They are computed on the device, with a few operations for all samples together. Two calls with
    the same share, shape and name return the same values; values with another `name` are independent.

    The values are those of the Box-Muller transform (Box & Muller 1958, doi:10.1214/aoms/1177706645).
    """
    count = math.prod(shape)
    bits = _bits(share, -(-count // 2), device, name)
    # The half keeps the logarithm finite. The largest possible value is 6.7.
    radius = ((_shifted(bits, 32).float() + 0.5) * 2.0**-32).log().mul(-2).sqrt()
    angle = (bits & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count].reshape(len(bits), *shape)


def _bits(share: Share, count: int, device: torch.device, name: str) -> Tensor:
    """Return `count` random 64-bit integers for each sample, int64 [n, count].

    Every sample has a stream of its own of the generator SplitMix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195),
    which computes any position of a stream directly.
    """
    slots = to_device(share.slots, device)
    seeds = _mixed(slots * _GOLDEN + derive_seed(share.seed, name))
    return _mixed(seeds[:, None] + torch.arange(1, count + 1, device=device) * _GOLDEN)


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as a signed number, like the factors below: torch has few operations for uint64


def _mixed(values: Tensor) -> Tensor:
    values = (values ^ _shifted(values, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    values = (values ^ _shifted(values, 27)) * (0x94D049BB133111EB - 2**64)
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, places: int) -> Tensor:
    """Shift 64-bit integers to the right and fill with zeros; `>>` alone fills with the sign."""
    return (values >> places) & ((1 << 64 - places) - 1)
