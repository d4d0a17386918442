"""The facts that a checkpoint keeps with its weights."""

from __future__ import annotations

import numpy as np
import pytest

from trainers.checkpoints import facts
from trainers.contract.errors import UserError

TRAINED = {"classes": ["1", "10", "2"], "mean": [0.5, 0.25], "size": 32}


def test_equal_facts_have_no_differences():
    assert facts.differences(TRAINED, facts.checked({**TRAINED, "classes": ("1", "10", "2"), "later": 1})) == []


def test_statistics_may_differ_by_the_rounding_of_another_decoder():
    assert facts.differences(TRAINED, {**TRAINED, "mean": [0.5002, 0.25]}) == []
    assert facts.differences(TRAINED, {**TRAINED, "mean": [0.51, 0.25]}) == ["`mean` was [0.5, 0.25], and is [0.51, 0.25]"]


@pytest.mark.parametrize("classes, shown", [
    (["1", "2", "10"], "[1, 2, 10]"), (["1", "10"], "[1, 10]"),
    ([str(n) for n in range(99)], "[0, 1, 2, 3, 4, 5, 6, 7, ... (99 in all)]"),
])
def test_other_classes_are_named(classes, shown):
    assert facts.differences(TRAINED, {**TRAINED, "classes": classes}) == [f"`classes` was [1, 10, 2], and is {shown}"]


def test_names_are_lists_of_text():
    assert facts.names(TRAINED) == {"classes": ["1", "10", "2"]}


@pytest.mark.parametrize("value", [{"mean": np.ones(3)}, {"a": {1, 2}}, [1]])
def test_facts_that_no_checkpoint_can_hold_are_refused(value):
    with pytest.raises(UserError, match="the task's `facts` returns"):
        facts.checked(value)


def test_a_folder_that_is_no_checkpoint_has_no_facts(tmp_path):
    assert facts.read(tmp_path) == {}
    (tmp_path / "state.json").write_text("[]")
    assert facts.read(tmp_path) == {}
