"""The names of the tensors in a checkpoint. Imports no torch.

    models/<model>/<tensor>             a parameter or a buffer of a model
    ema/<model>/<parameter>             the average of a trained parameter (`train.ema`)
    optim/<update>/<parameter>/<state>  a state of an update's optimizer, such as `exp_avg`
    task/<name>                         a tensor of the task's own (`Task.state`)
"""

from __future__ import annotations

from collections.abc import Iterable

MODELS, AVERAGES, OPTIMIZERS, TASK = "models/", "ema/", "optim/", "task/"


def tensors_of_models(names: Iterable[str], raw: bool) -> dict[tuple[str, str], str]:
    """Return which of a checkpoint's tensors are the models' weights: {(model, tensor): name in the checkpoint}.

    Averages, if there are any, take the place of the trained parameters unless `raw`.
    """
    found: dict[str, dict[tuple[str, str], str]] = {MODELS: {}, AVERAGES: {}}
    for name in names:
        kind, slash, rest = name.partition("/")
        if kind + slash in found:
            model, _, tensor = rest.partition("/")
            found[kind + slash][model, tensor] = name
    return {**found[MODELS], **({} if raw else found[AVERAGES])}
