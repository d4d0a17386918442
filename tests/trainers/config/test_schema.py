"""What the schema computes from what a spec says."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from trainers.config.schema import Checkpoint, Optim, RunConfig, better


@pytest.mark.parametrize("metric, mode", {
    "loss": "min", "eval_loss": "min", "valid/loss": "min", "perplexity": "min", "wer": "min", "rmse": "min", "fid": "min",
    "top1": "max", "top5": "max", "accuracy": "max", "macro_f1": "max", "bleu": "max", "chrf2": "max", "r2": "max", "auc": "max",
    "mIoU": "max", "class/ship": None, "speed": None, "closeness": None, "mapping": None, "loss_accuracy": None,
}.items())
def test_the_name_of_a_metric_tells_which_values_are_better(metric, mode):
    assert better(metric) == mode


def test_the_mode_follows_the_metric_unless_the_spec_gives_it():
    assert Checkpoint(metric="loss").mode == "min" and Checkpoint(metric="top1").mode == "max"
    assert Checkpoint(metric="loss", mode="max").mode == "max"
    assert Checkpoint(metric="closeness", mode="min").mode == "min"
    assert Checkpoint().mode is None
    assert Checkpoint(metric="loss").best_by == "loss (lowest)" and Checkpoint(metric="top1").best_by == "top1 (highest)"
    assert Checkpoint().best_by is None and Checkpoint(metric="loss", keep_best=0).best_by is None
    with pytest.raises(ValidationError, match="checkpoint.mode must be max or min: the name `closeness` does not tell"):
        Checkpoint(metric="closeness")


@pytest.mark.parametrize("sections, problem", [
    ({}, "train.patience is given without checkpoint.metric"),
    ({"checkpoint": {"metric": "loss"}, "eval": {"every": "never"}}, "counts evaluations, but eval.every is never"),
    ({"checkpoint": {"metric": "loss"}}, None),
])
def test_patience_needs_a_metric_and_evaluations(sections, problem):
    values = {"name": "a", "task": "a:A", "train": {"steps": 1, "patience": 2}, **sections}
    if problem is None:
        assert RunConfig.model_validate(values).train.patience == 2
        return
    with pytest.raises(ValidationError, match=problem):
        RunConfig.model_validate(values)


@pytest.mark.parametrize("values, problem", [
    ({"name": "sgd", "nesterov": True, "momentum": 0.0}, "optim.nesterov is true, but optim.momentum is 0"),
    ({"betas": [0.9, 1.0]}, "less than 1"), ({"groups": [{"match": "head", "betas": [1.0, 0.9]}]}, "less than 1"),
])
def test_what_no_optimizer_of_torch_takes_is_refused(values, problem):
    with pytest.raises(ValidationError, match=problem):
        Optim(**values)
