"""Make a micro-batch from a map-style data set, sample by sample. Runs in a worker process or in the rank itself."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from trainers.contract.errors import UserError
from trainers.engine.batches.noise import seed_noise, seed_sample
from trainers.engine.task import Share

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Failed:
    """Says why a micro-batch could not be made. A worker returns this instead of the micro-batch."""

    message: str
    hint: str | None
    traceback: str | None  # None: the message says all


@dataclass(frozen=True)
class Maker:
    """Makes the micro-batch of a share: `maker[share]`, the form in which torch's DataLoader asks for data.

    Attributes:
        dataset: gives the sample of a row as `dataset[row]`.
        collate: makes one batch of a list of samples.
        seed: for the random numbers that samples draw. See `seed_sample`.
    """

    dataset: Any
    collate: Callable[[list[Any]], Any]
    seed: int

    def __getitem__(self, share: Share) -> Any:
        """Return the micro-batch, on the CPU, or Failed. Seeds the global generators and leaves them changed."""
        samples: list[Any] = []
        try:
            for row, epoch in zip(share.indices.tolist(), share.epochs.tolist()):
                seed_sample(self.seed, epoch, row)
                samples.append(self.dataset[row])
        except (Exception, SystemExit) as error:
            return _failed(f"row {row} of {type(self.dataset).__name__}", error, "the traceback is in the log of the rank")
        # A collate function may draw too (MixUp). The samples of a micro-batch depend on the number of ranks, its draws as well.
        seed_noise(CPU, share.seed, "collate", *share.slots[:1].tolist())
        try:
            return self.collate(samples)
        except (Exception, SystemExit) as error:
            return self._not_collated(share, samples, error)

    def _not_collated(self, share: Share, samples: list[Any], error: BaseException) -> Failed:
        forms = [_form(sample) for sample in samples]
        what = f"the samples of {type(self.dataset).__name__} cannot be put into one batch"
        odd = next((number for number, form in enumerate(forms) if form != forms[0]), None)
        if odd is not None:
            return Failed(f"{what}: row {share.indices[odd]} is {forms[odd]}, but row {share.indices[0]} is {forms[0]}",
                          "make all samples alike, for example with the transforms Resize and CenterCrop, or put them together "
                          "yourself: MapStyle(data_set, collate=FUNCTION)", None if self.collate is default_collate else
                          traceback.format_exc())
        if self.collate is default_collate:
            return Failed(f"{what}: they are {forms[0] if forms else 'none'}",
                          "return tensors, arrays or numbers, for example with the transform ToTensor, or put them together "
                          "yourself: MapStyle(data_set, collate=FUNCTION)", traceback.format_exc())
        return _failed(what, error, "the traceback is in the log of the rank")


def _failed(what: str, error: BaseException, hint: str) -> Failed:
    if isinstance(error, UserError):
        return Failed(f"{what}: {error.message}", error.hint, None)
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Failed(f"{what}: {' '.join(reason.split())}", hint, traceback.format_exc())


def _form(sample: Any) -> str:
    """Return the types and shapes of a sample in words, for example `(float32 [3, 32, 32], int)`."""
    match sample:
        case Tensor():
            return f"{str(sample.dtype).removeprefix('torch.')} {list(sample.shape)}"
        case np.ndarray():
            return f"{sample.dtype} {list(sample.shape)}"
        case Mapping():
            return "{" + ", ".join(f"{key}: {_form(value)}" for key, value in sample.items()) + "}"
        case str() | bytes():
            return type(sample).__name__
        case Sequence():
            return "(" + ", ".join(map(_form, sample)) + ")"
    return type(sample).__name__
