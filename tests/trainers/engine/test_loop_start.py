"""What the loop and an evaluation say and know before they begin."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made import make_checkpoint
from saving import ONE
from torch import nn

from trainers.checkpoints import facts
from trainers.checkpoints.export import read_models, to_safetensors
from trainers.config.schema import RunConfig
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths
from trainers.engine.evaluate_only import evaluate_only
from trainers.engine.loop import Loop
from trainers.engine.map_style import MapStyle
from trainers.engine.saving.restore import load_initial_weights
from trainers.engine.saving.watermark import check_data, fingerprint, watermark
from trainers.engine.task import Loss, Task


class Rows:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, share):
        return torch.ones(len(share.indices), 2)


class Linear(Task):
    evaluation: Rows | None = None

    def data(self, world):
        return Rows(8), self.evaluation

    def model(self):
        return nn.Linear(2, 1)

    def loss(self, model, batch):
        return Loss(model(batch).sum(), len(batch))


def started(tmp_path, evaluation, **checkpoint) -> Loop:
    config = RunConfig.model_validate({"name": "x", "task": "x:Linear", "train": {"steps": 1, "batch_size": 8},
                                       "checkpoint": checkpoint})
    task = Linear(config)
    task.evaluation = evaluation
    loop = Loop(task, config, ONE, RunPaths(tmp_path), None)
    loop._resume()
    loop.checkpoints.close()
    loop.stopping.close()
    return loop


METRIC = {"metric": "loss"}


@pytest.mark.parametrize("evaluation, checkpoint, said", [
    (None, METRIC, True), (Rows(0), METRIC, True), (Rows(4), METRIC, False), (None, {}, False)])
def test_a_metric_that_is_never_measured_deserves_a_warning(tmp_path, capsys, evaluation, checkpoint, said):
    loop = started(tmp_path, evaluation, **checkpoint)
    warning = "warning: there is no evaluation set, so `loss` (`checkpoint.metric`) is not measured"
    assert (warning in capsys.readouterr().out) == said
    assert (loop.eval_set is None) == (evaluation is None or not len(evaluation))


def test_data_with_other_facts_is_refused(tmp_path):
    loop = started(tmp_path, None)
    setup = replace(loop.setup, facts={"words": ["a", "b"]})
    check_data(setup, {"samples": [8, 0], "facts": {}})
    check_data(setup, {"samples": [8, 0]})  # a checkpoint of an older version
    check_data(setup, watermark(setup))
    with pytest.raises(UserError, match=r"the data has changed since this run started: `words` was \[b\], and is \[a, b\]"):
        check_data(setup, {"samples": [8, 0], "facts": {"words": ["b"]}})
    with pytest.raises(UserError, match="or the older version that started the run read it differently"):
        check_data(setup, {"samples": [9, 0]})
    with pytest.raises(UserError, match="since this run started: it had 9 training"):
        check_data(setup, {"samples": [9, 0], "facts": {"words": ["a", "b"]}})


class Named(Rows):
    def fingerprint(self):
        return self.name


def having(**attributes):
    """Return a data set of 3 samples with these attributes."""
    rows = Named(3) if "name" in attributes else Rows(3)
    vars(rows).update(attributes)
    return rows


@pytest.mark.parametrize("before, now", [
    ({"name": "a"}, {"name": "b"}), ({"lengths": np.array([1, 2, 3])}, {"lengths": torch.tensor([1, 3, 2])}),
    ({"targets": [0, 1, 2]}, {"targets": [0, 2, 1]}),
    ({"dataset": SimpleNamespace(targets=[0, 1, 2])}, {"dataset": SimpleNamespace(targets=[0, 1, 1])}),
])
def test_other_data_of_the_same_size_is_refused(tmp_path, before, now):
    setup = started(tmp_path, None).setup
    for role, words in (("train_set", "the training set has as many samples"), ("eval_set", "the evaluation set has as many")):
        marked = watermark(replace(setup, **{role: having(**before)}))
        check_data(replace(setup, **{role: having(**before)}), marked)
        check_data(replace(setup, **{role: having()}), marked)  # it had a fingerprint once, and has none now
        with pytest.raises(UserError, match=words):
            check_data(replace(setup, **{role: having(**now)}), marked)
    samples = having(**before)
    samples.__class__ = type("Samples", (type(samples),), {"__getitem__": lambda self, row: row})
    assert fingerprint(MapStyle(samples)) == fingerprint(having(**before)) is not None
    lists = {"lengths": [[1], [2, 3], [4]]}
    assert fingerprint(having(**lists)) is fingerprint(having()) is None


@pytest.mark.parametrize("state", [{}, {"facts": {"words": ["x", "y"]}}])
def test_an_evaluation_gets_the_facts_of_the_training(tmp_path, capsys, state):
    seen = []

    class Words(Linear):
        evaluation = Rows(4)

        def data(self, world):
            seen.append(self.trained_facts)
            return super().data(world)

        def facts(self):
            return {"words": ["x", "z"]}

    paths = RunPaths(tmp_path)
    weights = make_checkpoint(paths, 3, {"models/model/weight": torch.ones(1, 2), "models/model/bias": torch.zeros(1)}, **state)
    config = RunConfig.model_validate({"name": "x", "task": "x:Words", "train": {"steps": 1, "batch_size": 8},
                                       "eval": {"only": True}, "init": {"source": str(weights)}})
    assert evaluate_only(Words(config), config, ONE, paths, None) == 0
    out = capsys.readouterr().out
    assert seen == [state.get("facts", {})] and "eval 3  loss 2" in out
    assert (f"`{weights}` does not say what the model was trained with: `words`" in out) == (not state)


def test_weights_of_an_export_with_other_names_deserve_a_warning(tmp_path):
    paths = RunPaths(tmp_path)
    weights = make_checkpoint(paths, 3, {"models/model/weight": torch.ones(1, 2), "models/model/bias": torch.zeros(1)},
                              facts={"words": ["x", "y"]})
    file = tmp_path / "x.safetensors"
    to_safetensors(read_models(weights)["model"], file, facts.metadata(facts.read(weights), "r", 3))
    loop = started(tmp_path / "new", None)
    setup = replace(loop.setup, facts={"words": ["x", "z"]})
    _, (level, note) = load_initial_weights(str(file), loop.config, setup, loop.runners, loop.paths, ONE)
    assert level == "warning" and "`words` was [x, y], and is [x, z]" in note


def test_an_evaluation_gets_the_facts_of_an_export(tmp_path):
    paths = RunPaths(tmp_path)
    tensors = {"models/model/weight": torch.ones(1, 2), "models/model/bias": torch.zeros(1)}
    weights = make_checkpoint(paths, 3, tensors, facts={"words": ["x", "y"]})
    to_safetensors(read_models(weights)["model"], tmp_path / "x.safetensors", facts.metadata(facts.read(weights), "r", 3))
    config = RunConfig.model_validate({"name": "x", "task": "x:Linear", "train": {"steps": 1, "batch_size": 8},
                                       "eval": {"only": True}, "init": {"source": str(tmp_path / "x.safetensors")}})
    task = Linear(config)
    task.evaluation = Rows(4)
    assert evaluate_only(task, config, ONE, paths, None) == 0 and task.trained_facts == {"words": ["x", "y"]}
