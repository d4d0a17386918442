"""Counts a task's models, and measures the activations of a step, in a process of its own. For `launch plan`.

    python -P -m trainers.probe RUN_YAML RANKS [--activations]

It starts no other rank. It prints one object of JSON: `counts` (trainers/config/counts.py), and `activations`, null unless
they are asked for: bytes by the size of a micro-batch; on a GPU the most that was allocated, on a CPU
(ACCELERATE_USE_CPU=true) what autograd keeps for backward. Of samples of uneven lengths they are those of the first batch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from trainers.config.counts import Counts
from trainers.config.schema import RunConfig
from trainers.config.spec import read_spec, resolve
from trainers.contract import exit_codes
from trainers.contract.errors import UserError
from trainers.engine.batches.sampling import Shuffled
from trainers.engine.parallel.blocks import blocks, checkpoint_activations
from trainers.engine.precision import autocast, set_precision
from trainers.engine.task import Share, Task, Update
from trainers.engine.world import World


def count(models: Mapping[str, nn.Module]) -> Counts:
    parameters = [parameter.numel() for model in models.values() for parameter in model.parameters()]
    in_blocks = [sum(parameter.numel() for parameter in block.parameters())
                 for model in models.values() for block in blocks(model)]
    return Counts(parameters=sum(parameters), tensor=max(parameters), block=max(in_blocks, default=0), blocks=sum(in_blocks),
                  buffers=sum(buffer.numel() for model in models.values() for buffer in model.buffers()))


def count_task(task: Task, world: World) -> Counts:
    """How large a task's models are.

    The models are made on torch's meta device, which takes no memory and no data. A model that cannot be made so (it loads
    weights, or needs to have seen the data) is made as a rank makes it.
    """
    try:
        with torch.device("meta"):
            return count(task.models())
    except Exception:
        task.data(world)
        return count(task.models())


def measure(task: Task, config: RunConfig, world: World, ranks: int) -> tuple[Counts, dict[int, int]]:
    """(counts, activations of the most demanding update by micro-batch size)"""
    set_precision(config.train.precision, world.device)
    dataset, _ = task.data(world)
    models = {name: model.to(world.device) for name, model in task.models().items()}
    counts = count(models)
    largest = min(config.train.batch_size // ranks, len(dataset))
    sizes = sorted({max(1, min(4, largest) // 2), min(4, largest)})
    in_block = 0
    if config.train.checkpoint_activations:
        if world.device.type == "cpu":  # in backward a block's are there again
            in_block = 1
        else:
            for model in models.values():
                checkpoint_activations(model)
    updates = task.updates()
    found = {}
    for size in sizes:
        found[size] = max(_update(update, models, _batch(dataset, config, update, ranks, size), config, world, in_block)
                          for update in updates)
    return counts, found


def _batch(dataset, config: RunConfig, update: Update, ranks: int, size: int):
    share, = Shuffled(len(dataset), config.train.batch_size, config.train.seed, update.name).shares(0, 0, ranks, 1)
    return dataset.batch(Share(share.indices[:size], share.slots[:size], share.size, share.seed))


def _update(update: Update, models: Mapping[str, nn.Module], batch, config: RunConfig, world: World, in_block: int) -> int:
    """Bytes of one micro-batch."""
    def loss() -> Tensor:
        with autocast(config.train.precision, world.device):
            return update.loss(models, batch).sum

    try:
        if world.device.type == "cuda":
            return _allocated(loss)
        whole, block = _saved(loss, models)
        if not in_block:
            return whole
        plain = [(module, module.forward) for model in models.values() for module in blocks(model)]
        for model in models.values():
            checkpoint_activations(model)
        kept, _ = _saved(loss, models)
        for module, forward in plain:
            module.forward = forward
        return kept + block
    finally:
        for model in models.values():
            model.zero_grad(set_to_none=True)


def _allocated(loss: Callable[[], Tensor]) -> int:
    """The rise of a GPU's allocated memory over parameters and gradients, which a first backward has made."""
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss().backward()
    return torch.cuda.max_memory_allocated() - before


def _saved(loss: Callable[[], Tensor], models: Mapping[str, nn.Module]) -> tuple[int, int]:
    """(bytes that autograd keeps for backward, those of them of the block that keeps most)"""
    own = {tensor.untyped_storage().data_ptr()
           for model in models.values() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    largest, entered = 0, []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def enter(*_) -> None:
        entered.append(sum(kept.values()))

    def leave(*_) -> None:
        nonlocal largest
        largest = max(largest, sum(kept.values()) - entered.pop())

    hooks = [hook for model in models.values() for block in blocks(model)
             for hook in (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = loss()  # its graph keeps the storages, so that no two have one address
        del result
    finally:
        for hook in hooks:
            hook.remove()
    return sum(kept.values()), largest


def main(argv: list[str]) -> int:
    if len(argv) not in (2, 3) or argv[2:] not in ([], ["--activations"]):
        print("usage: python -m trainers.probe RUN_YAML RANKS [--activations]", file=sys.stderr)
        return exit_codes.USER_ERROR
    try:
        config = read_spec(Path(argv[0]))
        task = resolve(config.task, config.path)(config)
        world = World.from_env(os.environ)
        if argv[2:]:
            counts, activations = measure(task, config, world, int(argv[1]))
        else:
            counts, activations = count_task(task, world), None
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps({"counts": asdict(counts), "activations": activations}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
