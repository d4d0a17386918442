"""The measures that ranks sum up, and the metrics that a task reports. This file is also the program of two ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import serve

from trainers.config.schema import RunConfig
from trainers.contract.errors import UserError
from trainers.engine.evaluation import evaluate, plain_metrics
from trainers.engine.world import World


def test_single_numbers_of_numpy_and_torch_are_metrics():
    metrics = plain_metrics({"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(0.25), "d": 1, "e": 0.5,
                             "f": torch.ones(1, 1), "g": np.array(2.0), "h": True})
    assert metrics == {"a": 0.5, "b": 3, "c": 0.25, "d": 1, "e": 0.5, "f": 1.0, "g": 2.0, "h": True}
    assert {type(value) for value in metrics.values()} == {float, int, bool}


@pytest.mark.parametrize("value, described", [
    ([0.5], "a list"), ("0.5", "a str"), (None, "a NoneType"), (1 + 2j, "a complex"),
    (torch.ones(3), r"a Tensor of shape \(3,\)"), (np.ones((2, 2)), r"a ndarray of shape \(2, 2\)"),
])
def test_other_values_are_refused_and_named(value, described):
    with pytest.raises(UserError, match=f"returns `f1` as {described}, but a metric must be one number"):
        plain_metrics({"top1": 1.0, "f1": value})


@pytest.mark.parametrize("name", [3, b"caf\xe9", "caf\udce9"])
def test_names_must_be_text(name):
    with pytest.raises(UserError, match="which is not valid text"):
        plain_metrics({name: 1.0})


@pytest.mark.slow
def test_ranks_may_name_their_measures_in_different_orders_but_must_have_the_same(ranks):
    two = ranks(2)
    assert two("evaluated", names=[["a", "b"], ["b", "a"]]) == [{"a": 3.0, "b": 30.0}] * 2
    refused = ("the measures of rank 1 differ from those of rank 0: `b` is missing on one of them, or has another shape")
    assert two("evaluated", names=[["a", "b"], ["a"]]) == two("evaluated", names=[["a"], ["b", "a"]]) == [refused] * 2
    # The integers are 2**62 - 1 and twice 1: float64 would lose the small ones. The second batch of rank 1 is a filler.
    sums = {"counts": ["torch.int64", [2**62 + 1, 3]], "halves": ["torch.float64", 2.25], "mean": ["torch.float64", 1.0]}
    assert two("summed") == [sums] * 2


@pytest.mark.parametrize("measures, message", [
    ([{"a": 1}], "the task returns an int as its measure `a`"),
    ([{"a": (torch.ones(1), 1, 2)}], "the task returns a tuple as its measure `a`"),
    ([{"a": ("1", 2)}], "the task returns a tuple as its measure `a`"),
    ([[("a", 1)]], "the task returns a list as its measures, but must return a dict"),
    ([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}], r"the task's measure `a` has the shape \[2\] in one batch and \[3\] in "),
    ([{"a": torch.zeros(2)}, {"a": (torch.zeros(2), 1)}], r"the shape \[2\] in one batch and \[2\] and \[\] in another"),
])
def test_what_is_no_measure_is_refused_and_named(measures, message):
    with pytest.raises(UserError, match=message):
        measured_by(lambda number: measures[number], len(measures))


def test_sums_and_means_in_any_form_of_number():
    measured = measured_by(lambda number: {
        "mean": (np.float32(number), np.int64(1)), "sum": torch.tensor([number, 1], dtype=torch.float16),
        "count": torch.tensor(True), "classes": (torch.tensor([number, 4]), torch.tensor([2, 0]))}, 4)
    assert {name: value.dtype for name, value in measured.items()} == {
        "mean": torch.float64, "sum": torch.float64, "count": torch.int64, "classes": torch.float64}
    assert {name: value.tolist() for name, value in measured.items()} == {
        "mean": 1.5, "sum": [6, 4], "count": 4, "classes": [0.75, float("inf")]}


def measured_by(measures, batches):
    """The measures of a task that returns `measures(number)` for batch `number`, on one rank."""
    return evaluate(Alike(measures), {}, Rows(batches), CONFIG, World(0, 1, 0, 1, torch.device("cpu")), Never())


CONFIG = RunConfig.model_validate({"name": "x", "task": "x:X", "train": {"steps": 1, "batch_size": 2}, "eval": {"batch_size": 1}})


class Rows:
    """A data set whose batches are the numbers of their samples."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, share):
        return torch.from_numpy(share.indices)


class Alike:
    """A task that measures each batch of one sample by a function of the sample's number."""

    def __init__(self, measures):
        self.measures = measures

    def evaluate(self, models, batch):
        return self.measures(int(batch))


class Never:
    def at_boundary(self):
        return False


# ---- on the ranks


def summed(world):
    measured = evaluate(Alike(lambda number: {
        "counts": torch.tensor([2**62 - 1 if number == 0 else 1, 1]), "halves": torch.tensor(0.75).bfloat16(),
        "mean": (torch.tensor(number, device=world.device), 1)}), {}, Rows(3), CONFIG, world, Never())
    return {name: [str(value.dtype), value.tolist()] for name, value in measured.items()}


def evaluated(world, names):
    """Evaluate two samples, each on its own rank: `a` is 2 and 4, `b` is 20 and 40."""
    class Named:
        def evaluate(self, models, batch):
            sums = {"a": 2 * (batch + 1).sum(), "b": 20 * (batch + 1).sum()}
            return {name: (sums[name], len(batch)) for name in names[world.rank]}

    try:
        return {name: mean.item() for name, mean in evaluate(Named(), {}, Rows(2), CONFIG, world, Never()).items()}
    except UserError as error:
        return error.message


if __name__ == "__main__":
    serve(globals())
