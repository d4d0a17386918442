"""The facts that a checkpoint keeps with its weights."""

from __future__ import annotations

import numpy as np
import pytest

from trainers.checkpoints import facts
from trainers.checkpoints.tensor_files import write
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


@pytest.mark.parametrize("change, shown", [
    ({9: "x"}, "number 10 was 9, and is x"), ({98: None}, "number 99 was 98, and is nothing"), ({2: "x"}, "... (99 in all)]")])
def test_the_first_place_that_differs_is_shown(change, shown):
    before = [str(n) for n in range(99)]
    now = [word for n, old in enumerate(before) if (word := change.get(n, old)) is not None]
    assert facts.differences({"classes": before}, {"classes": now})[0].endswith(shown)


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


KEPT = {**TRAINED, "files": "1234567890123456", "held_out": None}


def test_an_export_holds_the_facts(tmp_path):
    file = tmp_path / "x.safetensors"
    write(file, {}, lambda name: [], {**facts.metadata(KEPT, "r-1", 3), "format": "pt"})
    assert facts.read(file) == facts.read(tmp_path) == KEPT


@pytest.mark.parametrize("metadata, found", [
    ({"run": "r-1", "step": "3", "classes": '["1", "2"]', "files": "abc"}, {"classes": ["1", "2"], "files": "abc"}),
    ({"format": "pt", "classes": "[1]"}, {}), ({}, {})], ids=["of an older version", "of another program", "none"])
def test_the_facts_of_other_files(tmp_path, metadata, found):
    write(tmp_path / "x.safetensors", {}, lambda name: [], metadata)
    assert facts.read(tmp_path / "x.safetensors") == found


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x02" + bytes(7) + b"[]",
                                     b"\x14" + bytes(7) + b'{"__metadata__":[1]} '])
def test_a_broken_file_has_no_facts(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    assert facts.read(tmp_path / "x.safetensors") == {}
