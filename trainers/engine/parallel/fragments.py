"""Fragments: the part of each tensor of a run's state that one rank holds.

A part is a contiguous range of the tensor's elements in row-major order. This form fits every strategy: a rank holds the
whole tensor under DDP, a slice of the first dimension under `fully_shard`, and a range of the flattened elements under ZeRO.
So one checkpoint format serves all strategies, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from trainers.checkpoints.names import MODELS, OPTIMIZERS
from trainers.contract.errors import UserError

Read = Callable[[str, int, int], Tensor]  # (name, start, count) -> flat [count], on the CPU

CODE_CHANGED = "the code or spec has changed since then: restore it, or start a new run"


@dataclass(frozen=True)
class Fragment:
    """The elements `start` to `start + part.numel()` of a tensor of shape `shape`. `part` is a view of live state."""

    part: Tensor
    start: int
    shape: tuple[int, ...]
    replicated: bool = False  # every rank holds the whole tensor, so any rank may write it

    @classmethod
    def whole(cls, tensor: Tensor) -> Fragment:
        return cls(tensor, 0, tuple(tensor.shape), replicated=True)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers of a model, by name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model that a checkpoint holds: its parameters, each by its first name, and persistent buffers."""
    return dict(model.named_parameters()) | buffers(model)


def tied_names(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """Map the further names of parameters that have several names to the first name. The names are those in checkpoints."""
    first_names = {}
    for model_name, model in models.items():
        first: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if first.setdefault(parameter, name) != name:
                first_names[f"{MODELS}{model_name}/{name}"] = f"{MODELS}{model_name}/{first[parameter]}"
    return first_names


def fill(fragments: Mapping[str, Fragment], shapes: Mapping[str, tuple[int, ...]], read: Read) -> None:
    """Copy values from a checkpoint into the fragments.

    Args:
        shapes: the shapes of the checkpoint's tensors, by name.
        read: reads elements of one of these tensors.

    Raises:
        UserError: the checkpoint lacks a tensor, or holds the tensor in another shape.
    """
    for name, fragment in fragments.items():
        _check_shape(name, fragment.shape, shapes)
        if fragment.part.numel():
            values = read(name, fragment.start, fragment.part.numel())
            fragment.part.detach().copy_(values.view(fragment.part.shape))


def optimizer_slots(update: str, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, bool]]:
    """Return which optimizer states a checkpoint holds for an update's model.

    Args:
        shapes: the shapes of the checkpoint's tensors, by name.

    Returns:
        {parameter: {state: True if the state has the parameter's shape (a moment), False if the state is a single number}}.
        torch's optimizers have one single number, `step`.

    Raises:
        UserError: the checkpoint has states of a parameter that the model does not have.
    """
    slots: dict[str, dict[str, bool]] = {name: {} for name, _ in model.named_parameters()}
    prefix = f"{OPTIMIZERS}{update}/"
    for name in shapes:
        if name.startswith(prefix):
            parameter, slot = name.removeprefix(prefix).rsplit("/", 1)
            if parameter not in slots:
                raise UserError(f"the checkpoint has `{parameter}`, but the model does not",
                                "the code has changed since then: restore it, or start a new run")
            slots[parameter][slot] = slot != "step"
    return slots


def check_no_unknown(shapes: Mapping[str, tuple[int, ...]], known: Collection[str]) -> None:
    """Check that the models have every model tensor of a checkpoint.

    Args:
        shapes: the shapes of the checkpoint's tensors, by name.
        known: the names of the models' tensors.

    Raises:
        UserError: the checkpoint has a model tensor that is not `known`.
    """
    for name in shapes:
        if name.startswith(MODELS) and name not in known:
            raise UserError(f"the checkpoint has `{name}`, but the model does not", CODE_CHANGED)


def _check_shape(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if name not in shapes:
        raise UserError(f"the checkpoint has no `{name}`, which the model needs", CODE_CHANGED)
    if shapes[name] != shape:
        raise UserError(f"`{name}` has shape {list(shapes[name])} in the checkpoint and {list(shape)} in the model", CODE_CHANGED)
