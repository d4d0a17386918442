"""Optimizer steps of one update: gradients with uneven micro-batches, skipped steps of fp16, gradients that are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainers.config.schema import Optim, RunConfig, Train
from trainers.contract.errors import TrainingError, UserError
from trainers.engine.parallel.ddp import Ddp
from trainers.engine.precision import LossScale
from trainers.engine.task import Loss, Update
from trainers.engine.update_runner import UpdateRunner
from trainers.engine.world import World

WORLD = World(0, 1, 0, 1, torch.device("cpu"))


class Sentences:
    """Rows of unequal length. The loss counts tokens, not rows."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randn(40, 9, 4, generator=generator)
        self.lengths = torch.randint(1, 10, (40,), generator=generator)

    def __len__(self):
        return 40

    def batch(self, share):
        rows = torch.from_numpy(share.indices)
        return self.tokens[rows], torch.arange(9) < self.lengths[rows, None]


def token_loss(models, batch):
    tokens, counted = batch
    return Loss(models["model"](tokens).squeeze(-1).pow(2)[counted].sum(), int(counted.sum()))


class Heads(nn.Module):
    """Two heads on one body. The heads take turns: each step uses one of them. A third head is never used.

    Attributes:
        bad_call: number of the call, from 1, whose output is infinite; None: no call.
    """

    def __init__(self):
        super().__init__()
        self.unused, self.first, self.second, self.body = nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(4, 4)
        self.calls, self.bad_call = 0, None

    def forward(self, tokens):
        self.calls += 1
        factor = float("inf") if self.calls == self.bad_call else 1.0
        return (self.first if self.calls % 2 else self.second)(self.body(tokens)) * factor


def make_runner(update=None, momentum=0.0, model=None, name="sgd", **train) -> UpdateRunner:
    config = RunConfig(name="x", task="x:X", train=Train(steps=5, batch_size=8, **train),
                       optim=Optim(name=name, lr=0.1, momentum=momentum))
    torch.manual_seed(0)
    models = {"model": model or nn.Linear(4, 1), "other": nn.Linear(4, 4)}
    update = update or Update("model", trains="model", loss=token_loss)
    return UpdateRunner(update, config, WORLD, Ddp(WORLD, config), Sentences(), models)


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_micro_batches_give_the_gradient_of_the_mean_over_all_tokens(micro):
    runner = make_runner(micro_batch_size=micro)
    before = [p.detach().clone() for p in runner.models["model"].parameters()]
    (share,) = make_runner().samples.shares(3, 0, 1)
    total, count = token_loss(runner.models, runner.dataset.batch(share))
    expected = torch.autograd.grad(total / count, list(runner.models["model"].parameters()))
    runner.take_step(3, 5)
    for parameter, old, gradient in zip(runner.models["model"].parameters(), before, expected):
        torch.testing.assert_close(parameter.detach(), old - 0.1 * gradient)
    assert runner.last_loss() == pytest.approx((total / count).item())
    assert runner.read_counters()[0] == count and runner.read_counters()[0] == 0


def test_gradients_in_the_model_of_another_update_are_cleared():
    def loss(models, batch):
        tokens, counted = batch
        return Loss(models["model"](models["other"](tokens)).pow(2).sum(), int(counted.sum()))

    runner = make_runner(Update("model", trains="model", loss=loss))
    runner.take_step(0, 5)
    assert runner.models["other"].weight.grad is not None  # the gradient flows through both models
    runner._clear_gradients()
    assert all(p.grad is None for model in runner.all_models for p in model.parameters())
    assert len(runner.sharded.optimizer.param_groups[0]["params"]) == 2


def test_a_step_that_fp16_skips_does_not_count_as_applied():
    fp16 = make_runner(precision="fp16")
    fp16.loss_scale = LossScale("fp16", 2.0**127)  # so large that gradients overflow
    fp16.take_step(0, 5)
    assert (fp16.applied, fp16.skipped, fp16.skipped_in_row) == (0, 1, 1)
    fp16.loss_scale = LossScale("fp16", 2.0**4)
    fp16.take_step(1, 5)
    assert (fp16.applied, fp16.skipped, fp16.skipped_in_row) == (1, 1, 0)
    resumed = make_runner(precision="fp16")
    resumed.load_state(fp16.state())
    assert resumed.applied == 1 and resumed.loss_scale.scale == fp16.loss_scale.scale == 2.0**4


def test_settle_changes_no_parameter_buffer_gradient_or_optimizer_state():
    runner = make_runner()
    runner.models["model"].register_buffer("seen", torch.ones(2))
    before = {k: v.clone() for k, v in runner.models["model"].state_dict().items()}
    runner.settle(0)
    after = runner.models["model"].state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in runner.models["model"].parameters()) and not runner.sharded.optimizer.state


def test_the_momentum_stays_finite_if_fp16_skips_the_first_step():
    fp16 = make_runner(momentum=0.9, precision="fp16")
    fp16.loss_scale = LossScale("fp16", 2.0**127)
    fp16.take_step(0, 5)
    fp16.loss_scale = LossScale("fp16", 2.0**4)
    for draw in (1, 2):
        fp16.take_step(draw, 5)
    assert fp16.applied == 2
    assert all(torch.isfinite(p).all() for p in fp16.models["model"].parameters())


def test_the_first_gradient_that_was_not_finite_is_named_even_if_the_check_comes_later():
    heads = Heads()
    runner = make_runner(model=heads, name="adamw")
    heads.bad_call = 3
    for draw in range(4):
        runner.take_step(draw, 5)
    with pytest.raises(TrainingError, match="update `model`, step 3: the gradient of `first.weight` is not finite"):
        runner.check_finite()


def test_gradients_are_checked_regularly_even_if_nothing_is_logged(monkeypatch):
    heads = Heads()
    runner = make_runner(model=heads, name="adamw")
    heads.bad_call = 2
    monkeypatch.setattr("trainers.engine.update_runner.CHECK_EVERY", 3)
    runner.take_step(0, 5)
    runner.take_step(1, 5)
    with pytest.raises(TrainingError, match="update `model`, step 2: the gradient of `second.weight`"):
        runner.take_step(2, 5)


def test_a_parameter_may_get_its_first_gradient_after_others():
    """torch's own fused SGD fails here. The expected numbers are those of torch's SGD without the fused kernel."""
    heads = Heads()
    runner = make_runner(model=heads, momentum=0.9)
    plain = Heads()
    plain.load_state_dict({name: value.clone() for name, value in heads.state_dict().items()})
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for draw in range(5):
        runner.take_step(draw, 5)
        sgd.zero_grad()
        loss = token_loss({"model": plain}, runner.dataset.batch(runner.samples.shares(draw, 0, 1)[0]))
        (loss.sum / loss.count).backward()
        sgd.step()
    for ours, theirs in zip(heads.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_loss_that_is_not_a_loss_is_refused_and_named():
    update = Update("critic", trains="model", loss=lambda models, batch: token_loss(models, batch).sum)
    with pytest.raises(UserError, match=r"the loss of update `critic` is a Tensor, but must be Loss\(sum, count\)"):
        make_runner(update).take_step(0, 5)
