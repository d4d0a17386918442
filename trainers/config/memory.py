"""What a model takes of a rank's memory under each strategy, in closed form. Imports no torch.

Parameters, gradients and optimizer states are fp32 under all strategies. Activations are not in it: they are measured
(trainers/probe.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from trainers.config.counts import Counts
from trainers.config.deepspeed_json import STAGES, deepspeed_config

if TYPE_CHECKING:
    from trainers.config.schema import Optim, RunConfig

FULL, HALF = 4, 2  # bytes of a number


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. While it gets ready it may need more than in its steps (`ready`)."""

    parameters: int          # with the fp32 copies that ZeRO updates
    gradients: int
    optimizer: int           # states
    buffers: int             # the model's own, and what gradients are collected in to cross ranks
    gathered: int = 0        # whole parameters and gradients, or half-precision copies, while they are computed with
    host: int = 0            # in the host's memory instead (`train.offload`)
    ready: int = 0
    one: bool = False        # whether device and host have one memory (CPU ranks)

    @property
    def total(self) -> int:
        """The most that the rank's device holds at once."""
        held = self.parameters + self.gradients + self.optimizer + self.buffers + self.gathered
        return max(held + self.host * self.one, self.ready)

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def expected(config: RunConfig, counts: Counts, ranks: int, device: str) -> Memory:
    """The memory of one of `ranks` on `device` (cuda, cpu), from the code of torch 2.14 and DeepSpeed 0.19 and measured beside it
    (tests/benchmarks/memory.py). Small tensors are split as evenly as large ones here."""
    strategy = config.train.strategy
    if strategy == "ddp":
        found = _ddp(config, counts, ranks)
    elif strategy == "fsdp":
        found = _fsdp(config, counts, ranks)
    else:
        found = _zero3(config, counts, ranks) if STAGES[strategy] == 3 else _zero12(config, counts, ranks)
    if device == "cpu":
        # There a model is made whole before it is sharded, and once more before ZeRO-1 and 2 have laid it out (which a
        # GPU without the room leaves to the host); and gloo reduces and scatters a copy, and gathers into one.
        block, part = counts.block or counts.rest, _part(counts.parameters, ranks)
        more = {"ddp": 0, "fsdp": block, "zero3": part}.get(strategy, counts.parameters + part)
        # The copy into which ZeRO-1 and 2 gather comes when the gradients have gone.
        gone = max(0, counts.parameters - (found.gradients + found.buffers) // FULL)
        copy = {"ddp": 0, "fsdp": block, "zero3": found.buffers // FULL}.get(strategy, gone)
        found = replace(found, one=True, ready=FULL * (counts.parameters + more), buffers=found.buffers + FULL * copy)
    return replace(found, buffers=found.buffers + FULL * counts.buffers)


def states(optim: Optim) -> int:
    """Numbers that the optimizer keeps of each parameter."""
    if optim.name == "sgd":
        return int(optim.momentum > 0)
    return 2


def _ddp(config: RunConfig, counts: Counts, ranks: int) -> Memory:
    whole = FULL * counts.parameters
    # Gradients lie in the buckets. But those of micro-batches that are not to cross ranks yet do not.
    unsent = whole if ranks > 1 and _accumulation(config, ranks) > 1 else 0
    return Memory(parameters=whole, gradients=whole + unsent, optimizer=states(config.optim) * whole, buffers=0,
                  gathered=_casts(config, counts))


def _fsdp(config: RunConfig, counts: Counts, ranks: int) -> Memory:
    """In backward: a block's whole parameters, the next one's that are being gathered, its gradients, and those of the
    last one, which cross ranks; outside of blocks, parameters all along, and their gradients twice at the end."""
    shard = FULL * _part(counts.parameters, ranks)
    held = states(config.optim) * shard
    half = HALF if config.train.precision in ("bf16", "fp16") else FULL
    block = counts.block or counts.rest
    in_blocks = (3 * half + FULL) * counts.block
    outside = half * counts.rest + max(0 if counts.block else half * counts.rest, (half + FULL) * counts.rest)
    gathered = max(in_blocks + 2 * half * counts.rest if counts.block else 0, outside)
    if config.train.offload == "parameters":  # a block's part is on the device while it is gathered
        return Memory(0, 0, 0, 0, gathered + FULL * _part(block, ranks), host=2 * shard + held)
    return Memory(parameters=shard, gradients=shard, optimizer=held, buffers=0, gathered=gathered,
                  ready=shard + FULL * block)


def _zero12(config: RunConfig, counts: Counts, ranks: int) -> Memory:
    """The whole model, an fp32 partition of it that is updated, and a bucket in which gradients are collected and one
    in which they cross ranks."""
    whole, part = FULL * counts.parameters, FULL * _part(counts.parameters, ranks)
    bucket = FULL * min(_bucket(config, ranks), counts.parameters)
    optimizer = states(config.optim) * part
    accumulating = _accumulation(config, ranks) > 1
    if config.train.strategy == "zero1":  # all are there as the first bucket leaves; each that does makes room
        gradients, buffers = whole, max(bucket, part)
    else:
        gradients, buffers = part * (1 + accumulating), max(2 * bucket, part)
    casts = _casts(config, counts)
    if config.train.offload != "none":
        # The partition, its gradient and a buffer to copy from, and what was accumulated.
        host = 3 * part + optimizer + part * accumulating + FULL * counts.tensor
        if config.train.strategy == "zero2":
            gradients = 0
        return Memory(whole, gradients, 0, 2 * bucket + FULL * counts.tensor, casts, host=host)
    return Memory(parameters=whole + part, gradients=gradients, optimizer=optimizer, buffers=buffers, gathered=casts)


def _zero3(config: RunConfig, counts: Counts, ranks: int) -> Memory:
    """The partition, of which DeepSpeed keeps a copy to update even in fp32. In backward: what is gathered, once more while
    it arrives, and a bucket of gradients, once more while it leaves; in the step a second copy of the gradients instead."""
    part = FULL * _part(counts.parameters, ranks)
    optimizer = states(config.optim) * part
    bucket = FULL * min(_bucket(config, ranks), counts.parameters)
    ahead = min(_setting(config, ranks, "stage3_prefetch_bucket_size"), counts.parameters)
    # Gathered ahead until so many are live; kept from forward to backward if used again before so many others were.
    near = _setting(config, ranks, "stage3_max_live_parameters") + _setting(config, ranks, "stage3_max_reuse_distance") // 2
    live = FULL * (min(counts.parameters, near + counts.tensor) + ahead)
    casts, largest = _casts(config, counts), FULL * counts.tensor
    if config.train.offload == "none":
        return Memory(parameters=2 * part, gradients=part, optimizer=optimizer, buffers=bucket,
                      gathered=max(bucket + live, part) + casts, ready=2 * part + largest)
    host = 3 * part + optimizer  # fp32 parameters, gradients as they accumulate, and those of the step
    kept = 0 if config.train.offload == "parameters" else part
    return Memory(parameters=kept, gradients=0, optimizer=0, buffers=bucket, gathered=bucket + live + casts,
                  host=host + part - kept, ready=2 * kept + largest)


def _casts(config: RunConfig, counts: Counts) -> int:
    """Autocast keeps half-precision copies of the weights from forward to backward."""
    return HALF * counts.parameters if config.train.precision in ("bf16", "fp16") else 0


def _part(numbers: int, ranks: int) -> int:
    return -(-numbers // ranks)


def _accumulation(config: RunConfig, ranks: int) -> int:
    return config.train.split(ranks)[1]


def _bucket(config: RunConfig, ranks: int) -> int:
    return _setting(config, ranks, "reduce_bucket_size")


def _setting(config: RunConfig, ranks: int, name: str) -> int:
    """A number of `zero_optimization`, with DeepSpeed's own default."""
    defaults: Mapping[str, Any] = {"stage3_max_reuse_distance": 1e9, "stage3_max_live_parameters": 1e9, "reduce_bucket_size": 5e8,
                                   "stage3_prefetch_bucket_size": 5e7}
    return int(deepspeed_config(config, ranks, None)["zero_optimization"].get(name, defaults[name]))
