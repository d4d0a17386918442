from __future__ import annotations

import random

import numpy as np
import torch

from trainers.engine.batches.noise import seed_noise, seed_sample, unchanged


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
