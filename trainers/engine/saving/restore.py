"""Fill a run's models and optimizers from a checkpoint, or its models from the weights of `init.source`."""

from __future__ import annotations

from collections.abc import Sequence

from trainers.checkpoints import facts
from trainers.checkpoints.names import AVERAGES
from trainers.config.schema import RunConfig
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths
from trainers.engine.parallel.fragments import Fragment, check_no_unknown, fill
from trainers.engine.saving import task_state
from trainers.engine.saving.storage import Reader
from trainers.engine.saving.weights import load_weights, open_source
from trainers.engine.setup import Setup
from trainers.engine.update_runner import UpdateRunner
from trainers.engine.world import World


def fragments(setup: Setup, runners: Sequence[UpdateRunner]) -> dict[str, Fragment]:
    """Return this rank's parts of all tensors in a checkpoint, by name: models, averaged weights, optimizer states and the task's
    own state."""
    found = _weights(setup, runners)
    for runner in runners:
        found |= runner.sharded.fragments(runner.update.name)
    return found | task_state.fragments(setup.task)


def _weights(setup: Setup, runners: Sequence[UpdateRunner]) -> dict[str, Fragment]:
    """Return this rank's parts of the models and averaged weights."""
    found = setup.strategy.fragments(setup.models)
    for runner in runners:
        if runner.average is not None:
            found |= runner.average.fragments(runner.update.trains)
    return found


def load_models(reader: Reader, setup: Setup, runners: Sequence[UpdateRunner]) -> None:
    """Load the models, averaged weights and task's own state of a checkpoint of this run, without the optimizer states."""
    task_state.load(setup.task, reader)
    fill(_weights(setup, runners), reader.shapes, reader.read)
    for runner in runners:
        runner.sharded.after_fill()


def load_tensors(reader: Reader, setup: Setup, runners: Sequence[UpdateRunner]) -> None:
    """Load the models, optimizer states and the task's own state of a checkpoint.

    Raises:
        UserError: the models, or the parameters that are trained, differ from those of the checkpoint.
    """
    shapes = reader.shapes
    check_no_unknown(shapes, {place.key for place in setup.layout})
    if any(name.startswith(AVERAGES) for name in shapes) != any(runner.average is not None for runner in runners):
        raise UserError("either the checkpoint or the spec has averaged weights (`train.ema`), and the other has none",
                        "restore `train.ema` in run.yaml, or start a new run from these weights: --from RUN")
    task_state.load(setup.task, reader)
    for runner in runners:
        runner.sharded.allocate(runner.update.name, shapes)
    fill(fragments(setup, runners), shapes, reader.read)
    for runner in runners:
        runner.sharded.after_fill()


def load_initial_weights(weights: str, config: RunConfig, setup: Setup, runners: Sequence[UpdateRunner], paths: RunPaths,
                         world: World) -> list[tuple[str, str]]:
    """Load the weights that `init.source` names. Return notes for the user, as (level, message).

    Raises:
        UserError: the weights cannot be read, or do not fit the models.
    """
    path = paths.first_weights(weights)
    source = open_source(path, world, config.init)
    note = load_weights(source, setup.layout, setup.strategy.fragments(setup.models), config.init.skip, f"`{weights}`")
    for runner in runners:
        runner.sharded.after_fill()
        if runner.average is not None:
            runner.average.restart()
    notes = [("info", note)]
    changes = facts.differences(facts.names(facts.read(path)), setup.facts)
    if changes and not config.init.skip:
        notes.append(("warning", f"these weights were trained with other names: {'; '.join(changes)}; init.skip=[NAME] "
                                 "leaves out a layer that belongs to the old names"))
    return notes
