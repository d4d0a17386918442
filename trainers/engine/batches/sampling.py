"""The samples and the random seeds of each step: pure functions of (seed, purpose, position).

There is no iterator, so no iterator state has to be saved. The step number is enough to resume a run, on any number of
ranks. Seeds are derived by a hash and never by addition, so that neighbouring seeds and steps share no random numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np

from trainers.config.batching import Batching
from trainers.contract.errors import UserError
from trainers.engine.batches.permutation import permuted
from trainers.engine.task import Share

AT_ONCE = 2048  # samples whose rows are computed together
# Names of the ways to put an epoch in order, as in a checkpoint. A run that began under one of them continues under it.
FEISTEL = "feistel"  # trainers/engine/batches/permutation.py
NUMPY = "numpy"      # numpy's permutation, which holds the whole epoch in memory; checkpoints without a name have this order


def derive_seed(*parts: int | str) -> int:
    """Return a seed from 0 to 2**63 - 1, the hash of numbers and words."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Shuffled:
    """The global batches of one update: `batch_size` samples each, from a data set of `length` samples.

    Every epoch has a new order. The epochs follow one another in an endless sequence. Batch `draw` (from 0) covers the
    positions [draw x batch_size, (draw + 1) x batch_size) of this sequence: a batch may reach into the next epoch, and no
    sample is dropped.

    Args:
        stream: name of the update. Updates with different names get different orders.
        most: the largest micro-batch that is allowed, in samples; None: no limit.

    Attributes:
        order: how an epoch is put in order.
    """

    def __init__(self, length: int, batch_size: int, seed: int, stream: str, most: int | None = None):
        self.length, self.batch_size, self.seed, self.stream, self.most = length, batch_size, seed, stream, most
        self.order = FEISTEL
        # The batches of one rank that were computed last: (their number, rank, ranks), rows and epochs [batches, share].
        self._block: tuple[tuple[int, int, int], np.ndarray, np.ndarray] | None = None
        self._orders: dict[int, np.ndarray] = {}  # for NUMPY: the epochs of these batches, by their seeds

    def continue_in(self, order: str) -> None:
        """Take over the order that a checkpoint names. Raises: UserError: this version does not know it."""
        if order not in (FEISTEL, NUMPY):
            raise unknown_order(order)
        self.order, self._block = order, None

    def steps(self, epochs: float) -> int:
        """Return the number of batches in `epochs` epochs, rounded up and at least 1."""
        return max(1, -int(-epochs * self.length // self.batch_size))

    def ends_epoch(self, draw: int) -> bool:
        """Whether batch `draw` holds the last sample of an epoch."""
        return (draw + 1) * self.batch_size // self.length > draw * self.batch_size // self.length

    def shares(self, draw: int, rank: int, ranks: int) -> list[Share]:
        """Return the micro-batches that rank `rank` takes of global batch `draw`.

        All micro-batches of all ranks have the same size. The ranks split the slots in order: rank 0 takes the first ones.
        """
        split = Batching(self.batch_size, ranks, self.most)
        slots = np.arange(rank * split.share, (rank + 1) * split.share)
        # Small batches are computed many at a time, because numpy needs as long for ten numbers as for a thousand.
        block = max(1, AT_ONCE // split.share)
        if self._block is None or self._block[0] != (draw // block, rank, ranks):
            positions = (draw // block * block + np.arange(block)[:, None]) * self.batch_size + slots
            indices = self._indices(positions.reshape(-1)).reshape(positions.shape)
            self._block = (draw // block, rank, ranks), indices, positions // self.length
        _, in_block, epochs_in_block = self._block
        indices, epochs = in_block[draw % block], epochs_in_block[draw % block]
        seed = derive_seed(self.seed, "batch", self.stream, draw)
        return [Share(indices[part], slots[part], self.batch_size, seed, epochs[part])
                for part in np.split(np.arange(split.share), split.accumulation)]

    def _indices(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows of the data set at these positions of the endless sequence."""
        epochs, within = np.divmod(positions, self.length)
        needed, of_each = np.unique(epochs, return_inverse=True)
        seeds = [derive_seed(self.seed, "order", self.stream, epoch) for epoch in needed.tolist()]
        if self.order == FEISTEL:
            return permuted(within, self.length, np.array(seeds, dtype=np.uint64)[of_each])
        self._orders = {seed: self._orders[seed] if seed in self._orders else
                        np.random.Generator(np.random.Philox(seed)).permutation(self.length) for seed in seeds}
        indices = np.empty_like(positions)
        for number, seed in enumerate(seeds):
            indices[of_each == number] = self._orders[seed][within[of_each == number]]
        return indices


def unknown_order(order: str) -> UserError:
    return UserError(f"the checkpoint says that its samples come in the order `{order}`, which this version does not know",
                     "continue with the version of `launch` that started this run")
