"""Count a task's models and measure the activations of a step, in a separate process. For `launch plan`.

    python -P -m trainers.probe RUN_YAML RANKS RESULT [--activations]

The process starts no other rank. It writes one JSON object into the file RESULT:

    counts         the sizes of the models (trainers/config/counts.py)
    activations    bytes by micro-batch size; null without --activations
    error          instead of both: an error of the user's, with `message` and `hint`

On a GPU, `activations` is the largest number of bytes that was allocated at once. On a CPU (ACCELERATE_USE_CPU=true), it is
the number of bytes that autograd keeps for backward. With `train.batch_tokens` the longest samples are measured, and micro-batch
sizes are tokens. Otherwise the first batch is measured, also where samples have uneven lengths.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainers.config.counts import Counts
from trainers.config.schema import RunConfig
from trainers.config.spec import read_spec, resolve
from trainers.contract import exit_codes
from trainers.contract.errors import UserError
from trainers.contract.files import replace_json
from trainers.engine.batches.data_sets import data_of
from trainers.engine.batches.sampler import make_sampler
from trainers.engine.batches.token_batches import TokenBatches
from trainers.engine.parallel.blocks import blocks, checkpoint_activations
from trainers.engine.parallel.gradients import untrained, without_gradients
from trainers.engine.precision import autocast, set_precision
from trainers.engine.task import Dataset, Share, Task, Update
from trainers.engine.world import World


def count(models: Mapping[str, nn.Module]) -> Counts:
    """Count the numbers in the parameters and buffers of models."""
    parameters = [parameter.numel() for model in models.values() for parameter in model.parameters()]
    in_blocks = [sum(parameter.numel() for parameter in block.parameters())
                 for model in models.values() for block in blocks(model)]
    return Counts(parameters=sum(parameters), tensor=max(parameters), block=max(in_blocks, default=0), blocks=sum(in_blocks),
                  buffers=sum(buffer.numel() for model in models.values() for buffer in model.buffers()))


def count_task(task: Task, world: World) -> Counts:
    """Count the numbers in the parameters and buffers of a task's models.

    The models are built on torch's meta device, which needs neither memory nor data. A model that cannot be built there (it
    loads weights, or it needs the data first) is built as a rank builds it.
    """
    try:
        with torch.device("meta"):
            return count(task.models())
    # An attribute that `data` sets is missing or None, or an operation needs real tensors. Any other error is the model's own.
    except (AttributeError, KeyError, TypeError, RuntimeError):
        task.data(world)
        return count(task.models())


def measure(task: Task, config: RunConfig, world: World, ranks: int) -> tuple[Counts, dict[int, int]]:
    """Measure the activations of one micro-batch, for one or two micro-batch sizes.

    Returns:
        The sizes of the models, and the bytes by micro-batch size. Of several updates, the one that needs most counts.
    """
    set_precision(config.train.precision, world.device)
    sets = data_of(task, config.train.seed, world)
    dataset = sets[0]
    models = {name: model.to(world.device) for name, model in task.models().items()}
    counts = replace(count(models), data=_bytes_of(sets, world.device))
    add_block = False
    if config.train.checkpoint_activations:
        if world.device.type == "cpu":
            add_block = True  # hooks see only what forward keeps; in backward, one block's activations exist again
        else:
            for model in models.values():
                checkpoint_activations(model)
    updates = task.updates()
    activations: dict[int, int] = {}
    for update in updates:
        for size, share in _micro_batches(dataset, config, update, ranks).items():
            with without_gradients(untrained(models, update.trains)):
                needed = _update(update, models, dataset.batch(share), config, world, add_block)
            activations[size] = max(needed, activations.get(size, 0))
    return counts, activations


def _bytes_of(sets: Iterable[object], device: torch.device) -> int:
    """Return the bytes of the tensors on `device` that are attributes of data sets. Memory that tensors share counts once."""
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for dataset in sets
                for value in getattr(dataset, "__dict__", {}).values() if isinstance(value, Tensor) and value.device == device}
    return sum(storages.values())


def _micro_batches(dataset: Dataset, config: RunConfig, update: Update, ranks: int) -> dict[int, Share]:
    """Return up to two micro-batches of up to 4 samples, by their sizes in samples or tokens.

    With `train.batch_tokens` these are the longest samples, which need most for each token. Otherwise the first ones of rank 0's
    part of the first batch are taken.
    """
    split = replace(config.batching(ranks), most=None)
    sampler = make_sampler(dataset, split, config.train.seed, update.name)
    if isinstance(sampler, TokenBatches):
        return {tokens: share for share, tokens in map(sampler.longest, (2, 4))}
    share = sampler.shares(0, 0, ranks)[0]
    most = min(4, len(share.indices), len(dataset))
    return {size: Share(share.indices[:size], share.slots[:size], share.size, share.seed, share.epochs[:size])
            for size in sorted({max(1, most // 2), most})}


def _update(update: Update, models: Mapping[str, nn.Module], batch: Any, config: RunConfig, world: World, add_block: bool) -> int:
    """Return the bytes of activations of one micro-batch.

    `add_block`: checkpoint the activations, and add the bytes of the block that keeps most (on a CPU).
    """
    def loss() -> Tensor:
        with autocast(config.train.precision, world.device):
            return update.loss(models, batch).sum

    try:
        if world.device.type == "cuda":
            return _allocated(loss)
        total, largest_block = _saved(loss, models)
        if not add_block:
            return total
        forwards = [(module, module.forward) for model in models.values() for module in blocks(model)]
        for model in models.values():
            checkpoint_activations(model)
        kept, _ = _saved(loss, models)
        for module, forward in forwards:
            module.forward = forward
        return kept + largest_block
    finally:
        for model in models.values():
            model.zero_grad(set_to_none=True)


def _allocated(loss: Callable[[], Tensor]) -> int:
    """Return the most bytes that forward and backward allocate on the GPU on top of parameters and gradients.

    The first of two rounds creates the gradients. The second round is measured.
    """
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss().backward()
    return torch.cuda.max_memory_allocated() - before


def _saved(loss: Callable[[], Tensor], models: Mapping[str, nn.Module]) -> tuple[int, int]:
    """Return (the bytes that autograd keeps for backward, the bytes that it keeps for the block that needs most)."""
    of_models = {tensor.untyped_storage().data_ptr()
                 for model in models.values() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    largest = 0
    entered: list[int] = []  # bytes kept when each of the current blocks was entered

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_models:
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
            result = loss()  # the graph in `result` keeps the storages alive: no two of them can have the same address
        del result
    finally:
        for hook in hooks:
            hook.remove()
    return sum(kept.values()), largest


def main(argv: list[str]) -> int:
    if len(argv) not in (3, 4) or argv[3:] not in ([], ["--activations"]):
        print("usage: python -m trainers.probe RUN_YAML RANKS RESULT [--activations]", file=sys.stderr)
        return exit_codes.USER_ERROR
    result = Path(argv[2])  # a file: a task may print anything, also when the process exits
    try:
        config = read_spec(Path(argv[0]))
        assert isinstance(config, RunConfig), "`launch plan` probes only training tasks"
        task = resolve(config.task, config.path)(config)
        world = World.from_env(os.environ)
        activations: dict[int, int] | None = None
        if argv[3:]:
            counts, activations = measure(task, config, world, int(argv[1]))
        else:
            counts = count_task(task, world)
    except UserError as error:
        replace_json(result, {"error": {"message": error.message, "hint": error.hint}})
        return error.exit_code
    replace_json(result, {"counts": asdict(counts), "activations": activations})
    return exit_codes.FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
