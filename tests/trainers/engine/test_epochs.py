"""Epochs, schedules and the end of a run where updates draw several batches in a step."""

from __future__ import annotations

import json

import pytest
import torch
from saving import ONE
from torch import nn

from trainers.checkpoints import manifest
from trainers.config.schema import RunConfig
from trainers.contract.files import replace_json
from trainers.contract.paths import RunPaths
from trainers.engine import loop
from trainers.engine.task import Loss, Task, Update


class Rows:
    def __init__(self, seen):
        self.seen = seen

    def __len__(self):
        return 50

    def batch(self, share):
        self.seen.extend(share.indices.tolist())
        return torch.from_numpy(share.indices).float().view(-1, 1) / 50


class Two(Task):
    """The critic takes `draws` steps, each on a batch of 10 of the 50 samples."""

    seen: list[int]

    def data(self, world):
        self.seen = []
        return Rows(self.seen), None

    def models(self):
        return {"generator": nn.Linear(1, 1), "critic": nn.Linear(1, 1)}

    def updates(self):
        def loss(name):
            return lambda models, batch: Loss(models[name](batch).square().sum(), len(batch))

        return [Update("generator", "generator", loss("generator")),
                Update("critic", "critic", loss("critic"), draws=self.config.model["draws"])]


def started(root, draws, until=None, **train) -> loop.Loop:
    config = RunConfig.model_validate({
        "name": "two", "task": "two:Two", "model": {"draws": draws}, "train": {"batch_size": 10, **train}, "log": {"every": 1},
        "optim": {"name": "sgd", "schedule": "linear", "lr": 1.0}, "checkpoint": {"every": "epoch", "keep_last": 99}})
    run = loop.Loop(Two(config), config, ONE, RunPaths(root), None)
    run.stopping.at_boundary = lambda: run.step == until
    return run


def rows(root) -> list[dict]:
    return [json.loads(line) for line in RunPaths(root).metrics.read_text().splitlines()]


# 5 draws are an epoch.
@pytest.mark.parametrize("draws, epochs, total, ends", [
    (1, 2, 10, [5, 10]), (2, 2, 5, [3, 5]), (2, 1, 3, [3]), (3, 2, 4, [2, 4]), (5, 3, 3, [1, 2, 3]), (7, 3, 3, [1, 2, 3]),
    (10, 3, 2, [1, 2]), (3, 0.5, 1, [1])])
def test_an_epoch_is_a_pass_of_the_update_that_draws_most(tmp_path, draws, epochs, total, ends):
    run = started(tmp_path, draws, epochs=epochs)
    assert run.total == total
    assert run.run() == 0
    assert RunPaths(tmp_path).checkpoint_steps() == ends
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == list(range(1, total + 1))
    # Both schedules end with the run, each after the steps of its own update. The rate logged is that of a step's last draw.
    assert logged[-1]["generator/lr"] == pytest.approx(1 / total)
    assert logged[-1]["critic/lr"] == pytest.approx(1 / (total * draws))
    assert [runner.applied for runner in run.runners] == [total, total * draws]
    counts = torch.tensor(run.task.seen).bincount(minlength=50)
    assert counts.sum() == 10 * total * (1 + draws)


def test_steps_are_training_steps(tmp_path):
    run = started(tmp_path, 3, steps=4)
    assert run.total == 4 and run.run() == 0 and [runner.applied for runner in run.runners] == [4, 12]


def test_a_run_of_an_older_version_keeps_its_number_of_steps(tmp_path, capsys):
    """Older versions counted a step as one draw, whatever the update: 2 epochs were 10 steps, and are 4 today."""
    assert started(tmp_path, 3, until=2, epochs=2).run() == 75
    folder = RunPaths(tmp_path).checkpoint(2)
    state = json.loads((folder / manifest.STATE).read_text())
    assert state.pop("total") == 4
    replace_json(folder / manifest.STATE, state)
    content = manifest.read(folder, 2)
    manifest.write(folder, entries={**content.pop("files"), manifest.STATE: manifest.entry(folder / manifest.STATE)},
                   **{key: value for key, value in content.items() if key != "format"})
    run = started(tmp_path, 3, until=5, epochs=2)
    assert run.run() == 75 and run.total == 10
    assert "this run keeps its 10 steps, although 2 epochs are 4 steps today" in capsys.readouterr().out
    again = started(tmp_path, 3, epochs=2)
    assert again.run() == 0 and (again.step, again.total) == (10, 10)
