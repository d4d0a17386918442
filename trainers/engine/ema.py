"""Averaged weights (`train.ema`), and the models as an evaluation sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from trainers.checkpoints.names import AVERAGES
from trainers.engine.parallel.buffers import share_buffers
from trainers.engine.parallel.fragments import Fragment
from trainers.engine.parallel.sharded_model import ShardedModel
from trainers.engine.world import World

if TYPE_CHECKING:
    from trainers.engine.update_runner import UpdateRunner


class Average:
    """The exponential moving average of a model's trained parameters (Polyak & Juditsky 1992; Tarvainen & Valpola 2017,
    arXiv:1703.01780). Each rank holds the average of the parts that its optimizer changes.

    An average has no buffers: an evaluation uses the model's own BatchNorm statistics.
    """

    def __init__(self, sharded: ShardedModel, decay: float):
        self.sharded, self.decay = sharded, decay
        self.values = [master.detach().clone() for master in sharded.masters()]

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the present weights."""
        torch._foreach_copy_(self.values, self.sharded.masters())

    @torch.no_grad()
    def update(self, applied: int) -> None:
        """Move the average towards the weights after an optimizer step. Does not wait for the device.

        Args:
            applied: number of applied steps before this one. While it is small, the decay is (1 + applied) / (10 + applied), as
                in TensorFlow's ExponentialMovingAverage. Otherwise the initial weights would dominate the first averages.
        """
        decay = min(self.decay, (1 + applied) / (10 + applied))
        torch._foreach_lerp_(self.values, self.sharded.masters(), 1 - decay)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Put the average into the model and the model's weights into the average; afterwards exchange them back. Collective.

        After an exception, the weights that a checkpoint saves are back in place too, but a strategy's copies of them are not:
        gathering them needs all ranks, and others may not take part.
        """
        self._exchange()
        try:
            self.sharded.after_fill()
            yield
        except BaseException:
            self._exchange()
            raise
        self._exchange()
        self.sharded.after_fill()

    def fragments(self, model: str) -> dict[str, Fragment]:
        """Return this rank's part of the average, by the names in checkpoints."""
        return {f"{AVERAGES}{model}/{name}": fragment for name, fragment in self.sharded.parts(self.values).items()}

    @torch.no_grad()
    def _exchange(self) -> None:
        for value, master in zip(self.values, self.sharded.masters(), strict=True):
            kept = master.clone()
            master.copy_(value)
            value.copy_(kept)


def start_averages(runners: Sequence[UpdateRunner], decay: float | None) -> None:
    """Give each update the average of the model that it trains. Updates that train the same model share one average, which
    follows the steps of each."""
    if decay is None:
        return
    averages: dict[str, Average] = {}
    for runner in runners:
        name = runner.update.trains
        if name not in averages:
            averages[name] = Average(runner.sharded, decay)
        runner.average = averages[name]


@contextmanager
def models_to_evaluate(models: Mapping[str, nn.Module], runners: Sequence[UpdateRunner], world: World
                       ) -> Iterator[dict[str, nn.Module]]:
    """Give the modules to call in an evaluation, by name, with the averaged weights in them if `train.ema` is set.

    Collective: all ranks enter and leave together.

    Do not save a checkpoint inside this context: the models do not hold the trained weights there.

    Args:
        models: the models by name, as the strategy placed them.
        runners: the updates that train them.
    """
    share_buffers(models, world)
    averages = {id(runner.average): runner.average for runner in runners if runner.average is not None}
    with ExitStack() as stack:
        for average in averages.values():
            stack.enter_context(average.in_model())
        yield {**models, **{runner.update.trains: runner.sharded.eval_module for runner in runners}}
