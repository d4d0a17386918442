"""Two updates on two models with BatchNorm, and forwards that read buffers that differ between ranks. This file is also the
program of its ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import TESTS
from ranks import Ranks, serve

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=[2])
def ranks(request):
    ranks = Ranks(request.param, __file__)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_run_is_the_same_run_although_a_forward_reads_a_buffer_of_its_rank(ranks, tmp_path, strategy):
    """Saves and evaluations share buffers too. Without a share at each step, the run that saves at step 7 would be another."""
    keys = {"train.strategy": strategy, "train.micro_batch_size": 5, "model": {"alone": strategy.startswith("zero")}}
    whole = ranks("trained", root=tmp_path / "whole", keys=keys)[0]
    assert whole["drift"] > 0  # ranks do end a step with different buffers
    ranks("trained", root=tmp_path / "cut", keys=keys, until=7)
    cut = ranks("trained", root=tmp_path / "cut", keys=keys)[0]
    assert len(whole["rows"]) == 12 + 3 and cut["rows"] == whole["rows"]


def trained(world, root, keys, until=None):
    """Train to the end, or until step `until`. Return the logged rows, and how far the buffers of any rank were from rank 0's at
    the end of a step."""
    sys.path.append(str(TESTS / "pairs"))
    import torch.distributed as dist
    from pairs import Pairs

    from trainers.config.schema import RunConfig
    from trainers.contract.paths import RunPaths
    from trainers.engine import loop

    values = {"name": "pairs", "task": "pairs:Pairs", "model": {}, "train": {"steps": 12, "batch_size": 20},
              "optim": {"name": "adam", "lr": 5e-3, "betas": [0.5, 0.9], "schedule": "cosine"}, "log": {"every": 1},
              "eval": {"every": 5}, "checkpoint": {"every": "never"}}
    for key, value in keys.items():
        first, _, second = key.partition(".")
        values[first] = {**values[first], second: value} if second else value
    config = RunConfig.model_validate(values)
    loop.close_process_group = lambda: None  # the process group serves the next call too
    Path(root).mkdir(parents=True, exist_ok=True)
    run = loop.Loop(Pairs(config), config, world, RunPaths(Path(root)), None)
    drift = 0.0

    def at_boundary():
        nonlocal drift
        for model in run.models.values():
            for buffer in model.buffers():
                of_first = buffer.clone()
                dist.broadcast(of_first, src=0)
                apart = (buffer - of_first).abs().max().double()
                dist.all_reduce(apart, dist.ReduceOp.MAX)
                drift = max(drift, apart.item())
        return until is not None and run.step >= until

    run.stopping.at_boundary = at_boundary
    assert run.run() == (0 if until is None else 75)
    rows = [json.loads(line) for line in (Path(root) / "metrics.jsonl").read_text().splitlines()]
    times = ("time", "rate", "data_wait")
    return {"rows": [{k: v for k, v in row.items() if k not in times} for row in rows], "drift": drift}


if __name__ == "__main__":
    serve(globals())
