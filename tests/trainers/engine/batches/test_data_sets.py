"""What the loop needs of a task's data, and the errors where that is missing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from trainers.contract.errors import UserError
from trainers.engine.batches.data_sets import data_of
from trainers.engine.map_style import MapStyle
from trainers.engine.world import World

WORLD = World(0, 1, 0, 1, torch.device("cpu"))
MAPPED = TensorDataset(torch.ones(3))


class Rows:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, share):
        return share.indices


class Task:
    def __init__(self, sets):
        self.sets = sets

    def data(self, world):
        return self.sets


@pytest.mark.parametrize("sets, message", [
    (Rows(3), "returns a Rows, but must return \\(training set"), ((Rows(3), None, None), "returns a tuple, but must return"),
    ((Rows(3), 5), "the evaluation set: int is no data set: it has no `__len__`"),
    ((None, Rows(3)), "the training set: NoneType is no data set: it has no `__len__`"),
    ((Rows(0), None), "the training set is empty"),
])
def test_data_that_the_loop_cannot_use_is_refused(sets, message):
    with pytest.raises(UserError, match=message):
        data_of(Task(sets), 1, WORLD)


def test_data_that_the_loop_can_use():
    sets = Rows(3), Rows(0)
    assert data_of(Task(sets), 1, WORLD) == sets
    assert isinstance(data_of(Task((Rows(1), MAPPED)), 1, WORLD)[1], MapStyle)
    assert data_of(Task((Rows(1), None)), 1, WORLD)[1] is None
