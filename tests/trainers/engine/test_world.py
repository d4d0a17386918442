"""The device of a rank."""

from __future__ import annotations

import pytest
import torch

from trainers.contract.errors import UserError
from trainers.engine.world import World


def second_of_two(**more: str) -> World:
    return World.from_env({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **more})


def test_ranks_share_a_gpu_only_if_they_are_asked_to(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="needs GPU 1"):
        second_of_two()
    shared = second_of_two(LAUNCH_SHARE_GPU="1")
    assert shared.device == torch.device("cuda", 0) and shared.shares_gpu
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert second_of_two(LAUNCH_SHARE_GPU="1").device == torch.device("cuda", 1)
    assert not second_of_two().shares_gpu


def test_without_a_gpu_there_is_nothing_to_share(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="needs GPU 1"):
        second_of_two(LAUNCH_SHARE_GPU="1")
