from __future__ import annotations

import pytest

from trainers.config.batching import Batching, divisors
from trainers.config.schema import RunConfig, Train
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


def test_a_batch_of_tokens_needs_no_division_without_rest():
    split = Batching(4096, 3, tokens=True)
    split.check()
    assert (split.share, split.micro, split.accumulation, split.evaluation) == (1366, 1366, 1, 4 * 1366)
    assert split.sizes() == [1366, 683, 341, 170, 85, 42, 21, 10, 5, 2, 1] and split.smaller() == 683
    small = Batching(4096, 3, most=500, tokens=True)
    assert (small.micro, small.accumulation, small.evaluation) == (500, 3, 2000)
    assert small.described() == "up to 4096 tokens = 3 rank(s) x about 500 micro-batch x 3 accumulation"


@pytest.mark.parametrize("train, evaluation, expected", [
    ({}, {}, (64, False, 256, False)), ({"batch_tokens": 500}, {}, (500, True, 2000, True)),
    ({"batch_tokens": 500}, {"batch_size": 3}, (500, True, 3, False)),
    ({"batch_size": 8}, {"batch_tokens": 9}, (8, False, 9, True)),
])
def test_training_and_evaluation_count_samples_or_tokens(train, evaluation, expected):
    config = RunConfig.model_validate({"name": "run", "task": "module:Task", "train": {"steps": 1, **train}, "eval": evaluation})
    split = config.batching(1)
    assert (split.batch, split.tokens, split.evaluation, split.evaluates_tokens) == expected
    assert RunConfig.model_validate(config.model_dump()) == config  # as run.yaml holds it
    with pytest.raises(ValueError, match="give one of train.batch_size and train.batch_tokens"):
        Train(steps=1, batch_size=1, batch_tokens=1)


def test_the_sizes_that_auto_tries():
    split = Batching(48, 2)
    assert split.sizes() == [24, 12, 8, 6, 4, 3, 2, 1] and split.smaller() == 12
    assert Batching(48, 2, most=7).sizes() == [6, 4, 3, 2, 1] and Batching(48, 2, most=1).smaller() is None
    assert divisors(10**9)[:3] == (10**9, 5 * 10**8, 25 * 10**7) and divisors(97) == (97, 1) and divisors(1) == (1,)
