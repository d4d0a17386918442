from __future__ import annotations

import numpy as np
import pytest

from trainers.engine.batches.sampling import Shuffled, derive_seed


def rows(samples: Shuffled, draw: int, ranks: int = 1) -> np.ndarray:
    return np.concatenate([share.indices for rank in range(ranks) for share in samples.shares(draw, rank, ranks)])


@pytest.mark.parametrize("length, batch_size", [(100, 12), (12, 12), (7, 12), (1, 4), (101, 24)])
def test_a_global_batch_is_the_same_on_any_number_of_ranks(length, batch_size):
    samples = Shuffled(length, batch_size, seed=3, stream="model")
    for draw in (0, 1, 7, 100):
        whole = rows(samples, draw)
        for ranks, most in [(1, 3), (2, None), (2, 1), (4, None)]:
            assert (rows(Shuffled(length, batch_size, 3, "model", most), draw, ranks) == whole).all()


def test_an_epoch_holds_every_sample_once_and_every_epoch_has_a_new_order():
    samples = Shuffled(50, 20, seed=1, stream="model")
    drawn = np.concatenate([rows(samples, draw) for draw in range(5)])  # two epochs in five batches
    first, second = drawn[:50], drawn[50:]
    assert sorted(first) == sorted(second) == list(range(50)) and (first != second).any()
    assert [samples.ends_epoch(draw) for draw in range(5)] == [False, False, True, False, True]
    epochs = np.concatenate([share.epochs for draw in range(5) for share in samples.shares(draw, 0, 1)])
    assert (epochs == [0] * 50 + [1] * 50).all()
    assert (samples.steps(1), samples.steps(2), samples.steps(0.01)) == (3, 5, 1)


def test_every_seed_stream_and_epoch_has_a_different_order():
    orders = [tuple(rows(Shuffled(30, 30, seed, stream), draw))
              for seed in (0, 1, 2) for stream in ("a", "b") for draw in (0, 1, 2)]
    assert len(set(orders)) == len(orders)
    assert derive_seed(1, 2) != derive_seed(2, 1) and derive_seed(12, 3) != derive_seed(1, 23) and 0 <= derive_seed("x") < 2**63


def test_a_sample_gets_the_same_random_values_on_any_number_of_ranks_and_micro_batches():
    samples = Shuffled(64, 16, seed=0, stream="model", most=2)
    (whole,) = Shuffled(64, 16, seed=0, stream="model").shares(5, 0, 1)
    expected = whole.generator().random(whole.size)
    for rank in range(4):
        assert len(samples.shares(5, rank, 4)) == 2
        for share in samples.shares(5, rank, 4):
            assert (share.generator().random(share.size)[share.slots] == expected[share.slots]).all()
    (other,) = Shuffled(64, 16, seed=0, stream="model").shares(6, 0, 1)
    assert (other.generator().random(16) != expected).any()
