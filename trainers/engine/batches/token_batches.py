"""Global batches of samples of similar length, up to a number of tokens (`train.batch_tokens`)."""

from __future__ import annotations

import numpy as np

from trainers.contract.errors import UserError
from trainers.engine.batches.lengths import cut, ranked, split
from trainers.engine.batches.permutation import derived, permuted
from trainers.engine.batches.sampling import AT_ONCE, derive_seed, unknown_order
from trainers.engine.task import Share

BY_LENGTH = "length"  # name of the order in a checkpoint
MOST_DRAWS = 64       # that are computed together


class TokenBatches:
    """The global batches of one update: whole samples of similar length, up to `budget` tokens.

    The samples are sorted by their lengths once and cut into batches. An epoch takes every batch once, in an order of its own,
    and shuffles the samples of equal lengths among their places. So every epoch has the same number of batches and holds every
    sample once, and batch `draw` is computed from (seed, draw) alone.

    Args:
        lengths: int64 [n, sides], of all samples (`lengths_of`).
        budget: the most tokens of a global batch.
        stream: name of the update. Updates with different names get different orders.
        most: the most tokens of a micro-batch; None: a rank's whole part of the batch. A longer sample is computed alone.

    Raises:
        UserError: a sample is longer than the budget.
    """

    order = BY_LENGTH

    def __init__(self, lengths: np.ndarray, budget: int, seed: int, stream: str, most: int | None = None):
        tokens = lengths.sum(1)
        if (longest := tokens.max()) > budget:
            row = int(tokens.argmax())
            sides = f" ({' + '.join(map(str, lengths[row]))})" if lengths.shape[1] > 1 else ""
            others = int((tokens > budget).sum()) - 1
            more = f"; {others:,} other sample{'s are' if others > 1 else ' is'} also too long" if others else ""
            raise UserError(f"sample {row} of the training set has {longest} tokens{sides}, more than `train.batch_tokens` "
                            f"({budget}){more}", f"use train.batch_tokens={longest} or more, or leave out or cut long samples")
        self.seed, self.stream, self.most = seed, stream, most
        places = ranked(lengths)
        self.rows = places.argsort(kind="stable")  # row of the data set at each place
        self.lengths = lengths[self.rows]
        self.groups = np.searchsorted(places[self.rows], np.arange(places.max() + 2))  # bounds of the samples of equal lengths
        self.bounds = cut(self.lengths, budget)
        self.batches = len(self.bounds) - 1  # in an epoch
        self._kept = (-1, np.zeros(0, dtype=np.int64))  # (epoch, order of its batches)
        self._block: tuple[int, list[tuple[int, np.ndarray]]] = (-1, [])  # (number, batches) of the last block of draws

    def continue_in(self, order: str) -> None:
        """Take over the order that a checkpoint names. Raises: UserError: this version does not know it."""
        if order != BY_LENGTH:
            raise unknown_order(order)

    def steps(self, epochs: float) -> int:
        """Return the number of batches in `epochs` epochs, rounded up and at least 1."""
        return max(1, -int(-epochs * self.batches // 1))

    def ends_epoch(self, draw: int) -> bool:
        """Whether batch `draw` is the last batch of an epoch."""
        return (draw + 1) % self.batches == 0

    def shares(self, draw: int, rank: int, ranks: int) -> list[Share]:
        """Return the micro-batches that rank `rank` takes of global batch `draw`.

        All ranks get equally many, with near-equal numbers of tokens. Where a batch has too few samples for this, a share is a
        filler.
        """
        batch, indices = self._batch(draw)
        bounds = split(self.lengths[self.bounds[batch]:self.bounds[batch + 1]], ranks, self.most)
        seed = derive_seed(self.seed, "batch", self.stream, draw)
        shares = []
        for part in range(rank, len(bounds) - 1, ranks):
            filler = bounds[part] == bounds[part + 1]
            slots = np.arange(1) if filler else np.arange(bounds[part], bounds[part + 1])
            epochs = np.full(len(slots), draw // self.batches)
            shares.append(Share(indices[slots], slots, len(indices), seed, epochs, bool(filler)))
        return shares

    def _batch(self, draw: int) -> tuple[int, np.ndarray]:
        """Return the number of the batch in the order of lengths, and its rows of the data set, int64 [samples]."""
        size = min(MOST_DRAWS, max(1, AT_ONCE * self.batches // len(self.rows)))  # draws that are computed together
        if self._block[0] != draw // size:
            first = draw // size * size
            epochs = np.arange(first, first + size) // self.batches
            batches = [int(self._order(int(epoch))[(first + i) % self.batches]) for i, epoch in enumerate(epochs)]
            places = [np.arange(self.bounds[batch], self.bounds[batch + 1]) for batch in batches]
            sizes = [len(of_batch) for of_batch in places]
            keys = np.array([derive_seed(self.seed, "order", self.stream, int(epoch)) for epoch in epochs], dtype=np.uint64)
            rows = self._rows(np.concatenate(places), keys.repeat(sizes))
            self._block = draw // size, list(zip(batches, np.split(rows, np.cumsum(sizes)[:-1])))
        return self._block[1][draw % size]

    def _order(self, epoch: int) -> np.ndarray:
        """Return the batches in the order of an epoch, int64 [batches]. The last epoch's order is kept."""
        if self._kept[0] != epoch:
            key = derive_seed(self.seed, "batches", self.stream, epoch)
            self._kept = epoch, permuted(np.arange(self.batches), self.batches, key)
        return self._kept[1]

    def longest(self, count: int) -> tuple[Share, int]:
        """Return the last `count` samples in the order of lengths as a share, and their number of tokens."""
        lengths = self.lengths[-count:]
        rows, slots = self.rows[-count:], np.arange(len(lengths))
        return Share(rows, slots, len(rows), self.seed), int(lengths.max(0).sum()) * len(lengths)

    def _rows(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Return the row of the data set at each place, after the samples of equal lengths were shuffled with its key."""
        groups = np.searchsorted(self.groups, places, "right") - 1
        first, size = self.groups[groups], self.groups[groups + 1] - self.groups[groups]
        return self.rows[first + permuted(places - first, size, derived(keys, groups))]
