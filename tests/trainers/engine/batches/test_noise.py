from __future__ import annotations

import random

import numpy as np
import torch

from trainers.engine.batches import noise
from trainers.engine.batches.noise import normal, seed_noise, seed_sample, unchanged, uniform
from trainers.engine.task import Share

CPU = torch.device("cpu")


def draw() -> tuple:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_a_sample_draws_the_same_whatever_was_drawn_before():
    seed_sample(1, 2, 3)
    first = draw()
    draw()
    seed_sample(1, 2, 3)
    assert draw() == first
    others = []
    for position in [(0, 2, 3), (2, 2, 3), (1, 1, 3), (1, 3, 2), (1, 2, 4)]:
        seed_sample(*position)
        others.append(draw())
    for values in zip(first, *others):
        assert len(set(values)) == 6  # each generator is seeded by each of the three numbers


def test_a_micro_batch_draws_the_same_from_each_global_generator():
    seed_noise(torch.device("cpu"), 7, "noise", 1)
    first = draw()
    seed_noise(torch.device("cpu"), 7, "noise", 2)
    other = draw()
    seed_noise(torch.device("cpu"), 7, "noise", 1)
    assert draw() == first and not set(first) & set(other)


def test_seeding_samples_leaves_the_ranks_own_noise_as_it_was():
    seed_noise(torch.device("cpu"), 7)
    expected = draw()
    seed_noise(torch.device("cpu"), 7)
    with unchanged():
        seed_sample(1, 2, 3)
        draw()
    assert draw() == expected


def share_of(*slots: int, seed: int = 5) -> Share:
    rows = np.array(slots, dtype=np.int64)
    return Share(rows, rows, 512, seed)


def test_noise_by_sample_depends_neither_on_ranks_nor_on_micro_batches():
    for draw_noise in (normal, uniform):
        whole = draw_noise(share_of(*range(512)), 3, 43, device=CPU)
        assert whole.shape == (512, 3, 43) and whole.dtype == torch.float32
        for count in (0, 1, 3, 8, 100):
            slots = np.random.default_rng(count).choice(512, count, replace=False)
            assert torch.equal(draw_noise(share_of(*slots), 3, 43, device=CPU), whole[torch.from_numpy(slots)])
        assert draw_noise(share_of(1, 2), device=CPU).shape == (2,)
        others = [draw_noise(share_of(*range(512), seed=6), 3, 43, device=CPU),
                  draw_noise(share_of(*range(512)), 3, 43, device=CPU, name="second"), whole.roll(1, 0), whole.roll(1, 2)]
        for other in others:  # of 66,048 pairs of independent values
            assert abs(torch.corrcoef(torch.stack([whole.flatten(), other.flatten()]))[0, 1]) < 0.02


def test_noise_by_sample_has_its_distribution():
    values = normal(share_of(*range(512)), 400, device=CPU).double().flatten()  # 204,800 values
    assert abs(values.mean()) < 0.01 and abs(values.var() - 1) < 0.02 and abs(values.pow(4).mean() - 3) < 0.1
    for bound, below in [(-3, 0.00135), (-1, 0.15866), (0, 0.5), (2, 0.97725)]:
        assert abs((values < bound).double().mean() - below) < 0.005
    values = uniform(share_of(*range(512)), 400, device=CPU).double().flatten()
    assert 0 <= values.min() < 1e-4 and 1 - 1e-4 < values.max() < 1
    counts = values.mul(64).long().bincount(minlength=64)
    assert (counts - 3200).abs().max() < 5 * 3200**0.5


def test_bits_are_those_of_splitmix64():
    """The reference implementation gives these numbers for the seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    bits = noise._mixed(1234567 + torch.arange(1, 4) * noise._GOLDEN)
    assert [int(value) % 2**64 for value in bits] == expected
