"""The precision in which a run computes.

Parameters, gradients, optimizer states and BatchNorm statistics are fp32 in every precision.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Mapping

import torch

from trainers.config.schema import Precision
from trainers.contract.errors import UserError

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_precision(precision: Precision, device: torch.device) -> None:
    """Let this process compute fp32 matrix products and convolutions in TF32 for `tf32`, and in fp32 otherwise.

    Raises:
        UserError: the device does not support `bf16`.
    """
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"`train.precision` is `bf16`, which {torch.cuda.get_device_name(device)} does not support",
                        "use train.precision=fp16")
    # torch's compiler reads these older settings. Reading them is an error once the newer `fp32_precision` was set
    # (torch 2.15), so the newer name is not used here.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def set_deterministic(deterministic: bool | Literal["warn"], compiled: bool, device: torch.device) -> None:
    """Choose kernels by `train.deterministic`.

    True: an operation that has no deterministic kernel raises a RuntimeError, which `failures.without_deterministic_kernel`
    recognises. "warn": such an operation warns and runs as usual. In this mode the backward pass of attention is not
    deterministic either, although torch has deterministic kernels for it. False: the fastest kernels.

    Args:
        compiled: whether the run compiles its models (`train.compile`).
    """
    # The benchmark measures the kernels of each convolution, and takes the fastest. This may be another one in the next attempt.
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_deterministic_debug_mode("default" if not deterministic else "warn" if deterministic == "warn" else "error")
    if not deterministic:
        return
    if device.type == "cuda":  # cuBLAS reads this when it starts, and may otherwise sum in another order each time
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Filling every new tensor helps to find bugs, but costs time. mypy does not see this attribute: torch defines it on the
    # class of the module.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if compiled:
        # This sets the same mode for torch's compiler too. It imports the compiler, which takes seconds.
        torch.use_deterministic_algorithms(True, warn_only=deterministic == "warn")


@contextmanager
def inexact_kernels() -> Iterator[None]:
    """Let operations without a deterministic kernel warn in this block, instead of raising an error: measures, rows and pictures
    do not change a run's weights."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(min(mode, 1))  # 0: default, 1: warn, 2: error
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager:
    """Return the context in which losses and measures are computed."""
    if precision in HALVES:
        return torch.autocast(device.type, HALVES[precision])
    return nullcontext()


class LossScale:
    """The factor on the loss in fp16: without it small gradients become zero (Micikevicius et al. 2018, arXiv:1710.03740).

    The factor is halved after a step whose gradients overflowed (that step is skipped), and doubled after 2,000 steps in a
    row without overflow. These are the constants of torch.amp.GradScaler. In every other precision the factor is always 1.

    Attributes:
        enabled: whether the precision is fp16.
        scale: the factor.
    """

    INTERVAL = 2000  # steps in a row without overflow, after which the factor is doubled

    def __init__(self, precision: Precision, scale: float = 2.0**16):
        self.enabled = precision == "fp16"
        self.scale = scale if self.enabled else 1.0
        self._good = 0  # steps in a row without overflow

    def adjust(self, applied: bool) -> None:
        """Adjust the factor after a step. `applied`: whether the step's gradients were finite."""
        if not self.enabled:
            return
        self._good = self._good + 1 if applied else 0
        if not applied:
            self.scale /= 2
        elif self._good == self.INTERVAL:
            self.scale *= 2
            self._good = 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: nothing unless the precision is fp16."""
        return {"scale": self.scale, "good": self._good} if self.enabled else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's `state`. Nothing changes if it is empty, or if this run's precision is not fp16."""
        if self.enabled and state:
            self.scale, self._good = state["scale"], state["good"]
