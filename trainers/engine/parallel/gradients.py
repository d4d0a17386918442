"""Which parameters get gradients while an update runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn


def untrained(models: Mapping[str, nn.Module], trains: str) -> list[nn.Parameter]:
    """Return the parameters that require gradients and that an update of the model `trains` does not train."""
    trained = set(models[trains].parameters())
    return [parameter for model in models.values() for parameter in model.parameters()
            if parameter.requires_grad and parameter not in trained]


@contextmanager
def without_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Compute no gradients of these parameters, which require gradients otherwise. Gradients still flow through their modules."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
