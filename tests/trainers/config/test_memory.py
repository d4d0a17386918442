from __future__ import annotations

from pathlib import Path

import pytest

from trainers.cifar10.config import Cifar10Config, Data, Model
from trainers.config.counts import Counts
from trainers.config.memory import expected
from trainers.config.schema import RunConfig

SENTENCES = str(Path(__file__).parents[2] / "sentences")
P = 10**9
BIG = Counts(parameters=P, tensor=4 * 10**6, block=10**7, blocks=P)


def config(strategy: str = "ddp", optim: str = "adamw", **train) -> RunConfig:
    return RunConfig(name="run", task="module:Task", train={"steps": 1, "strategy": strategy, **train}, optim={"name": optim})


def memory(strategy: str, ranks: int = 8, device: str = "cuda", optim: str = "adamw", **train):
    return expected(config(strategy, optim, **train), BIG, ranks, device)


def test_ddp_holds_16_bytes_of_each_parameter_and_sgd_12():
    assert memory("ddp").total == 16 * P
    assert memory("ddp", optim="sgd").total == 12 * P
    assert memory("ddp", ranks=1, micro_batch_size=1).total == 16 * P
    # Until they cross ranks, gradients of earlier micro-batches lie beside the buckets.
    assert memory("ddp", micro_batch_size=1).total == 20 * P


@pytest.mark.parametrize("strategy, parameters, gradients, optimizer", [
    ("zero1", 4 + 4 / 8, 4, 1), ("zero2", 4 + 4 / 8, 4 / 8, 1), ("zero3", 8 / 8, 4 / 8, 1), ("fsdp", 4 / 8, 4 / 8, 1)])
def test_what_is_sharded_is_an_eighth(strategy, parameters, gradients, optimizer):
    found = memory(strategy)
    assert (found.parameters, found.gradients, found.optimizer) == (parameters * P, gradients * P, optimizer * P)


def test_more_ranks_take_less_each():
    for strategy in ("zero1", "zero2", "zero3", "fsdp"):
        totals = [memory(strategy, ranks=ranks).total for ranks in (2, 8, 32)]
        assert totals == sorted(totals, reverse=True) and totals[1] < memory("ddp").total


def test_a_model_without_blocks_is_gathered_whole():
    alone = expected(config("fsdp"), Counts(parameters=P, tensor=10**6), 8, "cuda")
    assert alone.gathered >= 8 * P >= memory("fsdp").gathered * 50


def test_offload_moves_memory_to_the_host():
    for strategy, offload in (("zero2", "optimizer"), ("zero3", "optimizer"), ("zero3", "parameters"), ("fsdp", "parameters")):
        there, not_there = memory(strategy, offload=offload), memory(strategy)
        assert there.optimizer == 0 and there.host >= not_there.optimizer
        assert there.parameters + there.gathered + there.buffers < not_there.total
        assert memory(strategy, offload=offload, device="cpu").total > there.total  # where both are one memory


def test_half_precision_keeps_copies_but_fsdp_gathers_in_it():
    assert memory("ddp", precision="bf16").total == 18 * P
    assert memory("fsdp", precision="bf16").gathered < memory("fsdp").gathered


@pytest.mark.parametrize("model", [{}, {"width": 0.3}, {"batch_norm": False}, {"arch": "resnet18"}, {"arch": "resnet50"}],
                         ids=str)
def test_models_are_counted_on_the_meta_device_as_they_are_made(model, tmp_path):
    """Without data: there is no CIFAR-10 in that folder."""
    import torch

    from trainers.cifar10.model import make_model
    from trainers.cifar10.task import Cifar10
    from trainers.engine.world import World
    from trainers.probe import count, count_task

    data = Data(root=str(tmp_path))
    config = Cifar10Config(name="run", task="module:Task", train={"steps": 1}, model=Model(**model), data=data)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    assert count_task(Cifar10(config), world) == count({"model": make_model(Model(**model), 10, 32)})


def test_a_model_that_needs_the_data_is_counted_with_it():
    import torch
    from torch import nn

    from trainers.engine.task import Task
    from trainers.engine.world import World
    from trainers.probe import count_task

    class Late(Task):
        def data(self, world):
            self.words = 7
            return [], None

        def model(self):
            return nn.Embedding(self.words, 3)

    config = RunConfig(name="run", task="module:Task", train={"steps": 1})
    assert count_task(Late(config), World(0, 1, 0, 1, torch.device("cpu"))) == Counts(parameters=21, tensor=21)


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing():
    import torch

    from trainers.config.spec import resolve
    from trainers.engine.world import World
    from trainers.probe import measure

    world = World(0, 1, 0, 1, torch.device("cpu"))
    found = {}
    for again in (False, True):
        spec = RunConfig(name="run", task="sentences:Counting", path=SENTENCES, model={"depth": 6},
                         train={"steps": 1, "batch_size": 24, "checkpoint_activations": again})
        counts, found[again] = measure(resolve(spec.task, spec.path)(spec), spec, world, ranks=2)
        assert counts.blocks == 6 * counts.block < counts.parameters
    assert list(found[False]) == [2, 4] and found[False][4] > 1.8 * found[False][2]
    assert found[True][4] < found[False][4] / 2
