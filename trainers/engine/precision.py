"""What arithmetic a run uses. Parameters, gradients, optimizer states and BatchNorm statistics are fp32 in all."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Mapping

import torch

from trainers.config.schema import Precision
from trainers.contract.errors import UserError

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_precision(precision: Precision, device: torch.device) -> None:
    """Choose the arithmetic of fp32 products for this process.

    Raises:
        UserError: the device cannot compute in this precision.
    """
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"`train.precision` is `bf16`, which {torch.cuda.get_device_name(device)} does not have",
                        "use train.precision=fp16")
    # By these older names: the newer `fp32_precision` makes reading them an error (torch 2.15), and torch's own
    # compiler reads them.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def set_deterministic(compiled: bool) -> None:
    """Prefer kernels that give the same bits each time; one that has no such version warns and is used."""
    torch.backends.cudnn.benchmark = False  # its choice of kernels depends on timings
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = False  # a fill of each new tensor: for finding bugs
    if compiled:
        # The same for the compiler too, which this imports: seconds that other runs need not wait.
        torch.use_deterministic_algorithms(True, warn_only=True)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager:
    """The context in which a loss is computed."""
    if precision in HALVES:
        return torch.autocast(device.type, HALVES[precision])
    return nullcontext()


class LossScale:
    """The factor on a loss in fp16, whose small gradients would vanish (Micikevicius et al. 2018, arXiv:1710.03740);
    1 in any other precision. The constants are those of torch.amp.GradScaler: halved after a step whose gradients
    overflowed, which is skipped, and doubled after 2,000 in a row that did not.
    """

    INTERVAL = 2000

    def __init__(self, precision: Precision, scale: float = 2.0**16):
        self.enabled = precision == "fp16"
        self.scale = scale if self.enabled else 1.0
        self._good = 0

    def update(self, applied: bool) -> None:
        """After a step: whether its gradients were finite."""
        if not self.enabled:
            return
        self._good = self._good + 1 if applied else 0
        if not applied:
            self.scale /= 2
        elif self._good == self.INTERVAL:
            self.scale *= 2
            self._good = 0

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "good": self._good} if self.enabled else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self.enabled and state:
            self.scale, self._good = state["scale"], state["good"]
