"""The state of a task's own (`Task.state`) in a checkpoint: its tensors as `task/<name>`, its other values in state.json."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from trainers.checkpoints.facts import checked
from trainers.checkpoints.manifest import STATE
from trainers.checkpoints.names import TASK
from trainers.contract.errors import UserError
from trainers.engine.parallel.fragments import CODE_CHANGED, Fragment, fill
from trainers.engine.saving.storage import Reader
from trainers.engine.task import Task
from trainers.engine.world import World

KEY = "task"  # in state.json


def fragments(task: Task) -> dict[str, Fragment]:
    """Return the tensors of the state, by their names in checkpoints."""
    return {f"{TASK}{name}": Fragment.whole(tensor) for name, tensor in _tensors(task).items()}


def values(task: Task) -> dict[str, Any]:
    """Return the rest of the state. Raises: UserError: JSON cannot hold a value."""
    return checked({name: value for name, value in task.state().items() if not isinstance(value, Tensor)}, "state")


def _tensors(task: Task) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in task.state().items() if isinstance(value, Tensor)}


def check_equal(task: Task, world: World) -> None:
    """Check that all ranks have the same state: a checkpoint holds the state of one rank. Waits for the device. Collective.

    Raises:
        UserError: the states differ, on every rank.
    """
    if world.size == 1 or not task.state():
        return
    # Equal sums show equal tensors well enough. Text, because nan is not equal to nan.
    own = {name: str(tensor.double().sum().item()) for name, tensor in _tensors(task).items()}
    own |= {name: str(value) for name, value in values(task).items()}
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, own)
    for rank, other in enumerate(gathered):
        if different := [name for name in gathered[0] | other if gathered[0].get(name) != other.get(name)]:
            raise UserError(f"the task's `state` gives another `{different[0]}` on rank {rank} than on rank 0",
                            "change the state on all ranks alike: reduce or gather what goes into it over the ranks")


def load(task: Task, reader: Reader, strict: bool = True) -> None:
    """Fill the task's state from a checkpoint.

    Args:
        strict: the checkpoint and the task must have the same names; otherwise, only the names that both have are filled.

    Raises:
        UserError: the names or shapes differ, a tensor does not exist yet, or `state` returns copies, which cannot be filled.
    """
    tensors, others = fragments(task), values(task)
    kept = reader.json(STATE).get(KEY, {})
    before = {name.removeprefix(TASK) for name in reader.shapes if name.startswith(TASK)} | kept.keys()
    if strict and before != task.state().keys():
        raise UserError(f"the checkpoint holds {_listed(before)} of the task's `state`, which now returns "
                        f"{_listed(task.state())}", CODE_CHANGED)
    if strict:
        _check_tensors({name.removeprefix(TASK) for name in reader.shapes if name.startswith(TASK)}, _tensors(task).keys())
    fill({name: fragment for name, fragment in tensors.items() if name in reader.shapes}, reader.shapes, reader.read)
    for name, fragment in fragments(task).items():
        if fragment.part.data_ptr() != tensors[name].part.data_ptr():
            raise UserError(f"the task's `state` returns a copy of `{name.removeprefix(TASK)}`, which cannot be filled",
                            "return the tensor that the task uses, not a new one")
    if others and others.keys() <= kept.keys():
        task.load_state({name: kept[name] for name in others})


def _check_tensors(later: Collection[str], first: Collection[str]) -> None:
    """Raise a UserError unless the state has the same tensors later in the run as at its start."""
    for name in sorted({*later} ^ {*first}):
        when = "later in a run" if name in later else "at first"
        raise UserError(f"`{name}` of the task's `state` is a tensor only {when}, so a resumed run cannot fill it",
                        "make the tensor in `data`, and change it in place")


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "nothing"


@contextmanager
def preserved(task: Task) -> Iterator[None]:
    """Put the task's state back after the block."""
    tensors = {name: tensor.clone() for name, tensor in _tensors(task).items()}
    others = values(task)
    yield
    _check_tensors(_tensors(task).keys(), tensors.keys())
    for name, tensor in _tensors(task).items():
        tensor.copy_(tensors[name])
    if others:
        task.load_state(others)
