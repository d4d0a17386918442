from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from trainers.config.batching import Batching
from trainers.contract.errors import UserError
from trainers.engine.batches.evaluating import evaluation_shares, lengths_to_evaluate

LENGTHS = np.random.default_rng(0).integers(1, 40, (100, 2))


@pytest.mark.parametrize("lengths, tokens, batch", [
    (None, False, 4), (LENGTHS, False, 4), (LENGTHS, True, 300), (LENGTHS, True, 20), (LENGTHS, True, 10**6),
])
@pytest.mark.parametrize("length", [1, 7, 8, 100])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_every_sample_is_evaluated_once_and_all_ranks_have_equally_many_batches(length, ranks, lengths, tokens, batch):
    lengths = lengths if lengths is None else lengths[:length]
    of_ranks = [evaluation_shares(length, batch, rank, ranks, lengths, tokens) for rank in range(ranks)]
    assert len({len(shares) for shares in of_ranks}) == 1
    shares = [share for shares in of_ranks for share in shares]
    assert sorted(row for share in shares if not share.filler for row in share.indices) == list(range(length))
    assert all(len(share.indices) and (share.slots == share.indices).all() and share.size == length for share in shares)
    assert all(len(share.indices) == 1 for share in shares if share.filler)
    for share in shares:
        if tokens:
            padded = lengths[share.indices].max(0).sum() * len(share.indices)
            assert padded <= batch or len(share.indices) == 1
        else:
            assert len(share.indices) <= batch


def test_batches_hold_similar_lengths_and_ranks_near_equal_tokens():
    lengths = np.random.default_rng(1).integers(1, 60, (5000, 1))
    for batch, tokens in ((32, False), (1000, True)):
        of_ranks = [evaluation_shares(5000, batch, rank, 4, lengths, tokens) for rank in range(4)]
        totals = [sum(lengths[share.indices].sum() for share in shares) for shares in of_ranks]
        assert max(totals) < 1.02 * min(totals)
        padded = sum(len(share.indices) * lengths[share.indices].max() for shares in of_ranks for share in shares)
        assert sum(totals) > 0.97 * padded


@pytest.mark.parametrize("lengths, message", [
    (None, "the evaluation would take up to 400 tokens at a time, but the set to evaluate, a SimpleNamespace, has no `lengths`"),
    ([[1, 2], [3]], "`lengths` of the set to evaluate is not an array"),
    ([1.5, 2.5], "which has 2 samples, is float64 of shape (2,)"), ([1, 2, 3], "is int64 of shape (3,)"),
    (np.ones((2, 1, 1), int), "of shape (2, 1, 1)"), (len, "`lengths` of the set to evaluate, which has 2 samples, is object"),
])
def test_lengths_that_are_missing_or_have_another_form_are_refused(lengths, message):
    class Two(SimpleNamespace):
        def __len__(self):
            return 2

    Two.__name__ = "SimpleNamespace"
    with pytest.raises(UserError) as error:
        lengths_to_evaluate(Two(lengths=lengths), Batching(100, 1, tokens=True, evaluates_tokens=True))
    assert message in error.value.message and "lengths" in error.value.hint
