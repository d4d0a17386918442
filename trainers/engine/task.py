"""What a task gives to the loop."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from trainers.config.schema import Optim, RunConfig
from trainers.engine.world import World


@dataclass(frozen=True)
class Share:
    """One rank's part of a global batch, or a micro-batch of it."""

    indices: np.ndarray  # [n] rows of the data set
    slots: np.ndarray    # [n] their places in the global batch
    size: int            # samples in the global batch
    seed: int            # the global batch's own, the same on every rank

    def generator(self) -> np.random.Generator:
        """Randomness of the global batch: draw `size` values and take `[slots]` of them, so that a
        sample gets the same value however many ranks and micro-batches there are."""
        return np.random.Generator(np.random.Philox(self.seed))


class Dataset(Protocol):
    def __len__(self) -> int: ...

    def batch(self, share: Share) -> Any:
        """The samples `share.indices` on the rank's device, augmented by `share.generator()`."""
        ...


class Loss(NamedTuple):
    """A loss before division: the engine divides by the count over all ranks and micro-batches."""

    sum: Tensor  # scalar, summed over `count` items, with its graph
    count: int   # items (images, tokens)


Measures = Mapping[str, tuple[Tensor, Tensor | int]]  # by name: (sum, count), of any shape that divides


@dataclass(frozen=True)
class Update:
    """One optimizer and what it lowers. A classifier has one, a GAN two."""

    name: str
    trains: str                                               # the model whose parameters it changes
    loss: Callable[[Mapping[str, nn.Module], Any], Loss]      # (models by name, batch) -> Loss
    draws: int = 1                                            # batches, and optimizer steps, it takes a step
    optim: Optim | None = None                                # its own settings; None: the run's


class Task:
    """Base class of tasks. One model and one loss need `data`, `model`, `loss` and perhaps `measure`;
    several models and updates need `models` and `updates` instead of `model` and `loss`."""

    unit = "samples"  # what a Loss counts, for the rate that is shown

    def __init__(self, config: RunConfig):
        self.config = config

    def prefetch(self) -> list[str]:
        """Download what `data` and `model` would, for ranks that cannot; what is where now, a line each. It runs
        alone, before any rank starts; `config.missing` says whether it need. Raises UserError."""
        return []

    def data(self, world: World) -> tuple[Dataset, Dataset | None]:
        """(training set, evaluation set or None), on `world.device`. Raises UserError for bad input."""
        raise TypeError(f"{type(self).__name__} must define data(self, world)")

    def model(self) -> nn.Module:
        """The model, on the CPU, initialized from torch's global generator, which the run has seeded."""
        raise TypeError(f"{type(self).__name__} must define model(self)")

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        raise TypeError(f"{type(self).__name__} must define loss(self, model, batch)")

    def measure(self, model: nn.Module, batch: Any) -> Measures:
        """Evaluation of one batch, by name; summed over batches and ranks, then divided."""
        total, count = self.loss(model, batch)
        return {"loss": (total, count)}

    def report(self, measured: Mapping[str, Tensor], figures: Path | None) -> dict[str, float]:
        """The metrics of an evaluation, from the divided measures, the same on every rank. May write
        pictures (*.png) into `figures`, which exists; None: none are wanted (not the end, or not rank 0)."""
        return {name: value.item() for name, value in measured.items() if value.ndim == 0}

    def models(self) -> dict[str, nn.Module]:
        return {"model": self.model()}

    def updates(self) -> list[Update]:
        return [Update("model", trains="model", loss=lambda models, batch: self.loss(models["model"], batch))]

    def huggingface(self, model: nn.Module, folder: Path) -> None:
        """Write into a folder what Hugging Face's layout of a model has beside its weights: config.json, and a tokenizer's
        files where there is one. Of a transformers model the config, by default; of any other nothing."""
        config = getattr(model, "config", None)
        if hasattr(model, "save_pretrained") and config is not None:
            config = copy.deepcopy(config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)

    def evaluate(self, models: Mapping[str, nn.Module], batch: Any) -> Measures:
        return self.measure(models["model"], batch)
