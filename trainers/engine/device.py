"""Bring numbers from the host to a rank's device without waiting for the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(numbers: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Return host numbers as a tensor on `device`, with the same dtype and shape.

    A GPU copies pinned memory while the host goes on. A copy from other memory makes the host wait. torch keeps pinned memory
    until the copy is done, and uses it again. On the CPU the result shares the memory of `numbers`.
    """
    tensor = torch.from_numpy(numbers) if isinstance(numbers, np.ndarray) else numbers
    if device.type != "cuda":
        return tensor.to(device)
    return pinned(tensor).to(device, non_blocking=True)


def pinned(tensor: Tensor) -> Tensor:
    """Return a copy of a host tensor in pinned memory; the tensor itself if the system grants no pinned memory."""
    try:
        return tensor.pin_memory()
    except RuntimeError:  # pinned memory is limited (`ulimit -l`, the memory of a container); a copy works without it
        return tensor
