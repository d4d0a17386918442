"""What arithmetic a run uses. Parameters, gradients, optimizer states and BatchNorm statistics are fp32 in all."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from trainers.config import Precision
from trainers.errors import UserError


def set_precision(precision: Precision, device: torch.device) -> None:
    """Choose the arithmetic of fp32 products for this process.

    Raises:
        UserError: the device cannot compute in this precision.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError("`train.precision` is `tf32`, which only GPUs have; these ranks run on CPU",
                        "use train.precision=fp32 or bf16")
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
    if precision in ("bf16", "fp16"):
        return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
    return nullcontext()


def loss_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss in fp16, whose small gradients would vanish (Micikevicius et al. 2018); off otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
