"""Copies of tensors in one block of host memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from saving import bits, make

from trainers.engine.saving import staging
from trainers.engine.saving.staging import Staging


def test_copies_have_the_bits_of_the_tensors_and_lie_in_one_block():
    copier, tensors = Staging(), make(1)
    copies = copier.copies(tensors)
    assert bits(copies) == bits(tensors)
    assert all(copy.is_contiguous() for copy in copies.values())
    blocks = {copy.untyped_storage().data_ptr() for copy in copies.values()}
    assert len(blocks) == 1 and len(copies) == len(tensors)
    assert bits(copier.copies(make(2))) == bits(make(2))
    assert {copy.untyped_storage().data_ptr() for copy in copies.values()} == blocks  # used again
    more = {**make(3), "more": torch.arange(100_000.0)}
    assert bits(copier.copies(more)) == bits(more)
    assert Staging().copies({}) == {}


def test_the_copies_of_an_earlier_call_are_not_those_of_live_tensors():
    live = torch.arange(5.0)
    (copy,) = Staging().copies({"live": live}).values()
    live += 1
    assert copy.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("refused", [False, True])
def test_a_pinned_block_is_registered_whole_and_let_go_before_it_is_freed(monkeypatch, refused):
    calls, kernels = [], []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: calls.append(("register", address, size)) or int(refused),
        cudaHostUnregister=lambda address: calls.append(("unregister", address))))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: kernels.append(device))
    block = staging._new_block(1000, pinned=True)
    address, part = block.data_ptr(), block[10:20]
    assert calls == [("register", address, 1000)]
    del block
    assert len(calls) == 1  # a part of the block is in use
    del part
    assert calls[1:] == ([] if refused else [("unregister", address)])
    assert kernels == (["cuda"] if refused else [])
