"""Optimizer steps of one update: gradients with uneven micro-batches, skipped steps of fp16, gradients that are not finite."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from trainers.config.schema import Optim, RunConfig, Train
from trainers.contract.errors import TrainingError, UserError
from trainers.engine.failures import MemoryFull, memory_for, work_without_memory
from trainers.engine.parallel.ddp import Ddp
from trainers.engine.precision import LossScale
from trainers.engine.task import Loss, Update
from trainers.engine.update_runner import UpdateRunner, read
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


def make_runner(update=None, momentum=0.0, model=None, other=None, name="sgd", **train) -> UpdateRunner:
    config = RunConfig(name="x", task="x:X", train=Train(**{"steps": 5, "batch_size": 8, **train}),
                       optim=Optim(name=name, lr=0.1, momentum=momentum))
    torch.manual_seed(0)
    models = {"model": model or nn.Linear(4, 1), "other": other or nn.Linear(4, 4)}
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
    assert read([runner])[0].loss == pytest.approx((total / count).item())
    assert read([runner])[0].items == count
    runner.take_step(3, 5)
    assert read([runner])[0].items == 2 * count


@pytest.mark.parametrize("micro, work", [(1, "sample"), (2, "step")])
def test_a_sample_that_does_not_fit_alone_is_told_from_a_micro_batch(micro, work):
    def loss(models, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    runner = make_runner(Update("model", trains="model", loss=loss), micro_batch_size=micro)
    with pytest.raises(MemoryFull) as error, memory_for("step"):
        runner.take_step(0, 5)
    assert work_without_memory(error.value) == work


def test_the_gradient_flows_through_a_model_that_the_update_does_not_train():
    seen = []

    def loss(models, batch):
        tokens, counted = batch
        seen.append([p.requires_grad for p in models["other"].parameters()])
        return Loss(models["other"](models["model"](tokens).expand(-1, -1, 4)).pow(2).sum(), int(counted.sum()))

    model = nn.Linear(4, 1)
    model.bias.requires_grad_(False)
    other = nn.Linear(4, 4)
    other.bias.requires_grad_(False)  # frozen by the task
    runner = make_runner(Update("model", trains="model", loss=loss), model=model, other=other)
    before = model.weight.detach().clone()
    runner.take_step(0, 5)
    assert seen == [[False, False]] and other.weight.grad is None
    assert other.weight.requires_grad and not other.bias.requires_grad
    assert not torch.equal(model.weight, before) and model.weight.requires_grad and not model.bias.requires_grad


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
        read([runner])


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


@pytest.mark.parametrize("change, message", [
    (lambda loss: loss.sum, r"is a Tensor, but must be Loss\(sum, count\)"),
    (lambda loss: Loss(loss.sum.expand(3), 3), r"has a float32 tensor of shape \[3\] as its sum"),
    (lambda loss: Loss(loss.sum.item(), 3), "has a float as its sum"),
    (lambda loss: Loss(loss.sum.detach(), 3), "does not depend on the parameters that the update trains"),
    (lambda loss: Loss(loss.sum, torch.ones(3)), r"has a float32 tensor of shape \[3\] as its count"),
    (lambda loss: Loss(loss.sum, torch.tensor(3).bfloat16()), r"has a bfloat16 tensor of shape \[\] as its count"),
    (lambda loss: Loss(loss.sum, None), "has a NoneType as its count"),
])
def test_a_loss_that_cannot_be_trained_on_is_refused_and_named(change, message):
    update = Update("critic", trains="model", loss=lambda models, batch: change(token_loss(models, batch)))
    with pytest.raises(UserError, match=f"the loss of update `critic` {message}"):
        make_runner(update).take_step(0, 5)


def test_a_loss_without_any_gradient_of_the_trained_model_is_refused():
    """The loss has a graph, but the graph does not reach the model."""
    free = nn.Parameter(torch.ones(()))
    with pytest.raises(UserError, match="no parameter that is trained has got a gradient"):
        make_runner(Update("critic", trains="model", loss=lambda models, batch: Loss(free * 2, 1))).take_step(0, 5)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_a_count_on_the_device_gives_the_same_steps_as_a_number(kind):
    def counted_on_device(models, batch):
        loss = token_loss(models, batch)
        return Loss(loss.sum, batch[1].sum().to(kind))

    on_host = make_runner(micro_batch_size=2)
    on_device = make_runner(Update("model", trains="model", loss=counted_on_device), micro_batch_size=2)
    for draw in range(3):
        on_host.take_step(draw, 5)
        on_device.take_step(draw, 5)
    assert read([on_host]) == [replace(read([on_device])[0], data_wait_s=read([on_host])[0].data_wait_s)]
    assert all(map(torch.equal, on_host.sharded.model.parameters(), on_device.sharded.model.parameters()))


def test_counts_may_be_weights_that_sum_to_less_than_1():
    def weighted(models, batch):
        total, count = token_loss(models, batch)
        return Loss(total * 1e-4, count * 1e-4)

    runner, expected = make_runner(Update("model", trains="model", loss=weighted)), make_runner()
    for each in (runner, expected):
        each.take_step(0, total=5)
    assert read([runner])[0].loss == pytest.approx(read([expected])[0].loss, rel=1e-5)
    torch.testing.assert_close(runner.models["model"].weight, expected.models["model"].weight)


def test_losses_in_half_precision_are_summed_in_fp32():
    """A sum in bf16 would leave out every loss after the first."""
    losses = iter([256.0, 1, 1, 1, 1, 1, 1])

    def loss(models, batch):
        return Loss((models["model"].bias.sum() * 0 + next(losses)).bfloat16(), 1)

    runner = make_runner(Update("model", trains="model", loss=loss), batch_size=7, micro_batch_size=1)
    runner.take_step(0, 5)
    assert read([runner])[0].loss == pytest.approx(262 / 7)


def test_a_step_that_is_not_logged_reads_nothing_from_the_device(monkeypatch):
    reads = Counter()
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counting(tensor, *args, name=name, original=original):
            # On a CPU only, a step asks whether the factor on the gradients is 1.
            if sys._getframe(1).f_code.co_name != "step":
                reads[name] += 1
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counting)
    critic = make_runner(Update("critic", trains="model", loss=lambda models, batch: Loss(
        models["model"](batch[0]).squeeze(-1).pow(2).mul(batch[1]).sum(), batch[1].sum()), draws=3))
    generator = make_runner(Update("model", trains="model", loss=lambda models, batch: Loss(
        models["model"](batch[0]).sum(), len(batch[0]))))
    for step in range(4):
        for runner in (critic, generator):
            for draw in runner.draws(step):
                runner.take_step(draw, 20)
    assert not reads
    assert len(read([critic, generator])) == 2 and reads == {"tolist": 1}
