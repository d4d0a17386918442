"""`train.ema` on one rank: the average itself, its place in checkpoints, and the weights that evaluations use."""

from __future__ import annotations

import json

import pytest
import torch
from saving import ONE
from torch import nn

from trainers.checkpoints.export import read_models, to_safetensors
from trainers.config.schema import Init, RunConfig
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths
from trainers.engine.ema import models_to_evaluate
from trainers.engine.loop import Loop
from trainers.engine.precision import LossScale
from trainers.engine.saving import storage
from trainers.engine.saving.weights import open_source
from trainers.engine.task import Loss, Task


class Points:
    def __len__(self):
        return 64

    def batch(self, share):
        values = torch.from_numpy(share.indices).float()
        return torch.stack([values.sin(), values.cos()], 1), (values % 3 == 0).long()


class Toy(Task):
    """`weights` holds the weights before each training step."""

    fails = False

    def data(self, world):
        self.weights = []
        return Points(), Points()

    def model(self):
        model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        model[0].bias.requires_grad_(False)
        return model

    def loss(self, model, batch):
        inputs, labels = batch
        if model.training:
            self.weights.append(weights_of(model))
        elif self.fails:
            raise ZeroDivisionError("the evaluation fails")
        return Loss(nn.functional.cross_entropy(model(inputs), labels, reduction="sum"), len(labels))


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def loop_of(root, steps=30, **sections) -> Loop:
    values = {"name": "toy", "task": "toy:Toy", "train": {"steps": steps, "batch_size": 16, "ema": 0.8}, "log": {"every": 1},
              "optim": {"name": "sgd", "lr": 0.1}, "eval": {"every": 10}, "checkpoint": {"every": 10, "keep_last": 9}}
    config = RunConfig.model_validate({**values, **{key: {**values.get(key, {}), **more} for key, more in sections.items()}})
    root.mkdir(exist_ok=True)
    return Loop(Toy(config), config, ONE, RunPaths(root), None)


def averages(history, decay, parameters):
    """A plain loop over the weights after each step."""
    average = {name: history[0][name].clone() for name in parameters}
    for number, weights in enumerate(history[1:]):
        now = min(decay, (1 + number) / (10 + number))
        for name, value in average.items():
            value.mul_(now).add_(weights[name], alpha=1 - now)
    return average


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


TRAINED = ["0.weight", "1.bias", "1.weight", "2.bias", "2.weight"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run: (its folder, its loop)."""
    root = tmp_path_factory.mktemp("ema") / "run"
    loop = loop_of(root)
    assert loop.run() == 0
    return root, loop


def test_the_average_is_that_of_a_plain_loop(trained):
    root, loop = trained
    final = weights_of(loop.models["model"])
    expected = averages([*loop.task.weights, final], 0.8, TRAINED)
    reader = storage.Reader(RunPaths(root).checkpoint(30))
    assert {name for name in reader.shapes if name.startswith("ema/")} == {f"ema/model/{name}" for name in TRAINED}
    for name, value in expected.items():
        torch.testing.assert_close(reader.tensor(f"ema/model/{name}"), value)
        assert torch.equal(reader.tensor(f"models/model/{name}"), final[name])
    assert not torch.allclose(expected["2.weight"], final["2.weight"], atol=1e-4)


def test_evaluations_and_exports_use_the_average_and_the_models_buffers(trained, tmp_path):
    root, loop = trained
    checkpoint = RunPaths(root).checkpoint(30)
    exported = {}
    for raw in (False, True):
        to_safetensors(read_models(checkpoint, raw)["model"], tmp_path / f"{raw}.safetensors", {})
        source = open_source(checkpoint, ONE, Init(source="x", raw=raw))
        assert set(source.shapes) == set(weights_of(loop.models["model"]))
        from safetensors.torch import load_file

        exported[raw] = load_file(tmp_path / f"{raw}.safetensors")
        assert all(torch.equal(source.read(name, 0, value.numel()), value.view(-1)) for name, value in exported[raw].items())
    assert equal(exported[True], weights_of(loop.models["model"]))
    assert [name for name in sorted(exported[True]) if not torch.equal(exported[True][name], exported[False][name])] == TRAINED
    model = Toy(loop.config).model().eval()
    model.load_state_dict(exported[False])
    inputs, labels = Points().batch(type("Share", (), {"indices": torch.arange(64).numpy()}))
    row = [json.loads(line) for line in RunPaths(root).metrics.read_text().splitlines()][-1]
    assert row["split"] == "eval" and row["loss"] == pytest.approx(nn.functional.cross_entropy(model(inputs), labels).item())


def test_a_resumed_run_has_the_same_average_to_the_bit(trained, tmp_path):
    root, _ = trained
    first = loop_of(tmp_path / "cut")
    first.stopping.at_boundary = lambda: first.step >= 13
    assert first.run() == 75
    assert loop_of(tmp_path / "cut").run() == 0
    one, other = (storage.Reader(RunPaths(folder).checkpoint(30)) for folder in (root, tmp_path / "cut"))
    assert one.shapes == other.shapes and all(torch.equal(one.tensor(name), other.tensor(name)) for name in one.shapes)


def test_an_evaluation_that_fails_or_stops_leaves_the_trained_weights_in_the_model(tmp_path):
    loop = loop_of(tmp_path / "run", eval={"every": "never"})
    assert loop.run() == 0
    model, average = loop.models["model"], loop.runners[0].average
    before, kept = weights_of(model), [value.clone() for value in average.values]
    with models_to_evaluate(loop.models, loop.runners, ONE) as models:
        assert models["model"] is model and not torch.equal(weights_of(model)["2.weight"], before["2.weight"])
        assert torch.equal(average.fragments("model")["ema/model/2.weight"].part, before["2.weight"])
    assert equal(weights_of(model), before) and all(map(torch.equal, average.values, kept))
    loop.task.fails = True
    with pytest.raises(ZeroDivisionError):
        loop._evaluate()
    assert equal(weights_of(model), before) and all(map(torch.equal, average.values, kept))


def test_a_stop_within_an_evaluation_saves_the_trained_weights(trained, tmp_path):
    loop = loop_of(tmp_path / "cut")
    calls = []
    loop.stopping.at_boundary = lambda: loop.step == 10 and not calls.append(loop.evaluated)
    assert loop.run() == 75 and calls == [False]  # the only call at step 10 was in the evaluation
    assert loop_of(tmp_path / "cut").run() == 0
    logged = [[{**json.loads(line), "time": None} for line in RunPaths(folder).metrics.read_text().splitlines()]
              for folder in (trained[0], tmp_path / "cut")]
    assert [(row["step"], row["loss"]) for row in logged[0]] == [(row["step"], row["loss"]) for row in logged[1]]


def test_a_step_that_fp16_skips_does_not_move_the_average(tmp_path):
    loop = loop_of(tmp_path / "run", train={"precision": "fp16"})
    runner = loop.runners[0]
    before = [value.clone() for value in runner.average.values]
    runner.loss_scale = LossScale("fp16", 2.0**127)
    runner.take_step(0, 30)
    assert runner.skipped == 1 and all(map(torch.equal, runner.average.values, before))
    runner.loss_scale = LossScale("fp16", 2.0**4)
    runner.take_step(1, 30)
    assert runner.applied == 1 and not all(map(torch.equal, runner.average.values, before))


def test_a_new_run_starts_from_the_average_or_from_the_trained_weights(trained, tmp_path):
    root, loop = trained
    checkpoint = RunPaths(root).checkpoint(30)
    reader = storage.Reader(checkpoint)
    for raw, kind in ((False, "ema"), (True, "models")):
        new = loop_of(tmp_path / kind, init={"source": str(checkpoint), "raw": raw})
        new._resume()
        assert torch.equal(new.models["model"][2].weight, reader.tensor(f"{kind}/model/2.weight"))
        assert torch.equal(new.runners[0].average.fragments("model")["ema/model/2.weight"].part, new.models["model"][2].weight)


def test_a_run_cannot_go_on_with_another_kind_of_weights(trained, tmp_path):
    for key, ema in (("with", 0.8), ("without", None)):
        first = loop_of(tmp_path / key, train={"ema": ema})
        first.stopping.at_boundary = lambda: True
        assert first.run() == 75
        with pytest.raises(UserError, match="either the checkpoint or the spec has averaged weights"):
            loop_of(tmp_path / key, train={"ema": None if ema else 0.8}).run()
