"""What a rank holds of a run's state: of each tensor one contiguous part of its elements, in row-major order.

Every strategy fits this form: DDP's ranks hold all of each tensor, `fully_shard` a slice of its first dimension, and
ZeRO a stretch of its flattened elements. So one checkpoint format serves them all, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from trainers.contract.errors import UserError

Read = Callable[[str, int, int], Tensor]  # (name, start, count) -> flat [count], on the CPU


@dataclass(frozen=True)
class Fragment:
    """`part` holds the elements `start` to `start + part.numel()` of a tensor of `shape`: a view of live state."""

    part: Tensor
    start: int
    shape: tuple[int, ...]
    everywhere: bool = False  # all ranks hold the whole: any one may write it

    @classmethod
    def whole(cls, tensor: Tensor) -> Fragment:
        return cls(tensor, 0, tuple(tensor.shape), everywhere=True)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers, by name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: its parameters, each by its first name, and its persistent buffers."""
    return dict(model.named_parameters()) | buffers(model)


def tied(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """By each further name of a parameter that a model names more than once: its first name; as checkpoints name them."""
    found = {}
    for model_name, model in models.items():
        first: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if first.setdefault(parameter, name) != name:
                found[f"models/{model_name}/{name}"] = f"models/{model_name}/{first[parameter]}"
    return found


def fill(fragments: Mapping[str, Fragment], shapes: Mapping[str, tuple[int, ...]], read: Read) -> None:
    """Read into every fragment what a checkpoint holds for it; `shapes`: of the checkpoint's tensors.

    Raises:
        UserError: the checkpoint lacks one, or has it in another shape.
    """
    for name, fragment in fragments.items():
        _fits(name, fragment.shape, shapes)
        if fragment.part.numel():
            values = read(name, fragment.start, fragment.part.numel())
            fragment.part.detach().copy_(values.view(fragment.part.shape))


def slots(update: str, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, bool]]:
    """Of an update's optimizer, by parameter of its model: the states that a checkpoint holds, and whether each has the
    parameter's shape (a moment) or is a single number (torch's optimizers have one, `step`).

    Raises:
        UserError: the checkpoint has states of a parameter that the model has not.
    """
    found: dict[str, dict[str, bool]] = {name: {} for name, _ in model.named_parameters()}
    prefix = f"optim/{update}/"
    for name in shapes:
        if name.startswith(prefix):
            parameter, slot = name.removeprefix(prefix).rsplit("/", 1)
            if parameter not in found:
                raise UserError(f"the checkpoint has `{parameter}`, which the model has not",
                                "the code has changed since: put it back, or start a new run")
            found[parameter][slot] = slot != "step"
    return found


def no_others(shapes: Mapping[str, tuple[int, ...]], known: Collection[str]) -> None:
    """Raises: UserError: a checkpoint has a tensor of a model that is not among the models' `known` ones."""
    for name in shapes:
        if name.startswith("models/") and name not in known:
            raise UserError(f"the checkpoint has `{name}`, which the model has not",
                            "the code or spec has changed since: put it back, or start a new run")


def _fits(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
    hint = "the code or spec has changed since: put it back, or start a new run"
    if name not in shapes:
        raise UserError(f"the checkpoint has no `{name}`, which the model needs", hint)
    if shapes[name] != shape:
        raise UserError(f"`{name}` is {list(shapes[name])} in the checkpoint and {list(shape)} in the model", hint)
