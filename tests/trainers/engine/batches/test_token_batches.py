from __future__ import annotations

import time

import numpy as np
import pytest

from trainers.config.batching import Batching
from trainers.contract.errors import UserError
from trainers.engine.batches.lengths import cut, ranked, split
from trainers.engine.batches.sampler import make_sampler
from trainers.engine.batches.token_batches import TokenBatches

BUDGET = 1500


def made(count: int, sides: int, seed: int = 0) -> np.ndarray:
    """Lengths as of sentences and their translations: similar, around 12 words, a few very long."""
    random = np.random.default_rng(seed)
    first = np.maximum(random.gamma(6, 2, count).astype(int), 1)
    others = [np.maximum(first + random.normal(0, 2, count).astype(int), 1) for _ in range(sides - 1)]
    return np.stack([first, *others], axis=1)


PAIRS = made(3000, 2)


def padded(lengths: np.ndarray) -> int:
    return len(lengths) * int(lengths.max(0).sum())


def batch_of(samples: TokenBatches, draw: int, ranks: int = 1) -> list[int]:
    """The rows of a global batch, in the order of its slots, without fillers."""
    shares = [share for rank in range(ranks) for share in samples.shares(draw, rank, ranks) if not share.filler]
    slots = np.concatenate([share.slots for share in shares])
    assert sorted(slots) == list(range(shares[0].size)) and len({share.size for share in shares}) == 1
    rows = np.concatenate([share.indices for share in shares])
    return rows[slots.argsort()].tolist()


def test_an_epoch_holds_every_sample_once_in_batches_up_to_the_budget():
    samples = TokenBatches(PAIRS, BUDGET, seed=1, stream="model")
    epochs = []
    for epoch in range(3):
        draws = range(epoch * samples.batches, (epoch + 1) * samples.batches)
        batches = [batch_of(samples, draw) for draw in draws]
        assert sorted(row for batch in batches for row in batch) == list(range(len(PAIRS)))
        assert all(padded(PAIRS[batch]) <= BUDGET for batch in batches)
        assert {int(e) for draw in draws for share in samples.shares(draw, 0, 1) for e in share.epochs} == {epoch}
        assert [samples.ends_epoch(draw) for draw in draws] == [False] * (samples.batches - 1) + [True]
        epochs.append(batches)
    assert (samples.steps(1), samples.steps(2.5), samples.steps(1e-9)) == (
        samples.batches, -(-5 * samples.batches // 2), 1)
    assert len({str(batches) for batches in epochs}) == 3
    # Batches come in another order, and samples of equal lengths change their batches.
    sets = [{frozenset(batch) for batch in batches} for batches in epochs]
    assert len(sets[0] & sets[1]) < samples.batches / 4
    assert [len(b) for b in epochs[0]] != [len(b) for b in epochs[1]]


def test_the_global_batches_depend_on_seed_and_draw_alone():
    whole = TokenBatches(PAIRS, BUDGET, seed=1, stream="model")
    split_up = TokenBatches(PAIRS, BUDGET, seed=1, stream="model", most=100)
    for draw in (0, 7, 500, 3):
        expected = batch_of(whole, draw)
        assert all(batch_of(samples, draw, ranks) == expected for samples in (whole, split_up) for ranks in (1, 2, 3, 4))
        assert {share.seed for rank in range(3) for share in split_up.shares(draw, rank, 3)} == {whole.shares(draw, 0, 1)[0].seed}
    others = [TokenBatches(PAIRS, BUDGET, seed, stream) for seed, stream in ((2, "model"), (1, "other"))]
    assert all(batch_of(other, 3) != batch_of(whole, 3) for other in others)


@pytest.mark.parametrize("most", [None, 100, 30, 1])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 50])
def test_ranks_have_equally_many_micro_batches_and_near_equal_tokens(ranks, most):
    samples = TokenBatches(PAIRS, BUDGET, seed=0, stream="model", most=most)
    longest = PAIRS.sum(1).max()
    for draw in range(0, samples.batches, 5):
        of_ranks = [samples.shares(draw, rank, ranks) for rank in range(ranks)]
        assert len({len(shares) for shares in of_ranks}) == 1 and (most or len(of_ranks[0]) == 1)
        assert all(len(share.indices) == 1 for shares in of_ranks for share in shares if share.filler)
        tokens = [sum(PAIRS[share.indices].sum() for share in shares if not share.filler) for shares in of_ranks]
        assert max(tokens) - min(tokens) <= 2 * longest * (1 if most is None else len(of_ranks[0]))
        if most:
            assert all(padded(PAIRS[share.indices]) <= most or len(share.indices) == 1 for shares in of_ranks for share in shares)
    if ranks == 50:
        assert any(share.filler for draw in range(samples.batches) for share in samples.shares(draw, 0, 50))


@pytest.mark.parametrize("most", [BUDGET // 4, BUDGET // 4 + 10])
def test_a_micro_batch_size_of_a_whole_share_is_an_upper_bound_too(most):
    class Data:
        lengths = PAIRS

        def __len__(self):
            return len(PAIRS)

    def largest(most):
        samples = make_sampler(Data(), Batching(BUDGET, 4, most, tokens=True), seed=0, stream="model")
        shares = [share for draw in range(300) for rank in range(4) for share in samples.shares(draw, rank, 4)]
        return max(padded(PAIRS[share.indices]) for share in shares)

    assert largest(most) <= most < largest(None)


@pytest.mark.parametrize("sides, most", [(1, 0.02), (2, 0.05), (3, 0.12)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_little_is_padding(sides, most, ranks):
    lengths = made(29_000, sides)
    samples = TokenBatches(lengths, 4096, seed=0, stream="model")
    shares = [share for draw in range(samples.batches) for rank in range(ranks) for share in samples.shares(draw, rank, ranks)]
    share_of_padding = 1 - lengths.sum() / sum(padded(lengths[share.indices]) for share in shares)
    assert 0 < share_of_padding < most


def test_the_second_side_rises_and_falls_by_turns():
    lengths = np.array([[2, 1], [1, 1], [1, 3], [2, 3], [1, 2], [2, 2], [3, 1], [3, 3]])
    order = ranked(lengths).argsort(kind="stable")
    assert lengths[order].tolist() == [[1, 1], [1, 2], [1, 3], [2, 3], [2, 2], [2, 1], [3, 1], [3, 3]]
    assert ranked(np.array([[5], [4], [5]])).tolist() == [1, 0, 1]


def test_cut_and_split_at_the_edges():
    assert cut(np.array([[2], [2], [2], [3]]), 6).tolist() == [0, 3, 4]
    assert cut(np.array([[1, 1]]), 2).tolist() == [0, 1]
    assert split(np.array([[5]]), 3, None).tolist() == [0, 0, 1, 1]
    assert split(np.array([[1], [1], [1], [100]]), 2, None).tolist() == [0, 3, 4]
    assert split(np.array([[1], [1], [1], [100]]), 1, 2).tolist()[-1] == 4


def test_a_sample_longer_than_the_budget_is_refused_with_its_row():
    lengths = PAIRS.copy()
    lengths[17], lengths[40] = (BUDGET, 5), (BUDGET, 1)
    with pytest.raises(UserError) as error:
        TokenBatches(lengths, BUDGET, 0, "model")
    assert error.value.message == ("sample 17 of the training set has 1505 tokens (1500 + 5), more than `train.batch_tokens` "
                                   "(1500); 1 other sample is also too long")
    assert "train.batch_tokens=1505" in error.value.hint


def test_another_order_of_a_checkpoint_is_refused():
    samples = TokenBatches(PAIRS, BUDGET, 0, "model")
    samples.continue_in(samples.order)
    with pytest.raises(UserError, match="in the order `feistel`"):
        samples.continue_in("feistel")


def test_a_million_samples_cost_seconds_once_and_less_than_a_millisecond_each_batch():
    began = time.perf_counter()
    samples = TokenBatches(made(1_000_000, 2), 8192, 0, "model")
    assert time.perf_counter() - began < 20
    took = []
    for draw in range(50):
        began = time.perf_counter()
        samples.shares(draw * 7919, 1, 4)
        took.append(time.perf_counter() - began)
    print(f"{min(took) * 1e3:.2f} ms")
    assert min(took) < 2e-3
