"""Loss as (sum, count): micro-batches of uneven counts change no gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainers.config.schema import Optim, RunConfig, Train
from trainers.contract.errors import TrainingError
from trainers.engine.parallel.ddp import Ddp
from trainers.engine.precision import LossScale
from trainers.engine.task import Loss, Update
from trainers.engine.update_runner import UpdateRunner
from trainers.engine.world import World

WORLD = World(0, 1, 0, 1, torch.device("cpu"))


class Sentences:
    """Rows of unequal length: what counts is the token, not the row."""

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
    """Of two heads each step has another, on a body that all have; a third is never used."""

    def __init__(self):
        super().__init__()
        self.unused, self.first, self.second, self.body = nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(4, 4)
        self.calls, self.bad_call = 0, None

    def forward(self, tokens):
        self.calls += 1
        factor = float("inf") if self.calls == self.bad_call else 1.0
        return (self.first if self.calls % 2 else self.second)(self.body(tokens)) * factor


def runner(update=None, momentum=0.0, model=None, name="sgd", **train) -> UpdateRunner:
    config = RunConfig(name="x", task="x:X", train=Train(steps=5, batch_size=8, **train),
                       optim=Optim(name=name, lr=0.1, momentum=momentum))
    torch.manual_seed(0)
    models = {"model": model or nn.Linear(4, 1), "other": nn.Linear(4, 4)}
    update = update or Update("model", trains="model", loss=token_loss)
    return UpdateRunner(update, config, WORLD, Ddp(WORLD, config), Sentences(), models)


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_micro_batches_give_the_gradient_of_the_mean_over_all_tokens(micro):
    one = runner(micro_batch_size=micro)
    before = [p.detach().clone() for p in one.models["model"].parameters()]
    (share,) = one.samples.shares(3, 0, 1, 1)
    total, count = token_loss(one.models, one.dataset.batch(share))
    expected = torch.autograd.grad(total / count, list(one.models["model"].parameters()))
    one.take_step(3, 5)
    for parameter, old, gradient in zip(one.models["model"].parameters(), before, expected):
        torch.testing.assert_close(parameter.detach(), old - 0.1 * gradient)
    assert one.last_loss() == pytest.approx((total / count).item())
    assert one.measured()[0] == count and one.measured()[0] == 0


def test_an_update_leaves_no_gradient_in_another_updates_model():
    def loss(models, batch):
        tokens, counted = batch
        return Loss(models["model"](models["other"](tokens)).pow(2).sum(), int(counted.sum()))

    both = runner(Update("model", trains="model", loss=loss))
    both.take_step(0, 5)
    assert both.models["other"].weight.grad is not None  # it flowed through
    both._clear()
    assert all(p.grad is None for model in both.all_models for p in model.parameters())
    assert len(both.sharded.optimizer.param_groups[0]["params"]) == 2


def test_fp16_counts_skipped_steps_and_schedules_do_not_count_them():
    half = runner(precision="fp16")
    half.scale = LossScale("fp16", 2.0**127)  # overflows
    half.take_step(0, 5)
    assert (half.applied, half.skipped, half.skipped_in_row) == (0, 1, 1)
    half.scale = LossScale("fp16", 2.0**4)
    half.take_step(1, 5)
    assert (half.applied, half.skipped, half.skipped_in_row) == (1, 1, 0)
    again = runner(precision="fp16")
    again.load_state(half.state())
    assert again.applied == 1 and again.scale.scale == half.scale.scale == 2.0**4


def test_settling_leaves_no_trace():
    one = runner()
    one.models["model"].register_buffer("seen", torch.ones(2))
    before = {k: v.clone() for k, v in one.models["model"].state_dict().items()}
    one.settle(0)
    after = one.models["model"].state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in one.models["model"].parameters()) and not one.sharded.optimizer.state


def test_a_first_step_that_fp16_skips_leaves_the_momentum_sound():
    half = runner(momentum=0.9, precision="fp16")
    half.scale = LossScale("fp16", 2.0**127)
    half.take_step(0, 5)
    half.scale = LossScale("fp16", 2.0**4)
    for draw in (1, 2):
        half.take_step(draw, 5)
    assert half.applied == 2
    assert all(torch.isfinite(p).all() for p in half.models["model"].parameters())


def test_a_gradient_that_was_not_finite_is_named_though_other_parameters_have_theirs_by_now():
    heads = Heads()
    one = runner(model=heads, name="adamw")
    heads.bad_call = 3
    for draw in range(4):
        one.take_step(draw, 5)
    with pytest.raises(TrainingError, match="update `model`, step 3: the gradient of `first.weight` is not finite"):
        one.check()


def test_gradients_are_looked_at_now_and_then_though_nothing_is_logged(monkeypatch):
    heads = Heads()
    one = runner(model=heads, name="adamw")
    heads.bad_call = 2
    monkeypatch.setattr("trainers.engine.update_runner.UNCHECKED", 3)
    one.take_step(0, 5)
    one.take_step(1, 5)
    with pytest.raises(TrainingError, match="update `model`, step 2: the gradient of `second.weight`"):
        one.take_step(2, 5)


def test_a_parameter_may_get_its_first_gradient_after_others():
    """torch's fused SGD cannot; the numbers are those of the one that is not fused."""
    heads = Heads()
    one = runner(model=heads, momentum=0.9)
    plain = Heads()
    plain.load_state_dict({name: value.clone() for name, value in heads.state_dict().items()})
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for draw in range(5):
        one.take_step(draw, 5)
        sgd.zero_grad()
        loss = token_loss({"model": plain}, one.dataset.batch(one.samples.shares(draw, 0, 1, 1)[0]))
        (loss.sum / loss.count).backward()
        sgd.step()
    for ours, theirs in zip(heads.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
