from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from trainers.config.schema import RunConfig
from trainers.engine.groups import grouped
from trainers.engine.parallel import ddp
from trainers.engine.world import World


def test_a_single_rank_starts_no_process_group_and_wraps_no_model(monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **more: pytest.fail("a process group was started"))
    monkeypatch.setattr(ddp, "Accelerator", lambda *args, **more: pytest.fail("Accelerate would start a process group"))
    config = RunConfig(name="x", task="a:B", train={"steps": 1})
    strategy = ddp.Ddp(World(0, 1, 0, 1, torch.device("cpu")), config)
    model = torch.nn.Linear(2, 2)
    assert strategy.shard(strategy.place(model), config.optim, grouped(model, config.optim, [])).module is model
