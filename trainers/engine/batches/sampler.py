"""What a sampler is, and which one a run uses."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from trainers.config.batching import Batching
from trainers.contract.errors import UserError
from trainers.engine.batches.lengths import HINT, lengths_of
from trainers.engine.batches.sampling import Shuffled
from trainers.engine.batches.token_batches import TokenBatches
from trainers.engine.task import Dataset, Share


class Sampler(Protocol):
    """The endless sequence of global batches that one update draws, numbered from 0.

    Attributes:
        order: name of the way in which samples follow one another, for a checkpoint.
    """

    order: str

    def continue_in(self, order: str) -> None:
        """Take over the order that a checkpoint names. Raises: UserError: this version does not know it."""
        ...

    def steps(self, epochs: float) -> int:
        """Return the number of batches in `epochs` epochs, rounded up and at least 1."""
        ...

    def ends_epoch(self, draw: int) -> bool:
        """Whether batch `draw` holds the last sample of an epoch."""
        ...

    def shares(self, draw: int, rank: int, ranks: int) -> list[Share]:
        """Return the micro-batches that rank `rank` takes of global batch `draw`: equally many on every rank.

        The samples of a global batch depend on neither `ranks` nor micro-batches.
        """
        ...


def make_sampler(dataset: Dataset, split: Batching, seed: int, stream: str) -> Sampler:
    """Return the sampler of an update.

    Args:
        stream: name of the update. Updates with different names get different orders.

    Raises:
        UserError: batches of tokens need `lengths`, which the data set does not have or which have another form; or a sample is
            longer than a batch.
    """
    if not split.tokens:
        return Shuffled(len(dataset), split.batch, seed, stream, split.most)
    return TokenBatches(lengths_to_train(dataset), split.batch, seed, stream, split.most)


def lengths_to_train(dataset: Dataset) -> np.ndarray:
    """Return the lengths of a training set, int64 [n, sides]. Raises: UserError: it has none, or in another form."""
    lengths = lengths_of(dataset, "training set")
    if lengths is None:
        raise UserError("`train.batch_tokens` needs the lengths of the samples, but the training set, a "
                        f"{type(dataset).__name__}, has no `lengths`", f"use train.batch_size, or add lengths: {HINT}")
    return lengths
