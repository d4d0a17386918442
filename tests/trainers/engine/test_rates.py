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


class Timed(Task):
    """By the test's clock, a training loss takes 1 s, an evaluation 7 s, and the first training loss of an attempt 100 s more, as
    if the model had to be compiled."""

    now = 0.0

    def data(self, world):
        self.compiled = False
        return Rows(), Rows()

    def model(self):
        return nn.Linear(1, 1)

    def loss(self, model, batch):
        if torch.is_grad_enabled():
            Timed.now += 1 if self.compiled else 101
            self.compiled = True
        else:
            Timed.now += 7
        return Loss(model(batch).square().sum(), len(batch))


@pytest.mark.parametrize("every", [1, 3])
def test_the_first_step_of_an_attempt_and_evaluations_count_in_no_rate(tmp_path, monkeypatch, every):
    """Unless the first step is logged by itself."""
    monkeypatch.setattr(time, "perf_counter", lambda: Timed.now)
    config = RunConfig.model_validate({
        "name": "x", "task": "x:Timed", "train": {"steps": 12, "batch_size": 10}, "log": {"every": every},
        "eval": {"every": 2, "batch_size": 40}, "checkpoint": {"every": "never"}})

    def run(until):
        attempt = loop.Loop(Timed(config), config, ONE, RunPaths(tmp_path), None)
        attempt.stopping.at_boundary = lambda: attempt.step == until
        return attempt.run()

    assert (run(4), run(None)) == (75, 0)
    found = {row["step"]: row["rate"] for row in map(json.loads, RunPaths(tmp_path).metrics.read_text().splitlines())
             if row["split"] == "train"}
    compiled = {1} if every == 3 else {1, 5}
    assert found == {step: pytest.approx(10 / (101 if step in compiled else 1)) for step in found} and len(found) >= 5
