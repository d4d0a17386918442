"""Rates between logged steps, and what they leave out."""

from __future__ import annotations

import json
import time

import pytest
import torch
from saving import ONE
from torch import nn

from trainers.config.schema import RunConfig
from trainers.contract.paths import RunPaths
from trainers.engine import loop, rates
from trainers.engine.rates import Rates
from trainers.engine.task import Loss, Task
from trainers.engine.update_runner import Reading


def reading(items: float, wait_s: float) -> Reading:
    return Reading(loss=1.0, norm=1.0, items=items, data_wait_s=wait_s)


def test_rates_are_those_since_the_last_logged_step(monkeypatch):
    now = 100.0
    monkeypatch.setattr(rates.time, "perf_counter", lambda: now)
    measured = Rates()
    measured.begin(10, [])
    now = 104.0
    assert measured.measured(12, 20, [reading(8, 0.5), reading(80, 0.5)], leader=1) == {
        "rate": 20.0, "data_wait": 0.25, "eta_s": 16.0}
    now = 105.0
    began = now
    now = 107.0
    measured.leave_out(began)  # an evaluation
    now = 108.0
    assert measured.measured(14, 20, [reading(16, 0.5), reading(100, 1.5)], leader=1) == {
        "rate": 10.0, "data_wait": 0.5, "eta_s": 6.0}


class Rows:
    def __len__(self):
        return 40

    def batch(self, share):
        return torch.ones(len(share.indices), 1)


class Compiling(Task):
    """The first training loss of an attempt takes long, as if the model had to be compiled."""

    def data(self, world):
        self.compiled = False
        return Rows(), Rows()

    def model(self):
        return nn.Linear(1, 1)

    def loss(self, model, batch):
        if torch.is_grad_enabled() and not self.compiled:
            self.compiled = True
            time.sleep(1)
        return Loss(model(batch).square().sum(), len(batch))


@pytest.mark.parametrize("every", [1, 3])
def test_the_first_step_of_a_resumed_attempt_counts_in_no_rate(tmp_path, every):
    config = RunConfig.model_validate({"name": "x", "task": "x:Compiling", "train": {"steps": 12, "batch_size": 10},
                                       "log": {"every": every}, "eval": {"every": 2}, "checkpoint": {"every": "never"}})

    def run(until):
        attempt = loop.Loop(Compiling(config), config, ONE, RunPaths(tmp_path), None)
        attempt.stopping.at_boundary = lambda: attempt.step == until
        return attempt.run()

    assert (run(4), run(None)) == (75, 0)
    found = {row["step"]: row["rate"] for row in map(json.loads, RunPaths(tmp_path).metrics.read_text().splitlines())
             if row["split"] == "train"}
    slow = {1} if every == 3 else {1, 5}  # steps that are logged by themselves
    assert {step for step, rate in found.items() if rate < 40} == slow, found
