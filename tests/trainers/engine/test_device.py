from __future__ import annotations

import numpy as np
import torch

from trainers.engine.device import pinned, to_device


def test_numbers_keep_their_values_and_kind():
    for numbers in (np.arange(6).reshape(2, 3), np.empty(0, np.int64), torch.tensor([True, False])):
        result = to_device(numbers, torch.device("cpu"))
        assert result.tolist() == numbers.tolist() and result.shape == numbers.shape
    assert to_device(np.zeros(3, np.uint8), torch.device("meta")).dtype == torch.uint8


def test_a_gpu_gets_pinned_memory_and_the_host_does_not_wait(monkeypatch):
    copies = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 0)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **how: copies.append((tensor.data_ptr(), device.type, how)))
    numbers = np.arange(3)
    to_device(numbers, torch.device("cuda", 0))
    (address, device, how), = copies
    assert address != numbers.ctypes.data and device == "cuda" and how == {"non_blocking": True}


def test_a_copy_works_without_pinned_memory(monkeypatch):
    def refuse(tensor):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    tensor = torch.arange(3)
    assert pinned(tensor) is tensor
