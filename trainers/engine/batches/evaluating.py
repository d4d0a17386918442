"""Which samples each rank evaluates, and in which batches."""

from __future__ import annotations

import numpy as np

from trainers.config.batching import Batching
from trainers.contract.errors import UserError
from trainers.engine.batches.lengths import HINT, cut, lengths_of, ranked
from trainers.engine.task import Dataset, Share


def lengths_to_evaluate(dataset: Dataset, batching: Batching) -> np.ndarray | None:
    """Return the lengths of a set to evaluate, int64 [n, sides]; None if it has none and needs none.

    Raises:
        UserError: batches of tokens need `lengths`, which the data set does not have; or its `lengths` have another form.
    """
    lengths = lengths_of(dataset, "set to evaluate")
    if batching.evaluates_tokens and lengths is None:
        raise UserError(f"the evaluation would take up to {batching.evaluation} tokens at a time, but the set to evaluate, a "
                        f"{type(dataset).__name__}, has no `lengths`", f"use eval.batch_size, or add lengths: {HINT}")
    return lengths


def shares_to_evaluate(dataset: Dataset, batching: Batching, rank: int, ranks: int) -> list[Share]:
    """Return the batches of a data set that rank `rank` evaluates, as `evaluation_shares` says.

    Raises:
        UserError: see `lengths_to_evaluate`.
    """
    if not len(dataset):
        return []
    lengths = lengths_to_evaluate(dataset, batching)
    return evaluation_shares(len(dataset), batching.evaluation, rank, ranks, lengths, batching.evaluates_tokens)


def evaluation_shares(length: int, batch_size: int, rank: int, ranks: int, lengths: np.ndarray | None = None,
                      tokens: bool = False) -> list[Share]:
    """Return the batches that rank `rank` evaluates.

    All ranks together evaluate every sample exactly once. All ranks get the same number of batches, because each rank must
    take part in every collective; where samples are too few for this, a share is a filler. Samples with lengths are sorted by
    them: a batch holds similar lengths, and the ranks' tokens are near-equal.

    Args:
        length: number of samples, at least 1.
        batch_size: the most samples in a batch; with `tokens`, the most tokens. A longer sample is a batch alone.
        lengths: int64 [length, sides], of all samples; None: unknown, and then `tokens` must be false.
    """
    rows = np.arange(length) if lengths is None else ranked(lengths).argsort(kind="stable")
    if tokens:
        assert lengths is not None
        bounds = _bounds(lengths[rows], batch_size, ranks)
        batches = [rows[bounds[part]:bounds[part + 1]] for part in range(rank, len(bounds) - 1, ranks)]
    else:
        number = -(-(-(-length // ranks)) // batch_size)
        batches = [rows[rank::ranks][i * batch_size:(i + 1) * batch_size] for i in range(number)]
    return [Share(batch, batch, length, 0) if len(batch) else Share(rows[:1], rows[:1], length, 0, filler=True)
            for batch in batches]


def _bounds(lengths: np.ndarray, budget: int, ranks: int) -> np.ndarray:
    """Return the bounds of batches of at most `budget` tokens. Their number is a multiple of `ranks`; the last may be empty.

    With a smaller budget as many batches are more equal: the smallest such budget is found by halving an interval.
    """
    parts = ranks * -(-(len(cut(lengths, budget)) - 1) // ranks)
    enough, too_small = budget, int(lengths.sum()) // parts - 1
    while enough - too_small > 1 + enough // 200:
        middle = (enough + too_small) // 2
        if len(cut(lengths, middle)) - 1 <= parts:
            enough = middle
        else:
            too_small = middle
    bounds = cut(lengths, enough)
    return np.append(bounds, np.full(parts + 1 - len(bounds), len(lengths)))
