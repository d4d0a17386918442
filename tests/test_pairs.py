"""Two updates on two models with BatchNorm, and forwards that read buffers that differ between ranks. This file is also the
program of its ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import TESTS
from ranks import serve

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_run_is_the_same_run_although_a_forward_reads_a_buffer_of_its_rank(ranks, tmp_path, strategy):
    """Saves and evaluations share buffers too. Without a share at each step, the run that saves at step 7 would be another."""
    keys = {"train.strategy": strategy, "train.micro_batch_size": 5, "model": {"alone": strategy.startswith("zero")},
            "train.ema": 0.9, "optim.groups": [{"match": "*.bias", "lr_scale": 0.5}]}
    whole = ranks(2)("trained", root=tmp_path / "whole", keys=keys)[0]
    assert whole["drift"] > 0  # ranks do end a step with different buffers
    ranks(2)("trained", root=tmp_path / "cut", keys=keys, until=7)
    cut = ranks(2)("trained", root=tmp_path / "cut", keys=keys)[0]
    assert len(whole["rows"]) == 12 + 3 and cut["rows"] == whole["rows"]
    recomputed = ranks(2)("trained", root=tmp_path / "recomputed", keys={**keys, "train.checkpoint_activations": True})[0]
    assert recomputed["rows"] == whole["rows"]  # a recomputed block sees the buffers of its forward, and changes none


def test_three_ranks_settle_without_a_trace_and_resume_to_the_bit(ranks, tmp_path):
    keys = {"train.batch_size": 18, "train.micro_batch_size": 3}
    whole = ranks(3)("trained", root=tmp_path / "whole", keys=keys)[0]
    for until in (2, 9):
        ranks(3)("trained", root=tmp_path / "cut", keys=keys, until=until)
    assert ranks(3)("trained", root=tmp_path / "cut", keys=keys)[0]["rows"] == whole["rows"]


@pytest.mark.parametrize("model, synchronized", [({"norm": False, "drift": False}, False), ({"drift": False}, True)])
def test_two_updates_have_the_same_losses_on_any_number_of_ranks(ranks, tmp_path, model, synchronized):
    """The noise of the generator is the same too. Synchronized BatchNorm needs micro-batches that hold the same samples. Adam
    would make rounding errors large: a bias before BatchNorm has a gradient of nothing else."""
    keys = {"model": {**model, "draws": 3}, "train.sync_batchnorm": synchronized, "optim.name": "sgd", "optim.lr": 0.1}
    whole = ranks(1)("trained", root=tmp_path / "one", keys=keys)[0]["rows"]
    runs = {f"{size} {strategy}": ranks(size)("trained", root=tmp_path / f"{size}{strategy}", keys={
        **keys, "train.strategy": strategy})[0]["rows"] for size in (2, 4) for strategy in ("ddp", "fsdp")}
    if not synchronized:
        runs["accumulation"] = ranks(2)("trained", root=tmp_path / "micro", keys={**keys, "train.micro_batch_size": 2})[0]["rows"]
    for name, rows in runs.items():
        differences = [abs(row[key] - first[key]) / abs(first[key]) for first, row in zip(whole, rows, strict=True)
                       for key in first if key.endswith("loss")]
        print(f"{name}: losses within {max(differences):.1e}")
        assert len(differences) == 2 * 12 + 3 and max(differences) < 1e-5
    assert max(row["critic/loss"] for row in whole[-4:] if "critic/loss" in row) < 0.995 * whole[0]["critic/loss"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_only_the_trained_model_gets_gradients(ranks, tmp_path, strategy):
    """The weights move as they do where all models get gradients, which are thrown away."""
    keys = {"train.strategy": strategy}
    spared, whole = (ranks(2)("trained", root=tmp_path / str(every), keys=keys, every=every) for every in (False, True))
    assert spared[0]["rows"] == whole[0]["rows"]
    for each in spared:
        assert each["gradients"] == [["critic"], ["generator"]]
    for each in whole:
        assert each["gradients"] == [["critic", "generator"]]


def trained(world, root, keys, until=None, every=False):
    """Train to the end, or until step `until`.

    Args:
        every: compute gradients of all models in every update.

    Returns:
        The logged rows; how far the buffers of any rank were from rank 0's at the end of a step; and which models have got
        gradients together.
    """
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
        for model in run.models.values() if world.size > 1 else ():
            for buffer in model.buffers():
                of_first = buffer.clone()
                dist.broadcast(of_first, src=0)
                apart = (buffer - of_first).abs().max().double()
                dist.all_reduce(apart, dist.ReduceOp.MAX)
                drift = max(drift, apart.item())
        return until is not None and run.step >= until

    gradients = set()
    for runner in run.runners:
        if every:
            runner._untrained = []
        step = runner.sharded.step

        def spying(*args, step=step, **settings):
            gradients.add(tuple(sorted(name for name, model in run.models.items()
                                       if any(p.grad is not None for p in model.parameters()))))
            return step(*args, **settings)

        runner.sharded.step = spying
    run.stopping.at_boundary = at_boundary
    assert run.run() == (0 if until is None else 75)
    rows = [json.loads(line) for line in (Path(root) / "metrics.jsonl").read_text().splitlines()]
    times = ("time", "rate", "data_wait")
    return {"rows": [{k: v for k, v in row.items() if k not in times} for row in rows], "drift": drift,
            "gradients": sorted(gradients)}


if __name__ == "__main__":
    serve(globals())
