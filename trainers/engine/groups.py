"""Which parameters share which settings of the optimizer: `optim.groups`, `optim.decay_norms_and_biases`, `optim.layer_decay`.

Everything here goes by the names of parameters and the types of modules, never by shapes: ZeRO flattens parameters.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from trainers.config.schema import Group, Optim
from trainers.contract.errors import UserError
from trainers.contract.text import first_few
from trainers.engine.parallel.blocks import blocks
from trainers.engine.task import Task, Update

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NORM_NAME = re.compile(r"Norm(\dd)?$")  # classes of other libraries: LlamaRMSNorm, T5LayerNorm


@dataclass(frozen=True)
class ParameterGroup:
    """The trained parameters of a model that share the optimizer's settings."""

    names: Sequence[str]        # the parameters' names in the model
    size: int                   # how many numbers they hold together
    lr_scale: float             # their learning rate is this times that of the schedule
    options: Mapping[str, Any]  # arguments of torch's optimizer that belong to a group, by name


def grouped(model: nn.Module, optim: Optim, groups: Sequence[Group], prefix: str = "") -> list[ParameterGroup]:
    """Divide the trained parameters of a model into groups with equal settings, in the order of the model.

    Args:
        groups: settings by the names of parameters. The first group that matches a parameter counts.
        prefix: what the patterns of `groups` expect in front of the model's names.

    Raises:
        UserError: `optim.layer_decay` is set, and the model has no blocks.
    """
    scales = layer_scales(model, optim.layer_decay) if optim.layer_decay is not None else {}
    undecayed = set() if optim.decay_norms_and_biases else norms_and_biases(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    settings: dict[str, tuple[float, dict[str, Any]]] = {}
    members: dict[str, list[str]] = {}
    for name in trained:
        own = next((group for group in groups if matches(group, prefix + name)), None)
        options = {**options_of(optim), **({"weight_decay": 0.0} if name in undecayed else {}),
                   **(own.model_dump(exclude_none=True, exclude={"match", "lr_scale"}) if own else {})}
        scale = (own.lr_scale if own else 1.0) * scales.get(name, 1.0)
        settings[str((scale, options))] = scale, options
        members.setdefault(str((scale, options)), []).append(name)
    return [ParameterGroup(names, sum(trained[name].numel() for name in names), *settings[key]) for key, names in members.items()]


def described(groups: Sequence[ParameterGroup]) -> str:
    """Return the size of each group, and the settings that not all groups share."""
    rows = [{"lr": f"x{group.lr_scale:.4g}", **group.options} for group in groups]
    differing = [key for key in rows[0] if any(row[key] != rows[0][key] for row in rows)]
    return first_few([f"{group.size:,} in {len(group.names)} tensors ({', '.join(f'{key} {row[key]}' for key in differing)})"
                      for group, row in zip(groups, rows)], most=16)


def options_of(optim: Optim) -> dict[str, Any]:
    """Return the settings that groups may change, for the optimizer that `optim.name` names."""
    if optim.name == "sgd":
        return {"weight_decay": optim.weight_decay, "momentum": optim.momentum}
    return {"weight_decay": optim.weight_decay, "betas": optim.betas, "eps": optim.eps}


def groups_of(task: Task, updates: Sequence[Update], models: Mapping[str, nn.Module], optim: Optim) -> list[list[ParameterGroup]]:
    """Return the parameter groups of each update. Call this before the models are sharded.

    Args:
        optim: the settings of updates that have none of their own.

    Raises:
        UserError: a group matches no trained parameter, or only parameters of earlier groups, or sets what the optimizer does not
            have.
    """
    result = []
    names: dict[int, tuple[Optim, list[str]]] = {}  # of the parameters that each of the settings is for
    for update in updates:
        settings, model = update.optim or optim, models[update.trains]
        prefix = f"{update.trains}." if len(models) > 1 else ""
        trained = [prefix + name for name, parameter in model.named_parameters() if parameter.requires_grad]
        names.setdefault(id(settings), (settings, []))[1].extend(trained)
        own = task.groups(update, model)
        where = f"`groups` of the task, for update `{update.name}`,"
        if key := settings.foreign_key(own):
            raise UserError(f"{where} sets `{key}`, which optim.name={settings.name} does not have",
                            "look at `self.config.optim.name` before setting it")
        _check_matches(own, trained, where, shadows=False)
        result.append(grouped(model, settings, [*settings.groups, *own], prefix))
    for settings, trained in names.values():
        _check_matches(settings.groups, trained, "`optim.groups`", shadows=True)
    return result


def matches(group: Group, name: str) -> bool:
    """Return whether a pattern of the group matches a parameter's name, or the name of a module that holds the parameter."""
    return any(fnmatchcase(part, pattern) for pattern in group.patterns for part in _with_modules(name))


def norms_and_biases(model: nn.Module) -> set[str]:
    """Return the names of the parameters of norms, and of all biases."""
    of_norms = {id(parameter) for module in model.modules() if isinstance(module, NORMS) or _is_named_norm(module)
                for parameter in module.parameters(recurse=False)}
    return {name for name, parameter in model.named_parameters()
            if id(parameter) in of_norms or "bias" in name.rpartition(".")[2].split("_")}


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return a factor on the learning rate for each parameter, by name.

    The factor is 1 after the last block, `decay` in the last block, decay^2 in the block before, and so on down to
    decay^(blocks + 1) before the first block, as for ELECTRA (Clark et al. 2020, arXiv:2003.10555) and BEiT (Bao et al. 2021,
    arXiv:2106.08254).

    Before and after go by the order in which the model lists its parameters. A parameter between two blocks, such as the last
    norm of an encoder, belongs to the block before it.

    Raises:
        UserError: the model has no blocks.
    """
    found = blocks(model)
    if not found:
        raise UserError("`optim.layer_decay` is set, but the model has no blocks whose depth could be counted",
                        "put the model's blocks in a ModuleList, name their classes in `_no_split_modules`, or use "
                        "optim.groups with lr_scale")
    depth = {id(parameter): number for number, block in enumerate(found, 1) for parameter in block.parameters()}
    scales, reached = {}, 0
    for name, parameter in model.named_parameters():
        level = depth.get(id(parameter), len(found) + 1 if reached == len(found) else reached)
        reached = max(reached, min(level, len(found)))
        scales[name] = decay ** (len(found) + 1 - level)
    return scales


def _is_named_norm(module: nn.Module) -> bool:
    return any(NORM_NAME.search(cls.__name__) for cls in type(module).__mro__)


def _with_modules(name: str) -> Iterator[str]:
    """Yield a parameter's name and the names of the modules that hold the parameter."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _check_matches(groups: Sequence[Group], names: Sequence[str], where: str, shadows: bool) -> None:
    """Raise a UserError if a pattern matches none of the names, or, with `shadows`, if a group gets none of them."""
    for number, group in enumerate(groups):
        for pattern in group.patterns:
            if not any(fnmatchcase(part, pattern) for name in names for part in _with_modules(name)):
                known = list(dict.fromkeys(part for name in names for part in _with_modules(name)))
                near = difflib.get_close_matches(pattern.strip("*."), known, n=3)
                raise UserError(f"{where} has the pattern `{pattern}`, which matches no trained parameter",
                                "near names are " + ", ".join(f"`{name}`" for name in near) if near else
                                f"the parameters are {first_few([f'`{name}`' for name in names])}")
        if shadows and all(any(matches(earlier, name) for earlier in groups[:number]) for name in names if matches(group, name)):
            raise UserError(f"{where} has the group {_listed(group)}, but earlier groups match all of its parameters: the first "
                            "group that matches counts", "move this group to the front, or leave it out")


def _listed(group: Group) -> str:
    return ", ".join(f"`{pattern}`" for pattern in group.patterns)
