from __future__ import annotations

from pathlib import Path

import pytest

from trainers.cifar10.config import Cifar10Config, Data, Model
from trainers.config.counts import Counts
from trainers.config.memory import expected
from trainers.config.schema import RunConfig
from trainers.contract.errors import UserError

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
    # Gradients of earlier micro-batches lie outside DDP's buckets until they cross ranks.
    assert memory("ddp", micro_batch_size=1).total == 20 * P


@pytest.mark.parametrize("strategy, parameters, gradients, optimizer", [
    ("zero1", 4 + 4 / 8, 4, 1), ("zero2", 4 + 4 / 8, 4 / 8, 1), ("zero3", 8 / 8, 4 / 8, 1), ("fsdp", 4 / 8, 4 / 8, 1)])
def test_sharded_memory_is_an_eighth_on_8_ranks(strategy, parameters, gradients, optimizer):
    sharded = memory(strategy)
    assert (sharded.parameters, sharded.gradients, sharded.optimizer) == (parameters * P, gradients * P, optimizer * P)


def test_with_more_ranks_each_rank_needs_less():
    for strategy in ("zero1", "zero2", "zero3", "fsdp"):
        totals = [memory(strategy, ranks=ranks).total for ranks in (2, 8, 32)]
        assert totals == sorted(totals, reverse=True) and totals[1] < memory("ddp").total


@pytest.mark.parametrize("strategy, share, offload", [("ddp", 1, "none"), ("zero2", 8, "none"), ("zero3", 8, "none"),
                                                      ("fsdp", 8, "none"), ("zero2", 8, "optimizer"), ("fsdp", 8, "parameters")])
def test_averaged_weights_lie_where_the_optimizers_states_lie(strategy, share, offload):
    place = "optimizer" if offload == "none" else "host"
    averaged, plain = memory(strategy, offload=offload, ema=0.99), memory(strategy, offload=offload)
    assert getattr(averaged, place) - getattr(plain, place) == 4 * P / share


def test_a_model_without_blocks_is_gathered_whole():
    without_blocks = expected(config("fsdp"), Counts(parameters=P, tensor=10**6), 8, "cuda")
    assert without_blocks.gathered >= 8 * P >= memory("fsdp").gathered * 50


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_deepspeed_allocates_its_bucket_whole_on_a_gpu(strategy):
    """A model of 1,000 numbers needs 80 MB for the bucket, and in stages 1 and 2 twice that with overlap_comm."""
    small = Counts(parameters=1000, tensor=1000)
    twice = 1 if strategy == "zero3" else 2
    for more, buckets in (({}, 1), ({"overlap_comm": True}, twice), ({"contiguous_gradients": False}, 0)):
        settings = config(strategy, deepspeed={"zero_optimization": more})
        on_gpu, on_cpu = (expected(settings, small, 2, device).buffers for device in ("cuda", "cpu"))
        assert 80_000_000 * buckets <= on_gpu < 80_000_000 * buckets + 10_000 and on_cpu < 20_000


def test_data_on_the_device_is_memory_too():
    plain, more = (expected(config("ddp"), Counts(parameters=P, tensor=1000, data=data), 1, "cuda") for data in (0, 10**9))
    assert more.total == plain.total + 10**9


def test_offload_moves_memory_to_the_host():
    for strategy, offload in (("zero2", "optimizer"), ("zero3", "optimizer"), ("zero3", "parameters"), ("fsdp", "parameters")):
        offloaded, plain = memory(strategy, offload=offload), memory(strategy)
        assert offloaded.optimizer == 0 and offloaded.host >= plain.optimizer
        assert offloaded.parameters + offloaded.gathered + offloaded.buffers < plain.total
        assert memory(strategy, offload=offload, device="cpu").total > offloaded.total  # there, device and host share one memory


def test_half_precision_keeps_copies_but_fsdp_gathers_in_it():
    assert memory("ddp", precision="bf16").total == 18 * P
    assert memory("fsdp", precision="bf16").gathered < memory("fsdp").gathered


@pytest.mark.parametrize("model", [{}, {"width": 0.3}, {"batch_norm": False}, {"arch": "resnet18"}, {"arch": "resnet50"}],
                         ids=str)
def test_counts_on_the_meta_device_equal_those_of_real_models(model, tmp_path):
    """Counting needs no data: the folder does not contain CIFAR-10."""
    import torch

    from trainers.cifar10.model import make_model
    from trainers.cifar10.task import Cifar10
    from trainers.engine.world import World
    from trainers.probe import count, count_task

    data = Data(root=str(tmp_path))
    config = Cifar10Config(name="run", task="module:Task", train={"steps": 1}, model=Model(**model), data=data)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    assert count_task(Cifar10(config), world) == count({"model": make_model(Model(**model), 10, 32)})


@pytest.mark.parametrize("error", [UserError("no such architecture"), NameError("name 'nn' is not defined")])
def test_a_model_that_is_wrong_is_an_error_before_any_data_is_read(error):
    import torch

    from trainers.engine.task import Task
    from trainers.engine.world import World
    from trainers.probe import count_task

    class Wrong(Task):
        def data(self, world):
            pytest.fail("data was read")

        def model(self):
            raise error

    with pytest.raises(type(error)):
        count_task(Wrong(RunConfig(name="run", task="module:Task", train={"steps": 1})), World(0, 1, 0, 1, torch.device("cpu")))


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


def test_batches_of_tokens_are_measured_on_the_longest_samples():
    import torch

    from trainers.config.spec import resolve
    from trainers.engine.world import World
    from trainers.probe import measure

    spec = RunConfig(name="run", task="language:Language", path=SENTENCES, train={"steps": 1, "batch_tokens": 4096})
    task = resolve(spec.task, spec.path)(spec)
    _, activations = measure(task, spec, World(0, 1, 0, 1, torch.device("cpu")), 2)
    longest = int(task.text.lengths.max())
    assert list(activations) == [2 * longest, 4 * longest] and 1.9 < activations[4 * longest] / activations[2 * longest] < 2.1


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing():
    import torch

    from trainers.config.spec import resolve
    from trainers.engine.world import World
    from trainers.probe import measure

    world = World(0, 1, 0, 1, torch.device("cpu"))
    activations = {}
    for checkpointing in (False, True):
        spec = RunConfig(name="run", task="sentences:Counting", path=SENTENCES, model={"depth": 6},
                         train={"steps": 1, "batch_size": 24, "checkpoint_activations": checkpointing})
        counts, activations[checkpointing] = measure(resolve(spec.task, spec.path)(spec), spec, world, ranks=2)
        assert counts.blocks == 6 * counts.block < counts.parameters
    assert list(activations[False]) == [2, 4] and activations[False][4] > 1.8 * activations[False][2]
    assert activations[True][4] < activations[False][4] / 2


def test_activations_are_those_of_an_update_that_trains_one_of_two_models():
    """A generator that this update does not train keeps nothing for a backward."""
    import torch
    from torch import nn

    from trainers.engine.task import Loss, Task, Update
    from trainers.engine.world import World
    from trainers.probe import measure

    class Rows:
        def __len__(self):
            return 8

        def batch(self, share):
            return torch.ones(len(share.indices), 4)

    class Two(Task):
        def data(self, world):
            return Rows(), None

        def models(self):
            made = nn.Sequential(*[layer for _ in range(9) for layer in (nn.Linear(4, 4), nn.Tanh())])
            return {"generator": made, "critic": nn.Linear(4, 1)}

        def updates(self):
            def loss(models, batch):
                return Loss(models["critic"](models["generator"](batch)).square().sum(), len(batch))

            return [Update("critic", trains=self.config.model["trains"], loss=loss)]

    needed = {}
    for trains in ("generator", "critic"):
        config = RunConfig(name="run", task="module:Two", model={"trains": trains}, train={"steps": 1, "batch_size": 8})
        needed[trains] = measure(Two(config), config, World(0, 1, 0, 1, torch.device("cpu")), ranks=1)[1][4]
    assert needed["critic"] < needed["generator"] / 4
