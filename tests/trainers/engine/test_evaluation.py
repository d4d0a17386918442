"""The metrics that a task reports."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainers.contract.errors import UserError
from trainers.engine.evaluation import draw_figures, plain_metrics


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
