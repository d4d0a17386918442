"""The models as an evaluation sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from trainers.engine.parallel.strategy import share_buffers
from trainers.engine.world import World

if TYPE_CHECKING:
    from trainers.engine.update_runner import UpdateRunner


@contextmanager
def models_to_evaluate(models: Mapping[str, nn.Module], runners: Sequence[UpdateRunner], world: World
                       ) -> Iterator[dict[str, nn.Module]]:
    """Give the modules to call in an evaluation, by name. Collective: all ranks enter and leave together.

    Args:
        models: the models by name, as the strategy placed them.
        runners: the updates that train them.
    """
    share_buffers(models, world)
    yield {**models, **{runner.update.trains: runner.sharded.eval_module for runner in runners}}
