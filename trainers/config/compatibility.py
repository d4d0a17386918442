"""Which settings go together. Imports no torch: what does not is refused when a run is planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from trainers.config import deepspeed_json
from trainers.contract.errors import UserError
from trainers.contract.text import either

if TYPE_CHECKING:
    from trainers.config.schema import RunConfig

ZERO = tuple(deepspeed_json.STAGES)
SHARDED = (*ZERO, "fsdp")
OFFLOADS = {"ddp": ("none",), "zero1": ("none", "optimizer"), "zero2": ("none", "optimizer"),
            "zero3": ("none", "optimizer", "parameters"), "fsdp": ("none", "parameters")}

# (whether it is so, why it cannot be, what to do), of a config and the device of its ranks
Refusal = tuple[Callable[["RunConfig", str], bool], str, str]
REFUSALS: list[Refusal] = [
    (lambda c, device: c.train.precision == "tf32" and device == "cpu",
     "`train.precision` is `tf32`, which only GPUs have; these ranks run on CPU", "use train.precision=fp32 or bf16"),
    (lambda c, device: c.train.compile and c.train.strategy in ZERO,
     "`train.compile` does not go with `{strategy}`: DeepSpeed moves parameters in hooks that a compiled model does not run",
     "use train.strategy=fsdp or ddp, or train.compile=false"),
    (lambda c, device: c.train.offload not in OFFLOADS[c.train.strategy],
     "`train.offload` is `{offload}`, which `{strategy}` cannot do", "use {offloads}"),
    (lambda c, device: c.checkpoint.layout == "full" and c.train.strategy in SHARDED,
     "`checkpoint.layout` is `full`, and under `{strategy}` no rank holds everything",
     "use checkpoint.layout=sharded; `launch export` makes one file of it"),
    (lambda c, device: bool(c.train.deepspeed) and c.train.strategy not in ZERO,
     "`train.deepspeed` is for zero1 to zero3; `train.strategy` is `{strategy}`", "leave it out, or use train.strategy=zero2"),
]


def unsupported(config: RunConfig, device: str) -> Iterator[UserError]:
    """What of a run's settings cannot be, on ranks of `device`: cpu or cuda."""
    train = config.train
    words = {"strategy": train.strategy, "offload": train.offload,
             "offloads": either(f"train.offload={word}" for word in OFFLOADS[train.strategy])}
    for refused, reason, mend in REFUSALS:
        if refused(config, device):
            yield UserError(reason.format(**words), mend.format(**words))
    try:
        deepspeed_json.check(train.deepspeed)
    except UserError as error:
        yield error


def check(config: RunConfig, device: str) -> None:
    """Raises: UserError: the first thing that cannot be."""
    for error in unsupported(config, device):
        raise error
