"""Host memory into which a save copies its tensors, so that training continues while they are written."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

from trainers.engine.saving import storage

ALIGNMENT = 64  # bytes; a multiple of the size of every dtype


class Staging:
    """One block of host memory for all tensors, which every call uses again.

    On a GPU machine the block is pinned, so that the GPU copies at full speed. torch's own pinned memory is not used: torch
    would round each allocation up to a power of two.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def copies(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return contiguous copies of tensors of any device, by name. They are valid until the next call."""
        starts, size = {}, 0
        for name, tensor in tensors.items():
            starts[name] = size
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        cuda = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        if size > self._block.nbytes:
            self._block = torch.empty(0, dtype=torch.uint8)  # free the old block first
            self._block = _new_block(size, pinned=bool(cuda))
        result = {}
        for name, tensor in tensors.items():
            part = self._block[starts[name]:starts[name] + tensor.nbytes]
            result[name] = part.view(tensor.dtype).view(tensor.shape)
            _copy(tensor.detach(), result[name])
        for device in cuda:
            torch.cuda.synchronize(device)
        return result


def _new_block(size: int, pinned: bool) -> Tensor:
    """Return `size` bytes of host memory: pinned, if that is asked for and the system allows it."""
    block = torch.empty(size, dtype=torch.uint8)
    if pinned:
        driver = torch.cuda.cudart()
        if int(driver.cudaHostRegister(block.data_ptr(), size, 0)) == 0:
            # The memory must not be freed while it is registered. At the end of the process the driver does this itself.
            weakref.finalize(block.untyped_storage(), driver.cudaHostUnregister, block.data_ptr()).atexit = False
        else:
            with suppress(RuntimeError):  # the next kernel reports the driver's error, and clears it
                torch.zeros(1, device="cuda")
    return block


def _copy(tensor: Tensor, buffer: Tensor) -> None:
    if tensor.is_cuda or tensor.is_conj() or tensor.is_neg() or not tensor.is_contiguous():
        buffer.copy_(tensor, non_blocking=True)
    else:
        # numpy copies in one thread. torch uses several threads, which wait for each other whenever another process uses
        # one of the cores (500 MB on two busy cores: 0.06 s with numpy, 0.19 s with torch).
        storage.raw(buffer)[:] = storage.raw(tensor)
