from __future__ import annotations

import pytest

from trainers.config.batching import Batching, divisors
from trainers.config.schema import RunConfig
from trainers.contract.errors import UserError


@pytest.mark.parametrize("batch, ranks, most, micro, accumulation", [
    (64, 1, None, 64, 1), (64, 4, 4, 4, 4), (64, 16, 8, 4, 1), (64, 2, 5, 4, 8), (26, 2, 12, 1, 13),
])
def test_the_largest_micro_batch_within_the_bound_is_taken(batch, ranks, most, micro, accumulation):
    split = Batching(batch, ranks, most)
    split.check()
    assert (split.micro, split.accumulation) == (micro, accumulation) and ranks * micro * accumulation == batch
    assert ("upper bound" in split.described()) == (most not in (None, micro))


def test_a_batch_that_the_ranks_cannot_share_is_refused_only_in_training():
    def config(only: bool) -> RunConfig:
        return RunConfig.model_validate({
            "name": "run", "task": "module:Task", "train": {"steps": 1, "batch_size": 10, "micro_batch_size": 5},
            "init": {"source": "run-1"}, "eval": {"only": only}})

    with pytest.raises(UserError, match="`train.batch_size` is 10, not a multiple of 3 ranks"):
        config(only=False).batching(3)
    assert config(only=True).batching(3).evaluation == 4 * 5 and config(only=False).batching(2).evaluation == 4 * 5


def test_the_sizes_that_auto_tries():
    split = Batching(48, 2)
    assert split.sizes() == [24, 12, 8, 6, 4, 3, 2, 1] and split.smaller() == 12
    assert Batching(48, 2, most=7).sizes() == [6, 4, 3, 2, 1] and Batching(48, 2, most=1).smaller() is None
    assert divisors(10**9)[:3] == (10**9, 5 * 10**8, 25 * 10**7) and divisors(97) == (97, 1) and divisors(1) == (1,)
