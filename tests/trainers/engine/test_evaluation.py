"""The measures that ranks sum up, and the metrics that a task reports. This file is also the program of two ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import Ranks, serve

from trainers.config.schema import RunConfig
from trainers.contract.errors import UserError
from trainers.engine.evaluation import draw_figures, evaluate, plain_metrics


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


@pytest.mark.parametrize("error, warning", [
    (OSError(28, "No space left on device"), "cannot write figures to .*: No space left on device"),
    (ZeroDivisionError("division by zero"), "the task cannot draw its figures: ZeroDivisionError: division by zero"),
    (KeyError("x"), "the task cannot draw its figures: KeyError: 'x'"),
])
def test_an_error_while_drawing_is_a_warning(error, warning, tmp_path):
    class Draws:
        def report(self, measured, figures):
            raise error

    notes = []
    draw_figures(Draws(), {}, tmp_path / "figures", lambda level, message: notes.append((level, message)))
    ((level, message),) = notes
    import re

    assert level == "warning" and re.fullmatch(warning, message)


def test_ranks_may_name_their_measures_in_different_orders_but_must_have_the_same():
    two = Ranks(2, __file__)
    try:
        assert two("evaluated", names=[["a", "b"], ["b", "a"]]) == [{"a": 3.0, "b": 30.0}] * 2
        refused = ("the measures of rank 1 differ from those of rank 0: `b` is missing on one of them, or has another shape")
        assert two("evaluated", names=[["a", "b"], ["a"]]) == two("evaluated", names=[["a"], ["b", "a"]]) == [refused] * 2
    finally:
        two.close()


# ---- on the ranks


def evaluated(world, names):
    """Evaluate two samples, each on its own rank: `a` is 2 and 4, `b` is 20 and 40."""
    class Samples:
        def __len__(self):
            return 2

        def batch(self, share):
            return torch.from_numpy(share.indices)

    class Named:
        def evaluate(self, models, batch):
            sums = {"a": 2 * (batch + 1).sum(), "b": 20 * (batch + 1).sum()}
            return {name: (sums[name], len(batch)) for name in names[world.rank]}

    class Never:
        def at_boundary(self):
            return False

    config = RunConfig.model_validate({"name": "x", "task": "x:X", "train": {"steps": 1, "batch_size": 2}})
    try:
        return {name: mean.item() for name, mean in evaluate(Named(), {}, Samples(), config, world, Never()).items()}
    except UserError as error:
        return error.message


if __name__ == "__main__":
    serve(globals())
