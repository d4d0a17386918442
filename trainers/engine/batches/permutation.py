"""Random permutations that are computed for single positions, at a cost that does not depend on their length."""

from __future__ import annotations

import numpy as np

# Permutations of 5 or 6 numbers need the most rounds: with 12, the tests of uniformity see them fail at 60,000 keys; with 14 not.
ROUNDS = 16

# Odd constants with about as many ones as zeros: 2**64 / golden ratio, and the multipliers of splitmix64 (Steele et al. 2014).
GOLDEN, FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
HALF = np.uint64(32)


def permuted(positions: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Return where a random permutation of the numbers from 0 to `size` - 1 takes each position.

    Different keys give independent permutations. The permutation is a Feistel network with a keyed hash in each round (Luby
    and Rackoff 1988), on pairs (left, right) of numbers below a and b, where a x b is just above `size`. A result that is not
    below `size` is put through the network again until it is ("cycle walking"; for both: Black and Rogaway 2002, "Ciphers with
    Arbitrary Finite Domains").

    Args:
        positions: int64 [n], each from 0 to size - 1.
        size: one number, or int64 [n]: a size for each position; up to 2**62.
        key: one number, or uint64 [n]: a key for each position; below 2**64.

    Returns:
        int64 [n].
    """
    sizes, keys = np.asarray(size, dtype=np.uint64), np.asarray(key, dtype=np.uint64)
    a = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    b = (sizes + a - np.uint64(1)) // a
    result = _network(positions.astype(np.uint64), a, b, keys)
    while len(outside := np.flatnonzero(result >= sizes)):
        result[outside] = _network(result[outside], *(v[outside] if v.ndim else v for v in (a, b, keys)))
    return result.astype(np.int64)


def derived(key: np.ndarray | int, number: np.ndarray | int) -> np.ndarray:
    """Return a key that is made from a key and a number, as uint64. Either may be an array."""
    mixed = _hash(np.asarray(number, dtype=np.uint64), np.asarray(key, dtype=np.uint64))
    return _hash(mixed >> HALF, mixed)


def _network(x: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Permute the numbers below a x b. Each round adds a hash of one half to the other half, which can be undone."""
    left, right = x // b, x % b
    with np.errstate(over="ignore"):
        for number in range(ROUNDS):
            key = key + GOLDEN
            if number % 2:
                right = _sum(right, _hash(left, key), b)
            else:
                left = _sum(left, _hash(right, key), a)
    return left * b + right


def _sum(half: np.ndarray, hashed: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Add a number below `limit`, made from the upper bits of a hash, modulo `limit` (at most 2**31)."""
    total = half + ((hashed >> HALF) * limit >> HALF)
    return np.minimum(total, total - limit)  # below `limit` the difference wraps round to a huge number


def _hash(x: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Mix a number with a key: two multiplications, as in splitmix64. The upper half of the result is the better one."""
    with np.errstate(over="ignore"):
        x = (x ^ key) * FIRST
        return (x ^ (x >> HALF)) * SECOND
