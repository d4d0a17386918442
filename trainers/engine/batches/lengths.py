"""Cut samples into batches of similar length, by the number of their tokens.

A sample has one length or, where it has several sides (source and target), one for each side. The tokens of a batch are those
of its padded tensors: on each side, its number of samples x its longest sample, summed over the sides. Memory and time follow
this number, and it is the same whatever the number of ranks. (fairseq's `--max-tokens` takes the larger side instead of the
sum: for a pair of similar lengths, `batch_tokens` is twice that number.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainers.contract.errors import UserError

HINT = "`lengths` of a data set is an array of whole numbers, [samples] or [samples, sides]: README, \"Batches of tokens\""


def lengths_of(dataset: Any, name: str) -> np.ndarray | None:
    """Return the lengths of the samples of a data set, int64 [samples, sides]; None if the data set has no `lengths`.

    An empty sample counts as one token, because it takes a row of a batch.

    Args:
        name: "training set" or "evaluation set", for the error.

    Raises:
        UserError: `lengths` has another form.
    """
    given = getattr(dataset, "lengths", None)
    if given is None:
        return None
    try:
        lengths = np.asarray(given.cpu() if hasattr(given, "cpu") else given)
    except (TypeError, ValueError):  # lists of unequal lengths
        raise UserError(f"`lengths` of the {name} is not an array", HINT) from None
    if lengths.ndim not in (1, 2) or len(lengths) != len(dataset) or lengths.size == 0 or lengths.dtype.kind not in "iu":
        raise UserError(f"`lengths` of the {name}, which has {len(dataset):,} samples, is {lengths.dtype} of shape "
                        f"{lengths.shape}", HINT)
    return np.maximum(lengths.reshape(len(lengths), -1), 1).astype(np.int64)


def ranked(lengths: np.ndarray) -> np.ndarray:
    """Return each sample's place in the order of lengths, int64 [n] from 0. Samples of equal lengths share a place.

    The first side comes first. Among samples that are equal in it, the second side rises and falls by turns, and so on: a batch
    that reaches from one length of the first side into the next meets similar lengths of the second side there.

    Args:
        lengths: int64 [n, sides].
    """
    places = np.zeros(len(lengths), dtype=np.int64)
    for side in lengths.T:
        longest = side.max()
        snake = np.where(places % 2 == 0, side, longest - side)
        places = np.unique(places * (longest + 1) + snake, return_inverse=True)[1].reshape(-1)
    return places


def cut(lengths: np.ndarray, budget: int) -> np.ndarray:
    """Cut a sequence of samples into batches of at most `budget` tokens, each as long as possible. A longer sample is a batch
    alone.

    Args:
        lengths: int64 [n, sides], in order.

    Returns:
        int64 [batches + 1]: batch i holds the samples from bound i up to, and without, bound i + 1.
    """
    bounds = [0]
    while (first := bounds[-1]) < len(lengths):
        following = lengths[first:first + max(1, budget // lengths[first].sum())]
        tokens = np.maximum.accumulate(following).sum(1) * np.arange(1, len(following) + 1)
        bounds.append(first + max(1, int(np.searchsorted(tokens, budget, "right"))))
    return np.array(bounds)


def split(lengths: np.ndarray, ranks: int, most: int | None) -> np.ndarray:
    """Split a sequence of samples into `ranks` x r parts with near-equal numbers of tokens.

    r is the smallest number with which no part has more than `most` tokens (None: r = 1), except that a longer sample is a part
    alone. A part may be empty.

    Args:
        lengths: int64 [n, sides], in order, n at least 1.

    Returns:
        int64 [parts + 1]: the bounds of the parts, as of `cut`.
    """
    tokens = lengths.sum(1)
    weights = tokens if most is None else np.minimum(tokens, most)
    ends, total = weights.cumsum(), int(weights.sum())
    rounds = 1 if most is None else -(-total // (ranks * most))
    while True:
        parts = ranks * rounds
        of_sample = parts * (2 * ends - weights) // (2 * total)  # the part in which the middle of the sample lies
        bounds = np.searchsorted(of_sample, np.arange(parts + 1))
        starts = np.unique(bounds[bounds < len(lengths)])  # of the parts that are not empty
        sizes = np.diff(starts, append=len(lengths))
        if most is None or np.all((np.maximum.reduceat(lengths, starts).sum(1) * sizes <= most) | (sizes == 1)):
            return bounds
        rounds += 1 + rounds // 50
