"""The keyed permutation is a permutation, and looks like a random one. The keys are fixed, so no result depends on chance."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from math import sqrt

import numpy as np
import pytest

from trainers.engine.batches.permutation import derived, permuted

RANDOM = np.random.default_rng(1).integers(2**63, size=30_000).astype(np.uint64)
KEYS = {"random keys": RANDOM, "neighbouring keys": np.arange(30_000, dtype=np.uint64),
        "derived keys": derived(7, np.arange(30_000))}
LIMIT = 5  # standard deviations


def table(size: int, keys: np.ndarray) -> np.ndarray:
    """The permutation of each key, [keys, size]."""
    return permuted(np.tile(np.arange(size), len(keys)), size, keys.repeat(size)).reshape(-1, size)


def excess(counts: np.ndarray, freedom: int | None = None) -> float:
    """By how many standard deviations the chi-square of counts that should be equal is above its mean."""
    expected = counts.sum() / counts.size
    freedom = freedom or counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / sqrt(2 * freedom)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000, 65_536, 65_537, 99_991])
def test_every_position_is_taken_once(size):
    assert (np.sort(permuted(np.arange(size), size, 3)) == np.arange(size)).all()


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_orders_of_a_few_samples_are_equally_frequent(size, keys):
    permutations = list(itertools.permutations(range(size)))
    places = size ** np.arange(size)
    codes = [int(np.dot(order, places)) for order in permutations]
    counts = np.bincount(table(size, keys) @ places, minlength=max(codes) + 1)
    assert counts.sum() == counts[codes].sum() == len(keys)
    assert excess(counts[codes]) < LIMIT


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("size", [7, 16, 30, 100])
def test_first_positions_pairs_of_neighbours_and_serial_correlation(size, keys):
    orders = table(size, keys)
    at_each_position = np.stack([np.bincount(column, minlength=size) for column in orders.T])
    assert excess(at_each_position, (size - 1) ** 2) < LIMIT
    for one, two in ((0, 1), (size // 2, size // 2 + 1), (0, size - 1)):
        pairs = np.bincount(orders[:, one] * size + orders[:, two], minlength=size**2).reshape(size, size)
        assert pairs.trace() == 0 and excess(pairs[~np.eye(size, dtype=bool)]) < LIMIT
        steps = np.bincount((orders[:, two] - orders[:, one]) % size, minlength=size)[1:]
        assert excess(steps) < LIMIT
    centred = orders - (size - 1) / 2
    correlation = (centred[:, :-1] * centred[:, 1:]).sum() / (centred**2).sum()
    assert abs(correlation + 1 / size) < LIMIT / sqrt(orders.size)  # of a random order it is -1 / size


def test_the_tests_see_a_permutation_that_is_not_random():
    shifted = (np.arange(7) + RANDOM[:, None].astype(np.int64)) % 7  # uniform in each position, but not in pairs
    steps = np.bincount((shifted[:, 1] - shifted[:, 0]) % 7, minlength=7)[1:]
    assert excess(steps) > 1000 * LIMIT


def test_neighbours_in_a_long_order_are_as_far_apart_as_chance_has_them():
    size = 10**9
    order = permuted(np.arange(100_000), size, 11)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < LIMIT / sqrt(len(order))
    assert excess(np.bincount(order * 1000 // size, minlength=1000)) < LIMIT
    other = permuted(np.arange(100_000), size, 12)
    assert abs(np.corrcoef(order, other)[0, 1]) < LIMIT / sqrt(len(order))


def test_sizes_and_keys_may_differ_for_each_position():
    sizes, keys = np.array([5, 1, 1000, 5, 10**12]), np.array([1, 2, 3, 4, 5], dtype=np.uint64)
    positions = np.array([4, 0, 999, 2, 10**12 - 1])
    together = permuted(positions, sizes, keys)
    assert [int(permuted(positions[i:i + 1], int(sizes[i]), int(keys[i]))[0]) for i in range(5)] == together.tolist()
    assert (together < sizes).all()


def test_a_batch_of_a_billion_samples_costs_no_memory_and_less_than_a_millisecond():
    batch = np.arange(12_345_678, 12_345_678 + 1024)
    permuted(batch, 10**9, 1)
    tracemalloc.start()
    permuted(batch, 10**9, 1)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()
    took = []
    for key in range(50):
        began = time.perf_counter()
        permuted(batch, 10**9, key)
        took.append(time.perf_counter() - began)
    assert min(took) < 1e-3
