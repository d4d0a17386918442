"""How much of a rank's memory a model needs under each strategy, in closed form. Imports no torch.

Parameters, gradients and optimizer states are fp32 under all strategies. Activations are not included: they are measured
(trainers/probe.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from trainers.config.counts import Counts
from trainers.config.deepspeed_json import STAGES, deepspeed_config

if TYPE_CHECKING:
    from trainers.config.schema import RunConfig

FULL, HALF = 4, 2  # bytes of a number


@dataclass(frozen=True)
class Memory:
    """The memory that a model needs on one rank, in bytes."""

    parameters: int          # with the fp32 copies that ZeRO updates
    gradients: int
    optimizer: int           # the optimizer's states, and averaged weights
    buffers: int             # the model's own buffers, and buffers that collect gradients for communication
    gathered: int = 0        # whole parameters and gradients, or half-precision copies, during computation
    data: int = 0            # data sets that stay on the device, where they were measured
    host: int = 0            # moved to the host's memory (`train.offload`)
    ready: int = 0           # the most before the first step, which may be more than in a step
    one: bool = False        # whether device and host share one memory (CPU ranks)

    @property
    def total(self) -> int:
        """The most bytes that the rank's device holds at once."""
        held = self.parameters + self.gradients + self.optimizer + self.buffers + self.gathered
        return self.data + max(held + self.host * self.one, self.ready)

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def expected(config: RunConfig, counts: Counts, ranks: int, device: str) -> Memory:
    """Return the memory of each of `ranks` ranks on `device` (cuda or cpu).

    The formulas follow the code of torch 2.14 and DeepSpeed 0.19, and were compared with measurements
    (tests/benchmarks/memory.py). They split small tensors as evenly as large ones.
    """
    strategy = config.train.strategy
    if strategy == "ddp":
        memory = _ddp(config, counts, ranks)
    elif strategy == "fsdp":
        memory = _fsdp(config, counts, ranks)
    else:
        memory = (_zero3 if STAGES[strategy] == 3 else _zero12)(config, counts, ranks, device)
    if device == "cpu":
        # On a CPU the model is built whole before it is sharded. ZeRO-1 and 2 then need a second copy until the parameters are
        # in their partitions. (With a GPU that has no room for this copy, the copy is made in host memory.)
        block, part = counts.block or counts.rest, _part(counts.parameters, ranks)
        second = {"ddp": 0, "fsdp": block, "zero3": part}.get(strategy, counts.parameters + part)
        # gloo's reduce-scatter works on a copy, and its all-gather writes into a copy. ZeRO-1 and 2 gather after they have freed
        # the gradients. The copy takes the place of the gradients, so only the bytes by which it is larger count.
        beyond_freed = max(0, counts.parameters - (memory.gradients + memory.buffers) // FULL)
        copy = {"ddp": 0, "fsdp": block, "zero3": memory.buffers // FULL}.get(strategy, beyond_freed)
        memory = replace(memory, one=True, ready=FULL * (counts.parameters + second), buffers=memory.buffers + FULL * copy)
    return replace(memory, buffers=memory.buffers + FULL * counts.buffers, data=counts.data)


def states(config: RunConfig) -> int:
    """Return how many numbers lie beside each parameter: the optimizer's states, and the averaged weight (`train.ema`)."""
    optim = config.optim
    return (int(optim.momentum > 0) if optim.name == "sgd" else 2) + (config.train.ema is not None)


def _ddp(config: RunConfig, counts: Counts, ranks: int) -> Memory:
    whole = FULL * counts.parameters
    # Gradients lie in DDP's buckets. With accumulation, the gradients of earlier micro-batches lie outside the buckets.
    outside = whole if ranks > 1 and _accumulation(config, ranks) > 1 else 0
    return Memory(parameters=whole, gradients=whole + outside, optimizer=states(config) * whole, buffers=0,
                  gathered=_casts(config, counts))


def _fsdp(config: RunConfig, counts: Counts, ranks: int) -> Memory:
    """Backward holds a block's whole parameters, the next block's parameters while they are gathered, the block's gradients,
    and the previous block's gradients while they cross ranks. Parameters outside of blocks are held all the time, and their
    gradients twice at the end."""
    shard = FULL * _part(counts.parameters, ranks)
    held = states(config) * shard
    half = HALF if config.train.precision in ("bf16", "fp16") else FULL
    block = counts.block or counts.rest
    in_blocks = (3 * half + FULL) * counts.block
    outside = half * counts.rest + max(0 if counts.block else half * counts.rest, (half + FULL) * counts.rest)
    gathered = max(in_blocks + 2 * half * counts.rest if counts.block else 0, outside)
    if config.train.offload == "parameters":  # a block's shard is on the device while the block is gathered
        return Memory(0, 0, 0, 0, gathered + FULL * _part(block, ranks), host=2 * shard + held)
    return Memory(parameters=shard, gradients=shard, optimizer=held, buffers=0, gathered=gathered,
                  ready=shard + FULL * block)


def _zero12(config: RunConfig, counts: Counts, ranks: int, device: str) -> Memory:
    """A rank holds the whole model, the fp32 partition that it updates, a bucket that collects gradients, and a bucket whose
    gradients cross ranks."""
    whole, part = FULL * counts.parameters, FULL * _part(counts.parameters, ranks)
    bucket, collecting = FULL * min(_bucket(config, ranks), counts.parameters), _collecting(config, counts, ranks, device)
    optimizer = states(config) * part
    accumulating = _accumulation(config, ranks) > 1
    if config.train.strategy == "zero1":  # all gradients exist when the first bucket is sent; each sent bucket frees room
        gradients, buffers = whole, max(collecting, part)
    else:
        gradients, buffers = part * (1 + accumulating), max(collecting + bucket, part)
    casts = _casts(config, counts)
    if config.train.offload != "none":
        # The partition, its gradient, a buffer to copy from, and accumulated gradients.
        host = 3 * part + optimizer + part * accumulating + FULL * counts.tensor
        if config.train.strategy == "zero2":
            gradients = 0
        return Memory(whole, gradients, 0, collecting + bucket + FULL * counts.tensor, casts, host=host)
    return Memory(parameters=whole + part, gradients=gradients, optimizer=optimizer, buffers=buffers, gathered=casts)


def _zero3(config: RunConfig, counts: Counts, ranks: int, device: str) -> Memory:
    """A rank holds its partition of the parameters, and a second copy of it, which DeepSpeed updates.

    The second copy exists in every precision, even in fp32. Backward also holds gathered parameters, a second copy of
    parameters that are just arriving, a bucket of gradients, and a second copy of this bucket while it is sent. The optimizer
    step holds a second copy of the gradients instead.
    """
    part = FULL * _part(counts.parameters, ranks)
    optimizer = states(config) * part
    bucket, collecting = FULL * min(_bucket(config, ranks), counts.parameters), _collecting(config, counts, ranks, device)
    ahead = min(_setting(config, ranks, "stage3_prefetch_bucket_size"), counts.parameters)
    # DeepSpeed gathers ahead until max_live_parameters are live. It keeps a parameter from forward to backward if fewer than
    # max_reuse_distance others are used in between.
    near = _setting(config, ranks, "stage3_max_live_parameters") + _setting(config, ranks, "stage3_max_reuse_distance") // 2
    live = FULL * (min(counts.parameters, near + counts.tensor) + ahead)
    casts, largest = _casts(config, counts), FULL * counts.tensor
    if config.train.offload == "none":
        return Memory(parameters=2 * part, gradients=part, optimizer=optimizer, buffers=collecting,
                      gathered=max(bucket + live, part) + casts, ready=2 * part + largest)
    host = 3 * part + optimizer  # fp32 parameters, accumulated gradients, and the gradients of the step
    kept = 0 if config.train.offload == "parameters" else part
    return Memory(parameters=kept, gradients=0, optimizer=0, buffers=collecting, gathered=bucket + live + casts,
                  host=host + part - kept, ready=2 * kept + largest)


def _casts(config: RunConfig, counts: Counts) -> int:
    """Return the bytes of the half-precision copies of the weights, which autocast keeps from forward to backward."""
    return HALF * counts.parameters if config.train.precision in ("bf16", "fp16") else 0


def _part(numbers: int, ranks: int) -> int:
    return -(-numbers // ranks)


def _accumulation(config: RunConfig, ranks: int) -> int:
    return config.batching(ranks).accumulation


def _collecting(config: RunConfig, counts: Counts, ranks: int, device: str) -> int:
    """Return the bytes of the buckets in which DeepSpeed collects gradients.

    DeepSpeed allocates a bucket whole, however small the model is. On a CPU only the part that is used takes memory.
    """
    zero = deepspeed_config(config, ranks, None)["zero_optimization"]
    if not zero.get("contiguous_gradients", True):
        return 0
    size = _bucket(config, ranks) if device == "cuda" else min(_bucket(config, ranks), counts.parameters)
    return FULL * size * (1 + (zero["overlap_comm"] and zero["stage"] < 3))


def _bucket(config: RunConfig, ranks: int) -> int:
    return _setting(config, ranks, "reduce_bucket_size")


def _setting(config: RunConfig, ranks: int, name: str) -> int:
    """Return a number from `zero_optimization`; DeepSpeed's default if the number is not set."""
    defaults: Mapping[str, Any] = {"stage3_max_reuse_distance": 1e9, "stage3_max_live_parameters": 1e9, "reduce_bucket_size": 5e8,
                                   "stage3_prefetch_bucket_size": 5e7}
    return int(deepspeed_config(config, ranks, None)["zero_optimization"].get(name, defaults[name]))
