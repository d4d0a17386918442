"""The state of a task's own: what is filled from a checkpoint, and what is refused."""

from __future__ import annotations

import pytest
import torch
from made import make_checkpoint, make_run

from trainers.contract.errors import UserError
from trainers.engine.saving import task_state
from trainers.engine.saving.storage import Reader
from trainers.engine.task import Task


class Keeping(Task):
    def __init__(self, **state):
        self.kept = state

    def state(self):
        return self.kept

    def load_state(self, values):
        self.kept.update(values)


@pytest.fixture
def reader(tmp_path):
    """The checkpoint of a run whose task has kept a queue and a counter."""
    task = Keeping(queue=torch.arange(3.0), count=7)
    tensors = {name: fragment.part for name, fragment in task_state.fragments(task).items()}
    return Reader(make_checkpoint(make_run(tmp_path / "run"), 5, {"models/model/w": torch.ones(2), **tensors},
                                  **{task_state.KEY: task_state.values(task)}))


def test_tensors_are_filled_in_place_and_other_values_are_given_back(reader):
    queue = torch.zeros(3)
    task = Keeping(queue=queue, count=0)
    task_state.load(task, reader)
    assert queue.tolist() == [0, 1, 2] and task.kept["count"] == 7


def test_an_evaluation_fills_what_both_have(reader):
    task = Keeping(queue=torch.zeros(3), other=1)
    task_state.load(task, reader, strict=False)
    assert task.kept["queue"].tolist() == [0, 1, 2] and task.kept["other"] == 1


@pytest.mark.parametrize("state, message", [
    ({}, "the checkpoint holds `count`, `queue` of the task's `state`, which now returns nothing"),
    ({"queue": torch.zeros(3), "count": 0, "more": 1}, "which now returns `count`, `more`, `queue`"),
    ({"queue": torch.zeros(4), "count": 0}, r"`task/queue` has shape \[3\] in the checkpoint"),
    ({"queue": None, "count": 0}, "`queue` of the task's `state` is a tensor only later in a run"),
    ({"queue": torch.zeros(3), "count": torch.tensor(0)}, "`count` of the task's `state` is a tensor only at first"),
    ({"queue": torch.zeros(3), "count": {1}}, "the task's `state` returns `count`, which JSON cannot hold"),
])
def test_another_state_is_refused(reader, state, message):
    with pytest.raises(UserError, match=message):
        task_state.load(Keeping(**state), reader)


def test_a_copy_is_refused(reader):
    class Copying(Keeping):
        def state(self):
            return {**self.kept, "queue": self.kept["queue"].clone()}

    with pytest.raises(UserError, match="returns a copy of `queue`, which cannot be filled"):
        task_state.load(Copying(queue=torch.zeros(3), count=0), reader)


def test_a_block_that_must_change_nothing(tmp_path):
    task = Keeping(queue=torch.zeros(3), count=0)
    with task_state.preserved(task):
        task.kept["queue"] += 1
        task.kept["count"] = 9
    assert task.kept["queue"].tolist() == [0, 0, 0] and task.kept["count"] == 0


def test_a_tensor_that_a_loss_makes_first_is_refused():
    task = Keeping(queue=None)
    with pytest.raises(UserError, match="`queue` of the task's `state` is a tensor only later in a run"):
        with task_state.preserved(task):
            task.kept["queue"] = torch.zeros(3)
