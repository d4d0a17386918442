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
    torch.backends.fp32_precision = "tf32" if precision == "tf32" else "ieee"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager:
    """The context in which a loss is computed."""
    if precision in ("bf16", "fp16"):
        return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
    return nullcontext()


def loss_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss in fp16, whose small gradients would vanish (Micikevicius et al. 2018); off otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
