"""The mean of the weights of several checkpoints of one run, read in pieces. Imports no torch.

Vaswani et al. 2017 (arXiv:1706.03762, section 6.1) evaluate the mean of the last 5 checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.checkpoints.tensor_files import SIZES, Parts
from trainers.contract.errors import UserError

AVERAGED = ("F64", "F32", "F16", "BF16")


def older(checkpoint: Path, count: int) -> list[Path]:
    """Return the `count` checkpoints beside `checkpoint` that come before it, newest first.

    Raises:
        UserError: there are fewer.
    """
    if count == 0:
        return []
    step = _step(checkpoint)
    steps = sorted((number for path in checkpoint.parent.iterdir() if (number := _step(path)) is not None
                    and step is not None and number < step), reverse=True)[:count]
    if len(steps) < count:
        raise too_few(f"`{checkpoint.parent}`", step, len(steps) + 1, count + 1)
    return [checkpoint.with_name(f"step_{number}") for number in steps]


def mean_of(step: int, older: Sequence[int]) -> str:
    """Return 'the mean of steps 10, 20, 30'."""
    return f"the mean of steps {', '.join(map(str, sorted((step, *older))))}"


def too_few(where: str, step: int | None, found: int, wanted: int) -> UserError:
    """Return the error that `where` has only `found` whole checkpoints up to a step, and not `wanted`."""
    return UserError(f"{where} has {found} whole checkpoint{'s' * (found != 1)} up to step {step}, but the weights of {wanted} "
                     "are to be averaged",
                     (f"use --average {found} (init.average={found})" if found > 1 else "leave out --average (init.average)")
                     + "; a run keeps as many of its newest checkpoints as `checkpoint.keep_last` says")


def _step(folder: Path) -> int | None:
    match = re.fullmatch(r"step_(\d+)", folder.name)
    return int(match[1]) if match else None


class Mean(Parts):
    """The means of the floating-point tensors of several checkpoints, computed in float64. Other tensors, such as counters,
    are those of the first checkpoint.

    Args:
        folders: the checkpoints, newest first.
    """

    def __init__(self, folders: Sequence[Path]):
        super().__init__(folders[0])
        self._others = [Parts(folder) for folder in folders[1:]]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        super().read_into(name, start, buffer)
        layout = self.layout(name)
        if layout.dtype not in AVERAGED or not buffer:
            return
        total = _to_float64(buffer, layout.dtype)
        other = memoryview(bytearray(len(buffer)))
        for parts in self._others:
            if parts.shapes.get(name) != layout.shape or parts.layout(name) != layout:
                raise UserError(f"`{name}` of {parts.folder} has another shape or type than in {self.folder}, or is missing: the "
                                "two cannot be averaged", "average checkpoints of one run")
            parts.read_into(name, start, other)
            total += _to_float64(other, layout.dtype)
        buffer[:] = _from_float64(total / (len(self._others) + 1), layout.dtype)


def _to_float64(buffer: memoryview, dtype: str) -> Any:
    """Return numbers from their bytes, float64 [n]."""
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(buffer, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(buffer, f"f{SIZES[dtype]}").astype(np.float64)


def _from_float64(values: Any, dtype: str) -> bytes:
    """Return the bytes of numbers, rounded to nearest even."""
    import numpy as np

    if dtype != "BF16":
        return values.astype(f"f{SIZES[dtype]}").tobytes()
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).tobytes()
